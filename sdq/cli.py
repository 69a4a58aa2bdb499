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
from sdq import checkpoint, exported, format_table, formats
from sdq.leaf_table import bits_per_element, leaf_table, size_text
from sdq.manifest import read_manifest, to_json_number
from sdq.progress import bytes_bar
from sdq.tree import LeafReport


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status. A user's mistake is one line on stderr."""
    args = parser().parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, OSError, ImportError) as error:
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
    inspect.add_argument(
        "path", metavar="PATH", help="folder that sdq.save wrote, or what sdq export did"
    )
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.set_defaults(run=_inspect)

    for name, what in (("convert", "as it is"), ("quantize", "quantised")):
        command = commands.add_parser(
            name,
            help=f"read a published checkpoint and save it {what}",
            description="Read safetensors in the original or in diffusers' key layout, a file, an "
            f"index of shards or a folder, and save the weights {what} as an sdq checkpoint, leaf "
            "by leaf. Killed, the same command goes on where it stopped.",
        )
        command.add_argument("source", metavar="SRC", help="file, index or folder")
        command.add_argument("--model", required=True, help="which; a wrong name lists all")
        if name == "quantize":
            command.add_argument("--recipe", default="plain", help="(default: plain)")
            command.add_argument(
                "--embedders",
                metavar="FORMAT",
                help='of what embeds time and text, or "bf16" (default: 8 bits)',
            )
        command.add_argument("--out", type=pathlib.Path, required=True, help="folder")
        command.add_argument("--json", action="store_true", help="print JSON")
        command.set_defaults(run=_quantize)

    export = commands.add_parser(
        "export",
        help="write a checkpoint as safetensors",
        description="Write a checkpoint as safetensors for other programs: codes and scales as "
        "docs/safetensors.md says, or the weights that they stand for, in names, shapes and dtypes "
        "of the published checkpoint that it was made of.",
    )
    export.add_argument("checkpoint", metavar="CHECKPOINT", help="folder that sdq wrote")
    export.add_argument(
        "--out",
        type=pathlib.Path,
        required=True,
        metavar="OUT",
        help="a .safetensors file, or a new folder",
    )
    export.add_argument(
        "--dequantize", action="store_true", help="weights as published, not codes and scales"
    )
    export.add_argument(
        "--shard-size", type=float, metavar="GB", help="of the files in a folder (default: 5)"
    )
    export.set_defaults(run=_export)

    encode = commands.add_parser(
        "encode",
        help="prompts to the embeddings that a published model reads",
        description="Run the text encoders of a published model and write what they say of "
        'prompts as one safetensors file. Needs pip install "sdq[encode]"; downloads nothing.',
    )
    encode.add_argument("--model", required=True, help="which; a wrong name lists all")
    encode.add_argument(
        "--encoders",
        type=pathlib.Path,
        required=True,
        metavar="DIR",
        help="folder that holds text_encoder, tokenizer, ... as diffusers' pipelines do",
    )
    encode.add_argument(
        "--prompt", action="append", required=True, help="may be given several times"
    )
    encode.add_argument(
        "--negative", default="", metavar="TEXT", help="that guidance leads away from"
    )
    encode.add_argument("--out", type=pathlib.Path, required=True, help="safetensors file")
    encode.set_defaults(run=_encode)

    sample = commands.add_parser(
        "sample",
        help="sample videos with a quantised model",
        description="Sample videos with a quantised model. The bundled one, shapes, writes an "
        "animation and a strip of frames for each prompt; a published one writes latents for each "
        "prompt of --embeddings, and goes on where it was if it is interrupted.",
    )
    _add_model_options(sample)
    sample.add_argument("--out", type=pathlib.Path, required=True, help="folder for the files")
    sample.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    shapes = sample.add_argument_group("the bundled model")
    shapes.add_argument("--prompt", action="append", help="a caption; may be given several times")
    shapes.add_argument(
        "--compare",
        choices=["bf16"],
        help="also sample this reference from the same noise and write report.html",
    )
    shapes.add_argument(
        "--video",
        choices=["webp", "gif", "mp4"],
        help='mp4 needs pip install "sdq[video]" (default: webp)',
    )
    large = sample.add_argument_group(
        "published models", "their own defaults stand for what is left out"
    )
    large.add_argument(
        "--embeddings", type=pathlib.Path, metavar="FILE", help="that sdq encode wrote"
    )
    large.add_argument(
        "--size", type=_size, metavar="WIDTHxHEIGHTxFRAMES", help="of the videos, in pixels"
    )
    large.add_argument("--shift", type=float, help="above 1: more steps where there is more noise")
    large.add_argument(
        "--low-noise",
        type=pathlib.Path,
        metavar="DIR",
        help="of two networks the other one's checkpoint; --checkpoint is that for much noise",
    )
    large.add_argument("--guidance-low", type=float, metavar="G", help="and its guidance")
    sample.set_defaults(run=_sample)

    decode = commands.add_parser(
        "decode",
        help="latents of a published model to a video file",
        description="Run the VAE of a published model on latents that sdq sample wrote. Needs "
        'pip install "sdq[pixels]"; downloads nothing.',
    )
    decode.add_argument("latents", type=pathlib.Path, metavar="LATENTS", help="safetensors file")
    decode.add_argument(
        "--vae",
        type=pathlib.Path,
        required=True,
        metavar="DIR",
        help="of diffusers' VAE, or of the pipeline that holds it",
    )
    decode.add_argument(
        "--out", type=pathlib.Path, required=True, metavar="FILE", help=".mp4, .webp or .gif"
    )
    decode.add_argument("--fps", type=float, help="frames a second (default: the model's)")
    decode.add_argument(
        "--tiling", action="store_true", help="tile after tile: less memory, slightly other pixels"
    )
    decode.set_defaults(run=_decode)

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

    analyze = commands.add_parser(
        "analyze",
        help="find out where quantised inputs hurt, and plan decomposition",
        description="Scan a model without data: random captions, noise and its own samples say how "
        "much of the velocity's error each layer makes at each step, and where activation "
        "decomposition pays within a budget. Writes analysis.json and a heat map.",
    )
    _add_model_options(analyze, recipe="semanticdialect")
    analyze.add_argument("--budget", type=float, help="extra matrix products, as a share of all")
    analyze.add_argument("--captions", type=int, default=4, help="how many (default: 4)")
    analyze.add_argument("--probes", type=int, default=2, help="directions a step (default: 2)")
    analyze.add_argument("--seed", type=int, default=0, help="of captions, noise (default: 0)")
    analyze.add_argument("--out", type=pathlib.Path, required=True, help="folder for the files")
    analyze.add_argument("--json", action="store_true", help="also print the JSON")
    analyze.set_defaults(run=_analyze)

    recipes = commands.add_parser(
        "recipes",
        help="list the recipes",
        description="The named ways to quantise a model, for --recipe.",
    )
    recipes.add_argument("--json", action="store_true", help="print JSON")
    recipes.set_defaults(run=_recipes)
    return top


