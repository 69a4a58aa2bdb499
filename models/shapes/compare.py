"""Measure a quantised shapes model against its reference, from the same captions and noise."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.common.sampler import Trajectory, sigmas
from models.shapes.config import CONFIG
from models.shapes.detect import Detection, detect, verdicts
from models.shapes.generate import Settings, velocity
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


@functools.partial(jax.jit, static_argnames=("settings",))
def _velocities(params, tokens, x, levels, *, settings: Settings):
    def one(_, step):
        return None, velocity(params, tokens, settings)(step[0], step[1], jnp.int32(0), ())[0]

    return jax.lax.scan(one, None, (x, levels))[1]


def step_sqnr_db(model: Model, tokens: jax.Array, reference: Trajectory) -> np.ndarray:
    """Teacher-forced: SQNR of the velocity where the reference was at each step, `[steps, B]`."""
    levels = jnp.asarray(sigmas(model.settings.sampler)[:-1], jnp.float32)
    v = _velocities(model.params, tokens, reference.x, levels, settings=model.settings)
    return np.asarray(jax.vmap(jax.vmap(sqnr_db))(reference.v, v))


@functools.partial(jax.jit, static_argnames=("settings",))
def _intermediates(params, tokens, x, sigma, *, settings: Settings):
    model = Shapes(CONFIG, settings.ops, settings.dtype)
    levels = jnp.broadcast_to(sigma, len(x))
    _, seen = model.apply({"params": params}, x, levels, tokens, mutable=["intermediates"])
    return flatten(seen["intermediates"]["dit"]["blocks"])


def layer_sqnr_db(
    reference: Model, quantised: Model, tokens: jax.Array, x: jax.Array, sigma: float
) -> dict[str, list[float]]:
    """SQNR of every linear's input and every block's output, per depth, given the same x."""
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


@jax.jit
def clip_scores(scene: Scene, reference: jax.Array, video: jax.Array) -> dict[str, Any]:
    """Everything that is measured on one clip, against the reference clip of the same noise.

    Flow and static pixels come from the things that are detected in the reference.

    Args:
      scene: what the caption says (`scene_of`).
      reference: `[*VIDEO]` in [0, 1].
      video: `[*VIDEO]`.
    """
    known = detect(reference)
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
