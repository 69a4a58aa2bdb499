"""Find the fastest way to cut each matmul of `pallas_kernels.workloads` on this GPU.

    python -m scripts.tune --out pallas_kernels/tuned

Minutes a workload, most of them compilation. Written after each one; products that the file holds
are not measured again.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sdq
from pallas_kernels import device, quantized_matmul
from pallas_kernels.mosaic_gpu.config import BASES, BF16, FEW, Config, fitted, heuristic
from pallas_kernels.mosaic_gpu.operands import tile_weight
from pallas_kernels.rows import Fp8Rows
from pallas_kernels.tuning import as_entry, file_name
from pallas_kernels.workloads import LINEARS, Linear
from scripts import _results as results
from scripts._timing import SETTLED, side_by_side_seconds

AT_ONCE = 8  # compilations
FORMAT = "sdq32:16"


SHAPES: dict[str, tuple[dict[str, int], ...]] = {
    "fast": ({"tile_m": 256}, {"tile_m": 224}),
    "accurate": ({"tile_m": 192}, {"tile_m": 192, "stages": 4}, {"tile_m": 176}),
    BF16: ({"tile_m": 192}, {"tile_m": 128, "warpgroups": 3}),
}


def candidates(mode: str, m: int, n: int) -> Iterator[Config]:
    """Ways worth trying for m rows of x and n of w."""
    base = heuristic(mode, m, n)
    yield base
    if m <= FEW:
        for warpgroups, stages in itertools.product((1, 2), (4, 6, 8, 12, 16)):
            yield dataclasses.replace(base, warpgroups=warpgroups, stages=stages)
        return
    for shape, cluster, width in itertools.product(SHAPES[mode], (1, 2), (4, 8, 16)):
        changed = dataclasses.replace(base, **shape, cluster=cluster, width=width)
        yield fitted(changed, 2, most=shape.get("stages", 6))


def operands(linear: Linear, mode: str) -> tuple[jax.Array | Fp8Rows, Any]:
    """Random ones, quantised as the mode wants them."""
    keys = jax.random.split(jax.random.key(0))
    w = jax.random.normal(keys[0], (linear.n, linear.k), jnp.bfloat16)
    tiled = tile_weight(sdq.quantize(w, FORMAT, select="two_stage"))
    x = jax.random.normal(keys[1], (linear.m, linear.k), jnp.bfloat16)
    if mode == BF16:
        return x, tiled
    rows = Fp8Rows(
        values=x.astype(jnp.float8_e4m3fn),
        exponents=jnp.zeros((linear.m, 1), jnp.int8),
        dtype=np.dtype(jnp.bfloat16),
        interleaved=True,
    )
    return rows, tiled


def measure(linear: Linear, mode: str) -> list[tuple[float, Config]]:
    """Seconds of every candidate that compiles, the fastest first."""
    x, w = operands(linear, mode)
    configs = list(dict.fromkeys(candidates(mode, linear.m, linear.n)))

    def program(config: Config) -> Callable[..., jax.Array]:
        call = functools.partial(quantized_matmul, implementation="mosaic_gpu", config=config)
        return jax.jit(call).lower(x, w).compile()

    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        programs = list(pool.map(program, configs))
    calls: dict[str, Callable[[], Any]] = {
        str(number): functools.partial(compiled, x, w) for number, compiled in enumerate(programs)
    }
    seconds = side_by_side_seconds(calls, runs=3, at_least=SETTLED).values()
    timed = sorted(zip(seconds, configs, strict=True), key=lambda pair: pair[0])
    for one, config in timed:
        print(f"  {1e3 * one:8.3f} ms  {config}", flush=True)
    return timed


def main() -> None:
    """Tune what is missing and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the tables")
    parser.add_argument("--only", default="", help="workloads whose name holds this")
    parser.add_argument("--modes", nargs="*", choices=list(BASES), default=list(BASES))
    args = parser.parse_args()
    file = args.out / file_name(device.current().kind)
    known = json.loads(file.read_text())["entries"] if file.exists() else []
    args.out.mkdir(parents=True, exist_ok=True)
    for linear in LINEARS:
        for mode in args.modes:
            size = {"mode": mode, "m": linear.m, "k": linear.k, "n": linear.n}
            if args.only not in str(linear) or any(size.items() <= e.items() for e in known):
                continue
            print(f"{linear} ({mode})", flush=True)
            seconds, best = measure(linear, mode)[0]
            found = as_entry(mode, linear.m, linear.k, linear.n, best)
            known.append(found | {"milliseconds": round(1e3 * seconds, 4)})
            document = {"environment": results.environment("tune"), "entries": known}
            file.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