def _add_model_options(command: argparse.ArgumentParser, recipe: str = "plain") -> None:
    """The options that say what is sampled and how."""
    command.add_argument("--model", default="shapes", help="(default: shapes)")
    command.add_argument(
        "--checkpoint",
        type=pathlib.Path,
        metavar="PATH",
        help="weights that scripts.train_shapes wrote (default: the bundled ones); of a published "
        "model, the folder of sdq quantize or convert",
    )
    command.add_argument("--recipe", metavar="NAME", help=f"see `sdq recipes` (default: {recipe})")
    for option, what in (("--weights", "the blocks' kernels"), ("--acts", "their inputs")):
        command.add_argument(
            option, metavar="FORMAT", help=f'instead of a recipe: format of {what}, or "bf16"'
        )
    command.set_defaults(default_recipe=recipe)
    command.add_argument("--steps", type=int, help="(default of shapes: 24)")
    command.add_argument("--solver", help="unipc or euler (default of shapes: unipc)")
    command.add_argument("--guidance", type=float, help="(default of shapes: 2)")


def _model_options(args: argparse.Namespace) -> tuple[Any, Any]:
    """The Recipe and the Settings that `_add_model_options` asked for."""
    models.check_name(args.model)
    from models.common import recipes
    from models.shapes.generate import GUIDANCE, SAMPLER, Settings

    formats_given = [name for name in (args.weights, args.acts) if name is not None]
    if formats_given and args.recipe is not None:
        raise ValueError("--recipe says the formats: give it or --weights and --acts, not both")
    recipe = recipes.named(args.recipe or args.default_recipe)
    if formats_given:
        plain = recipe.weight_formats, recipe.input_formats
        recipe = recipes.rounding(args.weights or plain[0], args.acts or plain[1])
    steps = SAMPLER.steps if args.steps is None else args.steps
    sampler = dataclasses.replace(SAMPLER, steps=steps, solver=args.solver or SAMPLER.solver)
    return recipe, Settings(
        sampler=sampler, guidance=GUIDANCE if args.guidance is None else args.guidance
    )


