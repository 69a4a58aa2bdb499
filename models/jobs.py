"""What a call of `sdq sample` asks for, and what follows from it before anything is computed."""

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

import sdq
from models.common import recipes
from models.common.sampler import Sampler, Step, steps_of, timesteps
from models.embeddings import NEGATIVE, Embeddings
from models.families import family_of
from models.published import Size, latent_size, published
from sdq.manifest import MANIFEST, fingerprint, read_manifest


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One call of `sdq sample`; what is None is as the model was published.

    Attributes:
      model: one of `published.PUBLISHED`.
      checkpoint: the transformer; of two experts, that for much noise.
      embeddings: the file of `sdq encode`.
      size: of the videos, (width, height, frames).
      out: folder for the latents.
      low_noise: the other expert.
      steps: evaluations of the velocity.
      shift: see `Sampler`.
      solver: see `Sampler`.
      guidance: see `Published`.
      guidance_low: see `Published`.
      seed: of the noise.
      dtype: that the model computes in.
    """

    model: str
    checkpoint: pathlib.Path
    embeddings: pathlib.Path
    size: Size
    out: pathlib.Path
    low_noise: pathlib.Path | None = None
    steps: int | None = None
    shift: float | None = None
    solver: str | None = None
    guidance: float | None = None
    guidance_low: float | None = None
    seed: int = 0
    dtype: Any = jnp.bfloat16


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What follows from a job without its weights and texts.

    Attributes:
      config: of the network.
      folders: of its checkpoint; of two experts, that for much noise first.
      recipe: by which they were quantised.
      size: of the latents, (T, H, W).
      steps: numbers of all steps.
      timesteps: that the network is told, `[steps]`.
      scales: of classifier-free guidance, for each step.
      is_high: whether the first expert computes, for each step.
      guidance: that the network is told, if it is.
      facts: for the files, and to know the job again.
    """

    config: Any
    folders: Sequence[pathlib.Path]
    recipe: recipes.Recipe
    size: Size
    steps: Step
    timesteps: np.ndarray
    scales: Sequence[float]
    is_high: Sequence[bool]
    guidance: float
    facts: dict[str, Any]


def plan(job: Job) -> Plan:
    """Defaults filled in, and checked."""
    defaults = published(job.model)
    config = family_of(job.model).sizes[job.model]
    size = latent_size(job.model, job.size)
    has_two = defaults.boundary is not None
    if has_two != (job.low_noise is not None):
        raise ValueError(
            f"low_noise: {job.model} is "
            + ("two networks: give both checkpoints" if has_two else "one network: give none")
        )
    if job.guidance_low is not None and not has_two:
        raise ValueError(f"guidance_low: {job.model} is one network")
    sampler = Sampler(
        steps=defaults.steps if job.steps is None else job.steps,
        shift=defaults.shift(size) if job.shift is None else job.shift,
        solver=job.solver or defaults.solver,
    )
    guidance = defaults.guidance if job.guidance is None else job.guidance
    low = job.guidance_low
    if low is None:  # of a guidance that was asked for, both
        low = defaults.guidance_low if job.guidance is None else guidance
    low = guidance if low is None else low
    if not (math.isfinite(guidance) and math.isfinite(low)):
        raise ValueError(f"guidance: expected a finite number, got {guidance:g}, {low:g}")
    is_told = getattr(config, "guidance", False)
    folders = [folder for folder in (job.checkpoint, job.low_noise) if folder is not None]
    recipe = _recipe(job.model, folders)
    facts = {
        "model": job.model,
        "size": list(job.size),
        "seed": job.seed,
        "steps": sampler.steps,
        "shift": float(sampler.shift),
        "solver": sampler.solver,
        "guidance": float(guidance),
        **({"guidance_low": float(low)} if has_two else {}),
        "recipe": recipe.name,
        "dtype": np.dtype(job.dtype).name,
        "checkpoint": [fingerprint(folder / MANIFEST)[1] for folder in folders],
        "embeddings": fingerprint(_existing(job.embeddings))[1],
        "sdq": sdq.__version__,
    }
    return Plan(
        config=config,
        folders=folders,
        recipe=recipe,
        size=size,
        steps=steps_of(sampler),
        timesteps=timesteps(sampler),
        scales=[1.0] * sampler.steps if is_told else defaults.scales(sampler, guidance, low),
        is_high=defaults.is_high(sampler),
        guidance=guidance,
        facts=facts,
    )


def _recipe(model: str, folders: Sequence[pathlib.Path]) -> recipes.Recipe:
    """By which checkpoints were quantised."""
    found = set()
    for folder in folders:
        metadata = read_manifest(folder).metadata
        if metadata.get("model") != model:
            raise ValueError(f"{folder}: holds {metadata.get('model')!r}, not {model!r}")
        found.add(metadata.get("recipe"))
    if len(found) > 1:
        raise ValueError(f"checkpoints of different recipes: {', '.join(map(repr, found))}")
    name = str(found.pop())
    recipe = recipes.Recipe(name=name) if name == recipes.KEEP else recipes.named(name)
    if recipe.needs_scan or recipe.is_online:
        raise ValueError(f"recipe {name!r} needs a scan of the model, which nobody has made")
    return recipe


def check_texts(texts: Embeddings, model: str, *, needs_negative: bool) -> None:
    """Raise a ValueError unless this model can read the embeddings."""
    wanted, config = published(model).text, family_of(model).sizes[model]
    if texts.text != wanted:
        raise ValueError(
            f"embeddings: of the encoders of {texts.text}, {model} reads those of {wanted}"
        )
    for name in ("text", "pooled"):
        width = getattr(config, f"{name}_width", None)
        for where, arrays in (("", texts.arrays), (NEGATIVE, texts.negative)):
            if width is not None and name in arrays and arrays[name].shape[-1] != width:
                found = arrays[name].shape[-1]
                raise ValueError(
                    f"embeddings: {where}{name} has {found} channels, {model} reads {width}"
                )
    if needs_negative and not texts.negative:
        raise ValueError("embeddings: guidance needs a negative prompt; encode again, with one")


def _existing(file: pathlib.Path) -> pathlib.Path:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    return file
