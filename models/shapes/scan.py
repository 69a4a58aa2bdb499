"""The data-free scan of the shapes model: its own samples for captions drawn from the grammar."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.common.layers import Ops
from models.common.quantizer import SiteRule
from models.common.sampler import sigmas, velocity_from_x0
from models.common.scan import Probe, ProbeState, noise_power, second_moments
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


def moments(params: Any, seen: Seen, dtype: Any = jnp.bfloat16) -> dict[str, jax.Array]:
    """E[x x^T] of every site's inputs, float32 `[blocks, K, K]`, over all that was seen."""
    return _moments(params, seen.x, seen.levels, seen.tokens, dtype=dtype)


@functools.partial(jax.jit, static_argnames="dtype")
def _moments(params, x, levels, tokens, *, dtype):
    model = Shapes(CONFIG, dtype=dtype)

    def step(x: jax.Array, level: jax.Array) -> dict[str, jax.Array]:
        level = jnp.broadcast_to(level, len(x))
        _, found = model.apply({"params": params}, x, level, tokens, mutable=["intermediates"])
        blocks = flatten(found["intermediates"]["dit"]["blocks"])
        return second_moments(
            {site: blocks[site.removeprefix("blocks/") + "_input"] for site in SITES}
        )

    def add(total, seen):
        return jax.tree.map(jnp.add, total, step(*seen)), None

    first = step(x[0], levels[0])
    total, _ = jax.lax.scan(add, first, (x[1:], levels[1:]))
    return jax.tree.map(lambda m: m / len(x), total)


def noise(
    params: Any,
    seen: Seen,
    fmt: str,
    *,
    probes: int = 4,
    seed: int = 0,
    dtype: Any = jnp.bfloat16,
    on_step: Callable[[np.ndarray], None] | None = None,
) -> dict[str, np.ndarray]:
    """How much of the velocity's error each site makes when its inputs are quantised.

    Returns:
      By site `[steps, blocks, bins]`: power over the velocity's own, salient tokens first.
    """
    rules = (SiteRule(r"blocks/.*", fmt),)
    probe = Probe(rules=rules, sites=tuple(VIDEO_SITES), tokens=TOKENS)
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
    return {site: np.asarray(power) for site, power in found.items()}


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