def _refuse(args: argparse.Namespace, names: Sequence[str], why: str) -> None:
    """Options that would be ignored are mistakes."""
    for name in names:
        if getattr(args, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')}: {why}")


def _require(args: argparse.Namespace, names: Sequence[str]) -> None:
    """Options that another one makes necessary."""
    if missing := [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) is None]:
        raise ValueError(f"--model {args.model} needs {', '.join(missing)}")


def _size(text: str) -> tuple[int, int, int]:
    """832x480x81."""
    try:
        width, height, frames = map(int, text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHTxFRAMES, got {text!r}") from None
    return width, height, frames


def _note(note: str) -> None:
    print(note, file=sys.stderr)


def _encode(args: argparse.Namespace) -> int:
    from models import embeddings, text_encoders

    found = text_encoders.encode(
        args.model, args.prompt, args.encoders, negative=args.negative, on_note=_note
    )
    embeddings.save(found, args.out)
    print(args.out)
    return 0


def _decode(args: argparse.Namespace) -> int:
    from models import pixels

    print(pixels.decode(args.latents, args.vae, args.out, fps=args.fps, tiling=args.tiling))
    return 0


_OF_SHAPES = ("prompt", "compare", "video", "recipe", "weights", "acts")
_OF_PUBLISHED = ("embeddings", "size", "shift", "low_noise", "guidance_low")


def _sample(args: argparse.Namespace) -> int:
    return _sample_shapes(args) if args.model in models.SAMPLED else _sample_published(args)


def _sample_published(args: argparse.Namespace) -> int:
    from models import families, generate, jobs
    from models.published import published

    models.check_name(args.model, families.names())
    published(args.model)
    why = "of the bundled model; the text of a published one is in --embeddings, how it is "
    _refuse(args, _OF_SHAPES, why + "quantised in --checkpoint")
    _require(args, ("checkpoint", "embeddings", "size"))
    job = jobs.Job(
        model=args.model,
        checkpoint=args.checkpoint,
        embeddings=args.embeddings,
        size=args.size,
        out=args.out,
        low_noise=args.low_noise,
        steps=args.steps,
        shift=args.shift,
        solver=args.solver,
        guidance=args.guidance,
        guidance_low=args.guidance_low,
        seed=args.seed,
    )
    try:
        written = generate.run(job, on_note=_note)
    except KeyboardInterrupt:
        print("sdq sample: interrupted; the same command goes on", file=sys.stderr)
        return 130
    for path in written:
        print(path)
    return 0


def _sample_shapes(args: argparse.Namespace) -> int:
    _refuse(args, _OF_PUBLISHED, "of published models; shapes reads prompts and has one size")
    _require(args, ("prompt",))
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
            suffix=f".{args.video or 'webp'}",
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


def _analyze(args: argparse.Namespace) -> int:
    recipe, settings = _model_options(args)
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


def _recipes(args: argparse.Namespace) -> int:
    from models.common import recipes

    if args.json:
        print(json.dumps([dataclasses.asdict(r) for r in recipes.RECIPES.values()], indent=1))
    else:
        rich.console.Console().print(recipes.to_rich(recipes.RECIPES.values()))
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


def _quantize(args: argparse.Namespace) -> int:
    from models import checkpoints
    from models.common import recipes

    is_kept = args.command == "convert"
    recipe = recipes.Recipe(name=recipes.KEEP) if is_kept else recipes.named(args.recipe)
    embedders = recipes.KEEP if is_kept else args.embedders or checkpoints.EMBEDDERS
    try:
        checkpoints.quantize(args.source, args.model, recipe, args.out, embedders)
    except KeyboardInterrupt:
        print(f"sdq {args.command}: interrupted; the same command goes on", file=sys.stderr)
        return 130
    return _inspect(argparse.Namespace(path=args.out, json=args.json))


def _export(args: argparse.Namespace) -> int:
    shard_size = None if args.shard_size is None else int(args.shard_size * 1e9)
    try:
        if args.dequantize:
            from models import checkpoints

            files = checkpoints.dequantize(args.checkpoint, args.out, shard_size)
        else:
            total = sum(entry.nbytes for entry in read_manifest(args.checkpoint).leaves)
            with bytes_bar("export", total) as on_part:
                files = exported.export(
                    args.checkpoint, args.out, shard_size=shard_size, on_part=on_part
                )
    except KeyboardInterrupt:
        print("sdq export: interrupted; nothing is left", file=sys.stderr)
        return 130
    size = size_text(sum(file.stat().st_size for file in files))
    print(f"{files[0]}: {size} in {len(files)} {'file' if len(files) == 1 else 'files'}")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    is_exported = exported.is_exported(args.path)
    manifest = exported.read_manifest(args.path) if is_exported else read_manifest(args.path)
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
