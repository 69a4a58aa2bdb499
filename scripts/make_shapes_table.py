"""What 4 bits cost the shapes model, on held-out captions: formats, recipes, each part of them.

    python -m scripts.make_shapes_table formats recipes ablation --out docs/results

Minutes on a GPU, hours on a CPU. Rows that are already in the results file, of the same recipe on
the same captions, device and versions, are not measured again: an interrupted run goes on where it
stopped.
"""

import argparse
import functools
import json
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from models.common.recipes import KEEP, Recipe
from models.shapes.evaluation import FLOOR, Measured, conditions, measure, summaries
from models.shapes.generate import Settings
from models.shapes.scores import Task
from scripts import _results as results
from scripts import _workers
from scripts._shapes_plots import plot, sqnr_db
from scripts._shapes_tables import TABLES, Table
from sdq import formats

ATTRIBUTES = ("colour", "background", "shape", "size", "motion", "all", "one_thing")


def to_markdown(table: Table, document: Mapping[str, Any]) -> str:
    """The page that goes into docs/results."""
    measured = document["results"]
    made = document["conditions"]
    sampler, seeds = made["sampler"], made["seeds"]
    seeds_in_words = f"seed {made['seed']}" if seeds == 1 else f"each of {seeds} seeds"
    where = document["environment"] | {
        "captions": f"{made['prompts']}, never seen in training, {seeds_in_words}",
        "sampler": f"{sampler['solver']}, {sampler['steps']} steps, shift {sampler['shift']:g}, "
        f"guidance {sampler['guidance']:g}",
    }
    lines = []
    for heading, recipes in table.groups.items():
        known = {recipe.name: recipe for recipe in recipes if recipe.name in measured}
        if not known:
            continue  # of an interrupted run
        rows = [(KEEP, None), (FLOOR, None), *known.items()]
        lines += ["", f"## {heading}"] if heading else []
        lines += ["", "| " + " | ".join(table.columns) + " |", "|" + "---|" * len(table.columns)]
        lines += [_row(table, name, recipe, measured[name]) for name, recipe in rows]
    return results.page(
        table.title,
        where,
        table.text,
        *lines,
        "",
        "What is right in the videos of bf16:",
        "",
        "| " + " | ".join(ATTRIBUTES) + " |",
        "|" + "---|" * len(ATTRIBUTES),
        "| " + " | ".join(_percent(measured[KEEP]["accuracy"][a]) for a in ATTRIBUTES) + " |",
    )


def _row(table: Table, name: str, recipe: Recipe | None, summary: Mapping[str, Any]) -> str:
    """A line of Markdown; bf16 is not compared with itself, and has no recipe."""
    cells = []
    for column in table.columns:
        if column in NAMES:
            cells.append(name if recipe is None else NAMES[column](recipe))
        elif name == KEEP and column not in ALONE:
            cells.append("")
        else:
            cells.append(MEASURES[column](summary))
    return "| " + " | ".join(cells) + " |"


def _bits(names: str) -> str:
    """Formats and what they store."""
    return ", ".join(
        name if name == KEEP else f"`{name}` {formats.parse(name).bits_per_element:g} bit"
        for name in names.split(", ")
    )


def _percent(number: Mapping[str, Any]) -> str:
    return f"{100 * number['mean']:.1f} ± {100 * number['error']:.1f}"


def _decibels(number: Mapping[str, Any]) -> str:
    return f"{number['mean']:.2f} ± {number['error']:.2f}"


def _lost(summary: Mapping[str, Any]) -> str:
    change = summary["change"]["all"]
    return f"{-100 * change['mean']:.1f} ± {100 * change['error']:.1f}"


def _sqnr(summary: Mapping[str, Any]) -> str:
    number = sqnr_db(summary)
    return _decibels(number) if number["error"] else f"{number['mean']:.1f}"


def _gained(summary: Mapping[str, Any], name: str) -> str:
    number = summary["against"][name]
    if not number["error"]:
        return ""  # that recipe itself
    return f"{number['mean']:+.2f} ± {number['error']:.2f}"


