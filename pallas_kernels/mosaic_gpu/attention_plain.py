"""What `weighing.py` means, in plain jnp; stands in for it where a kernel is interpreted."""

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic_gpu.attention_operands import in_order
from pallas_kernels.mosaic_gpu.softmax import CODES, OCTAVES, REACH, TOP


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
