"""How differently the shapes model rounds the tokens of one thing (`common/consistency.py`).

Pairs are drawn from the tokens that show a thing in the reference's video, told apart by how many
frames of tokens lie between them: does what is shared survive the motion?
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.common.consistency import Observed, Pairs
from models.common.sampler import Trajectory, sigmas
from models.shapes.compare import Model
from models.shapes.config import CONFIG
from models.shapes.generate import Settings, velocity
from models.shapes.world import VIDEO
from models.wan.sites import VIDEO_SITES
from sdq import formats

GRID = CONFIG.dit.grid(VIDEO[:3])
PAIRS = 256  # of each video
COVERED = 0.5  # of a token's pixels, at least, show the thing


def has_choice(settings: Settings) -> bool:
    """Whether every input that is quantised has dialects to choose from."""
    names = [rule.format for rule in getattr(settings.ops.quantizer, "rules", ()) if rule.format]
    return bool(names) and all(formats.parse(name).has_choice for name in names)


def pairs_of(masks: jax.Array, key: jax.Array) -> Pairs:
    """Random pairs of tokens that show the same thing; the kind is the frames between them.

    Args:
      masks: how much of each pixel shows each thing, `[B, FRAMES, 2, WIDTH, WIDTH]`.
      key: of the draw.
    """
    batch, frames, things, height, width = masks.shape
    t, h, w = GRID
    patches = masks.reshape(batch, t, frames // t, things, h, height // h, w, width // w).mean(
        axis=(2, 5, 7)
    )
    shown = jnp.moveaxis(patches, 2, 1).reshape(batch, things, -1) >= COVERED

    def draw(shown: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        which, one, other = jax.random.split(key, 3)
        thing = jax.random.categorical(which, _log(shown.any(axis=-1)), shape=(PAIRS,))
        weights = _log(shown)[thing]
        tokens = jnp.stack([jax.random.categorical(k, weights) for k in (one, other)], axis=-1)
        apart = jnp.abs(tokens[:, 0] // (h * w) - tokens[:, 1] // (h * w))
        counts = shown.any() & (tokens[:, 0] != tokens[:, 1])
        return tokens.astype(jnp.int32), jnp.where(counts, apart, t).astype(jnp.int32)

    tokens, kind = jax.vmap(draw)(shown, jax.random.split(key, batch))
    return Pairs(tokens=tokens, kind=kind)


def inconsistency(
    model: Model, tokens: jax.Array, reference: Trajectory, masks: jax.Array, key: jax.Array
) -> np.ndarray:
    """Teacher-forced along the reference's trajectory, over all steps, sites and blocks.

    Args:
      model: whose settings have a quantizer with dialect formats.
      tokens: captions int32 `[B, CAPTION_TOKENS]`.
      reference: where the reference was.
      masks: of the things in its videos, `[B, FRAMES, 2, WIDTH, WIDTH]`.
      key: of the pairs.
    Returns:
      Float `[B, frames of tokens, 2]`: squared differences and squares, by frames between them.
    """
    levels = jnp.asarray(sigmas(model.settings.sampler)[:-1], jnp.float32)
    return np.asarray(
        _sums(model.params, tokens, reference, levels, masks, key, settings=model.settings)
    )


@functools.partial(jax.jit, static_argnames="settings")
def _sums(params, tokens, reference, levels, masks, key, *, settings: Settings):
    quantizer = Observed(base=settings.ops.quantizer, sites=tuple(VIDEO_SITES), kinds=GRID[0])
    ops = dataclasses.replace(settings.ops, quantizer=quantizer)
    settings = dataclasses.replace(settings, ops=ops)
    predict = velocity(params, tokens, settings)
    pairs = pairs_of(masks, key)
    if settings.guidance != 1:  # the half without a caption is no part of it
        ignored = Pairs(tokens=pairs.tokens, kind=jnp.full_like(pairs.kind, GRID[0]))
        pairs = jax.tree.map(lambda *halves: jnp.concatenate(halves), pairs, ignored)
    state = quantizer.initial_state(CONFIG.dit.layers, len(pairs.kind), pairs)

    def one(state: Any, step: Any) -> tuple[Any, None]:
        x, level, number = step
        return predict(x, level, number, state)[1], None

    state, _ = jax.lax.scan(one, state, (reference.x, levels, jnp.arange(len(levels))))
    return sum(of.sum(axis=0)[: len(tokens)] for of in state.sums.values())


def _log(yes: jax.Array) -> jax.Array:
    """Weights of a categorical draw: even among the true ones, and finite if there are none."""
    return jnp.where(yes, 0.0, -1e9)
