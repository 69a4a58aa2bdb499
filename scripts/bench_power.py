"""At which clock each product runs, and what the GPU draws meanwhile.

    python -m scripts.bench_power --out docs/results

Each way runs alone for some seconds while nvidia-smi looks. A GPU at its power limit lowers its
clock, so that a kernel of fewer cycles need not take less time, and one of more cycles not more.
"""

import contextlib
import dataclasses
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from pallas_kernels import device
from pallas_kernels.workloads import LINEARS, Linear
from scripts import _results as results
from scripts._timing import back_to_back_seconds
from scripts.bench_matmul import ways

LOOK = ("nvidia-smi", "--query-gpu=clocks.sm,power.draw,power.limit,clocks.max.sm", "--loop-ms=100")
AS_NUMBERS = "--format=csv,noheader,nounits"
LINEAR = next(one for one in LINEARS if str(one) == "Wan 14B q or o, 32760 tokens")
MACS = {"bf16": 2048, "fp8": 4096}  # a cycle and multiprocessor


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a GPU does under one load; medians.

    Attributes:
      name: of the way.
      milliseconds: of a call.
      megahertz: of the multiprocessors.
      watts: of the board.
      busy: share of the cycles that the tensor cores need at least.
    """

    name: str
    milliseconds: float
    megahertz: float
    watts: float
    busy: float


@contextlib.contextmanager
def looking() -> Iterator[list[str]]:
    """Yields a list of nvidia-smi's lines that grows."""
    seen: list[str] = []
    with subprocess.Popen([*LOOK, AS_NUMBERS], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = process.stdout

        def read() -> None:
            for line in lines:
                if line.endswith("\n"):  # the last may be cut
                    seen.append(line)

        reader = threading.Thread(target=read)
        reader.start()
        try:
            yield seen
        finally:
            process.terminate()
            reader.join()


def medians(lines: list[str]) -> tuple[float, ...]:
    """Megahertz, watts, limit in watts, highest megahertz, of lines that `looking` saw."""
    if not lines:
        raise RuntimeError("nvidia-smi said nothing: is there a GPU that it knows?")
    try:
        numbers = [[float(number) for number in line.split(",")] for line in lines]
    except ValueError as error:
        raise RuntimeError(f"nvidia-smi gave no number: {error}") from None
    return tuple(statistics.median(kind) for kind in zip(*numbers, strict=True))


def load(name: str, call: Callable[[], Any], linear: Linear, seconds: float) -> Load:
    """Run one way for some seconds; the first half only heats up."""
    each = back_to_back_seconds(call)
    times = []
    with looking() as seen:
        end = time.perf_counter() + seconds
        while (start := time.perf_counter()) < end:
            calls = max(1, round(0.05 / each))
            for _ in range(calls - 1):
                call()
            jax.block_until_ready(call())
            times.append((time.perf_counter() - start) / calls)
    megahertz, watts, *_ = medians(late(seen))
    each = statistics.median(late(times))
    macs = MACS["bf16" if name in ("XLA bf16", "rows kept in bf16") else "fp8"]
    least = linear.operations / 2 / macs / device.current().cores  # cycles
    return Load(
        name=name,
        milliseconds=1e3 * each,
        megahertz=megahertz,
        watts=watts,
        busy=least / (each * megahertz * 1e6),
    )


def late(values: list[Any]) -> list[Any]:
    """The second half."""
    return values[len(values) // 2 :]


def limits(seconds: float = 2.0) -> str:
    """Of this GPU; nvidia-smi takes a while to begin."""
    with looking() as seen:
        end = time.perf_counter() + seconds
        while not seen and time.perf_counter() < end:
            time.sleep(0.05)
    _, _, watts, megahertz = medians(seen)
    return f"{watts:.0f} W, {megahertz:.0f} MHz"


def to_markdown(found: list[Load], where: dict[str, str]) -> str:
    """The page that goes into docs/results."""
    return results.page(
        "What products draw",
        where,
        f"{LINEAR}, {LINEAR.m} x {LINEAR.k} x {LINEAR.n}. Each way alone for some seconds; medians "
        "of the second half. Busy: cycles that the tensor cores need at least, of those that "
        "passed.",
        "",
        "| | ms | MHz | W | tensor cores busy % |",
        "|---|---|---|---|---|",
        *(
            f"| {r.name} | {r.milliseconds:.3f} | {r.megahertz:.0f} | {r.watts:.0f} | "
            f"{100 * r.busy:.0f} |"
            for r in found
        ),
    )


def main() -> None:
    """Measure and write JSON and Markdown."""
    parser = results.parser(__doc__)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each way (default: 3)")
    args = parser.parse_args()
    if reason := device.without_mosaic_gpu():
        parser.error(reason)
    where = results.environment("bench_power", limits=limits())
    products = {n: call for n, call in ways(LINEAR).items() if not n.endswith(", bf16 rows")}
    found = [load(name, call, LINEAR, args.seconds) for name, call in products.items()]
    page = to_markdown(found, where)
    print(page)
    if args.out:
        document = {"environment": where, "results": [dataclasses.asdict(row) for row in found]}
        results.write(args.out, "matmul_power_hopper", page, document)


if __name__ == "__main__":
    main()
