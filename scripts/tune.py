"""Find the fastest way to cut each matmul of `pallas_kernels.workloads` on this GPU.

    python -m scripts.tune --out pallas_kernels/tuned

Minutes a workload, most of them compilation. Written after each one; products that the file holds
are not measured again. All candidates are measured quickly, the best of them once more.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from pallas_kernels import device, quantized_matmul
from pallas_kernels.mosaic_gpu.config import (
    BASES,
    BF16,
    Config,
    FewConfig,
    fitted,
    heuristic,
    tiles,
)
from pallas_kernels.tuning import as_entry, file_name, measured_mode
from pallas_kernels.workloads import LINEARS, Linear
from scripts import _results as results
from scripts._products import operands, program, seconds_of_each
from scripts._timing import SETTLED, compiled

TILES = 3  # that a rule likes best, of many rows
FINALISTS = 4  # candidates that are measured twice


def candidates(mode: str, m: int, n: int) -> Iterator[Config | FewConfig]:
    """Ways worth trying for m rows of x and n of w."""
    base = heuristic(mode, m, n)
    if isinstance(base, FewConfig):
        yield base
        for warpgroups, each in itertools.product((2, 3, 4), (2, 3, 5)):
            few = {"warpgroups": warpgroups, "stages": warpgroups * each}
            yield fitted(dataclasses.replace(base, **few), 2)
        return
    cuts = tiles(mode, m, n, device.current().cores)[:TILES]
    for cut, width in itertools.product(cuts, (4, 8, 16)):
        yield fitted(dataclasses.replace(cut, width=width), 2)


def fastest(linear: Linear, mode: str) -> tuple[float, Config | FewConfig]:
    """Seconds of the fastest candidate, and which one that is."""
    made = operands(linear)
    x: list[Any] = made.x if mode == BF16 else made.rows
    configs = list(dict.fromkeys(candidates(mode, linear.m, linear.n)))
    ways = [
        functools.partial(quantized_matmul, implementation="mosaic_gpu", config=config)
        for config in configs
    ]
    programs = compiled([(program(way), (x, made.tiled)) for way in ways])
    calls: dict[str, Callable[[], Any]] = {
        str(number): functools.partial(one, x, made.tiled) for number, one in enumerate(programs)
    }
    quick = seconds_of_each(linear, calls, SETTLED / 2)
    ranked = sorted(quick, key=lambda one: quick[one])
    for one in ranked:
        print(f"  {1e3 * quick[one]:8.4f} ms  {configs[int(one)]}", flush=True)
    # The clock has not settled in so short a time: the first ones again.
    settled = seconds_of_each(linear, {one: calls[one] for one in ranked[:FINALISTS]})
    best = min(settled, key=lambda one: settled[one])
    return settled[best], configs[int(best)]


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
            if measured_mode(mode, linear.m) != mode or args.only not in str(linear):
                continue
            if any(size.items() <= e.items() for e in known):
                continue
            print(f"{linear} ({mode})", flush=True)
            seconds, best = fastest(linear, mode)
            found = as_entry(mode, linear.m, linear.k, linear.n, best)
            known.append(found | {"milliseconds": round(1e3 * seconds, 4)})
            document = {"environment": results.environment("tune"), "entries": known}
            file.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
