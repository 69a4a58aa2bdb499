"""Operands of the workloads' products, in bf16 and quantised, for what measures them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import sdq
from pallas_kernels.mosaic_gpu.config import FEW
from pallas_kernels.mosaic_gpu.operands import TiledWeight, tile_weight
from pallas_kernels.rows import Fp8Rows, fp8_rows
from pallas_kernels.workloads import Linear

FORMAT = "sdq32:16"
LAYERS = 8  # that a call for few rows multiplies with: alone they would be dispatched too slowly


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Operands:
    """One of each layer.

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
    """Random numbers, for `layers(linear)` products."""
    quantize = jax.jit(functools.partial(sdq.quantize, fmt=FORMAT, select="two_stage"))
    found = Operands(x=[], w=[], rows=[], weights=[], tiled=[])
    for seed in range(layers(linear)):
        keys = jax.random.split(jax.random.key(seed))
        x = jax.random.normal(keys[0], (linear.m, linear.k), jnp.bfloat16)
        w = jax.random.normal(keys[1], (linear.n, linear.k), jnp.bfloat16)
        rows = jax.jit(fp8_rows)(quantize(x))
        weight = quantize(w)
        found.x.append(x)
        found.w.append(w)
        # Called interleaved because any order of channels will do here.
        found.rows.append(dataclasses.replace(rows, interleaved=True))
        found.weights.append(weight)
        found.tiled.append(tile_weight(weight))
    return found


def layers(linear: Linear) -> int:
    """Products of one call, each with a weight of its own: more than a cache holds."""
    return LAYERS if linear.m <= FEW else 1


def all_layers(product: Callable[..., Any]) -> Any:
    """A product of each layer's operands in one program."""
    return jax.jit(lambda *operands: list(map(product, *operands)))
