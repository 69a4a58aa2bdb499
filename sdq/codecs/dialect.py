"""Dialect formats (sdq32, dialectfp4, e2m1): 4-bit codes, a byte a block, an exponent a row.

A value is `sign * magnitudes[dialect][index] * 2^e`, e the row exponent less what the block's byte
says. A code is `[sign : 1 | index : 3]`.

  block exponent  floor(log2 amax) - 3, so that the block maximum lands in [8, 16) half-units, but
                  never more than 7 below the row's and never below -125, so that every value is a
                  normal float32
  row exponent    the largest of its blocks', int8 in [-125, 124]; -128 marks a row with NaN or Inf
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sdq import formatbook, packing, select
from sdq.codecs.encoded import Encoded
from sdq.formatbook import EXPONENT_WINDOW
from sdq.formats import Format
from sdq.numerics import (
    NON_FINITE,
    exponent_of,
    largest_magnitude,
    power_of_two,
)
from sdq.select import Choice

BAD_ROW = -128
LOWEST_EXPONENT = -125


class Scaled(NamedTuple):
    """An array in units of its blocks' exponents.

    Attributes:
      u: magnitudes in half-units, in [0, 16), `[..., G, block]`; 0 in bad rows.
      exponent: of each block, int32 `[..., G]`.
      row: the row exponent, int32 `[..., 1]`.
      bad: whether a row holds NaN or Inf, `[..., 1]`.
    """

    u: jax.Array
    exponent: jax.Array
    row: jax.Array
    bad: jax.Array


def scaled(x: jax.Array) -> Scaled:
    """The exponents of float32 `[..., G, block]`, and what they leave to be coded."""
    block_exponent = exponent_of(largest_magnitude(x))
    highest = jnp.max(block_exponent, axis=-1, keepdims=True, initial=LOWEST_EXPONENT)
    bad = highest == NON_FINITE
    row = jnp.maximum(highest - 3, LOWEST_EXPONENT)
    lowest = jnp.maximum(row - EXPONENT_WINDOW, LOWEST_EXPONENT)
    exponent = jnp.clip(block_exponent - 3, lowest, row)
    u = jnp.abs(x) * power_of_two(-exponent)[..., None]
    return Scaled(jnp.where(bad[..., None], 0.0, u), exponent, row, bad)


def encode(x: jax.Array, fmt: Format, choice: Choice) -> Encoded:
    """float32 `[..., G, block]` -> codes of that shape, metadata `[..., G]`, row exponents."""
    book = formatbook.BOOKS[fmt.book or ""]
    u, exponent, row, bad = scaled(x)
    dialect = select.choose(u, book, choice)
    index = jnp.asarray(formatbook.index_table(book)).reshape(-1)[
        dialect[..., None].astype(jnp.int32) * formatbook.BINS + select.bins(u)
    ]
    sign = jnp.signbit(x).astype(jnp.uint8) << 3
    return Encoded(
        codes=sign | index,
        scales=packing.pack_metadata(row - exponent, dialect),
        outer=jnp.where(bad, BAD_ROW, row).astype(jnp.int8),
    )


def decode(encoded: Encoded, fmt: Format) -> jax.Array:
    """float32 `[..., G, block]`; a bad row is NaN throughout."""
    below, dialect = packing.unpack_metadata(encoded.scales)
    row = _row_exponents(encoded).astype(jnp.int32)
    bad = row == BAD_ROW
    exponent = jnp.where(bad, 0, row - below)
    step = jnp.where(bad, jnp.nan, power_of_two(exponent))
    table = jnp.asarray(formatbook.magnitudes(formatbook.BOOKS[fmt.book or ""]))
    index = dialect[..., None] * 8 + (encoded.codes & 7).astype(jnp.int32)
    magnitude = table.astype(jnp.float32).reshape(-1)[index] * step[..., None]
    return jnp.where(encoded.codes & 8, -magnitude, magnitude)


def decode_fp8(encoded: Encoded, fmt: Format) -> tuple[jax.Array, jax.Array]:
    """e4m3 `[..., G, block]` and row exponents `[..., 1]`: `value * 2^row`, nothing rounds."""
    table = jnp.asarray(formatbook.fp8_table(formatbook.BOOKS[fmt.book or ""]))
    index = encoded.scales[..., None].astype(jnp.int32) * 8 + (encoded.codes & 7).astype(jnp.int32)
    bits = jax.lax.bitcast_convert_type(table, jnp.uint8).reshape(-1)[index]
    bits = bits | ((encoded.codes & 8) << 4)
    row = _row_exponents(encoded)
    bits = jnp.where((row == BAD_ROW)[..., None], jnp.uint8(0x7F), bits)
    return jax.lax.bitcast_convert_type(bits, jnp.float8_e4m3fn), row


def problems(encoded: Encoded, fmt: Format) -> dict[str, jax.Array]:
    """What this format can never produce: whether the arrays hold it, by its description."""
    below, dialect = packing.unpack_metadata(encoded.scales)
    used = jnp.asarray(formatbook.BOOKS[fmt.book or ""].ids, jnp.int32)
    row = _row_exponents(encoded).astype(jnp.int32)
    good = row != BAD_ROW
    return {
        f"a dialect id is not in book {fmt.book!r}": jnp.any(~jnp.isin(dialect, used)),
        f"a row exponent lies below {LOWEST_EXPONENT}": jnp.any(good & (row < LOWEST_EXPONENT)),
        f"a block exponent lies below {LOWEST_EXPONENT}": jnp.any(
            good & (row - below < LOWEST_EXPONENT)
        ),
    }


def _row_exponents(encoded: Encoded) -> jax.Array:
    assert encoded.outer is not None, "a dialect array has row exponents"
    return encoded.outer
