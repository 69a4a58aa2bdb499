"""Metadata bytes, row exponents and the table that decodes them, for each family of formats.

A number is `sign * table[byte, index] * 2^exponent`, the byte of its block, the exponent of its
row.

  dialects  as they are stored; exact
  mxfp4     the byte says how far a block's scale lies below the largest of its row. Exact up to 14
            octaves below; beyond, numbers are rounded to multiples of 2^-15 of the largest scale
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from sdq import formatbook
from sdq.codecs import Encoded, e2m1
from sdq.codecs.dialect import BAD_ROW, LOWEST_EXPONENT
from sdq.codecs.mxfp4 import NAN_SCALE
from sdq.formats import Format

MX_LIFT = 6  # octaves: 6 * 2^6 is the largest that e4m3 holds
E8M0_BIAS = 127


def misfit(fmt: Format) -> str | None:
    """Why a format's numbers cannot be stored so; None if they can."""
    if fmt.family not in ("dialect", "mxfp4"):
        return f"{fmt}: only dialect formats and mxfp4 are decoded in registers"
    if (fmt.block or 0) % 16:
        return f"{fmt}: blocks must be multiples of 16"
    return None


def metadata(encoded: Encoded, fmt: Format) -> tuple[jax.Array, jax.Array]:
    """Bytes uint8 `[N, G]`, and exponents int8 `[N]`, BAD_ROW for a row that held NaN or Inf."""
    if fmt.family == "dialect":
        assert encoded.outer is not None
        return encoded.scales, encoded.outer[:, 0]
    scale = encoded.scales.astype(jnp.int32)
    bad = jnp.any(scale == NAN_SCALE, axis=1)
    exponent = jnp.max(scale, axis=1, initial=0) - E8M0_BIAS - MX_LIFT
    exponent = jnp.maximum(exponent, LOWEST_EXPONENT)
    below = exponent[:, None] + MX_LIFT + E8M0_BIAS - scale
    bytes_ = jnp.where(bad[:, None], 0, jnp.minimum(below, 255)).astype(jnp.uint8)
    return bytes_, jnp.where(bad, BAD_ROW, exponent).astype(jnp.int8)


@functools.cache
def look_up_table(fmt: Format, dtype: Any = jnp.float8_e4m3fn) -> np.ndarray:
    """uint32, for each metadata byte the eight magnitudes.

    Args:
      fmt: of the weight.
      dtype: e4m3, two words: the numbers; or bf16, four: their low bytes, their high bytes.
    """
    if fmt.family == "dialect":
        table = formatbook.fp8_table(formatbook.BOOKS[fmt.book or ""])
    else:
        steps = 2.0 ** (MX_LIFT - np.arange(256))
        table = (steps[:, None] * e2m1.VALUES).astype(ml_dtypes.float8_e4m3fn)
    bytes_ = table.astype(dtype).view(np.uint8).reshape(256, 8, -1).swapaxes(1, 2)
    return np.ascontiguousarray(bytes_).reshape(-1).view(np.uint32)
