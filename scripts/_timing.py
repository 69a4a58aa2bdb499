"""How long a call takes, and how much memory a compiled program asks for."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def median_seconds(function: Callable, runs: int) -> float:
    """Median wall time of a call, after one call to warm up."""
    jax.block_until_ready(function())
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        jax.block_until_ready(function())
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def peak_bytes(compiled: Any) -> int:
    """XLA's own account of a compiled program: arguments, outputs and temporaries."""
    memory = compiled.memory_analysis()
    return memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes


def back_to_back_seconds(function: Callable, runs: int = 5, at_least: float = 0.02) -> float:
    """Median time of a call among many that are queued without waiting: what the device needs.

    Args:
      function: to call.
      runs: queues.
      at_least: seconds that a queue should take.
    """
    jax.block_until_ready(function())
    once = median_seconds(function, 3)
    calls = max(3, int(at_least / once))

    def queue() -> Any:
        for _ in range(calls - 1):
            function()
        return function()

    return median_seconds(queue, runs) / calls


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a large copy."""
    x = jnp.ones((1 << 28,), jnp.bfloat16)
    copy = jax.jit(lambda x: x + 1)
    seconds = back_to_back_seconds(lambda: copy(x))
    return 2 * x.nbytes / seconds
