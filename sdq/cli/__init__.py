"""The command `sdq`. Each subcommand is thin: parse, call the library, show."""

import argparse
import sys
from collections.abc import Sequence

import sdq
from sdq.cli import checkpoints, lists, pipelines, sampling, studies


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
    for part in (lists, checkpoints, pipelines, sampling, studies):
        part.add(commands)
    return top
