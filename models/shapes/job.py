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
from models.common.sampler import sigmas
from models.shapes import recipe as recipes
from models.shapes.compare import Model, layer_sqnr_db, step_sqnr_db
from models.shapes.detect import detect, verdicts
from models.shapes.generate import Settings, generate, start
from models.shapes.params import WEIGHTS, load
from models.shapes.recipe import KEEP, Recipe
from models.shapes.vocabulary import parse, tokenize
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
      recipe: formats of weights and activations.
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
      ValueError: a prompt that the world cannot show (before any work is done).
    """
    captions = [parse(prompt) for prompt in job.prompts]
    params = load(job.checkpoint)
    job.out.mkdir(parents=True, exist_ok=True)
    leaves: list[LeafReport] = []
    weights, settings = recipes.apply(params, job.recipe, job.settings, leaves.append)
    quantised, reference = Model(weights, settings), Model(params, job.settings)
    written: list[pathlib.Path] = []
    clips: list[Clip] = []
    steps: list[np.ndarray] = []
    total = len(captions) * job.settings.sampler.steps * (3 if job.compare else 1)
    with step_bar("sample", total) as step_done:
        for number, caption in enumerate(captions):
            tokens = jnp.asarray(tokenize(str(caption)))[None]
            noise = functools.partial(start, jax.random.key(job.seed), np.array([number]))
            video = generate(
                quantised.params, tokens, noise(), settings=quantised.settings, on_step=step_done
            )[0]
            name = f"{number + 1}-{'-'.join(str(caption).split()[1:4])}"
            if job.compare:
                videos, seen = generate(
                    reference.params,
                    tokens,
                    noise(),
                    settings=reference.settings,
                    trajectory=True,
                    on_step=step_done,
                )
                steps.append(step_sqnr_db(quantised, tokens, seen, step_done))
                right = {
                    who: verdicts(scene_of(caption, jax.random.key(0)), detect(clip))
                    for who, clip in (("reference", videos[0]), ("quantised", video))
                }
                clips.append(
                    measure_clip(
                        str(caption),
                        np.asarray(videos[0]),
                        np.asarray(video),
                        {
                            name: {who: bool(found[name]) for who, found in right.items()}
                            for name in right["reference"]
                        },
                    )
                )
                middle = len(seen.x) // 2
                layers = layer_sqnr_db(
                    reference,
                    quantised,
                    tokens,
                    seen.x[middle],
                    float(sigmas(job.settings.sampler)[middle]),
                )
                both = side_by_side([videos[0], video], [KEEP, str(job.recipe)])
                written.append(job.out / f"{name}-beside-{KEEP}{job.suffix}")
                write_video(both, written[-1], scale=1)
            written += [job.out / f"{name}{job.suffix}", job.out / f"{name}.png"]
            write_video(video, written[-2])
            write_strip(video, written[-1])
    if job.compare:
        report = Report(
            title="Quantised sampling beside bf16",
            model=f"shapes, {sum(np.prod(leaf.shape) for leaf in leaves) / 1e6:.1f} M parameters",
            recipe=RecipeWords(
                weights=job.recipe.weights, activations=job.recipe.acts, reference=KEEP
            ),
            clips=clips,
            memory=_memory(leaves),
            layer_sqnr_db=layers,
            step_sqnr_db=np.concatenate(steps, axis=1).mean(axis=1),
            environment=_environment(job),
            notes=[
                "Layers are compared at the middle step of the last prompt, given the same input.",
                "The model is small; its channels were rescaled, without changing its function, "
                "to have the heavy tails of large models (models/shapes/stressors.py).",
            ],
        )
        written.append(write_report(report, job.out / "report.html"))
    return written


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
