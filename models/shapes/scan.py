"""The data-free scan of the shapes model: its own samples for captions drawn from the grammar."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.common.layers import Ops
from models.common.quantizer import SiteRule
from models.common.sampler import sigmas, velocity_from_x0
from models.common.scan import (
    SHARES,
    InputStatistics,
    Probe,
    ProbeState,
    Proposal,
    input_statistics,
    linear_work,
    noise_power,
    propose,
    quiet_layers,
    token_count,
)
from models.common.semantic import Decomposition, Layers
from models.shapes.config import CONFIG
from models.shapes.generate import Settings, generate, start
from models.shapes.modeling import Shapes
from models.shapes.world import VIDEO, caption_tokens, sample_scene
from models.wan.sites import SITES, VIDEO_SITES
from sdq.rules import flatten

TOKENS = int(np.prod(CONFIG.dit.grid(VIDEO[:3])))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """Points on the model's own trajectories.

    Attributes:
      x: noisy videos `[steps, B, *VIDEO]`.
      levels: noise levels `[steps]`.
      tokens: captions int32 `[B, CAPTION_TOKENS]`.
    """

    x: jax.Array
    levels: jax.Array
    tokens: jax.Array

    def thinned(self, steps: int) -> "Seen":
        """At most so many steps, evenly spread."""
        number = np.unique(np.linspace(0, len(self.x) - 1, steps).round().astype(int))
        return dataclasses.replace(self, x=self.x[number], levels=self.levels[number])


def watch(
    params: Any,
    settings: Settings,
    *,
    captions: int = 4,
    seed: int = 0,
    on_step: Callable[[np.ndarray], None] | None = None,
) -> Seen:
    """Sample videos of random captions, none of them held out; keep every step."""
    key = jax.random.key(seed)
    scenes = jax.vmap(sample_scene)(jax.random.split(jax.random.fold_in(key, 0), captions))
    tokens = jax.vmap(caption_tokens)(scenes)
    noise = start(jax.random.fold_in(key, 1), np.arange(captions))
    _, seen = generate(params, tokens, noise, settings=settings, trajectory=True, on_step=on_step)
    levels = jnp.asarray(sigmas(settings.sampler)[:-1], jnp.float32)
    return Seen(x=seen.x, levels=levels, tokens=tokens)


def statistics(params: Any, seen: Seen, dtype: Any = jnp.bfloat16) -> dict[str, InputStatistics]:
    """Of every site's inputs, over all that was seen."""
    return _statistics(params, seen.x, seen.levels, seen.tokens, dtype=dtype)


@functools.partial(jax.jit, static_argnames="dtype")
def _statistics(params, x, levels, tokens, *, dtype):
    model = Shapes(CONFIG, dtype=dtype)

    def step(x: jax.Array, level: jax.Array) -> dict[str, InputStatistics]:
        level = jnp.broadcast_to(level, len(x))
        _, found = model.apply({"params": params}, x, level, tokens, mutable=["intermediates"])
        blocks = flatten(found["intermediates"]["dit"]["blocks"])
        return input_statistics(
            {site: blocks[site.removeprefix("blocks/") + "_input"] for site in SITES}
        )

    def add(total, seen):
        new = step(*seen)
        return {site: total[site].plus(new[site]) for site in total}, None

    total, _ = jax.lax.scan(add, step(x[0], levels[0]), (x[1:], levels[1:]))
    return {
        site: of._replace(second_moment=of.second_moment / len(x)) for site, of in total.items()
    }


def noise(
    params: Any,
    seen: Seen,
    rules: Sequence[SiteRule],
    *,
    probes: int = 2,
    seed: int = 0,
    dtype: Any = jnp.bfloat16,
    on_step: Callable[[np.ndarray], None] | None = None,
) -> dict[str, np.ndarray]:
    """How much of the velocity's error each site makes when its inputs are quantised.

    Returns:
      By site `[steps, blocks, bins]`: power over the velocity's own, salient tokens first.
    """
    probe = Probe(rules=tuple(rules), sites=tuple(VIDEO_SITES), tokens=TOKENS)
    found = _noise(
        params,
        seen.x,
        seen.levels,
        seen.tokens,
        jax.random.key(seed),
        probe=probe,
        probes=probes,
        dtype=dtype,
        on_step=on_step,
    )
    return {site: np.asarray(found[site]) for site in VIDEO_SITES}  # in the order of the model


def bins_of(tokens: int) -> int:
    """How many of the scan's bins hold so many tokens."""
    return 1 + [token_count(share, TOKENS) for share in SHARES].index(tokens)


def plan(
    params: Any, noise: Mapping[str, np.ndarray], budget: float, salient: float | None = None
) -> Proposal:
    """Where decomposition pays, by the mean noise over the steps; of `salient` tokens if given."""
    work = linear_work(params["dit"]["blocks"], VIDEO_SITES)
    shares = SHARES if salient is None else (salient,)
    return propose(_mean(noise), work, TOKENS, budget, shares)


def sharing_layers(
    noise: Mapping[str, np.ndarray], decomposition: Decomposition | None, part: float
) -> Layers:
    """Where sharing sub-formatbooks costs little: layers that make at most that part of noise."""
    if decomposition is None:
        return quiet_layers(_mean(noise), (), 0, part)
    bins = bins_of(decomposition.tokens)
    return quiet_layers(_mean(noise), decomposition.layers, bins, part)


def _mean(noise: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {site: power.mean(axis=0) for site, power in noise.items()}


@functools.partial(jax.jit, static_argnames=("probe", "probes", "dtype", "on_step"))
def _noise(params, x, levels, tokens, key, *, probe: Probe, probes: int, dtype, on_step):
    def one(_, seen):
        x, level, number = seen

        def velocity(probe: Probe, state: ProbeState) -> tuple[jax.Array, Any]:
            model = Shapes(CONFIG, Ops(quantizer=probe), dtype, remat=True)
            level_of_each = jnp.broadcast_to(level, len(x))
            x0, seen = model.apply({"params": params}, x, level_of_each, tokens, state)
            return velocity_from_x0(x, jnp.asarray(x0), level, CONFIG.sigma_floor), seen

        state = probe.initial_state(CONFIG.dit.layers, len(x))
        _, state = velocity(dataclasses.replace(probe, ranking=True), state)
        power = noise_power(
            lambda state: velocity(probe, state)[0],
            state,
            jax.random.fold_in(key, number),
            probes,
        )
        if on_step is not None:
            jax.debug.callback(lambda number, _: on_step(number), number, power)
        return None, power

    steps = jnp.arange(len(levels))
    return jax.lax.scan(one, None, (x, levels, steps))[1]
