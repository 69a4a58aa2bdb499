"""The fused activation quantiser on a Hopper GPU: time against a copy's, and every cut's.

    python -m scripts.bench_row_quantizer --out docs/results

Bytes are those that must move: x, values, exponents. The share is of the bandwidth that XLA's
elementwise bf16 copy of the same x reaches in the same process.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import device
from pallas_kernels.mosaic_gpu.quantizer import Norm, SubFormatbooks, quantize
from pallas_kernels.mosaic_gpu.quantizer_task import Config, default_config, words_held
from scripts import _results as results
from scripts._timing import compiled, long_work, side_by_side_seconds
from sdq import formats

SHAPES = ((32768, 5120), (32760, 13824), (32760, 8960), (32760, 1536), (76544, 3072))
MOST_WORDS = 64  # of a thread, before registers spill
BEHIND = 0.05  # seconds of other work, while calls queue that are shorter than their dispatch
FORMATS = ("sdq32:16", "sdq32:32", "e2m1:16")
CUTS = ((32, 16), (32, 20), (64, 16), (64, 20), (128, 16), (128, 20), (160, 20), (256, 16))


def ways(m: int, k: int) -> dict[str, Callable[[jax.Array], Any]]:
    """What to time, by name: functions of x `[m, k]`."""
    books = jnp.full((65, 1, 8), 15, jnp.uint8)
    sub = SubFormatbooks(books, jnp.zeros(m, jnp.int32))
    tokens = jnp.arange(0, m, 10, dtype=jnp.int32)
    norm = Norm(jnp.ones((1, k)), jnp.zeros((1, k)), 1e-6)

    def timed(fmt: str = FORMATS[0], **options: Any) -> Callable[[jax.Array], Any]:
        return functools.partial(
            quantize, fmt=formats.parse(fmt), num_sms=device.current().cores, **options
        )

    found: dict[str, Callable[[jax.Array], Any]] = {"copy": lambda x: -x}
    found |= {fmt: timed(fmt) for fmt in FORMATS}
    found["with metadata"] = timed(metadata=True)
    found["shared books"] = timed(sub_formatbooks=sub)
    more: dict[str, dict[str, Any]] = {
        "": {},
        "norm in front": {"norm": norm},
        "GELU in front": {"activation": "gelu"},
        "residuals of a tenth": {"residual_of": tokens},
        "norm, shared books, residuals": {
            "norm": norm,
            "sub_formatbooks": sub,
            "residual_of": tokens,
        },
    }
    found |= {name: timed(**options) for name, options in more.items() if name}
    default = default_config(k, 16)
    found["no exchange"] = timed(config=dataclasses.replace(default, exchange=False))
    found["8 columns"] = timed(config=dataclasses.replace(default, columns=8))
    for threads, warps in CUTS:
        if words_held(k, 16, threads) <= MOST_WORDS:
            cut = f"{threads} threads, {warps} warps"
            for name, options in more.items():
                config = Config(threads=threads, warps=warps)
                found[f"{name}, {cut}" if name else cut] = timed(config=config, **options)
    return found


def measure(m: int, k: int) -> dict[str, float]:
    """Milliseconds by name; a copy's under "copy"."""
    noise = jax.random.normal(jax.random.key(0), (m, k), jnp.bfloat16)
    channels = jnp.exp(jax.random.normal(jax.random.key(1), (1, k))).astype(jnp.bfloat16)
    x = noise * channels
    functions = ways(m, k)
    programs = compiled([(function, (x,)) for function in functions.values()])
    timed: dict[str, Callable[[], Any]] = {
        name: functools.partial(program, x)
        for name, program in zip(functions, programs, strict=True)
    }
    seconds = side_by_side_seconds(timed, behind=long_work(BEHIND))
    return {name: 1e3 * one for name, one in seconds.items()}


def to_markdown(times: dict[str, dict[str, float]], where: dict[str, str]) -> str:
    """The page that goes into docs/results."""
    return results.page(
        "The fused activation quantiser",
        where,
        "Calls queue behind other work, because some take less time than their dispatch.",
        *(line for shape, found in times.items() for line in to_lines(shape, found)),
    )


def to_lines(shape: str, milliseconds: dict[str, float]) -> list[str]:
    """A table for a shape."""
    m, k = map(int, shape.split(" x "))
    copied = 4 * m * k / milliseconds["copy"]
    lines = ["", f"## {shape}", "", "| | ms | share of a copy's bandwidth |", "|---|---|---|"]
    for name, value in milliseconds.items():
        moved = 4 * m * k if name == "copy" else 3 * m * k + m
        lines.append(f"| {name} | {value:.4f} | {moved / value / copied:.0%} |")
    return lines


def main() -> None:
    """Measure and write JSON and Markdown."""
    parser = results.parser(__doc__)
    args = parser.parse_args()
    if not device.current().is_hopper:
        parser.error(f"needs a Hopper GPU, not {device.current().kind}")
    where = results.environment("bench_row_quantizer")
    times = {}
    for m, k in SHAPES:
        shape = f"{m} x {k}"
        times[shape] = measure(m, k)
        print("\n".join(to_lines(shape, times[shape])), flush=True)
        if args.out:
            document = {"environment": where, "ms": times}
            results.write(args.out, "row_quantizer_hopper", to_markdown(times, where), document)


if __name__ == "__main__":
    main()
