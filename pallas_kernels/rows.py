"""Fp8Rows: quantised activations as fp8 numbers and a power of two a row."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from sdq import QTensor, to_fp8
from sdq.codecs.dialect import BAD_ROW
from sdq.numerics import power_of_two


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Rows:
    """`values * 2^exponents`, exactly what a dialect QTensor of one row a token stands for.

    Attributes:
      values: e4m3 `[..., K]`; a row that held NaN or Inf is NaN throughout.
      exponents: int8 `[..., 1]`.
      dtype: of the numbers that were quantised.
      interleaved: whether channels lie in the order of `interleave`.
    """

    values: jax.Array
    exponents: jax.Array
    dtype: np.dtype = dataclasses.field(metadata={"static": True})
    interleaved: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the numbers."""
        return self.values.shape


def numbers(rows: Fp8Rows) -> jax.Array:
    """What the rows stand for, float32, channels in their own order."""
    values = deinterleave(rows.values) if rows.interleaved else rows.values
    return values.astype(jnp.float32) * row_scales(rows.exponents, bad=jnp.nan)


def fp8_rows(q: QTensor) -> Fp8Rows:
    """A dialect QTensor quantised along its last axis, decoded without rounding.

    Raises:
      ValueError: it is of another format or axis.
    """
    if q.axis != -1:
        raise ValueError(f"x: expected a QTensor quantised along its last axis, got axis {q.axis}")
    values, exponents = to_fp8(q)
    return Fp8Rows(values=values, exponents=exponents, dtype=q.dtype)


def interleave(x: jax.Array, run: int = 4) -> jax.Array:
    """Rows `[..., K]`, K a multiple of 32, in the order in which the Hopper kernel multiplies.

    Args:
      x: the rows.
      run: channels of a 32-bit register: 4 of e4m3, 2 of bf16. Of each 32 channels, the runs come
        in the order 0 2 4 6 1 3 5 7, or 0 4 8 12 1 5 9 13 and so on; `mosaic_gpu/operands.py` says
        why.
    """
    return _swapped(x, 4, 8 // run)


def deinterleave(x: jax.Array) -> jax.Array:
    """The inverse of interleave."""
    return _swapped(x, 2, 4)


def _swapped(x: jax.Array, outer: int, inner: int) -> jax.Array:
    run = 32 // (outer * inner)
    if isinstance(x, jax.Array) and run * x.dtype.itemsize == 4:
        # XLA moves words as fast as it copies, smaller runs at a fourteenth of that (H100).
        words = jax.lax.bitcast_convert_type(x.reshape(*x.shape[:-1], -1, run), jnp.uint32)
        swapped = jnp.swapaxes(words.reshape(*x.shape[:-1], -1, outer, inner), -2, -1)
        words = swapped.reshape(words.shape)
        return jax.lax.bitcast_convert_type(words, x.dtype).reshape(x.shape)
    runs = x.reshape(*x.shape[:-1], -1, outer, inner, run)
    return jnp.swapaxes(runs, -3, -2).reshape(x.shape)


def row_scales(exponents: jax.Array, bad: float) -> jax.Array:
    """2^exponents as float32; `bad` for rows that held NaN or Inf."""
    is_bad = exponents == BAD_ROW
    safe = jnp.where(is_bad, 0, exponents).astype(jnp.int32)
    return jnp.where(is_bad, bad, power_of_two(safe))
