"""NVFP4: E2M1 elements, blocks of 16, one E4M3 scale a block, and (two levels) a float32 a matrix.

A matrix is the last two axes with the quantised one last; leading axes (layers, experts, batch)
each have their own second-level scale, so that a stacked leaf scans and a batch does not change its
members.

  matrix scale  amax of the matrix / (448 * 6), float32; 1 in the one-level form
  block scale   E4M3(amax of the block / 6 / matrix scale), saturating at 448
  code          E2M1(x * ((1 / matrix scale) / block scale)), in float32 and in that order, as
                torchao and the kernels that it follows compute it
Block scales are stored as E4M3 bits; NaN (0x7F) marks every block of a bad row.
"""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from sdq.codecs import e2m1
from sdq.codecs.encoded import Encoded
from sdq.formats import Format
from sdq.numerics import divided_by, largest_magnitude, row_is_bad, without_subnormals
from sdq.select import Choice

E4M3_MAX = 448
E4M3_LARGEST_BITS = 0x7E
E4M3_VALUES = np.arange(128, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
SMALLEST_MATRIX_SCALE = 2.0**-117  # times the smallest E4M3 it is a normal float32


def encode(x: jax.Array, fmt: Format, choice: Choice) -> Encoded:
    """float32 `[..., M, G, 16]` -> codes, E4M3 bits `[..., M, G]`, matrix scales `[..., 1, 1]`."""
    amax = largest_magnitude(x)  # [..., M, G]
    bad = row_is_bad(amax)
    amax = jnp.where(bad, 0.0, amax)
    matrix = _matrix_scale(amax) if fmt.outer else None
    unit = 1.0 if matrix is None else matrix
    bits = e4m3_bits(divided_by(amax, e2m1.LARGEST) / unit)
    usable = (bits > 0) & ~bad
    reciprocal = (1.0 / unit) / jnp.where(usable, e4m3_value(bits), 1.0)
    y = jnp.where(
        usable[..., None], without_subnormals(x) * reciprocal[..., None], jnp.copysign(0.0, x)
    )
    return Encoded(
        codes=e2m1.encode(y),
        scales=jnp.where(bad, jnp.uint8(0x7F), bits),
        outer=matrix,
    )


def decode(encoded: Encoded, fmt: Format) -> jax.Array:
    """float32 `[..., G, 16]`."""
    step = e4m3_value(encoded.scales)
    if encoded.outer is not None:
        step = step * encoded.outer
    return e2m1.decode(encoded.codes) * step[..., None]


def e4m3_bits(x: jax.Array) -> jax.Array:
    """float32 x >= 0 to the bits of the nearest E4M3 number, ties to even, saturating: uint8.

    By hand: casts round twice on some backends (through bfloat16 on XLA:GPU).
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    halfway = (1 << 19) - 1 + ((bits >> 20) & 1)  # 20 of 23 mantissa bits go
    normal = ((bits + halfway) >> 20) - ((127 - 7) << 3)
    subnormal = jnp.round(x * 2.0**9).astype(jnp.int32)
    code = jnp.where(x < 2.0**-6, subnormal, normal)
    return jnp.minimum(code, E4M3_LARGEST_BITS).astype(jnp.uint8)


def e4m3_value(bits: jax.Array) -> jax.Array:
    """The float32 value of E4M3 bits; the sign bit must be clear."""
    return jnp.asarray(E4M3_VALUES)[bits.astype(jnp.int32)]


def _matrix_scale(amax: jax.Array) -> jax.Array:
    """float32 of amax's rank with the last two axes reduced to 1."""
    axes = tuple(range(max(amax.ndim - 2, 0), amax.ndim))
    largest = jnp.max(amax, axis=axes, keepdims=True, initial=0.0)
    scale = divided_by(largest, E4M3_MAX * e2m1.LARGEST)
    scale = jnp.maximum(scale, SMALLEST_MATRIX_SCALE)
    return jnp.where(largest == 0, 1.0, scale)


def problems(encoded: Encoded, fmt: Format) -> dict[str, jax.Array]:
    """What this format can never produce: whether the arrays hold it, by its description."""
    found = {"a block scale is negative": jnp.any(encoded.scales > 0x7F)}
    if encoded.outer is not None:
        positive = (encoded.outer > 0) & jnp.isfinite(encoded.outer)
        found["a matrix scale is not a positive number"] = jnp.any(~positive)
    return found
