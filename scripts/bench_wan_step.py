"""A whole sampling step of a Wan transformer at full length: bf16 against 4 bits on kernels.

    python -m scripts.bench_wan_step --out docs/results

Random weights, one video, 512 tokens of text, no guidance; as `bench_block`, but all blocks in one
`nn.scan`, patches, embeddings and head included, which stay in bf16. Both sorts of weights lie in
memory at once: 80 GB are enough for the 14B model with XLA_PYTHON_CLIENT_PREALLOCATE=false and
XLA_PYTHON_CLIENT_MEM_FRACTION=.95.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from models.common.layers import Ops
from models.wan.config import WanConfig
from models.wan.modeling import Wan
from scripts import _results as results
from scripts._timing import compiled, peak_bytes, side_by_side_seconds
from scripts._wan import TEXT, Grid, environment, in_4_bits, random_params, ways, what_to_measure

WAYS = ("plain, accurate", "semanticdialect, accurate", "full_path, fast", "full_path, accurate")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One way to compute the step.

    Attributes:
      name: of the way.
      seconds: of a step.
      times_faster: than bf16.
      weights: gigabytes.
      peak: gigabytes with all that is live beside them.
    """

    name: str
    seconds: float
    times_faster: float
    weights: float
    peak: float


def measure(config: WanConfig, grid: Grid) -> list[Result]:
    """Every way, in turn."""
    keys = jax.random.split(jax.random.key(1), 2)
    size = [count * patch for count, patch in zip(grid, config.patch, strict=True)]
    x = jax.random.normal(keys[0], (1, *size, config.in_channels))
    text = jax.random.normal(keys[1], (1, TEXT, config.text_width), jnp.bfloat16)
    inputs = (x, jnp.full((1,), 500.0), text)
    shapes = jax.eval_shape(Wan(config).init, jax.random.key(0), *inputs)["params"]
    params = random_params(shapes)
    blocks = jax.jit(functools.partial(jax.lax.map, in_4_bits))(params["blocks"])
    fewer = params | {"blocks": blocks}
    every = ways(config, grid, config.layers)
    tried: dict[str, tuple[Ops, Any, Any]] = {"bf16": (Ops(), params, None)}
    tried |= {name: (every[name][0], fewer, every[name][1]) for name in WAYS}

    def step(ops: Ops, params: Any, x: Any, t: Any, text: Any, state: Any) -> Any:
        return Wan(config, ops).apply({"params": params}, x, t, text, state=state)

    calls = {
        name: (functools.partial(step, ops), (weights, *inputs, state))
        for name, (ops, weights, state) in tried.items()
    }
    programs = dict(zip(calls, compiled(list(calls.values())), strict=True))
    for name, program in programs.items():
        print(f"{name}: {peak_bytes(program) / 1e9:.2f} GB", flush=True)
    timed: dict[str, Callable[[], Any]] = {
        name: functools.partial(program, *calls[name][1]) for name, program in programs.items()
    }
    seconds = side_by_side_seconds(timed, runs=3)
    return [
        Result(
            name=name,
            seconds=seconds[name],
            times_faster=seconds["bf16"] / seconds[name],
            weights=sum(leaf.nbytes for leaf in jax.tree.leaves(tried[name][1])) / 1e9,
            peak=peak_bytes(program) / 1e9,
        )
        for name, program in programs.items()
    ]


def to_markdown(found: list[Result], where: dict[str, str]) -> str:
    """The page that goes into docs/results."""
    return results.page(
        "A sampling step of Wan on kernels",
        where,
        "Peak: weights, inputs, outputs and temporaries of the compiled step. By part: "
        "[one of its blocks](block_hopper.md).",
        "",
        "| | s | against bf16 | weights GB | peak GB | less than bf16 |",
        "|---|---|---|---|---|---|",
        *(
            f"| {r.name} | {r.seconds:.3f} | {r.times_faster:.2f}x | {r.weights:.2f} | "
            f"{r.peak:.2f} | {found[0].peak / r.peak:.2f}x |"
            for r in found
        ),
    )


def main() -> None:
    """Measure and write JSON and Markdown."""
    args, config, grid = what_to_measure(__doc__)
    found = measure(config, grid)
    where = environment("bench_wan_step", args)
    page = to_markdown(found, where)
    print(page)
    if args.out:
        document = {"environment": where, "results": [dataclasses.asdict(row) for row in found]}
        results.write(args.out, "wan_step_hopper", page, document)


if __name__ == "__main__":
    main()
