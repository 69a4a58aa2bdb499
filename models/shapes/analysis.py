"""What `sdq analyze --model shapes` does: where quantising hurts, and what to do about it.

Data-free: random captions, noise and the model's own samples. Every site of every block at every
step gets the SQNR that the velocity would have if only this input were quantised.
"""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
import rich.table

import sdq
from models.common.progress import step_bar
from models.common.recipes import Recipe
from models.common.scan import Proposal
from models.common.scan_plot import heat_map
from models.shapes import recipe, scan
from models.shapes.generate import Settings
from models.shapes.params import WEIGHTS, load
from sdq.manifest import to_json_number


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One call of the command.

    Attributes:
      recipe: whose input formats are looked at, and whose budget the plan keeps to.
      settings: how the model is sampled.
      captions: random ones, none of them held out.
      probes: random directions at every step; more of them, less noise in the numbers.
      seed: of captions and noise.
      checkpoint: the model's weights.
    """

    recipe: Recipe
    settings: Settings
    captions: int = 4
    probes: int = 2
    seed: int = 0
    checkpoint: pathlib.Path = WEIGHTS

    def __post_init__(self):
        for name in ("captions", "probes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a number from 1 up, got {getattr(self, name)}")
        if not self.recipe.inputs:
            raise ValueError(f"recipe {self.recipe.name!r} quantises no inputs: nothing to analyze")
        if not self.recipe.extra_work:
            raise ValueError(
                f"recipe {self.recipe.name!r} has no budget for decomposition (extra_work)"
            )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Analysis:
    """What was found.

    Attributes:
      sqnr_db: of the velocity, by site `[steps, blocks]`.
      salient_share: of the site's noise, what the most salient tokens of the plan make, by site
        `[blocks]`.
      proposal: the plan for decomposition.
    """

    sqnr_db: dict[str, np.ndarray]
    salient_share: dict[str, np.ndarray]
    proposal: Proposal


def analyze(task: Task) -> Analysis:
    """Scan the model, with a progress bar."""
    params = load(task.checkpoint)
    with step_bar("analyze", 2 * task.settings.sampler.steps) as step_done:
        seen = scan.watch(
            params, task.settings, captions=task.captions, seed=task.seed, on_step=step_done
        )
        params = recipe.smoothed(params, seen, task.recipe.smooth, task.settings.dtype)
        noise = scan.noise(
            params,
            seen,
            task.recipe.inputs,
            probes=task.probes,
            seed=task.seed,
            dtype=task.settings.dtype,
            on_step=step_done,
        )
    proposal = scan.plan(params, noise, task.recipe.extra_work, task.recipe.salient)
    bins = scan.bins_of(proposal.decomposition.tokens)
    total = {site: power.sum(axis=-1) for site, power in noise.items()}
    with np.errstate(divide="ignore", invalid="ignore"):
        return Analysis(
            sqnr_db={site: -10 * np.log10(power) for site, power in total.items()},
            salient_share={
                site: noise[site][..., :bins].sum(axis=(0, 2)) / total[site].sum(axis=0)
                for site in noise
            },
            proposal=proposal,
        )


def to_json(task: Task, analysis: Analysis) -> dict[str, Any]:
    """Everything, for `json.dumps`."""
    proposal = analysis.proposal
    sampler = task.settings.sampler
    return {
        "model": "shapes",
        "recipe": task.recipe.name,
        "inputs": task.recipe.input_formats,
        "captions": task.captions,
        "probes": task.probes,
        "seed": task.seed,
        "sampler": dataclasses.asdict(sampler) | {"guidance": task.settings.guidance},
        "device": jax.devices()[0].device_kind,
        "versions": {"sdq": sdq.__version__, "jax": jax.__version__},
        "plan": {
            "budget": task.recipe.extra_work,
            "extra_work": proposal.extra_work,
            "tokens": proposal.decomposition.tokens,
            "of_tokens": scan.TOKENS,
            "layers": {site: list(blocks) for site, blocks in proposal.decomposition.layers},
            "input_noise_before_db": 10 * np.log10(proposal.noise_before),
            "input_noise_after_db": 10 * np.log10(proposal.noise_after),
        },
        "salient_share": {
            site: [to_json_number(float(x)) for x in share]
            for site, share in analysis.salient_share.items()
        },
        "sqnr_db": {
            site: [[to_json_number(float(x)) for x in step] for step in steps]
            for site, steps in analysis.sqnr_db.items()
        },
    }


def to_rich(task: Task, analysis: Analysis) -> rich.table.Table:
    """Where the noise comes from, and the plan."""
    proposal, decomposition = analysis.proposal, analysis.proposal.decomposition
    table = rich.table.Table(
        caption=f"plan: {decomposition.tokens} of {scan.TOKENS} tokens decomposed in the blocks "
        f"named, {100 * proposal.extra_work:.1f} % more matrix products (budget "
        f"{100 * task.recipe.extra_work:.1f} %); noise of all inputs "
        f"{10 * np.log10(proposal.noise_before):.1f} dB before, "
        f"{10 * np.log10(proposal.noise_after):.1f} dB after",
        caption_justify="left",
    )
    for column in ("input", "SQNR, dB", "worst block, dB", "noise of salient tokens", "decomposed"):
        table.add_column(column, justify="left" if column in ("input", "decomposed") else "right")
    chosen = dict(decomposition.layers)
    for site, decibels in analysis.sqnr_db.items():
        power = (10 ** (-decibels / 10)).mean(axis=0)  # [blocks]
        table.add_row(
            site.removeprefix("blocks/"),
            f"{-10 * np.log10(power.sum()):.1f}",
            f"{-10 * np.log10(power.max()):.1f}",
            f"{100 * analysis.salient_share[site].mean():.0f} %",
            ", ".join(map(str, chosen.get(site, ()))),
        )
    return table


def write_picture(task: Task, analysis: Analysis, path: pathlib.Path) -> pathlib.Path:
    """The SQNR of every layer at every step, those of the plan marked."""
    chosen = dict(analysis.proposal.decomposition.layers)
    return heat_map(
        analysis.sqnr_db,
        chosen,
        f"shapes, inputs {task.recipe.input_formats}: SQNR of the velocity if one input is "
        f"quantised",
        path,
    )
