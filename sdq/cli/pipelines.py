"""`sdq encode`, `sdq decode`: prompts to embeddings, latents to videos, of published models."""

import argparse
import pathlib
from typing import Any

from sdq.cli.options import note


def add(commands: Any) -> None:
    """Both commands."""
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


def _encode(args: argparse.Namespace) -> int:
    from models import embeddings, text_encoders

    found = text_encoders.encode(
        args.model, args.prompt, args.encoders, negative=args.negative, on_note=note
    )
    embeddings.save(found, args.out)
    print(args.out)
    return 0


def _decode(args: argparse.Namespace) -> int:
    from models import pixels

    print(pixels.decode(args.latents, args.vae, args.out, fps=args.fps, tiling=args.tiling))
    return 0
