"""What `sdq evaluate --model shapes` does: recipes against bf16, as means with standard errors."""

import dataclasses
import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import rich.table

import sdq
from models.common.recipes import KEEP, Recipe
from models.shapes import recipe as recipes
from models.shapes.compare import Model
from models.shapes.generate import Settings
from models.shapes.params import WEIGHTS, load
from models.shapes.scores import Scores, Task, reordered, score
from sdq.manifest import to_json_number

FLOOR = "floor"  # the noise floor's name

ATTRIBUTES = {
    "count": "number of things",
    "colour": "colours",
    "shape": "shapes",
    "size": "sizes",
    "motion": "motions",
    "background": "background",
    "all": "everything",
    "one_thing": "everything, one thing",
}
MEASURES = {  # name: (words, digits)
    "sqnr_db": ("SQNR of the velocity, dB", 2),
    "psnr_db": ("PSNR to the reference, dB", 2),
    "ssim": ("SSIM to the reference", 4),
    "flicker": ("flicker where nothing moves", 4),
    "warping_error": ("error along the motion", 4),
}
FAST = 1.0  # pixels a frame: faster captions have high motion; things that stay or grow have none


@dataclasses.dataclass(frozen=True, slots=True)
class Measured:
    """Of some recipes on the same prompts.

    Attributes:
      scores: by the recipe's words; KEEP is the reference, FLOOR the noise floor.
      work: the share of matrix products that each adds, the reference left out.
    """

    scores: dict[str, Scores]
    work: dict[str, float]


def evaluate(
    chosen: Sequence[Recipe],
    settings: Settings,
    task: Task,
    checkpoint: str | os.PathLike = WEIGHTS,
) -> dict[str, Any]:
    """`summaries` of the reference, the noise floor and recipes."""
    return summaries(measure((FLOOR, *chosen), settings, task, checkpoint))


def measure(
    chosen: Sequence[Recipe | str],
    settings: Settings,
    task: Task,
    checkpoint: str | os.PathLike = WEIGHTS,
) -> Measured:
    """Scores of recipes, or of FLOOR, beside the reference.

    Args:
      chosen: the recipes.
      settings: how to sample.
      task: which captions and noise.
      checkpoint: the model's weights.
    """
    params = load(checkpoint)
    models = {
        str(recipe): Model(*recipes.apply(params, recipe, settings))
        if isinstance(recipe, Recipe)
        else Model(reordered(params), settings)
        for recipe in dict.fromkeys(chosen)
    }
    scores = score(Model(params, settings), models, task)
    return Measured(
        {KEEP: scores.pop("reference"), **scores},
        {name: recipes.added_work(params, model.settings) for name, model in models.items()},
    )


def summaries(measured: Measured, against: Scores | None = None) -> dict[str, Any]:
    """A `summary` by name, for JSON; if asked, with `differences` prompt by prompt."""
    reference = measured.scores[KEEP]
    found = {KEEP: summary(reference, reference)}
    for name, added in measured.work.items():
        scores = measured.scores[name]
        found[name] = {"extra_work": added, **summary(scores, reference)}
        if against is not None:
            found[name]["against"] = differences(scores, against)
    return found


def conditions(
    settings: Settings, task: Task, checkpoint: str | os.PathLike = WEIGHTS
) -> dict[str, Any]:
    """What the numbers depend on besides the recipe, for JSON."""
    with open(checkpoint, "rb") as file:
        weights = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "model": "shapes",
        "checkpoint": weights,
        **dataclasses.asdict(task),
        "sampler": dataclasses.asdict(settings.sampler) | {"guidance": settings.guidance},
        "device": jax.devices()[0].device_kind,
        "versions": {"sdq": sdq.__version__, "jax": jax.__version__},
    }


def summary(scores: Scores, reference: Scores) -> dict[str, Any]:
    """Means and standard errors of everything; accuracies are shares in [0, 1].

    "change" is against the reference, prompt by prompt, so its error is smaller than that of two
    independent samples. Clips that a measure cannot judge in the reference (nothing rests in
    them, say) are left out of it. "low_motion" and "high_motion" are the same of those prompts
    alone. "inconsistency" is how differently the tokens of one thing round the same numbers, root
    of the mean square, as a share of the numbers; "by_distance" by the frames of tokens between.
    """
    fast = scores.speed > FAST
    return {
        **_means(scores, reference, np.ones_like(fast)),
        **_inconsistency(scores),
        "step_sqnr_db": [to_json_number(float(step.mean())) for step in scores.step_sqnr_db],
        "low_motion": _means(scores, reference, ~fast) | _inconsistency(scores, ~fast),
        "high_motion": _means(scores, reference, fast) | _inconsistency(scores, fast),
    }


