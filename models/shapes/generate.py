"""Captions to videos with the shapes model."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.common.layers import Ops
from models.common.sampler import (
    Sampler,
    Trajectory,
    Velocity,
    guided,
    noise,
    sample,
    velocity_from_x0,
)
from models.shapes.config import CONFIG
from models.shapes.modeling import Shapes
from models.shapes.world import VIDEO

PLAIN_OPS = Ops()
SAMPLER = Sampler(steps=24, shift=3.0, solver="unipc")
GUIDANCE = 2.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How videos are sampled; hashable, so that `jit` compiles each once.

    Attributes:
      sampler: steps, shift and solver.
      guidance: how far captions are followed beyond the model's own prediction; 1 is none.
      ops: matmul, attention and input quantisation of the model.
      dtype: that the model computes in.
    """

    sampler: Sampler = SAMPLER
    guidance: float = GUIDANCE
    ops: Ops = PLAIN_OPS
    dtype: Any = jnp.bfloat16


def velocity(params: Any, tokens: jax.Array, settings: Settings) -> Velocity:
    """The guided velocity of a batch of captions int32 `[B, CAPTION_TOKENS]`."""
    model = Shapes(CONFIG, settings.ops, settings.dtype)

    def predict(x, sigma, step, state, tokens):
        levels = jnp.broadcast_to(sigma, len(x))
        if state is None:
            x0 = model.apply({"params": params}, x, levels, tokens)
        else:
            state = settings.ops.quantizer.at_step(state, step)
            x0, state = model.apply({"params": params}, x, levels, tokens, state)
        return velocity_from_x0(x, jnp.asarray(x0), sigma, CONFIG.sigma_floor), state

    return guided(predict, tokens, jnp.zeros_like(tokens), settings.guidance)


def initial_state(settings: Settings, captions: int) -> Any:
    """What the quantizer knows before the first step, or None if it remembers nothing."""
    quantizer = settings.ops.quantizer
    evaluated = captions if settings.guidance == 1 else 2 * captions
    return quantizer.initial_state(CONFIG.dit.layers, evaluated)


def start(key: jax.Array, prompts: np.ndarray | jax.Array) -> jax.Array:
    """Noise for each prompt number, `[B, *VIDEO]`: the same number gets the same noise anywhere."""
    return jax.vmap(lambda n: noise(jax.random.fold_in(key, n), VIDEO))(jnp.asarray(prompts))


@functools.partial(
    jax.jit, static_argnames=("settings", "trajectory", "on_step"), donate_argnames="x"
)
def generate(
    params: Any,
    tokens: jax.Array,
    x: jax.Array,
    *,
    settings: Settings,
    trajectory: bool = False,
    on_step: Callable[[np.ndarray], None] | None = None,
) -> jax.Array | tuple[jax.Array, Trajectory]:
    """Videos float32 `[B, *VIDEO]` in [0, 1].

    Args:
      params: of the model, arrays or QTensors.
      tokens: captions int32 `[B, CAPTION_TOKENS]`.
      x: noise `[B, *VIDEO]`, donated.
      settings: how to sample.
      trajectory: also return every step's x and velocity.
      on_step: called with the number of each finished step.
    """
    result = sample(
        velocity(params, tokens, settings),
        x,
        settings.sampler,
        initial_state(settings, len(x)),
        trajectory=trajectory,
        on_step=on_step,
    )
    videos = jnp.clip((result[0] + 1) / 2, 0, 1)
    return (videos, result[-1]) if trajectory else videos
