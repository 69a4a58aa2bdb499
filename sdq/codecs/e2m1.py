"""The element of MXFP4 and NVFP4: FP4 E2M1, values 0 .5 1 1.5 2 3 4 6 and a sign.

Rounds to nearest, ties to even, saturates at 6 and keeps the sign of zero, as `ml_dtypes` casts do.
"""

import jax
import jax.numpy as jnp
import numpy as np

VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
LARGEST = 6


def encode(y: jax.Array) -> jax.Array:
    """float32 -> uint8 codes `[sign : 1 | index : 3]`; NaN is the caller's business."""
    magnitude = jnp.abs(y)
    index = jnp.zeros(y.shape, jnp.uint8)
    for lower in range(7):
        middle = float(VALUES[lower] + VALUES[lower + 1]) / 2
        # A tie goes to the even index, so odd lower neighbours give it away.
        above = magnitude >= middle if lower % 2 else magnitude > middle
        index += above.astype(jnp.uint8)
    return (jnp.signbit(y).astype(jnp.uint8) << 3) | index


def decode(codes: jax.Array) -> jax.Array:
    """uint8 codes -> float32."""
    magnitude = jnp.asarray(VALUES)[(codes & 7).astype(jnp.int32)]
    return jnp.where(codes & 8, -magnitude, magnitude)
