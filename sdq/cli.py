"""The command `sdq`. Each subcommand is thin: parse, call the library, show."""

import argparse
import dataclasses
import json
import math
import pathlib
import sys
from collections.abc import Sequence

import rich.box
import rich.console
import rich.table

import sdq
from sdq import format_table, formats
from sdq.manifest import LeafEntry, Manifest, read_manifest, to_json_number


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
    return top


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
    if args.json:
        leaves = [
            {
                **dataclasses.asdict(leaf),
                "sqnr_db": to_json_number(leaf.sqnr_db),
                "bits_per_element": _bits(leaf),
            }
            for leaf in manifest.leaves
        ]
        document = {
            "written_by": manifest.written_by,
            "metadata": manifest.metadata,
            "nbytes": sum(leaf.nbytes for leaf in manifest.leaves),
            "leaves": leaves,
        }
        print(json.dumps(document, indent=1))
    else:
        console = rich.console.Console()
        total = _size(sum(leaf.nbytes for leaf in manifest.leaves))
        console.print(f"{args.path}: {len(manifest.leaves)} leaves, {total}", soft_wrap=True)
        console.print(_leaf_table(manifest))
    return 0


def _leaf_table(manifest: Manifest) -> rich.table.Table:
    table = rich.table.Table(
        caption="written by " + ", ".join(f"{name} {v}" for name, v in manifest.written_by.items()),
        box=rich.box.SIMPLE_HEAD,
    )
    table.add_column("leaf", style="bold", overflow="fold")
    table.add_column("format")
    table.add_column("shape")
    table.add_column("bytes", justify="right")
    table.add_column("bits/element", justify="right")
    table.add_column("SQNR dB", justify="right")
    for leaf in manifest.leaves:
        table.add_row(
            leaf.path,
            f"[green]{leaf.format}[/]" if leaf.format else leaf.dtype,
            " x ".join(map(str, leaf.shape)) or "scalar",
            _size(leaf.nbytes),
            f"{bits:.3f}" if (bits := _bits(leaf)) is not None else "",
            "" if leaf.sqnr_db is None else f"{leaf.sqnr_db:.2f}",
        )
    return table


def _bits(leaf: LeafEntry) -> float | None:
    elements = math.prod(leaf.shape)
    return 8 * leaf.nbytes / elements if elements else None


def _size(nbytes: int) -> str:
    size = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"


if __name__ == "__main__":
    sys.exit(main())
