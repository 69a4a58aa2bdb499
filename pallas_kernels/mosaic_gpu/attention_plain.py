"""What `products.py` and `weighing.py` mean, in plain jnp; stands in for them where interpreted."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu.attention_operands import in_order
from pallas_kernels.mosaic_gpu.softmax import CODES, REACH, TOP


def begin(a: Any, b: Any) -> jax.Array:
    """As `products.begin`."""
    left, right = (part[...].astype(jnp.float32) for part in (a, b))
    plgpu.commit_smem()  # `wgmma` reads as TMA writes; a load must be fenced off
    return jax.lax.dot_general(left, right, (((1,), (1,)), ((), ())))


def arrived(*products: jax.Array, pending: int) -> tuple[jax.Array, ...]:
    """As `products.arrived`."""
    del pending
    return products


def weigh(
    scores: jax.Array, seen: jax.Array, before: jax.Array, slope: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """As `weighing.weigh`, but a code in each number, keys in their own order."""
    # A maximum over an axis loses NaNs on XLA:CPU.
    highest = jnp.where(jnp.isnan(scores).any(axis=1), jnp.nan, scores.max(axis=1))
    seen = jnp.maximum(seen, highest)
    now = jnp.maximum(highest, seen - REACH * 8 / CODES / slope)
    offset = TOP / CODES - now * slope
    parts = jnp.clip(scores * slope[:, None] + offset[:, None], 0, 1)
    decay = jnp.exp2((before - now) * slope * (CODES / 8))
    codes = jnp.where(jnp.isnan(parts), 0.0, jnp.round(parts * CODES))
    return codes, seen, now, decay


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
