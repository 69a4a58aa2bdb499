"""Exact arithmetic on powers of two, by bits: no logarithm, no rounding, the same on every backend.

float32 subnormals count as zero throughout, because some backends flush them and some do not.
"""

import functools

import jax
import jax.numpy as jnp

NON_FINITE = 128  # exponent_of(inf or NaN)
ZERO_EXPONENT = -127  # exponent_of(0)


def exponent_of(x: jax.Array) -> jax.Array:
    """floor(log2 |x|), int32; ZERO_EXPONENT for zero and subnormals, NON_FINITE for Inf, NaN."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    return ((bits >> 23) & 255) - 127


def without_subnormals(x: jax.Array) -> jax.Array:
    """float32 x with subnormals replaced by zeros of their sign, on every backend."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    normal = (bits & 0x7F800000) != 0
    flushed = jnp.where(normal, bits, bits & ~0x7FFFFFFF)
    return jax.lax.bitcast_convert_type(flushed, jnp.float32)


def largest_magnitude(x: jax.Array) -> jax.Array:
    """max |x| over the last axis, float32; NaN where there is one, else Inf where there is one.

    Zero where all are subnormal. Compares bits, whose order is that of the magnitudes with NaN on
    top: a maximum of floats loses NaNs on XLA:CPU.
    """
    pieces = [x.astype(jnp.float32)]
    while (length := pieces[0].shape[-1]) > 32 and length % 2 == 0 and len(pieces) < 64:
        # Cut down to what XLA:CPU reduces in one pass: it would split a long reduction, and write
        # an array of the size of x to memory first.
        pieces = [half for piece in pieces for half in jnp.split(piece, 2, axis=-1)]
    magnitudes = [jax.lax.bitcast_convert_type(p, jnp.int32) & 0x7FFFFFFF for p in pieces]
    largest = jnp.max(functools.reduce(jnp.maximum, magnitudes), axis=-1)
    largest = jax.lax.bitcast_convert_type(largest, jnp.float32)
    return without_subnormals(largest)


def power_of_two(n: jax.Array) -> jax.Array:
    """2^n as float32, for int32 n in [-126, 127]."""
    return jax.lax.bitcast_convert_type((n + 127) << 23, jnp.float32)


def times_power_of_two(x: jax.Array, n: jax.Array) -> jax.Array:
    """x * 2^n for int32 n in [-252, 254], exact wherever the result is a normal number.

    Two factors, because 2^n alone may leave float32 where x * 2^n does not.
    """
    half = n >> 1
    return x * power_of_two(half) * power_of_two(n - half)


def divided_by(x: jax.Array, divisor: int) -> jax.Array:
    """x / divisor for finite x >= 0, correctly rounded; divisor = 2^n * (an odd number in 3..127).

    In integers, because XLA's own division is not to be trusted with the last bit: by a constant it
    may become a product with the rounded reciprocal, and on GPUs it is approximate.
    """
    odd = divisor // (divisor & -divisor) if divisor > 0 else 0
    if not 2 < odd < 128:
        raise ValueError(f"divisor: expected 2^n times an odd number in 3..127, got {divisor}")
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    mantissa = (bits & 0x7FFFFF) | 0x800000
    numerator = mantissa << 8  # 32 bits, so that the quotient has 25 or more
    quotient = numerator // jnp.uint32(odd)
    inexact = (quotient * jnp.uint32(odd) != numerator).astype(jnp.uint32)
    # The conversion to 24 bits rounds to nearest even; the last bit tells it that more follows.
    rounded = (2 * quotient + inexact).astype(jnp.float32)
    exponent = exponent_of(x) - 23 - 9 - ((divisor // odd).bit_length() - 1)
    return jnp.where(x > 0, times_power_of_two(rounded, exponent), 0.0)


def row_is_bad(amax: jax.Array) -> jax.Array:
    """True for rows `[..., 1]` whose block maxima `[..., G]` hold a NaN or an Inf.

    The one policy for bad input, in every format: the whole row dequantises to NaN, never to a
    finite number.
    """
    return jnp.any(~jnp.isfinite(amax), axis=-1, keepdims=True)
