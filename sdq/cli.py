"""The command `sdq`. Each subcommand is thin: parse, call the library, show."""

import argparse
import dataclasses
import json
import pathlib
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import rich.console

import models
import sdq
from sdq import checkpoint, format_table, formats
from sdq.leaf_table import bits_per_element, leaf_table
from sdq.manifest import read_manifest, to_json_number
from sdq.tree import LeafReport


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status. A user's mistake is one line on stderr."""
    args = parser().parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, OSError) as error:
        print(f"sdq {args.command}: {error}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    """All subcommands and their options."""
    top = argparse.ArgumentParser(prog="sdq", description=sdq.__doc__)
    top.add_argument("--version", action="version", version=f"sdq {sdq.__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    table = commands.add_parser(
        "formats",
        help="compare all number formats on seeded data",
        description="Stored bits and SQNR of every number format on seeded synthetic data. "
        f"Names: {', '.join(formats.SYNTAX)}.",
    )
    table.add_argument(
        "names",
        nargs="*",
        metavar="FORMAT",
        help="formats to compare (default: a representative list)",
    )
    table.add_argument("--seed", type=int, default=0, help="of the data (default: 0)")
    table.add_argument("--plot", metavar="FILE", help="also draw a picture (PNG)")
    form = table.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--markdown", action="store_true", help="print Markdown")
    table.set_defaults(run=_formats)

    inspect = commands.add_parser(
        "inspect",
        help="list the leaves of a checkpoint",
        description="Format, size and quantisation error of every leaf of a checkpoint.",
    )
    inspect.add_argument("path", metavar="PATH", help="folder that sdq.save wrote")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.set_defaults(run=_inspect)

    sample = commands.add_parser(
        "sample",
        help="sample videos with a quantised model",
        description="Sample videos with a quantised model; writes an animation and a strip of "
        "frames for each prompt.",
    )
    _add_model_options(sample)
    sample.add_argument(
        "--prompt", action="append", required=True, help="a caption; may be given several times"
    )
    sample.add_argument("--out", type=pathlib.Path, required=True, help="folder for the files")
    sample.add_argument(
        "--compare",
        choices=["bf16"],
        help="also sample this reference from the same noise and write report.html",
    )
    sample.add_argument(
        "--video",
        choices=["webp", "gif", "mp4"],
        default="webp",
        help='mp4 needs pip install "sdq[video]" (default: webp)',
    )
    sample.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    sample.set_defaults(run=_sample)

    evaluate = commands.add_parser(
        "evaluate",
        help="measure a quantised model against bf16",
        description="Sample captions that training never saw, each from the same noise as bf16, "
        "and measure how much of them is right, how far the videos are from those of bf16, and "
        "the error of each step. Beside it stands the noise floor: bf16 with its sums in another "
        "order.",
    )
    _add_model_options(evaluate)
    evaluate.add_argument("--prompts", type=int, default=8, help="how many (default: 8)")
    evaluate.add_argument("--seed", type=int, default=0, help="of captions, noise (default: 0)")
    evaluate.add_argument("--batch", type=int, default=8, help="videos at once (default: 8)")
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    evaluate.set_defaults(run=_evaluate)
    return top


def _add_model_options(command: argparse.ArgumentParser) -> None:
    """The options that say what is sampled and how."""
    command.add_argument("--model", default="shapes", help="(default: shapes)")
    command.add_argument(
        "--checkpoint",
        type=pathlib.Path,
        metavar="FILE",
        help="weights that scripts.train_shapes wrote (default: the bundled ones)",
    )
    command.add_argument(
        "--weights", default="sdq32:16", metavar="FORMAT", help='or "bf16" (default: sdq32:16)'
    )
    command.add_argument(
        "--acts", default="sdq32:16", metavar="FORMAT", help='or "bf16" (default: sdq32:16)'
    )
    command.add_argument("--steps", type=int, default=24, help="(default: 24)")
    command.add_argument("--solver", default="unipc", help="unipc or euler (default: unipc)")
    command.add_argument("--guidance", type=float, default=2.0, help="(default: 2)")


def _model_options(args: argparse.Namespace) -> tuple[Any, Any]:
    """The Recipe and the Settings that `_add_model_options` asked for."""
    models.check_name(args.model)
    from models.shapes.generate import SAMPLER, Settings
    from models.shapes.recipe import Recipe

    sampler = dataclasses.replace(SAMPLER, steps=args.steps, solver=args.solver)
    return Recipe(weights=args.weights, acts=args.acts), Settings(
        sampler=sampler, guidance=args.guidance
    )


def _sample(args: argparse.Namespace) -> int:
    recipe, settings = _model_options(args)
    from models.shapes import job
    from models.shapes.params import WEIGHTS

    written = job.run(
        job.Job(
            prompts=args.prompt,
            recipe=recipe,
            settings=settings,
            out=args.out,
            compare=args.compare is not None,
            suffix=f".{args.video}",
            seed=args.seed,
            checkpoint=args.checkpoint or WEIGHTS,
            command=shlex.join(["sdq", *sys.argv[1:]]),
        )
    )
    for path in written:
        print(path)
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    recipe, settings = _model_options(args)
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


def _formats(args: argparse.Namespace) -> int:
    rows = format_table.measure(args.names or format_table.FORMATS, args.seed)
    if args.plot:
        format_table.plot(rows, args.plot)
    if args.json:
        print(format_table.to_json(rows, args.seed))
    elif args.markdown:
        print(format_table.to_markdown(rows))
    else:
        rich.console.Console().print(format_table.to_rich(rows))
    if args.plot:
        print(f"picture: {pathlib.Path(args.plot)}", file=sys.stderr)
    return 0


def _inspect(args: argparse.Namespace) -> int:
    manifest = read_manifest(args.path)
    reports = checkpoint.leaf_reports(manifest)
    if args.json:
        document = {
            "written_by": manifest.written_by,
            "metadata": manifest.metadata,
            "nbytes": sum(report.bytes_after for report in reports),
            "leaves": [_leaf_json(report) for report in reports],
        }
        print(json.dumps(document, indent=1))
    else:
        versions = ", ".join(f"{name} {version}" for name, version in manifest.written_by.items())
        console = rich.console.Console()
        console.print(leaf_table(reports, caption=f"written by {versions}"))
    return 0


def _leaf_json(report: LeafReport) -> dict[str, Any]:
    return {
        **dataclasses.asdict(report),
        "format": report.format and str(report.format),
        "sqnr_db": to_json_number(report.sqnr_db),
        "bits_per_element": bits_per_element(report),
    }


if __name__ == "__main__":
    sys.exit(main())
