"""What a sampling step of the shapes model costs under a recipe: peak memory, time, programs.

    python -m scripts.bench_step --out docs/results

Peak memory is XLA's own account of the compiled step (arguments, outputs, temporaries). Steps that
look at the attention and steps that learn sub-formatbooks are timed apart from those that share.
Nothing here is fast yet: inputs are rounded in plain jnp. Programs: how many a trajectory compiled.
"""

import argparse
import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.common.recipes import KEEP, RECIPES, Recipe
from models.shapes import recipe as recipes
from models.shapes.generate import Settings, generate, initial_state, start, velocity
from models.shapes.params import load
from models.shapes.vocabulary import EXAMPLE, tokenize
from scripts import _results as results
from scripts._timing import median_seconds, peak_bytes

CHOSEN = (Recipe(name=KEEP), RECIPES["w4a16"], RECIPES["plain"], RECIPES["semanticdialect"])
STEPS = {"shares": 3, "looks": 0, "learns": 1}  # a step number of each kind


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One recipe; times in milliseconds by kind of step."""

    recipe: str
    weight_bytes: int
    peak_bytes: int
    milliseconds: dict[str, float]
    programs: int


def measure(recipe: Recipe, params: Any, settings: Settings, batch: int, runs: int) -> Result:
    """Compile one step and time it; then sample, and count programs."""
    params, settings = recipes.apply(params, recipe, settings)
    tokens = jnp.broadcast_to(jnp.asarray(tokenize(EXAMPLE)), (batch, len(tokenize(EXAMPLE))))
    x = start(jax.random.key(0), np.arange(batch))
    state = initial_state(settings, batch)

    @jax.jit
    def step(params: Any, x: jax.Array, number: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        return velocity(params, tokens, settings)(x, jnp.float32(0.7), number, state)

    compiled = step.lower(params, x, jnp.int32(0), state).compile()
    milliseconds = {
        kind: 1e3 * median_seconds(lambda n=n: compiled(params, x, jnp.int32(n), state), runs)
        for kind, n in STEPS.items()
    }
    before = programs()
    for _ in range(2):
        generate(params, tokens, x + 0, settings=settings)
    return Result(
        recipe=recipe.name,
        weight_bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(params)),
        peak_bytes=peak_bytes(compiled),
        milliseconds=milliseconds,
        programs=programs() - before,
    )


def programs() -> int:
    """Of the whole trajectory, compiled so far."""
    return generate._cache_size()  # type: ignore[attr-defined]


def to_markdown(rows: list[Result], where: dict[str, str]) -> str:
    """The page that goes into docs/results."""
    first = rows[0]

    def cells(row: Result) -> list[str]:
        times = [
            f"{ms:.2f} ({ms / first.milliseconds[kind]:.2f}x)"
            for kind, ms in row.milliseconds.items()
        ]
        peak = f"{row.peak_bytes / 2**20:.1f} ({row.peak_bytes / first.peak_bytes:.2f}x)"
        return [row.recipe, f"{row.weight_bytes / 2**20:.1f}", peak, *times, str(row.programs)]

    kinds = " | ".join(f"ms, step that {kind}" for kind in STEPS)
    return results.page(
        "A sampling step of the shapes model",
        where,
        "Peak: arguments, outputs and temporaries of the compiled step, guidance included; times: "
        "medians; in brackets against bf16. Inputs are rounded in plain jnp: this table says what "
        "the recipes cost without kernels. Programs: compiled for a whole trajectory, sampled "
        "twice.",
        "",
        f"| recipe | weights MiB | peak MiB | {kinds} | programs |",
        "|" + "---|" * (4 + len(STEPS)),
        *("| " + " | ".join(cells(row)) + " |" for row in rows),
    )


def main() -> None:
    """Measure every recipe and write JSON and Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, help="folder (default: print only)")
    parser.add_argument("--batch", type=int, default=4, help="videos at once (default: 4)")
    parser.add_argument("--runs", type=int, default=9, help="timed runs (default: 9)")
    args = parser.parse_args()
    params = load()
    rows = [measure(recipe, params, Settings(), args.batch, args.runs) for recipe in CHOSEN]
    where = results.environment("bench_step", batch=f"{args.batch} videos, both halves of guidance")
    page = to_markdown(rows, where)
    print(page)
    if args.out:
        document = {"environment": where, "results": [dataclasses.asdict(row) for row in rows]}
        results.write(args.out, f"shapes_step_{jax.default_backend()}", page, document)


if __name__ == "__main__":
    main()
