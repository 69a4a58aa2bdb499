"""What `sdq sample --model shapes` does: sample captions, compare with a reference, report."""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sdq
from models.common.progress import step_bar
from models.common.recipes import KEEP, Recipe
from models.common.sampler import Trajectory, sigmas
from models.shapes import recipe as recipes
from models.shapes.compare import Model, layer_sqnr_db, step_sqnr_db
from models.shapes.detect import detect, verdicts
from models.shapes.generate import Settings, generate, start
from models.shapes.params import WEIGHTS, load
from models.shapes.vocabulary import Caption, parse, tokenize
from models.shapes.world import scene_of
from sdq import LeafReport
from sdq.report import Clip, Memory, Report, measure_clip, write_report
from sdq.report import Recipe as RecipeWords
from sdq.video_files import side_by_side, write_strip, write_video


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One call of the command.

    Attributes:
      prompts: captions.
      recipe: how the model is quantised.
      settings: how to sample.
      out: folder for the files.
      compare: also sample the bf16 model and write report.html.
      suffix: of the videos, ".webp", ".gif" or ".mp4".
      seed: of the noise.
      checkpoint: the model's weights.
      command: for the report.
    """

    prompts: Sequence[str]
    recipe: Recipe
    settings: Settings
    out: pathlib.Path
    compare: bool = False
    suffix: str = ".webp"
    seed: int = 0
    checkpoint: pathlib.Path = WEIGHTS
    command: str = ""


def run(job: Job) -> list[pathlib.Path]:
    """Write a video and a strip for each prompt, and report.html if comparing; returns the paths.

    Raises:
      ValueError: a prompt that the world cannot show, or weights of another model (before any
        work is done).
    """
    captions = [parse(prompt) for prompt in job.prompts]
    params = load(job.checkpoint)
    job.out.mkdir(parents=True, exist_ok=True)
    leaves: list[LeafReport] = []
    quantised = Model(*recipes.apply(params, job.recipe, job.settings, leaves.append))
    reference = Model(params, job.settings)
    written: list[pathlib.Path] = []
    compared: list[_Compared] = []
    total = len(captions) * job.settings.sampler.steps * (3 if job.compare else 1)
    with step_bar("sample", total) as step_done:
        for number, caption in enumerate(captions):
            tokens = jnp.asarray(tokenize(str(caption)))[None]
            noise = functools.partial(start, jax.random.key(job.seed), np.array([number]))
            sample = functools.partial(generate, tokens=tokens, on_step=step_done)
            video = sample(quantised.params, x=noise(), settings=quantised.settings)[0]
            stem = job.out / f"{number + 1}-{'-'.join(str(caption).split()[1:4])}"
            if job.compare:
                videos, seen = sample(
                    reference.params, x=noise(), settings=reference.settings, trajectory=True
                )
                compared.append(
                    _Compared(
                        clip=_clip(caption, videos[0], video),
                        step_sqnr_db=step_sqnr_db(quantised, tokens, seen, step_done)[:, 0],
                        layer_sqnr_db=_middle_layers(reference, quantised, tokens, seen),
                    )
                )
                beside = side_by_side([videos[0], video], [KEEP, str(job.recipe)])
                path = stem.with_name(f"{stem.name}-beside-{KEEP}{job.suffix}")
                written.append(write_video(beside, path, scale=1))
            written.append(write_video(video, stem.with_name(stem.name + job.suffix)))
            written.append(write_strip(video, stem.with_name(f"{stem.name}.png")))
    if job.compare:
        written.append(write_report(_report(job, leaves, compared), job.out / "report.html"))
    return written


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Compared:
    """One prompt beside the reference; the layers at the middle step."""

    clip: Clip
    step_sqnr_db: np.ndarray
    layer_sqnr_db: dict[str, list[float]]


def _clip(caption: Caption, reference: jax.Array, video: jax.Array) -> Clip:
    """Measures and verdicts of one video and its reference."""
    scene = scene_of(caption, jax.random.key(0))
    right = {
        who: verdicts(scene, detect(clip))
        for who, clip in (("reference", reference), ("quantised", video))
    }
    by_attribute = {
        name: {who: bool(found[name]) for who, found in right.items()}
        for name in right["reference"]
    }
    return measure_clip(str(caption), np.asarray(reference), np.asarray(video), by_attribute)


def _middle_layers(
    reference: Model, quantised: Model, tokens: jax.Array, seen: Trajectory
) -> dict[str, list[float]]:
    """`layer_sqnr_db` where the reference was at its middle step."""
    middle = len(seen.x) // 2
    level = float(sigmas(reference.settings.sampler)[middle])
    return layer_sqnr_db(reference, quantised, tokens, seen.x[middle], level)


def _report(job: Job, leaves: Sequence[LeafReport], compared: Sequence[_Compared]) -> Report:
    return Report(
        title="Quantised sampling beside bf16",
        model=f"shapes, {sum(np.prod(leaf.shape) for leaf in leaves) / 1e6:.1f} M parameters",
        recipe=RecipeWords(
            weights=job.recipe.weight_formats,
            activations=job.recipe.input_formats,
            reference=KEEP,
        ),
        clips=[one.clip for one in compared],
        memory=_memory(leaves),
        layer_sqnr_db=compared[-1].layer_sqnr_db,
        step_sqnr_db=np.mean([one.step_sqnr_db for one in compared], axis=0),
        environment=_environment(job),
        notes=[
            "Layers are compared at the middle step of the last prompt, given the same input.",
            "The model is small; its channels were rescaled, without changing its function, "
            "to have the heavy tails of large models (models/shapes/stressors.py).",
        ],
    )


def _memory(leaves: Sequence[LeafReport]) -> list[Memory]:
    """Bytes of the blocks' kernels and of everything else."""
    groups: dict[str, list[LeafReport]] = {"linears of the blocks": [], "everything else": []}
    for leaf in leaves:
        linear = "/blocks/" in leaf.path and leaf.path.endswith("kernel")
        groups["linears of the blocks" if linear else "everything else"].append(leaf)
    return [
        Memory(
            name=name,
            reference_bytes=sum(leaf.bytes_before for leaf in group),
            quantised_bytes=sum(leaf.bytes_after for leaf in group),
            elements=int(sum(np.prod(leaf.shape) for leaf in group)),
        )
        for name, group in groups.items()
    ]


def _environment(job: Job) -> dict[str, Any]:
    sampler = job.settings.sampler
    return {
        "command": job.command,
        "device": jax.devices()[0].device_kind,
        "versions": f"sdq {sdq.__version__}, jax {jax.__version__}",
        "sampler": f"{sampler.solver}, {sampler.steps} steps, shift {sampler.shift:g}, "
        f"guidance {job.settings.guidance:g}, seed {job.seed}",
    }
