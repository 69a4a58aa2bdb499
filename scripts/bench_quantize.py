"""How fast and in how much memory an array is quantised and dequantised, for every format.

    python -m scripts.bench_quantize --out docs/results

Jitted, float32 in, on whatever device JAX uses; medians of several runs. Peak memory is XLA's own
account of the compiled program: argument, output and temporaries, as multiples of the leaf.
"""

import argparse
import dataclasses
import os
import pathlib
import platform

import jax
import jax.numpy as jnp
import rich.progress

import sdq
from scripts import _results as results
from scripts._timing import median_seconds, peak_bytes
from sdq import distributions, format_table

SHAPE = (2048, 4096)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One format, one way to choose, one axis; throughputs in million elements a second."""

    format: str
    select: str | None
    axis: int
    quantize_melements_per_s: float
    dequantize_melements_per_s: float
    peak_bytes_per_leaf_byte: float


def measure(name: str, rule: str | None, axis: int, runs: int) -> Result:
    """Time one case."""
    x = jnp.asarray(distributions.sample("Gaussian", 0, SHAPE))
    quantize = jax.jit(lambda x: sdq.quantize(x, name, select=rule, axis=axis)).lower(x).compile()
    q = quantize(x)
    dequantize = jax.jit(sdq.dequantize).lower(q).compile()
    return Result(
        format=name,
        select=rule,
        axis=axis,
        quantize_melements_per_s=x.size / 1e6 / median_seconds(lambda: quantize(x), runs),
        dequantize_melements_per_s=x.size / 1e6 / median_seconds(lambda: dequantize(q), runs),
        peak_bytes_per_leaf_byte=peak_bytes(quantize) / x.nbytes,
    )


def to_markdown(rows: list[Result], where: dict[str, str]) -> str:
    """The page that goes into docs/results."""
    return results.page(
        "Quantisation throughput",
        where,
        "Million elements a second, medians. Peak: argument, output and temporaries of the program "
        "as multiples of the leaf. Axis -1: the quantised axis is contiguous; axis 0: it is not.",
        "",
        "| format | choice | axis | quantise M/s | dequantise M/s | peak |",
        "|---|---|---|---|---|---|",
        *(
            f"| `{r.format}` | {r.select or ''} | {r.axis} | {r.quantize_melements_per_s:.0f} | "
            f"{r.dequantize_melements_per_s:.0f} | {r.peak_bytes_per_leaf_byte:.2f} |"
            for r in rows
        ),
    )


def main() -> None:
    """Measure every case and write JSON and Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=pathlib.Path, help="folder for the results (default: print only)"
    )
    parser.add_argument("--runs", type=int, default=9, help="timed runs of each case (default: 9)")
    parser.add_argument("formats", nargs="*", default=format_table.FORMATS, help="default: all")
    args = parser.parse_args()

    cases = [
        (name, rule, axis)
        for name in args.formats
        for rule in format_table.select_rules(sdq.format(name))
        for axis in (-1, 0)
    ]
    rows = [
        measure(*case, args.runs)
        for case in rich.progress.track(
            cases, description="bench", console=rich.console.Console(stderr=True)
        )
    ]
    where = results.environment(
        "bench_quantize",
        device=f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, {platform.machine()}",
        array=f"float32 {list(SHAPE)}, Gaussian",
    )
    page = to_markdown(rows, where)
    print(page)
    if args.out:
        document = {"environment": where, "results": [dataclasses.asdict(row) for row in rows]}
        results.write(args.out, f"quantize_{jax.default_backend()}", page, document)


if __name__ == "__main__":
    main()
