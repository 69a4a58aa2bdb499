"""Measure a quantised shapes model against its reference, from the same captions and noise."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.common.sampler import Trajectory, sigmas
from models.shapes.config import CONFIG
from models.shapes.detect import Detection, detect, verdicts
from models.shapes.generate import Settings, initial_state, velocity
from models.shapes.modeling import Shapes
from models.shapes.render import flow, static_pixels
from models.shapes.world import Scene
from sdq import sqnr_db, video_metrics
from sdq.rules import flatten


@dataclasses.dataclass(frozen=True, slots=True)
class Model:
    """Weights and how to run them."""

    params: Any
    settings: Settings


def step_sqnr_db(
    model: Model,
    tokens: jax.Array,
    reference: Trajectory,
    on_step: Callable[[np.ndarray], None] | None = None,
) -> np.ndarray:
    """Teacher-forced: SQNR of the velocity where the reference was at each step, `[steps, B]`."""
    state = initial_state(model.settings, len(tokens))
    return np.asarray(teacher_forced(model, tokens, reference, state, on_step)[0])


def teacher_forced(
    model: Model,
    tokens: jax.Array,
    reference: Trajectory,
    state: Any,
    on_step: Callable[[np.ndarray], None] | None = None,
) -> tuple[jax.Array, Any]:
    """`step_sqnr_db` from a state of the quantizer, and its state after the last step."""
    levels = jnp.asarray(sigmas(model.settings.sampler)[:-1], jnp.float32)
    return _teacher_forced(
        model.params, tokens, reference, levels, state, settings=model.settings, on_step=on_step
    )


@functools.partial(jax.jit, static_argnames=("settings", "on_step"))
def _teacher_forced(params, tokens, reference, levels, state, *, settings: Settings, on_step):
    predict = velocity(params, tokens, settings)

    def one(state, step):
        seen, level, number = step
        v, state = predict(seen.x, level, number, state)
        decibels = jax.vmap(sqnr_db)(seen.v, v)
        if on_step is not None:
            jax.debug.callback(lambda number, _: on_step(number), number, decibels)
        return state, decibels

    state, decibels = jax.lax.scan(one, state, (reference, levels, jnp.arange(len(levels))))
    return decibels, state


@functools.partial(jax.jit, static_argnames=("settings",))
def _intermediates(params, tokens, x, sigma, *, settings: Settings):
    model = Shapes(CONFIG, settings.ops, settings.dtype)
    levels = jnp.broadcast_to(sigma, len(x))
    quantizer = settings.ops.quantizer
    state = quantizer.at_step(quantizer.initial_state(CONFIG.dit.layers, len(x)), jnp.int32(0))
    _, seen = model.apply({"params": params}, x, levels, tokens, state, mutable=["intermediates"])
    return flatten(seen["intermediates"]["dit"]["blocks"])


def layer_sqnr_db(
    reference: Model, quantised: Model, tokens: jax.Array, x: jax.Array, sigma: float
) -> dict[str, list[float]]:
    """SQNR of every linear's input and every block's output, per depth, given the same x.

    A quantizer with a memory knows what it knows at the first step: it decomposes, but has not
    learned yet what to share.
    """
    seen, other = (
        _intermediates(m.params, tokens, x, jnp.float32(sigma), settings=m.settings)
        for m in (reference, quantised)
    )
    return {
        name.replace("_input", " input"): np.asarray(
            jax.vmap(sqnr_db)(seen[name].astype(jnp.float32), other[name].astype(jnp.float32))
        ).tolist()
        for name in seen
    }


def clip_scores(
    scene: Scene, reference: jax.Array, known: Detection, video: jax.Array
) -> dict[str, Any]:
    """Everything that is measured on one clip, against the reference clip of the same noise.

    Args:
      scene: what the caption says.
      reference: `[*VIDEO]` in [0, 1].
      known: what is detected in it: says which pixels should rest, and how the others move.
      video: `[*VIDEO]`.
    Returns:
      Scalars by name; "right" holds the verdicts.
    """
    return {
        "psnr_db": video_metrics.psnr_db(reference, video),
        "ssim": video_metrics.ssim(reference, video).mean(),
        "flicker": video_metrics.flicker(video, static_pixels(known.masks)),
        "warping_error": video_metrics.warping_error(video, *_known_flow(known)),
        "right": verdicts(scene, detect(video)),
    }


def _known_flow(known: Detection) -> tuple[jax.Array, jax.Array]:
    """Flow of the detected things, and the pixels that are clearly theirs or stay background."""
    thing = (known.masks[:-1] > 0.95).any(axis=1)
    free = (known.masks < 0.05).all(axis=1)
    moves = flow(known.centres, known.radii, known.masks)
    return moves, thing | (free[:-1] & free[1:])
