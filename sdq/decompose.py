"""Activation decomposition: salient tokens are quantised twice, the second time what is left over.

y = Q(x) W, and for the salient tokens S also y_S += Q(x - Q(x))_S W. The residual's rows join the
rows of x in one product, so a fraction f of the tokens costs a fraction f of a product and no
second pass over W. The number of tokens is static; whether a layer spends it is data, so that
stacked layers differ inside one scan.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from sdq.formats import Format
from sdq.quantize import fake_quantize


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Decomposed:
    """The input of a linear, some of whose tokens have a second term.

    Attributes:
      base: Q(x), the numbers that it stands for, `[B, S, K]`.
      residual: Q(x - Q(x)) of those tokens, `[B, n, K]`.
      tokens: their numbers, int32 `[B, n]`, different from each other.
      active: bool `[]`, whether the second term counts.
    """

    base: jax.Array
    residual: jax.Array
    tokens: jax.Array
    active: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of x."""
        return self.base.shape

    @property
    def dtype(self) -> jnp.dtype:
        """Of x."""
        return self.base.dtype


def decompose(
    x: jax.Array,
    base: jax.Array,
    tokens: jax.Array,
    active: jax.Array,
    fmt: str | Format,
    select: str | None = None,
) -> Decomposed:
    """Quantise what quantising left over of some tokens.

    Args:
      x: `[B, S, K]`.
      base: Q(x), in x's dtype.
      tokens: which, int32 `[B, n]`.
      active: bool `[]`.
      fmt: of the residual.
      select: how its blocks choose.
    """
    rows = [jnp.take_along_axis(part, tokens[..., None], axis=1) for part in (x, base)]
    left = rows[0].astype(jnp.float32) - rows[1].astype(jnp.float32)
    residual = fake_quantize(left, fmt, select=select).astype(x.dtype)
    return Decomposed(base=base, residual=residual, tokens=tokens, active=active)


def multiply(x: Decomposed, product: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The product of x with a kernel.

    Args:
      x: of S tokens, n of them with a second term.
      product: linear, `[B, any number of tokens, K] -> [B, ..., N]`. Called with S rows where x is
        not active, else with S + n.
    Returns:
      `[B, S, N]`.
    """

    def with_residual() -> jax.Array:
        y = product(jnp.concatenate([x.base, x.residual], axis=1))
        y, more = jnp.split(y, [x.shape[1]], axis=1)
        return jax.vmap(lambda y, at, more: y.at[at].add(more))(y, x.tokens, more)

    return jax.lax.cond(x.active, with_residual, lambda: product(x.base))
