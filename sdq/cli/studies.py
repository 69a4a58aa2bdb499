"""`sdq evaluate`, `sdq analyze`: what quantising does to the bundled model, and where."""

import argparse
import dataclasses
import json
import pathlib
import sys
from typing import Any

import rich.console

from sdq.cli.options import add_model_options, model_options


def add(commands: Any) -> None:
    """Both commands."""
    evaluate = commands.add_parser(
        "evaluate",
        help="measure a quantised model against bf16",
        description="Sample captions that training never saw, each from the same noise as bf16, "
        "and measure how much of them is right, how far the videos are from those of bf16, and "
        "the error of each step. Beside it stands the noise floor: bf16 with its sums in another "
        "order.",
    )
    add_model_options(evaluate)
    evaluate.add_argument("--prompts", type=int, default=8, help="how many (default: 8)")
    evaluate.add_argument("--seed", type=int, default=0, help="of captions, noise (default: 0)")
    evaluate.add_argument("--batch", type=int, default=8, help="videos at once (default: 8)")
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    evaluate.set_defaults(run=_evaluate)

    analyze = commands.add_parser(
        "analyze",
        help="find out where quantised inputs hurt, and plan decomposition",
        description="Scan a model without data: random captions, noise and its own samples say how "
        "much of the velocity's error each layer makes at each step, and where activation "
        "decomposition pays within a budget. Writes analysis.json and a heat map.",
    )
    add_model_options(analyze, recipe="semanticdialect")
    analyze.add_argument("--budget", type=float, help="extra matrix products, as a share of all")
    analyze.add_argument("--captions", type=int, default=4, help="how many (default: 4)")
    analyze.add_argument("--probes", type=int, default=2, help="directions a step (default: 2)")
    analyze.add_argument("--seed", type=int, default=0, help="of captions, noise (default: 0)")
    analyze.add_argument("--out", type=pathlib.Path, required=True, help="folder for the files")
    analyze.add_argument("--json", action="store_true", help="also print the JSON")
    analyze.set_defaults(run=_analyze)


def _evaluate(args: argparse.Namespace) -> int:
    recipe, settings = model_options(args)
    from models.shapes import evaluation
    from models.shapes.params import WEIGHTS
    from models.shapes.scores import Task

    task = Task(prompts=args.prompts, seed=args.seed, batch=min(args.batch, args.prompts))
    checkpoint = args.checkpoint or WEIGHTS
    measured = evaluation.evaluate([recipe], settings, task, checkpoint)
    conditions = evaluation.conditions(settings, task, checkpoint)
    if args.json:
        print(json.dumps({**conditions, "results": measured}, indent=1))
    else:
        table = evaluation.to_rich(
            measured,
            caption=f"{task.prompts} captions that training never saw, seed {task.seed}, on "
            f"{conditions['device']}; ± standard error",
        )
        rich.console.Console().print(table)
    return 0


def _analyze(args: argparse.Namespace) -> int:
    recipe, settings = model_options(args)
    if args.budget is not None:
        recipe = dataclasses.replace(recipe, extra_work=args.budget)
    from models.shapes import analysis
    from models.shapes.params import WEIGHTS

    task = analysis.Task(
        recipe=recipe,
        settings=settings,
        captions=args.captions,
        probes=args.probes,
        seed=args.seed,
        checkpoint=args.checkpoint or WEIGHTS,
    )
    args.out.mkdir(parents=True, exist_ok=True)
    found = analysis.analyze(task)
    document = json.dumps(analysis.to_json(task, found), indent=1)
    written = args.out / "analysis.json"
    written.write_text(document + "\n")
    picture = analysis.write_picture(task, found, args.out / "analysis.png")
    if args.json:
        print(document)
    else:
        rich.console.Console().print(analysis.to_rich(task, found))
    for path in (written, picture):
        print(path, file=sys.stderr)
    return 0
