"""MXFP4 (OCP microscaling): E2M1 elements, blocks of 32, one E8M0 power of two a block.

Scale rules, for block maximum amax (E2M1 reaches 6 = 1.5 * 2^2):
  floor   2^(floor(log2 amax) - 2)     the OCP text; the maximum may saturate
  rceil   2^ceil(log2(amax / 6))       nothing saturates
  even    floor, after amax is rounded to E2M1's one mantissa bit
Scales are stored as E8M0 bits (value 2^(byte - 127)); 255 is NaN and marks every block of a bad
row.
"""

import jax
import jax.numpy as jnp

from sdq.codecs import e2m1
from sdq.codecs.encoded import Encoded
from sdq.formats import Format
from sdq.numerics import (
    exponent_of,
    largest_magnitude,
    row_is_bad,
    times_power_of_two,
    without_subnormals,
)
from sdq.select import Choice

NAN_SCALE = 255


def encode(x: jax.Array, fmt: Format, choice: Choice) -> Encoded:
    """float32 `[..., G, 32]` -> codes uint8 of that shape, E8M0 bits uint8 `[..., G]`."""
    amax = largest_magnitude(x)
    bad = row_is_bad(amax)
    exponent = _scale_exponent(amax, fmt.scale_rule)
    y = times_power_of_two(without_subnormals(x), -exponent[..., None])
    codes = e2m1.encode(jnp.where(bad[..., None], 0.0, y))
    bits = jnp.where(bad, NAN_SCALE, exponent + 127).astype(jnp.uint8)
    return Encoded(codes=codes, scales=bits, outer=None)


def decode(encoded: Encoded, fmt: Format) -> jax.Array:
    """float32 `[..., G, 32]`."""
    bits = encoded.scales.astype(jnp.int32)
    value = times_power_of_two(e2m1.decode(encoded.codes), bits[..., None] - 127)
    return jnp.where((bits == NAN_SCALE)[..., None], jnp.nan, value)


def _scale_exponent(amax: jax.Array, scale_rule: str | None) -> jax.Array:
    """int32 in [-127, 127]; exact, since it reads the bits of amax."""
    bits = jax.lax.bitcast_convert_type(amax, jnp.int32)
    if scale_rule == "rceil":
        above_six = (bits & 0x7FFFFF) > 0x400000  # mantissa beyond 1.5
        exponent = exponent_of(amax) - 2 + above_six.astype(jnp.int32)
    elif scale_rule == "even":
        quarter = 1 << 21  # half of E2M1's last mantissa bit
        exponent = ((bits + quarter) >> 23) - 127 - 2
    else:
        exponent = exponent_of(amax) - 2
    return jnp.clip(exponent, -127, 127)


def problems(encoded: Encoded, fmt: Format) -> dict[str, jax.Array]:
    """What this format can never produce: whether the arrays hold it, by its description."""
    return {}  # every byte is an E8M0 value and every nibble an E2M1 value
