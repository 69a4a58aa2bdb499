"""SemanticDialect online: a quantizer that learns from attention which tokens belong together.

On some steps every block looks at its attention, which says what tokens are salient and which of
them are alike. On the step after, it chooses its dialects freely and learns from the inputs of its
linears which shapes each group should keep to; the steps until the next look use that. Salient
tokens also get a second term in the layers that the plan picked.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.common.quantizer import Input, Rounding, SiteRule, first_match, plain_rounding
from pallas_kernels import Deferred, Projected, computed, prepared
from sdq import formats, saliency, seda
from sdq.decompose import Decomposed
from sdq.qtensor import blocks_of

SALIENCY = ("cross", "self", "error")
ALIKE = ("text", "attention")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sharing:
    """SeDA's knobs.

    Attributes:
      alike: by what tokens belong together: "text", how they look at the text (the cosine); or
        "attention", what they give each other, in units of an even spread.
      least: how alike at least.
      anchors: groups of each video, at most.
      candidates: how many of the most salient tokens the anchors are picked from.
      window: how far an anchor reaches along (T, H, W), in tokens; None is everywhere.
      members: shapes that a group allows each top.
      by_block: a sub-formatbook for each block of channels, not one for all.
      noise: the quietest layers share, as long as together they make at most this part of what
        quantised inputs do to the output (the data-free scan decides); 1 is all layers.
    """

    alike: str = "text"
    least: float = 0.5
    anchors: int = 4
    candidates: int = 64
    window: tuple[int, int, int] | None = None
    members: int = 1
    by_block: bool = True
    noise: float = 0.1

    def __post_init__(self):
        if not 0 < self.noise <= 1:
            raise ValueError(f"noise: expected a share in (0, 1], got {self.noise}")
        if self.alike not in ALIKE:
            raise ValueError(f"alike: expected one of {', '.join(ALIKE)}, got {self.alike!r}")
        if not 0 < self.anchors <= self.candidates:
            raise ValueError(
                f"anchors: expected in [1, {self.candidates}], the candidates, got {self.anchors}"
            )


Layers = tuple[tuple[str, tuple[int, ...]], ...]  # (site, block numbers) pairs


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Decomposition:
    """Where salient tokens are quantised twice.

    Attributes:
      tokens: how many of each video.
      layers: of the model.
    """

    tokens: int
    layers: Layers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What one block knows; stacked over the blocks outside.

    Attributes:
      look: bool `[]`, whether this step looks at the attention.
      learn: bool `[]`, whether this step chooses freely and learns the sub-formatbooks.
      salient: token numbers, int32 `[B, n]`, most salient first.
      group: of each token, int32 `[B, S]`.
      next_group: from the next step that learns on.
      books: sub-formatbooks by site, uint8 `[B, anchors + 1, G, 8]`.
      shares: by site, whether this block shares, bool `[]`.
      active: by site, whether this block decomposes, bool `[]`; sites where all do are not there.
    """

    look: jax.Array
    learn: jax.Array
    salient: jax.Array
    group: jax.Array
    next_group: jax.Array
    books: dict[str, jax.Array]
    shares: dict[str, jax.Array]
    active: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SemanticDialect:
    """A Quantizer.

    Attributes:
      rules: formats by site; dialect formats at the sites of the video's tokens.
      grid: tokens of a video along (T, H, W).
      sites: of the blocks, those whose inputs are the video's tokens; with the inputs' width.
      sharing: SeDA, or None.
      sharing_layers: where; None is everywhere.
      decomposition: or None.
      saliency: "cross": how distinct a token's cross-attention is; "self": attention received;
        "error": what quantising left over, at each site and step.
      stride: "self" asks every stride-th query.
      rounding: how inputs are rounded.
      refresh_every: steps between two that learn; 0 learns once. Step 0 looks and step 1 learns,
        then every so many steps one learns and the one before it looks.
      watches: False for a program of steps that neither look nor learn: a GPU waits whenever it is
        asked whether it should.

    Candidates for anchors are the most salient tokens known when the attention in question is seen:
    self-attention knows those of the look before (at the first, evenly spread ones).
    """

    rules: tuple[SiteRule, ...]
    grid: tuple[int, int, int]
    sites: tuple[tuple[str, int], ...]
    sharing: Sharing | None = None
    sharing_layers: Layers | None = None
    decomposition: Decomposition | None = None
    saliency: str = "cross"
    stride: int = 8
    refresh_every: int = 6
    rounding: Rounding = plain_rounding
    watches: bool = True

    def __post_init__(self):
        if self.saliency not in SALIENCY:
            raise ValueError(
                f"saliency: expected one of {', '.join(SALIENCY)}, got {self.saliency!r}"
            )
        if self.sharing is not None and self.refresh_every == 1:
            raise ValueError("refresh_every: a step that learns shares nothing; expected 0 or >= 2")
        rules = [first_match(self.rules, site) for site, _ in self.sites]
        if self.sharing is not None and not any(r and r.rule == "two_stage" for r in rules):
            raise ValueError("sharing: no input's blocks choose by two_stage: nothing to share")
        for name in ("candidates", "tokens"):
            part = self.sharing if name == "candidates" else self.decomposition
            if part is not None and not 0 < getattr(part, name) <= self.tokens:
                raise ValueError(
                    f"{name}: expected in [1, {self.tokens}], got {getattr(part, name)}"
                )
        for name, layers in (
            ("decomposition", self._layers),
            ("sharing_layers", self.sharing_layers or ()),
        ):
            unknown = {site for site, _ in layers} - {site for site, _ in self.sites}
            if unknown:
                raise ValueError(f"{name}: no such site: {', '.join(sorted(unknown))}")

    @property
    def tokens(self) -> int:
        """Tokens of a video."""
        return int(np.prod(self.grid))

    @property
    def _books(self) -> dict[str, int]:
        """How many a group has, by site: none where it is kept or its format has no choice."""
        if self.sharing is None:
            return {}
        found = {}
        for site, width in self.sites:
            rule = first_match(self.rules, site)
            if self.sharing_layers is not None and site not in dict(self.sharing_layers):
                continue
            if rule is not None and rule.rule == "two_stage":
                blocks, _ = blocks_of(width, formats.parse(rule.format or ""))
                found[site] = blocks if self.sharing.by_block else 1
        return found

    @property
    def _layers(self) -> Layers:
        return self.decomposition.layers if self.decomposition else ()

    @property
    def _salient(self) -> int:
        """How many salient tokens are remembered."""
        return max(
            self.sharing.candidates if self.sharing else 1,
            self.decomposition.tokens if self.decomposition else 1,
        )

    def initial_state(self, blocks: int, batch: int) -> State:
        """Nobody is in a group; the salient tokens are evenly spread. Stacked over the blocks."""
        spread = jnp.linspace(0, self.tokens - 1, self._salient).round().astype(jnp.int32)
        anchors = self.sharing.anchors if self.sharing else 0
        alone = jnp.full((batch, self.tokens), anchors, jnp.int32)
        one = State(
            look=jnp.array(False),
            learn=jnp.array(False),
            salient=jnp.broadcast_to(spread, (batch, self._salient)),
            group=alone,
            next_group=alone,
            books={
                site: jnp.full((batch, anchors + 1, count, 8), 15, jnp.uint8)
                for site, count in self._books.items()
            },
            shares={},
            active={},
        )
        stacked = jax.tree.map(lambda x: jnp.broadcast_to(x, (blocks, *x.shape)), one)

        def marked(layers: Layers) -> dict[str, jax.Array]:
            numbers = jnp.arange(blocks)
            return {site: jnp.isin(numbers, jnp.asarray(of, int)) for site, of in layers}

        everywhere = tuple((site, tuple(range(blocks))) for site in self._books)
        shares = everywhere if self.sharing_layers is None else self.sharing_layers
        some = tuple((site, of) for site, of in self._layers if set(of) != set(range(blocks)))
        return dataclasses.replace(stacked, shares=marked(shares), active=marked(some))

    def at_step(self, state: State, step: jax.Array) -> State:
        """The state with which sampling step number `step` begins."""
        every = self.refresh_every
        look, learn = step == 0, step == 1
        if every:
            look, learn = (
                look | ((step + 1) % every == 0),
                learn | ((step > 0) & (step % every == 0)),
            )
        return dataclasses.replace(
            state,
            look=jnp.broadcast_to(look, state.look.shape),
            learn=jnp.broadcast_to(learn, state.learn.shape),
            group=jnp.where(learn, state.next_group, state.group),
        )

    def quantize(self, x: jax.Array | Deferred, site: str, state: State | None) -> Input:
        """x `[B, S, K]`, rounded within its token's sub-formatbook, decomposed where planned."""
        rule = first_match(self.rules, site)
        if rule is None:
            return computed(x)
        x = rule.turned(x)
        if rule.format is None:
            return computed(x)
        books = self.sub_formatbooks(site, state)
        if state is None or self.decomposition is None or site not in dict(self._layers):
            return self.rounding(x, rule, books)[0]
        tokens = state.salient[:, : self.decomposition.tokens]
        if self.saliency == "error":
            base = rule.rounded(x, None if books is None else seda.allowed(*books))
            left = computed(x).astype(jnp.float32) - base.astype(jnp.float32)
            left = jnp.sum(jnp.square(left), axis=-1)
            tokens = saliency.most_salient(left, self.decomposition.tokens)
        rounded, residual = self.rounding(x, rule, books, tokens)
        active = state.active.get(site)
        return Decomposed(base=rounded, residual=residual, tokens=tokens, active=active)

    def sub_formatbooks(self, site: str, state: State | None) -> tuple[jax.Array, jax.Array] | None:
        """Those of a site's groups, and the group of each token; None: all is allowed."""
        if state is None or site not in state.books:
            return None
        books = state.books[site]
        alone = books.shape[1] - 1  # allows everything
        free = ~state.shares[site] | (state.learn if self.watches else False)
        return books, jnp.where(free, alone, state.group)

    def saw_input(self, x: jax.Array | Deferred, site: str, state: State | None) -> State | None:
        """Sub-formatbooks for this site's groups, on a step that learns."""
        if state is None or site not in state.books or self.sharing is None or not self.watches:
            return state
        rule = first_match(self.rules, site)
        assert rule is not None and rule.format is not None
        sharing, fmt, turn = self.sharing, rule.format, rule.turned

        def learned() -> jax.Array:
            return seda.sub_formatbooks(
                computed(turn(x)),
                state.group,
                fmt,
                count=sharing.anchors,
                members=sharing.members,
                by_block=sharing.by_block,
            )

        book = jax.lax.cond(state.learn, learned, lambda: state.books[site])
        return dataclasses.replace(state, books={**state.books, site: book})

    def saw_attention(
        self,
        q: jax.Array | Projected,
        k: jax.Array | Projected,
        site: str,
        state: State | None,
    ) -> State | None:
        """Salient tokens and the next groups, on a step that looks."""
        if state is None or not self.watches:
            return state
        salient, group = jax.lax.cond(
            state.look,
            lambda: self._look(prepared(q), prepared(k), site, state),
            lambda: (state.salient, state.next_group),
        )
        return dataclasses.replace(state, salient=salient, next_group=group)

    def _look(
        self, q: jax.Array, k: jax.Array, site: str, state: State
    ) -> tuple[jax.Array, jax.Array]:
        salient, group, sharing = state.salient, state.next_group, self.sharing
        of_text = site.endswith("cross_attn")
        if self.saliency == ("cross" if of_text else "self"):
            score = (
                saliency.distinct_attention(q, k)
                if of_text
                else saliency.attention_received(q, k, stride=self.stride)
            )
            salient = saliency.most_salient(score, self._salient)
        if sharing is not None and sharing.alike == ("text" if of_text else "attention"):
            candidates = salient[:, : sharing.candidates]
            alike = saliency.text_similarity if of_text else saliency.shared_attention
            group = seda.groups(
                alike(q, k, candidates),
                candidates,
                anchors=sharing.anchors,
                grid=self.grid,
                window=sharing.window,
                least=sharing.least,
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
