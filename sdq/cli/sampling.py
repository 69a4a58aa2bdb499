"""`sdq sample`: videos of the bundled model, latents of a published one."""

import argparse
import pathlib
import shlex
import sys
from typing import Any

import models
from sdq.cli.options import add_model_options, model_options, note, refuse, require

OF_SHAPES = ("prompt", "compare", "video", "recipe", "weights", "acts")
OF_PUBLISHED = ("embeddings", "size", "shift", "low_noise", "guidance_low")


def add(commands: Any) -> None:
    """The command."""
    sample = commands.add_parser(
        "sample",
        help="sample videos with a quantised model",
        description="Sample videos with a quantised model. The bundled one, shapes, writes an "
        "animation and a strip of frames for each prompt; a published one writes latents for each "
        "prompt of --embeddings, and goes on where it was if it is interrupted.",
    )
    add_model_options(sample)
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


def _size(text: str) -> tuple[int, int, int]:
    """832x480x81."""
    try:
        width, height, frames = map(int, text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHTxFRAMES, got {text!r}") from None
    return width, height, frames


def _sample(args: argparse.Namespace) -> int:
    return _sample_shapes(args) if args.model in models.SAMPLED else _sample_published(args)


def _sample_published(args: argparse.Namespace) -> int:
    from models import families, generate, jobs
    from models.published import published

    models.check_name(args.model, families.names())
    published(args.model)
    why = "of the bundled model; the text of a published one is in --embeddings, how it is "
    refuse(args, OF_SHAPES, why + "quantised in --checkpoint")
    require(args, ("checkpoint", "embeddings", "size"))
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
        written = generate.run(job, on_note=note)
    except KeyboardInterrupt:
        print("sdq sample: interrupted; the same command goes on", file=sys.stderr)
        return 130
    for path in written:
        print(path)
    return 0


def _sample_shapes(args: argparse.Namespace) -> int:
    refuse(args, OF_PUBLISHED, "of published models; shapes reads prompts and has one size")
    require(args, ("prompt",))
    recipe, settings = model_options(args)
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
