"""What `weighing.py` means, in plain jnp; stands in for it where a kernel is interpreted.

And what the whole kernel computes, for machines that cannot run it.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic_gpu.attention_operands import KEYS, Operands, in_order
from pallas_kernels.mosaic_gpu.softmax import CODES, FAR, OCTAVES, REACH, TOP


def attend(
    operands: Operands, *, heads: int, block: int | None = None, out_dtype: Any
) -> jax.Array:
    """As `attention.attend`, but for the order of sums; any width."""
    q, slope, k, v, v_scale = operands
    rows, length, width = q.shape
    q, slope = q[:, : slope.shape[1]], slope[:, :length]
    keys = jnp.moveaxis(k.reshape(rows, -1, KEYS, width), 1, 0)
    values = jnp.moveaxis(v.reshape(rows, v.shape[1], -1, KEYS), 2, 0)

    def step(state, tile):
        totals, seen, offset = state
        keys, values = (part.astype(jnp.float32) for part in tile[:2])
        scores = jnp.einsum("nsd,nld->nsl", q.astype(jnp.float32), keys).astype(jnp.float16)
        codes, seen, offset, keep = jax.vmap(weigh)(scores, seen, offset, slope)
        weights = join(codes).astype(jnp.float32)
        product = jnp.einsum("nsl,ndl->nsd", weights, values)
        then = jax.vmap(add)(totals, keep, product), seen, offset
        if block is None:
            return then, None
        sees = jnp.arange(length) // block >= tile[2] // block  # of blocks
        return tuple(
            jnp.where(sees.reshape(1, -1, *[1] * (new.ndim - 2)), new, old)
            for new, old in zip(then, state, strict=True)
        ), None

    far = jnp.full((rows, length), FAR)
    state = jnp.zeros((rows, length, v.shape[1])), -far, far
    first = KEYS * jnp.arange(len(keys))
    (totals, _, _), _ = jax.lax.scan(step, state, (keys, values, first))
    y = jax.vmap(divide, in_axes=(0, None))(totals, width) * v_scale[:, None]
    y = y.reshape(-1, heads, length, width).astype(out_dtype)
    return jnp.swapaxes(y, 1, 2)


def weigh(
    scores: jax.Array, seen: jax.Array, before: jax.Array, slope: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """As `weighing.weigh`, but codes as whole numbers, keys in their own order."""
    scores = scores.astype(jnp.float32)
    # A maximum over an axis loses NaNs on XLA:CPU.
    highest = jnp.where(jnp.isnan(scores).any(axis=1), jnp.nan, scores.max(axis=1)) * slope
    seen = jnp.maximum(seen, highest)
    now = jnp.maximum(highest, seen - REACH / OCTAVES)
    offset = _rounded_down(TOP / CODES - now)
    parts = scores * slope[:, None] + offset[:, None]
    parts = jnp.clip(parts.astype(jnp.float16).astype(jnp.float32), 0, 1)
    decay = jnp.exp2((offset - before) * OCTAVES)
    codes = jnp.where(jnp.isnan(parts), 0.0, jnp.round(parts * CODES))
    return codes, seen, offset, decay


def _rounded_down(x: jax.Array) -> jax.Array:
    """To float16 numbers."""
    near = x.astype(jnp.float16)
    above = near.astype(jnp.float32) > x
    return jnp.where(above, jnp.nextafter(near, jnp.float16(-jnp.inf)), near).astype(jnp.float32)


def join(codes: jax.Array) -> jax.Array:
    """As `weighing.join`."""
    return jax.lax.bitcast_convert_type(in_order(codes.astype(jnp.uint8)), jnp.float8_e4m3fn)


def add(totals: jax.Array, keep: jax.Array, product: jax.Array) -> jax.Array:
    """As `weighing.add`."""
    return totals * keep[:, None] + product


def divide(totals: jax.Array, width: int) -> jax.Array:
    """As `weighing.divide`."""
    weights = totals[:, width : width + 1]
    return jnp.where(weights == 0, 0.0, totals[:, :width] / weights)
