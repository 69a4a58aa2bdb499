"""Queries, keys and values as the Hopper attention reads them: e4m3 numbers and powers of two.

queries  blocks along the width, an exponent a query: part of what a unit of its scores is worth
keys     blocks along the width, an exponent a head, because scores of all keys are compared
         Both are so small, by their Euclidean norms, that no score exceeds what float16 holds.
values   blocks along the keys, an exponent a channel: part of the result's scale; transposed, and
         followed by ones, which sum up the weights
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic_gpu.softmax import OCTAVES
from pallas_kernels.rows import Fp8Rows, fp8_rows, row_scales
from sdq import quantize
from sdq.numerics import exponent_of, largest_magnitude, power_of_two, times_power_of_two

WIDTHS = (64, 128)  # of a head, that the kernels know
QUERIES = 8  # are copied at once
KEYS = 128  # of a tile
E4M3 = jnp.float8_e4m3fn
ONES = 8  # channels that sum up the weights: a tile of `wgmma`
FP8_TOP = 7  # the largest number of an fp8 row lies in [2^7, 2^8)
NORM_TOP = 4  # the largest norm lies in [2^4, 2^5): scores up to 1200
STEEPEST = 28.0  # slope: neighbouring float16 scores of 1000 are 220 octaves apart, enough for all


class Operands(NamedTuple):
    """Of `attention.attend`; B videos of H heads are one axis."""

    q: jax.Array
    slope: jax.Array
    k: jax.Array
    v: jax.Array
    v_scale: jax.Array


class Rounded(NamedTuple):
    """Numbers `values * scales`.

    Attributes:
      values: e4m3.
      scales: powers of two, float32, that broadcast against them.
    """

    values: jax.Array
    scales: jax.Array


def rounded(
    q: jax.Array, k: jax.Array, v: jax.Array, fmt_qk: str | None, fmt_pv: str | None
) -> tuple[Rounded, Rounded, Rounded]:
    """All three `[B, S, H, D]`, as `[B, H, S, D]`, `[B, H, L, D]` and `[B, H, D, L]`."""
    by_head = [jnp.swapaxes(x, 1, 2) for x in (q, k, v)]
    queries = _small(_rounded(by_head[0], fmt_qk, jnp.float32))
    b, h, length, width = by_head[1].shape
    keys = _rounded(by_head[1].reshape(b, h, length * width), fmt_qk, jnp.float32)
    keys = Rounded(keys.values.reshape(b, h, length, width), keys.scales[..., None])
    return queries, _small(keys), _rounded(jnp.swapaxes(by_head[2], 2, 3), fmt_pv, E4M3)


def arranged(q: Rounded, k: Rounded, v: Rounded, counts: jax.Array, scale: float) -> Operands:
    """For the kernel; `counts` says which keys do, bool `[B, L]`. Queries are filled up."""
    b, h, length, width = k.values.shape
    # A key that does not count looks like one that does, so that it is no larger than all of these.
    first = jnp.argmax(counts, axis=1)[:, None, None, None]
    alike = jnp.take_along_axis(k.values, first, axis=2)
    keys = jnp.where(counts[:, None, :, None], k.values, alike)
    more = -length % KEYS
    keys = jnp.concatenate([keys, jnp.broadcast_to(alike, (b, h, more, width))], axis=2)
    counts = counts[:, None, None, :]
    values = jnp.where(counts, v.values, jnp.zeros((), v.values.dtype))
    ones = jnp.broadcast_to(counts, (b, h, ONES, length)).astype(v.values.dtype)
    values = jnp.concatenate([values, ones], axis=2)
    values = in_order(jnp.pad(values, ((0, 0), (0, 0), (0, 0), (0, more))))
    slope = slopes(q, k, scale)
    fill = -slope.shape[-1] % QUERIES
    slope = jnp.pad(slope, ((0, 0), (0, 0), (0, fill)), constant_values=1.0)
    queries = jnp.pad(q.values, ((0, 0), (0, 0), (0, fill), (0, 0)))

    return of_all_heads(queries, slope, keys, values, v.scales[..., 0])


def slopes(q: Rounded, k: Rounded, scale: float) -> jax.Array:
    """What a unit of each query's scores is worth, `[B, H, S]`."""
    slope = (q.scales * k.scales)[..., 0] * (scale * math.log2(math.e) / OCTAVES)
    return jnp.clip(slope, -STEEPEST, STEEPEST).astype(jnp.float16).astype(jnp.float32)


def of_all_heads(*operands: jax.Array) -> Operands:
    """Arrays `[B, H, ...]` as Operands."""
    return Operands(*(x.reshape(-1, *x.shape[2:]) for x in operands))


def in_order(x: jax.Array) -> jax.Array:
    """The last axis, keys, in the order in which scores become weights without moving.

    A thread has scores of keys 2 t, 2 t + 1, 8 + 2 t and 9 + 2 t of sixteen; as the left operand of
    a product it has numbers 4 t .. 4 t + 3.
    """
    parts = x.reshape(*x.shape[:-1], -1, 2, 4, 2)
    return jnp.swapaxes(parts, -3, -2).reshape(x.shape)


def _rounded(x: jax.Array, fmt: str | None, dtype: Any) -> Rounded:
    """Along the last axis, an exponent for all of it; without a format only to dtype."""
    if fmt is None:
        exponent = of_largest(largest_magnitude(x.astype(jnp.float32)))[..., None]
        scaled = x.astype(jnp.float32) * power_of_two(-exponent)
        return Rounded(scaled.astype(dtype), power_of_two(exponent))
    rows: Fp8Rows = fp8_rows(quantize(x, fmt, select="two_stage"))
    return Rounded(rows.values.astype(dtype), row_scales(rows.exponents, bad=1.0))


def of_largest(magnitude: jax.Array) -> jax.Array:
    """Exponent of fp8 numbers of which one has this magnitude."""
    return jnp.clip(exponent_of(magnitude) - FP8_TOP, -126, 126)


def _small(x: Rounded) -> Rounded:
    """e4m3, the norms of the rows, or of all rows that share a scale, in [2^NORM_TOP, 2 * that).

    4-bit numbers are exact still, but for those 2^-10 of the norm and smaller.
    """
    norm = jnp.sqrt(jnp.sum(jnp.square(x.values), axis=-1))[..., None]
    if norm.shape != x.scales.shape:
        norm = jnp.max(norm, axis=-2, keepdims=True)
    exponent = jnp.clip(exponent_of(norm) - NORM_TOP, -126, 126)
    exponent = jnp.where(jnp.isfinite(norm), exponent, 0)
    values = (x.values * power_of_two(-exponent)).astype(E4M3)
    return Rounded(values, times_power_of_two(x.scales, exponent))