def differences(scores: Scores, base: Scores) -> dict[str, Any]:
    """Of two models, prompt by prompt: surer than the difference of their means."""
    fast = scores.speed > FAST
    found = {}
    for name in ("psnr_db", "sqnr_db"):
        change = _by_prompt(scores, name) - _by_prompt(base, name)
        found[name] = _mean(change)
        found |= {f"{name}, low motion": _mean(change[~fast])} if len(change) else {}
        found |= {f"{name}, high motion": _mean(change[fast])} if len(change) else {}
    right = [one.right["all"].astype(float) for one in (scores, base)]
    return found | {"right": _mean(right[0] - right[1])}


def _by_prompt(scores: Scores, name: str) -> np.ndarray:
    if name == "sqnr_db":
        return scores.step_sqnr_db.mean(axis=0) if len(scores.step_sqnr_db) else np.zeros(0)
    return getattr(scores, name)


def _means(scores: Scores, reference: Scores, of: np.ndarray) -> dict[str, Any]:
    """Of the prompts `of`."""
    accuracy, change = {}, {}
    for name in ATTRIBUTES:
        which = of & scores.one_thing if name == "one_thing" else of
        field = "all" if name == "one_thing" else name
        right, before = (one.right[field].astype(float)[which] for one in (scores, reference))
        accuracy[name] = _mean(right)
        change[name] = _mean(right - before)
    found = {"prompts": int(of.sum()), "accuracy": accuracy, "change": change}
    for name in MEASURES:
        values, known = _by_prompt(scores, name), of
        if name in ("flicker", "warping_error"):
            known = of & np.isfinite(getattr(reference, name))
        found[name] = _mean(values[known[: len(values)]])
    return found


def _inconsistency(scores: Scores, of: np.ndarray | None = None) -> dict[str, Any]:
    """Nothing where it was not measured; a video without pairs says nothing."""
    if scores.differences is None:
        return {}
    sums = scores.differences if of is None else scores.differences[of]

    def share(sums: np.ndarray) -> dict[str, Any]:
        seen = sums[sums[:, 1] > 0]
        return _mean(np.sqrt(seen[:, 0] / seen[:, 1]))

    by_distance = [share(sums[:, apart]) for apart in range(sums.shape[1])]
    return {"inconsistency": share(sums.sum(axis=1)), "by_distance": by_distance}


def to_rich(columns: Mapping[str, dict[str, Any]], caption: str) -> rich.table.Table:
    """A table of summaries, a column each."""
    table = rich.table.Table(caption=caption, caption_justify="left")
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    for name, words in ATTRIBUTES.items():
        cells = (_percent(column["accuracy"][name]) for column in columns.values())
        table.add_row(f"right {words}, %", *cells)
    table.add_section()
    for name, (words, digits) in MEASURES.items():
        table.add_row(words, *(_with_error(column[name], digits) for column in columns.values()))
    table.add_section()
    steps = max(len(column["step_sqnr_db"]) for column in columns.values())
    for words, step in (("first", 0), ("middle", steps // 2), ("last", steps - 1)):
        cells = (
            f"{float(column['step_sqnr_db'][step]):.1f}" if column["step_sqnr_db"] else ""
            for column in columns.values()
        )
        table.add_row(f"SQNR of the velocity, {words} step, dB", *cells)
    return table


def _mean(values: np.ndarray) -> dict[str, Any]:
    """Mean and its standard error; None where there are too few values to know."""
    count, values = len(values), np.asarray(values, np.float64)
    known = count > 1 and np.isfinite(values).all()
    return {
        "mean": to_json_number(float(values.mean())) if count else None,
        "error": float(values.std(ddof=1) / count**0.5) if known else None,
    }


def _percent(number: dict[str, Any]) -> str:
    if number["mean"] is None:
        return "-"
    error = "" if number["error"] is None else f" ± {100 * number['error']:.1f}"
    return f"{100 * number['mean']:.1f}{error}"


def _with_error(number: dict[str, Any], digits: int) -> str:
    if not isinstance(number["mean"], float):
        return str(number["mean"] or "-")
    error = "" if number["error"] is None else f" ± {number['error']:.{digits}f}"
    return f"{number['mean']:.{digits}f}{error}"
