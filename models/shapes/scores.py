"""Measure quantised shapes models on held-out captions, each from the same noise as the reference.

The noise floor beside them is the reference in another order of its channels: the same function,
whose sums round otherwise. What a metric says of it is what the metric says of nothing.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.common.progress import step_bar
from models.shapes.compare import Model, clip_scores, step_sqnr_db
from models.shapes.consistency import has_choice, inconsistency
from models.shapes.detect import detect
from models.shapes.generate import generate, start
from models.shapes.world import Scene, caption_tokens, sample_scene, speed

CLIPS_AT_ONCE = 8  # that are measured together


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Which captions and noise.

    Attributes:
      prompts: captions of each seed, drawn from those that training never sees.
      seed: of captions and noise; a caption's number alone decides both, whatever the batch.
      batch: videos sampled at once.
      seeds: how many, from `seed` up.
      consistency: also compare how the tokens of one thing are rounded.
    """

    prompts: int
    seed: int = 0
    batch: int = 8
    seeds: int = 1
    consistency: bool = False

    def __post_init__(self):
        for name in ("prompts", "batch", "seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a number from 1 up, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Of one model, each array over the prompts.

    Attributes:
      right: bool `[prompts]` by attribute; "one_thing" is "all" where the caption has one thing.
      one_thing: bool `[prompts]`, whether the caption has one thing.
      speed: of the fastest thing, pixels a frame.
      psnr_db, ssim: against the reference.
      flicker: on the pixels that rest in the reference.
      warping_error: along the motion in the reference.
      step_sqnr_db: `[steps, prompts]`, of the velocity where the reference was.
      differences: `[prompts, frames of tokens, 2]`, of `consistency.inconsistency`, or None.
    """

    right: dict[str, np.ndarray]
    one_thing: np.ndarray
    speed: np.ndarray
    psnr_db: np.ndarray
    ssim: np.ndarray
    flicker: np.ndarray
    warping_error: np.ndarray
    step_sqnr_db: np.ndarray
    differences: np.ndarray | None = None


def score(reference: Model, others: Mapping[str, Model], task: Task) -> dict[str, Scores]:
    """Scores of every model by name; the reference's own are "reference".

    The models' samplers must be the reference's. Draws a progress bar on stderr.
    """
    sampler = reference.settings.sampler
    if any(model.settings.sampler != sampler for model in others.values()):
        raise ValueError("all models must be sampled as the reference is")
    batches = task.seeds * -(-task.prompts // task.batch)
    found: dict[str, list[dict[str, Any]]] = {"reference": [], **{name: [] for name in others}}
    with step_bar("evaluate", batches * sampler.steps * (1 + 2 * len(others))) as step_done:
        for batch in _batches(task):
            noise = functools.partial(start, batch.key, batch.numbers)
            tokens = jax.vmap(caption_tokens)(batch.scenes)
            videos, seen = generate(
                reference.params,
                tokens,
                noise(),
                settings=reference.settings,
                trajectory=True,
                on_step=step_done,
            )
            known = _detected(videos)
            measured = functools.partial(_measured, batch.scenes, videos, known)
            found["reference"].append(batch.wanted(measured(videos)))
            for name, model in others.items():
                other = generate(
                    model.params, tokens, noise(), settings=model.settings, on_step=step_done
                )
                scores = measured(other)
                if task.consistency and has_choice(model.settings):
                    forced, scores["differences"] = inconsistency(
                        model, tokens, seen, known.masks, batch.key, step_done
                    )
                else:
                    forced = step_sqnr_db(model, tokens, seen, step_done)
                scores["step_sqnr_db"] = forced.T
                found[name].append(batch.wanted(scores))
    return {name: _joined(parts) for name, parts in found.items()}


def reordered(params: Any, seed: int = 0) -> Any:
    """The same function, the hidden channels of the feed-forward networks in another order."""
    blocks = params["dit"]["blocks"]
    up, down = blocks["ffn"]["up"], blocks["ffn"]["down"]
    order = np.random.RandomState(seed).permutation(up["bias"].shape[-1])
    ffn = {
        "up": {"kernel": up["kernel"][..., order], "bias": up["bias"][..., order]},
        "down": down | {"kernel": down["kernel"][..., order, :]},
    }
    return params | {"dit": params["dit"] | {"blocks": blocks | {"ffn": ffn}}}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Batch:
    """Prompts by number, and a seed's key; the last of a seed is filled up with unwanted ones."""

    key: jax.Array
    numbers: jax.Array
    scenes: Scene
    count: int

    def wanted(self, scores: Any) -> Any:
        """Arrays over the batch without the unwanted ones."""
        return jax.tree.map(lambda values: np.asarray(values)[: self.count], scores)


def _batches(task: Task) -> Iterator[_Batch]:
    for seed in range(task.seed, task.seed + task.seeds):
        key = jax.random.key(seed)
        for first in range(0, task.prompts, task.batch):
            numbers = jnp.arange(first, first + task.batch)
            yield _Batch(
                key=key,
                numbers=numbers,
                scenes=_drawn(key, numbers),
                count=min(task.batch, task.prompts - first),
            )


@jax.jit
def _drawn(key: jax.Array, numbers: jax.Array) -> Scene:
    return jax.vmap(lambda n: sample_scene(jax.random.fold_in(key, n), held_out=True))(numbers)


@jax.jit
def _detected(videos: jax.Array) -> Any:
    return jax.lax.map(detect, videos, batch_size=CLIPS_AT_ONCE)


@jax.jit
def _measured(scenes: Scene, references: jax.Array, known: Any, videos: jax.Array) -> Any:
    """`clip_scores` of every clip, and what its caption asks for."""
    scores = jax.lax.map(
        lambda clip: clip_scores(*clip),
        (scenes, references, known, videos),
        batch_size=CLIPS_AT_ONCE,
    )
    return {**scores, "one_thing": scenes.count == 1, "speed": jax.vmap(speed)(scenes)}


def _joined(parts: list[dict[str, Any]]) -> Scores:
    """Batches to arrays over all prompts."""
    joined = jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)
    steps = joined.pop("step_sqnr_db", np.zeros((len(joined["one_thing"]), 0)))
    return Scores(**joined, step_sqnr_db=steps.T)