NAMES: dict[str, Callable[[Recipe], str]] = {
    "recipe": lambda recipe: recipe.name,
    "weights": lambda recipe: _bits(recipe.weight_formats),
    "activations": lambda recipe: _bits(recipe.input_formats),
}
MEASURES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "extra work %": lambda s: f"{100 * s['extra_work']:.1f}" if s.get("extra_work") else "",
    "right %": lambda s: _percent(s["accuracy"]["all"]),
    "lost": _lost,
    "PSNR dB": lambda s: _decibels(s["psnr_db"]),
    "SSIM": lambda s: f"{s['ssim']['mean']:.3f}",
    "SQNR dB": _sqnr,
    "flicker": lambda s: f"{s['flicker']['mean']:.4f}",
    "along the motion": lambda s: f"{s['warping_error']['mean']:.4f}",
    "SQNR gained": lambda s: _gained(s, "sqnr_db"),
    "PSNR gained": lambda s: _gained(s, "psnr_db"),
    "low motion": lambda s: _gained(s, "psnr_db, low motion"),
    "high motion": lambda s: _gained(s, "psnr_db, high motion"),
    "inconsistency %": lambda s: _percent(s["inconsistency"]) if "inconsistency" in s else "",
}
ALONE = ("right %", "flicker", "along the motion")  # what bf16 has without a comparison


def _known(path: pathlib.Path, table: Table, about: Mapping[str, Any]) -> dict[str, Any]:
    """Rows of an earlier run under the same conditions, of recipes that are still the same."""
    before = json.loads(path.read_text()) if path.exists() else {}
    if any(before.get(key) != about[key] for key in ("conditions", "against")):
        return {}
    now = {KEEP: None, FLOOR: None} | {name: repr(one) for name, one in table.recipes.items()}
    rows = before["results"].items()
    return {name: row for name, row in rows if name in now and row.get("recipe") == now[name]}


def make(table: Table, task: Task, out: pathlib.Path, gpus: Sequence[str] = ()) -> None:
    """Measure what is missing and write the page, its JSON and its picture."""
    with _workers.workers(gpus) as each:
        about = next(iter(each(functools.partial(_about, task), [table.against])))
        known = _known(out / f"{table.stem}.json", table, about)
        missing = [one for one in (FLOOR, *table.recipes.values()) if str(one) not in known]
        if missing and table.against:  # first, because all others wait for its scores
            missing = [table.against, *(one for one in missing if one != table.against)]
        waiting, base = [], None
        for measured in each(functools.partial(_measured, task), missing):
            waiting.append(measured)
            base = measured.scores.get(str(table.against), base)
            if table.against and base is None:
                continue
            for one in waiting:
                known = _rows(table, summaries(one, base)) | known  # what is known stays
            waiting.clear()
            if FLOOR in known:
                _write(table, about, known, out)
            print(f"{table.stem}: {len(known) - 2} of {len(table.recipes)}", file=sys.stderr)
    _write(table, about, known, out)
    plot(table, known, out / f"{table.stem}.png")
    print((out / f"{table.stem}.md").read_text())


def _measured(task: Task, recipe: Recipe | str) -> Measured:
    return measure([recipe], Settings(), task)


def _rows(table: Table, found: Mapping[str, Any]) -> dict[str, Any]:
    """Summaries with what they are of, which `_known` compares."""
    recipes = {name: {"recipe": repr(one)} for name, one in table.recipes.items()}
    return {name: row | recipes.get(name, {}) for name, row in found.items()}


def _write(
    table: Table, about: Mapping[str, Any], measured: Mapping[str, Any], out: pathlib.Path
) -> None:
    """The page and its JSON, rows in the table's order."""
    names = [name for name in (KEEP, FLOOR, *table.recipes) if name in measured]
    document = {**about, "results": {name: measured[name] for name in names}}
    results.write(out, table.stem, to_markdown(table, document), document)


def _about(task: Task, against: Recipe | None) -> dict[str, Any]:
    return {
        "environment": results.environment("make_shapes_table"),
        "conditions": conditions(Settings(), task),
        "against": None if against is None else repr(against),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the tables that are asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "tables", nargs="*", metavar="TABLE", help=f"of {', '.join(TABLES)} (default: all)"
    )
    parser.add_argument("--prompts", type=int, default=512, help="of each seed (default: 512)")
    parser.add_argument("--seed", type=int, default=0, help="the first one (default: 0)")
    parser.add_argument("--batch", type=int, default=64, help="videos at once (default: 64)")
    parser.add_argument(
        "--gpus", default="", help="a process for each, like 0,1,2,3 or 0,0 (default: this process)"
    )
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for the results")
    args = parser.parse_args(argv)
    if unknown := set(args.tables) - set(TABLES):
        parser.error(f"no such table: {', '.join(sorted(unknown))}; there is {', '.join(TABLES)}")
    for name in args.tables or TABLES:
        table = TABLES[name]
        task = Task(
            prompts=args.prompts,
            seed=args.seed,
            batch=args.batch,
            seeds=table.seeds,
            consistency=table.consistency,
        )
        make(table, task, args.out, [gpu for gpu in args.gpus.split(",") if gpu])
    return 0


if __name__ == "__main__":
    sys.exit(main())
