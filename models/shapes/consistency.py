"""How differently the shapes model rounds the tokens of one thing (`common/consistency.py`).

Pairs are drawn from the tokens that show a thing in the reference's video, told apart by how many
frames of tokens lie between them: does what is shared survive the motion?
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from models.common.consistency import Observed, Pairs
from models.common.sampler import Trajectory
from models.shapes.compare import Model, teacher_forced
from models.shapes.config import CONFIG
from models.shapes.generate import Settings
from models.shapes.world import VIDEO
from models.wan.sites import VIDEO_SITES
from sdq import formats

GRID = CONFIG.dit.grid(VIDEO[:3])
PAIRS = 64  # of each video
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
    model: Model,
    tokens: jax.Array,
    reference: Trajectory,
    masks: jax.Array,
    key: jax.Array,
    on_step: Callable[[np.ndarray], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Teacher-forced along the reference's trajectory, over all steps, sites and blocks.

    Args:
      model: whose settings have a quantizer with dialect formats.
      tokens: captions int32 `[B, CAPTION_TOKENS]`.
      reference: where the reference was.
      masks: of the things in its videos, `[B, FRAMES, 2, WIDTH, WIDTH]`.
      key: of the pairs.
      on_step: called with the number of each finished step.
    Returns:
      `compare.step_sqnr_db`, and float `[B, frames of tokens, 2]`: squared differences and
      squares, by frames between them.
    """
    ops = model.settings.ops
    quantizer = Observed(base=ops.quantizer, sites=tuple(VIDEO_SITES), kinds=GRID[0])
    settings = dataclasses.replace(
        model.settings, ops=dataclasses.replace(ops, quantizer=quantizer)
    )
    pairs = _pairs_of(masks, key, settings.guidance != 1)
    state = quantizer.initial_state(CONFIG.dit.layers, len(pairs.kind), pairs)
    observed = Model(model.params, settings)
    decibels, state = teacher_forced(observed, tokens, reference, state, on_step)
    sums = sum(of.sum(axis=0)[: len(tokens)] for of in state.sums.values())
    return np.asarray(decibels), np.asarray(sums)


@functools.partial(jax.jit, static_argnames="guided")
def _pairs_of(masks: jax.Array, key: jax.Array, guided: bool) -> Pairs:
    """`pairs_of`; under guidance followed by as many for the half without a caption, ignored."""
    pairs = pairs_of(masks, key)
    if not guided:
        return pairs
    ignored = Pairs(tokens=pairs.tokens, kind=jnp.full_like(pairs.kind, GRID[0]))
    return jax.tree.map(lambda *halves: jnp.concatenate(halves), pairs, ignored)


def _log(yes: jax.Array) -> jax.Array:
    """Weights of a categorical draw: even among the true ones, and finite if there are none."""
    return jnp.where(yes, 0.0, -1e9)
