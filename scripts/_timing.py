"""How long a call takes, and how much memory a compiled program asks for."""

import concurrent.futures
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

# Seconds of one work after which a GPU at its power limit has found its clock (H100). Queues of
# 20 ms still run at their predecessor's: bf16 after fp8 looks up to a tenth slower than alone.
SETTLED = 0.25


AT_ONCE = os.cpu_count() or 1  # compilations


def compiled(
    calls: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]],
) -> list[Any]:
    """Functions, jitted or not, compiled for their arguments, several at once."""

    def one(call: tuple[Callable[..., Any], tuple[Any, ...]]) -> Any:
        function, arguments = call
        jitted: Any = function if hasattr(function, "lower") else jax.jit(function)
        return jitted.lower(*arguments).compile()

    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(one, calls))


def median_seconds(function: Callable, runs: int, enough: float = math.inf) -> float:
    """Median wall time of a call, after one call to warm up.

    Args:
      function: to call.
      runs: how often at most; once at least.
      enough: seconds after which no call begins any more.
    """
    jax.block_until_ready(function())
    seconds: list[float] = []
    while not seconds or (len(seconds) < runs and sum(seconds) < enough):
        start = time.perf_counter()
        jax.block_until_ready(function())
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def peak_bytes(compiled: Any) -> int:
    """XLA's own account of a compiled program: arguments, outputs elsewhere and temporaries."""
    memory = compiled.memory_analysis()
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + outputs + memory.temp_size_in_bytes


def back_to_back_seconds(function: Callable, runs: int = 5, at_least: float = 0.02) -> float:
    """Median time of a call among many that are queued without waiting: what the device needs.

    Args:
      function: to call.
      runs: queues.
      at_least: seconds that a queue should take.
    """
    return side_by_side_seconds({"": function}, runs, at_least)[""]


def side_by_side_seconds(
    functions: dict[str, Callable[..., Any]],
    runs: int = 5,
    at_least: float = 0.02,
    behind: Callable[[], Any] | None = None,
    fresh: Callable[[], Any] | None = None,
) -> dict[str, float]:
    """`back_to_back_seconds` of each, a queue of every one in turn.

    A GPU lowers its clock as it grows hot or exceeds its power: what is measured first, or alone,
    would look faster than it is beside the others.

    Args:
      functions: to call, by name.
      runs: queues.
      at_least: seconds that a queue should take.
      behind: long work that goes first and is not counted. While it runs the queue fills, so that
        kernels which are shorter than their dispatch do not wait for it.
      fresh: what every call gets for itself, made before the clock starts.
    """

    def arguments(calls: int) -> list[tuple[Any, ...]]:
        return jax.block_until_ready([(fresh(),) if fresh else () for _ in range(calls)])

    calls = {}
    for name, function in functions.items():

        def once(function: Callable[..., Any] = function) -> Any:
            return function(*arguments(1)[0])

        jax.block_until_ready(once())
        calls[name] = max(1, math.ceil(at_least / median_seconds(once, 3)))

    def queue(function: Callable[..., Any], calls: int) -> float:
        own = arguments(calls)
        start = time.perf_counter()
        last = behind() if behind else None
        for each in own:
            last = function(*each)
        jax.block_until_ready(last)
        return time.perf_counter() - start

    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(runs + 1):
        for name, function in functions.items():
            before = queue(function, 0) if behind else 0.0
            each = (queue(function, calls[name]) - before) / calls[name]
            if turn:  # the first only warms up
                seconds[name].append(each)
    return {name: statistics.median(times) for name, times in seconds.items()}


def long_work(seconds: float) -> Callable[[], Any]:
    """Copies that take about as long."""
    x = jnp.ones((1 << 28,), jnp.bfloat16)
    copy = jax.jit(lambda x: x + 1)
    count = math.ceil(seconds / back_to_back_seconds(lambda: copy(x)))

    def work() -> jax.Array:
        y = x
        for _ in range(count):
            y = copy(y)
        return y

    return work


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a large copy."""
    x = jnp.ones((1 << 28,), jnp.bfloat16)
    copy = jax.jit(lambda x: x + 1)
    seconds = back_to_back_seconds(lambda: copy(x))
    return 2 * x.nbytes / seconds
