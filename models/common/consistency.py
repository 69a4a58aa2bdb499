"""How differently two tokens round the same numbers.

Two tokens of one thing, the same block of channels, the same top: with free choice each may have
taken another shape, and equal values become different ones. `Observed` wraps a quantizer and sums,
for pairs of tokens that are given, the squared difference between a token's block rounded with its
own shape and with its partner's, in half-units, beside the block's own squares.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from models.common.quantizer import Input, SiteRule, first_match
from models.common.semantic import SemanticDialect
from pallas_kernels import Deferred, Projected, computed
from sdq import formatbook, formats, seda, select
from sdq.codecs import dialect
from sdq.numerics import largest_magnitude
from sdq.quantize import blocked
from sdq.select import Choice


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """Tokens to compare, two and two.

    Attributes:
      tokens: int32 `[B, P, 2]`.
      kind: what sort of pair, in 0..kinds - 1, or `kinds` for one that does not count; `[B, P]`.
    """

    tokens: jax.Array
    kind: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ObservedState:
    """Of one block; stacked over the blocks outside.

    Attributes:
      base: of the quantizer that is observed.
      pairs: the same for all blocks.
      sums: by site float32 `[B, kinds, 2]`: squared differences, squares; since the start.
    """

    base: Any
    pairs: Pairs
    sums: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """A Quantizer that rounds as its base does and sums what pairs of tokens do differently.

    Attributes:
      base: with `rules`, dialect formats at the sites.
      sites: that are observed, whose inputs are the video's tokens.
      kinds: of pairs.
    """

    base: Any
    sites: tuple[str, ...]
    kinds: int

    def initial_state(self, blocks: int, batch: int, pairs: Pairs | None = None) -> ObservedState:
        """Nothing seen yet; without pairs, nothing will be."""
        if pairs is None:
            pairs = Pairs(
                tokens=jnp.zeros((batch, 1, 2), jnp.int32),
                kind=jnp.full((batch, 1), self.kinds, jnp.int32),
            )
        return ObservedState(
            base=self.base.initial_state(blocks, batch),
            pairs=jax.tree.map(lambda x: jnp.broadcast_to(x, (blocks, *x.shape)), pairs),
            sums={site: jnp.zeros((blocks, batch, self.kinds, 2)) for site in self.sites},
        )

    def at_step(self, state: ObservedState, step: jax.Array) -> ObservedState:
        """The base's state at that step."""
        return dataclasses.replace(state, base=self.base.at_step(state.base, step))

    def quantize(self, x: jax.Array | Deferred, site: str, state: ObservedState | None) -> Input:
        """As the base does."""
        return self.base.quantize(x, site, None if state is None else state.base)

    def saw_input(self, x: jax.Array | Deferred, site: str, state: ObservedState | None) -> Any:
        """Adds what the pairs do differently with x."""
        if state is None:
            return state
        sums = state.sums
        rule = first_match(self.base.rules, site)
        if site in sums and rule is not None and rule.format is not None:
            allowed = None
            if isinstance(self.base, SemanticDialect):
                books = self.base.sub_formatbooks(site, state.base)
                allowed = None if books is None else seda.allowed(*books)
            found = differences(computed(rule.turned(x)), rule, allowed, state.pairs, self.kinds)
            sums = {**sums, site: sums[site] + found}
        return dataclasses.replace(state, base=self.base.saw_input(x, site, state.base), sums=sums)

    def saw_attention(
        self,
        q: jax.Array | Projected,
        k: jax.Array | Projected,
        site: str,
        state: ObservedState | None,
    ) -> Any:
        """As the base does."""
        if state is None:
            return state
        return dataclasses.replace(state, base=self.base.saw_attention(q, k, site, state.base))


def differences(
    x: jax.Array, rule: SiteRule, allowed: jax.Array | None, pairs: Pairs, kinds: int
) -> jax.Array:
    """What pairs of tokens do differently with the first one's numbers.

    Args:
      x: tokens `[B, S, K]` as they are quantised.
      rule: with a dialect format.
      allowed: each token's sub-formatbooks `[B, S, 1 or G, 8]`, or None.
      pairs: to compare.
      kinds: of pairs.
    Returns:
      float32 `[B, kinds, 2]`: sums of squared differences and of squares, in half-units, over those
      blocks in which both tokens have the same top.
    """
    fmt = formats.parse(rule.format or "")
    book = formatbook.BOOKS[fmt.book or ""]
    at = pairs.tokens.reshape(len(x), -1)  # [B, P * 2]

    def paired(values: jax.Array) -> jax.Array:
        """`[B, S, ...]` of the pairs' tokens, `[2, B, P, ...]`."""
        chosen = jax.vmap(lambda values, at: values[at])(values, at)
        return jnp.moveaxis(chosen.reshape(*pairs.tokens.shape, *values.shape[2:]), 2, 0)

    u = dialect.scaled(blocked(paired(x).astype(jnp.float32), -1, fmt)).u  # [2, B, P, G, block]
    books = None if allowed is None else paired(allowed)
    shapes = select.choose(u, book, Choice(rule.rule or "two_stage", allowed=books))
    top = select.nearest_top(largest_magnitude(u), book)
    mine = u[0]
    each = _rounded(mine, shapes, book)  # as both tokens round
    both = jnp.stack([jnp.square(each[0] - each[1]), jnp.square(mine)], axis=-1).sum(axis=-2)
    alike = top[0] == top[1]  # [B, P, G]
    per_pair = jnp.where(alike[..., None], both, 0).sum(axis=-2)  # [B, P, 2]
    by_kind = jax.vmap(lambda each, kind: jax.ops.segment_sum(each, kind, kinds + 1))
    return by_kind(per_pair, pairs.kind)[:, :kinds]


def _rounded(u: jax.Array, ids: jax.Array, book: formatbook.Book) -> jax.Array:
    """Magnitudes `[..., block]` as dialects `[2, ...]` hold them, `[2, ..., block]` half-units."""
    index = jnp.asarray(formatbook.index_table(book))[ids[..., None], select.bins(u)]
    values = jnp.asarray(formatbook.magnitudes(book), jnp.float32)
    return values[ids[..., None], index.astype(jnp.int32)]
