"""What plain 4-bit costs the shapes model: every number format beside bf16, on held-out captions.

    python -m scripts.make_shapes_table --out docs/results     # minutes on a GPU, hours on a CPU

Formats that are already in the results file, measured on the same captions, device and versions,
are not measured again: an interrupted run goes on where it stopped.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from models.shapes.evaluation import FLOOR, conditions, evaluate
from models.shapes.generate import Settings
from models.shapes.recipe import KEEP, Recipe
from models.shapes.scores import Task
from scripts import _results as results
from sdq import format_table, formats

STEM = "shapes_formats"
RECIPES = (
    *(Recipe(weights=name, acts=name) for name in format_table.FORMATS),
    Recipe(weights="sdq32:16"),
    Recipe(acts="sdq32:16"),
    Recipe(weights="mxfp4"),
    Recipe(acts="mxfp4"),
)
ATTRIBUTES = ("colour", "background", "shape", "size", "motion", "all", "one_thing")
AT_ONCE = 4  # recipes measured before the file is written


def to_markdown(document: Mapping[str, Any]) -> str:
    """The page that goes into docs/results."""
    measured = document["results"]
    made = document["conditions"]
    sampler = made["sampler"]
    where = document["environment"] | {
        "captions": f"{made['prompts']}, never seen in training, seed {made['seed']}",
        "sampler": f"{sampler['solver']}, {sampler['steps']} steps, shift {sampler['shift']:g}, "
        f"guidance {sampler['guidance']:g}",
    }
    return results.page(
        "The shapes model under every format",
        where,
        "Plain rounding of the blocks' weights and of the inputs of their linears, nothing else. "
        "Right: videos in which the detectors find everything that the caption says; lost: points "
        "against bf16, prompt by prompt. PSNR and SSIM: against bf16 from the same noise. SQNR: of "
        "the velocity where bf16 was, mean over the steps. ± standard error. The floor is bf16 "
        "with its sums in another order.",
        "",
        "| weights | activations | right % | lost | PSNR dB | SSIM | SQNR dB | flicker | along the "
        "motion |",
        "|---|---|---|---|---|---|---|---|---|",
        *(_row(name, summary) for name, summary in measured.items()),
        "",
        "What is right in the videos of bf16:",
        "",
        "| " + " | ".join(ATTRIBUTES) + " |",
        "|" + "---|" * len(ATTRIBUTES),
        "| " + " | ".join(_percent(measured[KEEP]["accuracy"][a]) for a in ATTRIBUTES) + " |",
    )


def _row(name: str, summary: Mapping[str, Any]) -> str:
    change, psnr, ssim = summary["change"]["all"], summary["psnr_db"], summary["ssim"]
    steps = [float(step) for step in summary["step_sqnr_db"]]
    compared = name != KEEP
    cells = [
        *_formats(name),
        _percent(summary["accuracy"]["all"]),
        f"{-100 * change['mean']:.1f} ± {100 * change['error']:.1f}" if compared else "",
        f"{psnr['mean']:.2f} ± {psnr['error']:.2f}" if compared else "",
        f"{ssim['mean']:.3f}" if compared else "",
        f"{sum(steps) / len(steps):.1f}" if compared else "",
        f"{summary['flicker']['mean']:.4f}",
        f"{summary['warping_error']['mean']:.4f}",
    ]
    return "| " + " | ".join(cells) + " |"


def _formats(name: str) -> tuple[str, str]:
    """The two formats of a result, as cells."""
    if name in (KEEP, FLOOR):
        return name, name
    recipe = next(recipe for recipe in RECIPES if str(recipe) == name)
    return _bits(recipe.weights), _bits(recipe.acts)


def _bits(name: str) -> str:
    return name if name == KEEP else f"`{name}` {formats.parse(name).bits_per_element:g} bit"


def _percent(number: Mapping[str, Any]) -> str:
    return f"{100 * number['mean']:.1f} ± {100 * number['error']:.1f}"


def _known(path: pathlib.Path, conditions: Mapping[str, Any]) -> dict[str, Any]:
    """Results of an earlier run under the same conditions."""
    before = json.loads(path.read_text()) if path.exists() else {}
    return before["results"] if before.get("conditions") == conditions else {}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is missing and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=512, help="(default: 512)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("--batch", type=int, default=64, help="videos at once (default: 64)")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for the results")
    args = parser.parse_args(argv)
    task = Task(prompts=args.prompts, seed=args.seed, batch=args.batch)
    settings = Settings()
    document: dict[str, Any] = {
        "environment": results.environment("make_shapes_table"),
        "conditions": conditions(settings, task),
    }
    measured = _known(args.out / f"{STEM}.json", document["conditions"])
    missing = [recipe for recipe in RECIPES if str(recipe) not in measured]
    for first in range(0, len(missing), AT_ONCE):
        measured |= evaluate(missing[first : first + AT_ONCE], settings, task)
        names = [KEEP, FLOOR, *(str(recipe) for recipe in RECIPES)]
        document["results"] = {name: measured[name] for name in names if name in measured}
        results.write(args.out, STEM, to_markdown(document), document)
    print((args.out / f"{STEM}.md").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
