"""Activation decomposition: salient tokens are quantised twice, the second time what is left over.

y = Q(x) W, and for the salient tokens S also y_S += Q(x - Q(x))_S W: a fraction f of the tokens
costs a fraction f of a product. The number of tokens is static; whether a layer spends it is data,
so that stacked layers differ inside one scan.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sdq.formats import Format
from sdq.quantize import fake_quantize


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Decomposed:
    """The input of a linear, some of whose tokens have a second term.

    Attributes:
      base: Q(x), `[B, S, K]`: numbers, or whatever else the product takes.
      residual: Q(x - Q(x)) of those tokens, `[B, n, K]`, likewise.
      tokens: their numbers, int32 `[B, n]`, different from each other.
      active: bool `[]`, whether the second term counts; None: it does.
    """

    base: Any
    residual: Any
    tokens: jax.Array
    active: jax.Array | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of x."""
        return self.base.shape

    @property
    def dtype(self) -> jnp.dtype:
        """Of x."""
        return self.base.dtype


def residual(
    x: jax.Array,
    base: jax.Array,
    tokens: jax.Array,
    fmt: str | Format,
    select: str | None = None,
) -> jax.Array:
    """Quantise what quantising left over of some tokens.

    Args:
      x: `[B, S, K]`.
      base: Q(x), in x's dtype.
      tokens: which, int32 `[B, n]`.
      fmt: of the residual.
      select: how its blocks choose.
    Returns:
      The numbers that it became, `[B, n, K]` in x's dtype.
    """
    rows = [jnp.take_along_axis(part, tokens[..., None], axis=1) for part in (x, base)]
    left = rows[0].astype(jnp.float32) - rows[1].astype(jnp.float32)
    return fake_quantize(left, fmt, select=select).astype(x.dtype)


def multiply(
    x: Decomposed,
    product: Callable[[Any], jax.Array],
    of_base: Callable[[Any], jax.Array] | None = None,
) -> jax.Array:
    """The product of x with a kernel.

    Args:
      x: of S tokens, n of them with a second term.
      product: linear, `[B, any number of tokens, K] -> [B, ..., N]`. Called with S tokens, and,
        where x is active, with n more.
      of_base: if what the S tokens get is more than that, such as a bias.
    Returns:
      `[B, S, N]`.
    """

    def plus_residual(y: jax.Array) -> jax.Array:
        def plus(y: jax.Array, at: jax.Array, more: jax.Array) -> jax.Array:
            return y.at[at].add(more, unique_indices=True)  # else a GPU adds by compare-and-swap

        return jax.vmap(plus)(y, x.tokens, product(x.residual))

    y = (of_base or product)(x.base)
    if x.active is None:
        return plus_residual(y)
    return jax.lax.cond(x.active, plus_residual, lambda y: y, y)
