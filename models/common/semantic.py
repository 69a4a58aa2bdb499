"""SemanticDialect online: a quantizer that learns from attention which tokens belong together.

On refresh steps every block chooses its dialects freely and looks at what it computes: attention
says which tokens are salient and which belong to them, the inputs of the linears say which shapes
each group should keep to. The steps until the next refresh use that. Salient tokens also get a
second term in the layers that the plan picked.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.common.quantizer import Input, SiteRule, first_match
from sdq import fake_quantize, saliency, seda
from sdq.decompose import decompose

SALIENCY = ("cross", "self", "error")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sharing:
    """SeDA's knobs.

    Attributes:
      anchors: of each video.
      window: how far an anchor reaches along (T, H, W), in tokens.
      least: shared attention below which a token stays alone, in units of an even spread.
      members: shapes that a group allows each top.
    """

    anchors: int = 32
    window: tuple[int, int, int] = (8, 2, 2)
    least: float = 1.0
    members: int = 1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Decomposition:
    """Where salient tokens are quantised twice.

    Attributes:
      tokens: how many of each video.
      layers: (site, block numbers) pairs.
    """

    tokens: int
    layers: tuple[tuple[str, tuple[int, ...]], ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What one block knows; stacked over the blocks outside.

    Attributes:
      refresh: bool `[]`, whether this step looks.
      salient: token numbers, int32 `[B, n]`, most salient first.
      group: of each token, int32 `[B, S]`.
      books: sub-formatbooks by site, uint8 `[B, anchors + 1, 8]`.
      active: by site, whether this block decomposes, bool `[]`.
    """

    refresh: jax.Array
    salient: jax.Array
    group: jax.Array
    books: dict[str, jax.Array]
    active: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SemanticDialect:
    """A Quantizer.

    Attributes:
      rules: formats by site; dialect formats at the sites of the video's tokens.
      grid: tokens of a video along (T, H, W).
      sites: of the blocks, those whose inputs are the video's tokens.
      sharing: SeDA, or None.
      decomposition: or None.
      saliency: "cross": how distinct a token's cross-attention is; "self": attention received;
        "error": what quantising left over, at each site and step.
      stride: "self" asks every stride-th query.
      refresh_every: steps; 0 looks at the first step only.

    Anchors are the most salient tokens known when a block's self-attention is seen: with "cross"
    those of the refresh before, and evenly spread ones at the first; with "error" always those.
    """

    rules: tuple[SiteRule, ...]
    grid: tuple[int, int, int]
    sites: tuple[str, ...]
    sharing: Sharing | None = None
    decomposition: Decomposition | None = None
    saliency: str = "cross"
    stride: int = 8
    refresh_every: int = 4

    def __post_init__(self):
        if self.saliency not in SALIENCY:
            raise ValueError(
                f"saliency: expected one of {', '.join(SALIENCY)}, got {self.saliency!r}"
            )
        for name in ("anchors", "tokens"):
            part = self.sharing if name == "anchors" else self.decomposition
            if part is not None and not 0 < getattr(part, name) <= self.tokens:
                raise ValueError(
                    f"{name}: expected in [1, {self.tokens}], got {getattr(part, name)}"
                )
        unknown = {site for site, _ in self._layers} - set(self.sites)
        if unknown:
            raise ValueError(f"decomposition: no such site: {', '.join(sorted(unknown))}")

    @property
    def tokens(self) -> int:
        """Tokens of a video."""
        return int(np.prod(self.grid))

    @property
    def _sharing_sites(self) -> tuple[str, ...]:
        """Where there is a choice to share; a site that is kept or has another format has none."""
        rules = {site: first_match(self.rules, site) for site in self.sites}
        return tuple(
            site
            for site, rule in rules.items()
            if self.sharing and rule is not None and rule.rule == "two_stage"
        )

    @property
    def _layers(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        return self.decomposition.layers if self.decomposition else ()

    @property
    def _salient(self) -> int:
        """How many salient tokens are remembered."""
        return max(
            self.sharing.anchors if self.sharing else 1,
            self.decomposition.tokens if self.decomposition else 1,
        )

    def initial_state(self, blocks: int, batch: int) -> State:
        """Nobody is in a group; the salient tokens are evenly spread. Stacked over the blocks."""
        spread = jnp.linspace(0, self.tokens - 1, self._salient).round().astype(jnp.int32)
        anchors = self.sharing.anchors if self.sharing else 0
        books = jnp.full((batch, anchors + 1, 8), 15, jnp.uint8)
        one = State(
            refresh=jnp.array(False),
            salient=jnp.broadcast_to(spread, (batch, self._salient)),
            group=jnp.full((batch, self.tokens), anchors, jnp.int32),
            books=dict.fromkeys(self._sharing_sites, books),
            active={},
        )
        stacked = jax.tree.map(lambda x: jnp.broadcast_to(x, (blocks, *x.shape)), one)
        active = {
            site: jnp.asarray([block in layers for block in range(blocks)])
            for site, layers in self._layers
        }
        return dataclasses.replace(stacked, active=active)

    def at_step(self, state: State, step: jax.Array) -> State:
        """The state with which sampling step number `step` begins."""
        every = self.refresh_every
        refresh = (step % every == 0) if every else (step == 0)
        return dataclasses.replace(state, refresh=jnp.broadcast_to(refresh, state.refresh.shape))

    def quantize(self, x: jax.Array, site: str, state: State | None) -> Input:
        """x `[B, S, K]`, rounded within its token's sub-formatbook, decomposed where planned."""
        rule = first_match(self.rules, site)
        if rule is None or rule.format is None:
            return x
        allowed = None
        if state is not None and site in state.books:
            allowed = seda.allowed(state.books[site], state.group)
            allowed = jnp.where(state.refresh, jnp.uint8(15), allowed)
        base = fake_quantize(x, rule.format, select=rule.rule, allowed=allowed)
        if state is None or site not in state.active:
            return base
        assert self.decomposition is not None
        tokens = state.salient[:, : self.decomposition.tokens]
        if self.saliency == "error":
            left = jnp.sum(jnp.square(x.astype(jnp.float32) - base.astype(jnp.float32)), axis=-1)
            tokens = saliency.most_salient(left, self.decomposition.tokens)
        return decompose(x, base, tokens, state.active[site], rule.format, rule.rule)

    def saw_input(self, x: jax.Array, site: str, state: State | None) -> State | None:
        """Sub-formatbooks for this site's groups, on a refresh step."""
        if state is None or site not in state.books or self.sharing is None:
            return state
        rule = first_match(self.rules, site)
        assert rule is not None and rule.format is not None
        sharing, fmt = self.sharing, rule.format

        def look() -> jax.Array:
            return seda.sub_formatbooks(
                x, state.group, fmt, count=sharing.anchors, members=sharing.members
            )

        book = jax.lax.cond(state.refresh, look, lambda: state.books[site])
        return dataclasses.replace(state, books={**state.books, site: book})

    def saw_attention(
        self, q: jax.Array, k: jax.Array, site: str, state: State | None
    ) -> State | None:
        """Salient tokens and groups, on a refresh step."""
        if state is None:
            return state
        salient, group = jax.lax.cond(
            state.refresh,
            lambda: self._look(q, k, site, state),
            lambda: (state.salient, state.group),
        )
        return dataclasses.replace(state, salient=salient, group=group)

    def _look(
        self, q: jax.Array, k: jax.Array, site: str, state: State
    ) -> tuple[jax.Array, jax.Array]:
        salient, group = state.salient, state.group
        if site.endswith("cross_attn"):
            if self.saliency == "cross":
                salient = saliency.most_salient(saliency.distinct_attention(q, k), self._salient)
            return salient, group
        if self.saliency == "self":
            received = saliency.attention_received(q, k, stride=self.stride)
            salient = saliency.most_salient(received, self._salient)
        if self.sharing is not None:
            group = seda.groups(
                q,
                k,
                salient[:, : self.sharing.anchors],
                grid=self.grid,
                window=self.sharing.window,
                least=self.sharing.least,
            )
        return salient, group


def extra_work(
    decomposition: Decomposition, work: Mapping[str, Any], tokens: int, blocks: int
) -> float:
    """Matrix products that decomposition adds, as a share of those of all sites.

    Args:
      decomposition: the plan.
      work: multiplications of each site's linears for a token.
      tokens: of a video.
      blocks: of the model.
    """
    added = sum(work[site] * len(layers) for site, layers in decomposition.layers)
    return added * decomposition.tokens / tokens / (sum(work.values()) * blocks)
