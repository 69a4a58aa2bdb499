"""Operands of the workloads' products, in bf16 and quantised, for what measures them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import sdq
from pallas_kernels.mosaic_gpu.operands import TiledWeight, tile_weight
from pallas_kernels.rows import Fp8Rows, fp8_rows
from pallas_kernels.workloads import Linear
from scripts._timing import SETTLED, long_work, side_by_side_seconds

FORMAT = "sdq32:16"
SHORT = 1024  # rows
SHORT_PRODUCTS, SHORT_WEIGHTS = 64, 8
SHORT_QUEUE = 0.006  # seconds; some hundred kernels, as many as may wait for a GPU


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Operands:
    """Rows of every product of a call, and as many weights as it has.

    Attributes:
      x: bf16 `[M, K]`.
      w: bf16 `[N, K]`.
      rows: x, quantised.
      weights: w, quantised.
      tiled: the same in the order of the Hopper kernels.
    """

    x: list[jax.Array]
    w: list[jax.Array]
    rows: list[Fp8Rows]
    weights: list[sdq.QTensor]
    tiled: list[TiledWeight]


def operands(linear: Linear) -> Operands:
    """Random numbers."""
    quantize = jax.jit(functools.partial(sdq.quantize, fmt=FORMAT, select="two_stage"))
    found = Operands(x=[], w=[], rows=[], weights=[], tiled=[])
    for key in jax.random.split(jax.random.key(0), products(linear)):
        x = jax.random.normal(key, (linear.m, linear.k), jnp.bfloat16)
        rows = jax.jit(fp8_rows)(quantize(x))
        found.x.append(x)
        # Called interleaved because any order of channels will do here.
        found.rows.append(dataclasses.replace(rows, interleaved=True))
    for key in jax.random.split(jax.random.key(1), weights(linear)):
        w = jax.random.normal(key, (linear.n, linear.k), jnp.bfloat16)
        weight = quantize(w)
        found.w.append(w)
        found.weights.append(weight)
        found.tiled.append(tile_weight(weight))
    return found


def products(linear: Linear) -> int:
    """Of a call: short ones many, so that little else is dispatched."""
    return SHORT_PRODUCTS if linear.m <= SHORT else 1


def weights(linear: Linear) -> int:
    """Of a call; of short ones more than a cache holds."""
    return SHORT_WEIGHTS if linear.m <= SHORT else 1


def seconds_of_each(
    linear: Linear, calls: dict[str, Callable[[], Any]], settled: float = SETTLED
) -> dict[str, float]:
    """Median time of a product, by name of the `program` that makes them.

    Args:
      linear: which.
      calls: of programs with their operands.
      settled: seconds that a queue of long ones takes.
    """
    if linear.m > SHORT:
        found = side_by_side_seconds(calls, runs=3, at_least=settled)
    else:
        behind = long_work(4 * SHORT_QUEUE)
        found = side_by_side_seconds(calls, at_least=SHORT_QUEUE, behind=behind)
    return {name: seconds / products(linear) for name, seconds in found.items()}


def program(product: Callable[..., Any]) -> Any:
    """All products of a call, from a list of x and lists of weights."""
    once = jax.jit(product)

    def call(x: list[Any], *others: list[Any]) -> list[Any]:
        found: list[Any] = []
        for first in range(0, len(x), len(others[0])):
            # In turn, else XLA makes one product of all that share a weight.
            turn = x[first : first + len(others[0])]
            turn, found = jax.lax.optimization_barrier((turn, found))
            found += map(once, turn, *others)
        return found

    return jax.jit(call)
