"""The data-free scan: what a model's own samples say about the inputs of its linears.

Needs prompts and noise, no data set. Two questions are asked at points of the sampling trajectory:
how large inputs are and how they vary together (`input_statistics`), and how much of the error of
the output each site of each block makes, salient tokens apart (`Probe`, `noise_power`), from which
`propose` plans where activation decomposition pays.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from models.common.quantizer import Input, Keep, SiteRule, first_match
from models.common.semantic import Decomposition, Layers, extra_work
from pallas_kernels import Deferred, Projected, computed, prepared
from sdq import saliency

SHARES = (0.05, 0.1, 0.2, 0.4, 1.0)  # of the tokens, most salient first: edges of the scan's bins


class InputStatistics(NamedTuple):
    """Of the inputs of one site; leading axis: the blocks.

    Attributes:
      second_moment: E[x x^T], float32 `[blocks, K, K]`.
      largest: magnitude of each channel, float32 `[blocks, K]`.
    """

    second_moment: jax.Array
    largest: jax.Array

    def plus(self, other: "InputStatistics") -> "InputStatistics":
        """Of both samples; second moments are summed."""
        return InputStatistics(
            self.second_moment + other.second_moment, jnp.maximum(self.largest, other.largest)
        )


def input_statistics(inputs: Mapping[str, jax.Array]) -> dict[str, InputStatistics]:
    """By site, of inputs `[blocks, B, S, K]`."""

    def one(x: jax.Array) -> InputStatistics:
        x = x.reshape(len(x), -1, x.shape[-1])
        product = jnp.einsum("lsi,lsj->lij", x, x, preferred_element_type=jnp.float32)
        return InputStatistics(product / x.shape[1], jnp.abs(x).max(axis=1).astype(jnp.float32))

    return {site: one(x) for site, x in inputs.items()}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ProbeState:
    """Of one block; stacked over the blocks outside.

    Attributes:
      share: of the quantisation error that is let in, by site, `[B, bins]`; 0 lets none in.
      bin: of each token by its saliency, 0 the most salient, int32 `[B, S]`.
    """

    share: dict[str, jax.Array]
    bin: jax.Array


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Probe(Keep):
    """A Quantizer whose errors come in shares that one can differentiate by.

    Attributes:
      rules: formats by site.
      sites: of the blocks, those whose inputs are the video's tokens.
      tokens: of a video.
      ranking: look at the attention and rank the tokens; else keep the state's ranks.
    """

    rules: tuple[SiteRule, ...]
    sites: tuple[str, ...]
    tokens: int
    ranking: bool = False

    def initial_state(self, blocks: int, batch: int) -> ProbeState:  # type: ignore[override]
        """No error is let in, all tokens are alike."""
        return ProbeState(
            share={site: jnp.zeros((blocks, batch, len(SHARES))) for site in self.sites},
            bin=jnp.zeros((blocks, batch, self.tokens), jnp.int32),
        )

    def quantize(self, x: jax.Array | Deferred, site: str, state: ProbeState | None) -> Input:
        """x plus the let-in share of its quantisation error."""
        x = computed(x)
        rule = first_match(self.rules, site)
        if state is None or site not in state.share or rule is None:
            return x
        turned = computed(rule.turned(x))
        error = rule.rounded(turned) - turned
        error = jax.lax.stop_gradient(computed(rule.turned(error)))  # and back
        share = jnp.take_along_axis(state.share[site], state.bin, axis=1)
        return x + (share[..., None] * error.astype(jnp.float32)).astype(x.dtype)

    def saw_attention(
        self,
        q: jax.Array | Projected,
        k: jax.Array | Projected,
        site: str,
        state: ProbeState | None,
    ) -> ProbeState | None:
        """Ranks by cross-attention, where asked for."""
        if state is None or not self.ranking or not site.endswith("cross_attn"):
            return state
        score = saliency.distinct_attention(prepared(q), prepared(k))
        rank = jnp.argsort(jnp.argsort(-score, axis=-1), axis=-1)
        edges = jnp.asarray([token_count(share, self.tokens) for share in SHARES[:-1]])
        ranked = jnp.searchsorted(edges, rank.reshape(-1), side="right").reshape(rank.shape)
        return dataclasses.replace(state, bin=ranked.astype(jnp.int32))


def token_count(share: float, tokens: int) -> int:
    """How many tokens a share is; at least one."""
    return max(1, round(share * tokens))


def noise_power(
    output: Callable[[ProbeState], jax.Array], state: ProbeState, key: jax.Array, probes: int
) -> dict[str, jax.Array]:
    """What quantising each site adds to the output's error, to first order.

    With J the derivative of the output by an input and e that input's error, `|J e|^2` is the mean
    of `<z, J e>^2` over random z: one backward pass for each z measures all sites of all blocks.

    Args:
      output: of a model with a Probe, `[B, ...]`.
      state: with the tokens' ranks; shares 0.
      key: of the z.
      probes: how many; the relative error is sqrt(2 / (probes * B * times it is called)).
    Returns:
      By site float32 `[blocks, bins]`: power over the output's own, mean over the batch.
    """

    def projected(share: dict[str, jax.Array], z: jax.Array) -> jax.Array:
        return jnp.vdot(z, output(dataclasses.replace(state, share=share)))

    signal = output(state)
    power = jnp.sum(jnp.square(signal).reshape(len(signal), -1), axis=-1)  # [B]

    def one(total: dict[str, jax.Array], key: jax.Array) -> tuple[dict[str, jax.Array], None]:
        z = jax.random.rademacher(key, signal.shape, signal.dtype)
        slopes = jax.grad(projected)(state.share, z)
        return jax.tree.map(lambda t, s: t + jnp.square(s), total, slopes), None

    nothing = jax.tree.map(jnp.zeros_like, state.share)
    total, _ = jax.lax.scan(one, nothing, jax.random.split(key, probes))
    return {
        site: jnp.mean(value / power[None, :, None], axis=1) / probes
        for site, value in total.items()
    }


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """Where decomposition pays.

    Attributes:
      decomposition: the plan.
      extra_work: matrix products that it adds, as a share of those of all sites.
      noise_before, noise_after: of quantised inputs, power over the output's own, as predicted.
    """

    decomposition: Decomposition
    extra_work: float
    noise_before: float
    noise_after: float


def propose(
    noise: Mapping[str, np.ndarray],
    work: Mapping[str, int],
    tokens: int,
    budget: float,
    shares: Sequence[float] = SHARES,
) -> Proposal:
    """The plan that takes most noise away within a budget.

    For each share of the tokens, pairs of site and block are taken in the order of what they give
    for what they cost; the best share wins. A second quantisation leaves about a hundredth of the
    first one's noise, which is counted as nothing.

    Args:
      noise: by site `[blocks, bins]`, of `noise_power`.
      work: multiplications for a token by site, of one block; all sites of the blocks.
      tokens: of a video.
      budget: extra products, as a share of all.
      shares: of the tokens, which to consider; of SHARES.
    """
    if not budget > 0:
        raise ValueError(f"budget: expected a positive share, got {budget}")
    blocks = len(next(iter(noise.values())))
    total_work = sum(work.values()) * blocks
    before = float(sum(value.sum() for value in noise.values()))
    best: Proposal | None = None
    for share in shares:
        bins = 1 + SHARES.index(share)
        count = token_count(share, tokens)
        gains = {
            (site, block): float(value[block, :bins].sum())
            for site, value in noise.items()
            for block in range(blocks)
        }
        chosen, spent, gained = [], 0.0, 0.0
        for site, block in sorted(gains, key=lambda at: gains[at] / work[at[0]], reverse=True):
            cost = work[site] * count / tokens / total_work
            if spent + cost <= budget:
                chosen.append((site, block))
                spent, gained = spent + cost, gained + gains[site, block]
        decomposition = Decomposition(tokens=count, layers=_by_site(noise, chosen))
        found = Proposal(
            decomposition=decomposition,
            extra_work=extra_work(decomposition, work, tokens, blocks),
            noise_before=before,
            noise_after=before - gained,
        )
        if best is None or found.noise_after < best.noise_after:
            best = found
    assert best is not None
    return best


def quiet_layers(
    noise: Mapping[str, np.ndarray], decomposed: Layers, bins: int, part: float
) -> Layers:
    """The layers that make least noise, as long as together they make at most a part of it.

    Args:
      noise: by site `[blocks, bins]`, of `noise_power`.
      decomposed: where the most salient tokens make no noise.
      bins: of those tokens.
      part: of the noise, in (0, 1].
    """
    exact = dict(decomposed)
    left = {
        (site, block): float(power[bins if block in exact.get(site, ()) else 0 :].sum())
        for site, by_block in noise.items()
        for block, power in enumerate(by_block)
    }
    quiet, total, sum_ = [], sum(left.values()), 0.0
    for layer in sorted(left, key=left.__getitem__):
        sum_ += left[layer]
        if sum_ <= part * total:
            quiet.append(layer)
    return _by_site(noise, quiet)


def linear_work(params: Any, sites: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Multiplications for a token by site, from the stacked kernels `[blocks, K, N]`."""

    def leaf(path: str) -> Any:
        node = params
        for name in path.split("/"):
            node = node[name]
        return node["kernel"]

    return {
        site: sum(int(np.prod(leaf(kernel).shape[-2:])) for kernel in kernels)
        for site, kernels in sites.items()
    }


def _by_site(sites: Iterable[str], chosen: Sequence[tuple[str, int]]) -> Layers:
    """(site, block) pairs, gathered."""
    blocks = {site: tuple(sorted(b for s, b in chosen if s == site)) for site in sites}
    return tuple((site, of) for site, of in blocks.items() if of)
