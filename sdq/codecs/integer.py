"""Symmetric integers (int4, int8): round(x / scale), one bfloat16 scale a block or a whole row.

int4 codes are -7..7 (two's complement in a nibble), int8 codes -127..127. `scale = bf16(amax /
largest)` and codes are computed with the rounded scale. A NaN scale marks every block of a bad row.
"""

import jax
import jax.numpy as jnp
import numpy as np

from sdq.codecs.encoded import Encoded
from sdq.formats import Format
from sdq.numerics import divided_by, largest_magnitude, row_is_bad, without_subnormals
from sdq.select import Choice

SMALLEST_SCALE = 2.0**-126


def encode(x: jax.Array, fmt: Format, choice: Choice) -> Encoded:
    """float32 `[..., G, block]` -> codes (uint8 nibbles or int8), bfloat16 scales `[..., G]`."""
    largest = _largest(fmt)
    amax = largest_magnitude(x)
    bad = row_is_bad(amax)
    amax = jnp.where(bad, 0.0, amax)
    # Rounding up to bfloat16 must not take largest * scale out of float32.
    ceiling = np.finfo(np.float32).max / largest * (1 - 2.0**-8)
    scale = jnp.minimum(divided_by(amax, largest), ceiling).astype(jnp.bfloat16)
    scale = jnp.maximum(scale, jnp.bfloat16(SMALLEST_SCALE))
    scale = jnp.where(amax == 0, jnp.bfloat16(0), scale)
    step = scale.astype(jnp.float32)[..., None]
    usable = step > 0
    y = jnp.where(usable, without_subnormals(x) / jnp.where(usable, step, 1.0), 0.0)
    y = jnp.where(bad[..., None], 0.0, y)
    q = jnp.clip(jnp.round(y), -largest, largest).astype(jnp.int8)
    if fmt.element_bits == 4:
        q = jax.lax.bitcast_convert_type(q, jnp.uint8) & 15
    return Encoded(codes=q, scales=jnp.where(bad, jnp.bfloat16(jnp.nan), scale), outer=None)


def decode(encoded: Encoded, fmt: Format) -> jax.Array:
    """float32 `[..., G, block]`."""
    q = encoded.codes
    if fmt.element_bits == 4:
        q = jax.lax.bitcast_convert_type(q << 4, jnp.int8) >> 4  # sign extension
    return q.astype(jnp.float32) * encoded.scales.astype(jnp.float32)[..., None]


def _largest(fmt: Format) -> int:
    return 2 ** (fmt.element_bits - 1) - 1


def problems(encoded: Encoded, fmt: Format) -> dict[str, jax.Array]:
    """What this format can never produce: whether the arrays hold it, by its description."""
    lowest = 8 if fmt.element_bits == 4 else -128
    below = f"a code is {-_largest(fmt) - 1}, below the symmetric range"
    return {
        below: jnp.any(encoded.codes == lowest),
        "a scale is negative": jnp.any(encoded.scales < 0),
    }
