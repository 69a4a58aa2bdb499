"""Options that several commands have, and what is said of wrong ones."""

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import models


def add_model_options(command: argparse.ArgumentParser, recipe: str = "plain") -> None:
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


def model_options(args: argparse.Namespace) -> tuple[Any, Any]:
    """The Recipe and the Settings that `add_model_options` asked for."""
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


def refuse(args: argparse.Namespace, names: Sequence[str], why: str) -> None:
    """Options that would be ignored are mistakes."""
    for name in names:
        if getattr(args, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')}: {why}")


def require(args: argparse.Namespace, names: Sequence[str]) -> None:
    """Options that another one makes necessary."""
    if missing := [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) is None]:
        raise ValueError(f"--model {args.model} needs {', '.join(missing)}")


def note(text: str) -> None:
    """Tell the user something that is no result."""
    print(text, file=sys.stderr)
