"""`sdq convert`, `quantize`, `inspect`, `export`: checkpoints of published models, and ours."""

import argparse
import dataclasses
import json
import pathlib
import sys
from typing import Any

import rich.console

from sdq import checkpoint, exported
from sdq.leaf_table import bits_per_element, leaf_table, size_text
from sdq.manifest import read_manifest, to_json_number
from sdq.progress import bytes_bar
from sdq.tree import LeafReport


def add(commands: Any) -> None:
    """All four commands."""
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
