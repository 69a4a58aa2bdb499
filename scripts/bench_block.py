"""One block of a Wan transformer at full length: bf16 against 4 bits on kernels.

    python -m scripts.bench_block --out docs/results

Random weights, one video, 512 tokens of text. SemanticDialect decomposes a tenth of the tokens and
shares sub-formatbooks at every input, which is more than a plan asks of most blocks; its step is
one of those that neither look nor learn. Attention is cuDNN's; in "full_path", otherwise the same,
fp8. As in a model's scan, the tokens that come in are given away: results may take their place.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from models.common.attention import attention
from models.common.full_path import FullPath
from models.common.layers import Ops, matmul
from models.common.rope import rope_table
from models.wan.config import WanConfig
from models.wan.modeling import Block
from models.wan.sites import SITES, TEXT_SITES
from pallas_kernels import MODES, TiledWeight, quantize_rows, quantized_matmul
from scripts import _results as results
from scripts._timing import (
    SETTLED,
    back_to_back_seconds,
    compiled,
    peak_bytes,
    side_by_side_seconds,
)
from scripts._wan import (
    FORMAT,
    TEXT,
    Grid,
    environment,
    in_4_bits,
    random_params,
    ways,
    what_to_measure,
)
from sdq.rules import path_of


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One way to run the block; `times_faster` than bf16."""

    name: str
    milliseconds: float
    times_faster: float
    peak_mib: float


def measure(config: WanConfig, grid: Grid) -> tuple[list[Result], dict[str, float]]:
    """Whole blocks, and milliseconds of their parts alone."""
    tokens = grid[0] * grid[1] * grid[2]
    keys = jax.random.split(jax.random.key(1), 6)
    x = jax.random.normal(keys[0], (1, tokens, config.width), jnp.bfloat16)
    text = jax.random.normal(keys[1], (1, TEXT, config.width), jnp.bfloat16)
    modulation = jax.random.normal(keys[2], (1, 1, 6, config.width))
    rope = rope_table(grid, config.rope_widths, config.rope_theta)
    arguments = (x, text, None, modulation, rope, None)
    params = random_params(
        jax.eval_shape(Block(config, Ops()).init, jax.random.key(0), *arguments)["params"]
    )
    fewer = in_4_bits(params)
    tried: dict[str, tuple[Ops, Any, Any]] = {"bf16": (Ops(), params, None)}
    for name, (ops, state) in ways(config, grid, layers=1).items():
        tried[name] = ops, fewer, jax.tree.map(lambda part: part[0], state)

    def run(ops: Ops, x: Any, weights: Any, text: Any, modulation: Any, memory: Any) -> Any:
        inputs = (x, text, None, modulation, rope, memory)
        return Block(config, ops).apply({"params": weights}, *inputs)

    calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
    others = {}  # arguments behind the tokens
    for name, (ops, weights, memory) in tried.items():
        others[name] = weights, text, modulation, memory
        function = jax.jit(functools.partial(run, ops), donate_argnums=0)
        calls.append((function, (x, *others[name])))
    programs = dict(zip(tried, compiled(calls), strict=True))
    peaks = {name: peak_bytes(program) / 2**20 for name, program in programs.items()}
    timed: dict[str, Callable[..., Any]] = {
        name: functools.partial(with_tokens, program, others[name])
        for name, program in programs.items()
    }
    seconds = side_by_side_seconds(timed, at_least=SETTLED, fresh=lambda: jnp.copy(x))
    found = [
        Result(
            name=name,
            milliseconds=1e3 * one,
            times_faster=seconds["bf16"] / one,
            peak_mib=peaks[name],
        )
        for name, one in seconds.items()
    ]
    return found, parts(config, tokens, params, fewer)


def with_tokens(program: Callable[..., Any], others: tuple[Any, ...], x: jax.Array) -> Any:
    """A call of a block, whose tokens come first."""
    return program(x, *others)


def parts(config: WanConfig, tokens: int, params: Any, fewer: Any) -> dict[str, float]:
    """Milliseconds of what a block consists of, each alone: self-attention, linears, quantising."""
    keys = iter(jax.random.split(jax.random.key(2), 3 + len(SITES)))
    heads = (1, tokens, config.heads, config.head_width)
    q, k, v = (jax.random.normal(next(keys), heads, jnp.bfloat16) for _ in range(3))
    calls: list[tuple[str, Callable[..., Any], tuple[Any, ...]]] = [
        ("self-attention", attention, (q, k, v)),
        ("self-attention in fp8", FullPath(), (q, k, v)),
    ]
    dense, quantised = (
        {path_of(at): leaf for at, leaf in _leaves(tree)} for tree in (params, fewer)
    )
    for site, linears in SITES.items():
        kernels = [f"{linear}/kernel" for linear in linears]
        shape = (1, TEXT if site in TEXT_SITES else tokens, dense[kernels[0]].shape[0])
        x = jax.random.normal(next(keys), shape, jnp.bfloat16)
        quantize = functools.partial(quantize_rows, fmt=FORMAT)
        rows = jax.jit(quantize)(x).rows
        calls.append(("quantising their inputs", quantize, (x,)))
        for path in kernels:
            calls.append(("linears in bf16", matmul, (x, dense[path])))
            for mode in MODES:
                name = f"linears in 4 bits, {mode}"
                product = functools.partial(quantized_matmul, mode=mode)
                calls.append((name, product, (rows, quantised[path])))
    programs = compiled([(function, arguments) for _, function, arguments in calls])
    found: dict[str, float] = dict.fromkeys((name for name, *_ in calls), 0.0)
    for (name, _, arguments), program in zip(calls, programs, strict=True):
        call = functools.partial(program, *arguments)
        found[name] += 1e3 * back_to_back_seconds(call, runs=3, at_least=SETTLED)
    return found


def _leaves(tree: Any) -> Any:
    return jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, TiledWeight))


def to_markdown(found: list[Result], parts: dict[str, float], where: dict[str, str]) -> str:
    """The page that goes into docs/results."""
    return results.page(
        "A block of Wan on kernels",
        where,
        "Whole blocks: norms, linears, attention to itself and to the text, residuals; below them "
        "parts alone. Tokens are given away: results may take their place. Peak: arguments, "
        "temporaries and what else comes out.",
        "",
        "| | ms | against bf16 | peak MiB |",
        "|---|---|---|---|",
        *(
            f"| {r.name} | {r.milliseconds:.2f} | {r.times_faster:.2f}x | {r.peak_mib:.0f} |"
            for r in found
        ),
        *(f"| {name} | {value:.2f} | | |" for name, value in parts.items()),
    )


def main() -> None:
    """Measure and write JSON and Markdown."""
    args, config, grid = what_to_measure(__doc__)
    found, parts = measure(config, grid)
    where = environment("bench_block", args)
    page = to_markdown(found, parts, where)
    print(page)
    if args.out:
        document = {
            "environment": where,
            "results": [dataclasses.asdict(row) for row in found],
            "parts_ms": parts,
        }
        results.write(args.out, "block_hopper", page, document)


if __name__ == "__main__":
    main()
