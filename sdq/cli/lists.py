"""`sdq formats`, `sdq recipes`: what there is to choose from."""

import argparse
import dataclasses
import json
import pathlib
import sys
from typing import Any

import rich.console

from sdq import format_table, formats


def add(commands: Any) -> None:
    """Both commands."""
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

    recipes = commands.add_parser(
        "recipes",
        help="list the recipes",
        description="The named ways to quantise a model, for --recipe.",
    )
    recipes.add_argument("--json", action="store_true", help="print JSON")
    recipes.set_defaults(run=_recipes)


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


def _recipes(args: argparse.Namespace) -> int:
    from models.common import recipes

    if args.json:
        print(json.dumps([dataclasses.asdict(r) for r in recipes.RECIPES.values()], indent=1))
    else:
        rich.console.Console().print(recipes.to_rich(recipes.RECIPES.values()))
    return 0
