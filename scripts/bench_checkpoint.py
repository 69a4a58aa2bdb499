"""A published checkpoint's way through `sdq`, with random weights: seconds and memory of each step.

    python -m scripts.bench_checkpoint --model wan2.1-t2v-14b --layout original --out docs/results

Each step is a command in a process of its own. Needs twice the checkpoint's size on disk.
"""

import dataclasses
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from models.families import names
from scripts import _results as results
from scripts._random_checkpoint import BF16, shapes_of, write
from sdq.manifest import read_manifest


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One command.

    Attributes:
      command: without folders.
      seconds: from its start to its end.
      peak: bytes of memory that it held at most, mapped files included.
    """

    command: str
    seconds: float
    peak: int


def run(command: str, *paths: str | pathlib.Path) -> Step:
    """`sdq` in a process of its own."""
    first, *rest = command.split()
    arguments = [sys.executable, "-m", "sdq.cli", first, *map(str, paths), *rest]
    start = time.perf_counter()
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"sdq {command}: failed")
    print(f"sdq {command}: {seconds:.1f} s", flush=True)
    kibibytes = 1 if sys.platform == "darwin" else 1024
    return Step(command=f"sdq {command}", seconds=seconds, peak=used.ru_maxrss * kibibytes)


def measure(model: str, layout: str, folder: pathlib.Path) -> tuple[list[Step], int]:
    """Every step, and the bytes of the quantised checkpoint."""
    source, made = folder / "source", folder / "quantised"
    write(model, layout, source)
    steps = [run(f"quantize --model {model}", source, "--out", made)]
    for file in source.iterdir():  # makes room
        file.unlink()
    steps.append(run("inspect", made))
    steps.append(run("export", made, "--out", folder / "exported"))
    steps.append(run("export --dequantize", made, "--out", folder / "dequantised"))
    return steps, sum(leaf.nbytes for leaf in read_manifest(made).leaves)


def main() -> None:
    """Measure and write JSON and Markdown."""
    parser = results.parser(__doc__)
    parser.add_argument("--model", choices=names(), default="wan2.1-t2v-14b")
    parser.add_argument("--layout", default="original", help="of its names (default: original)")
    args = parser.parse_args()
    shapes = shapes_of(args.model, args.layout)
    before = sum(map(math.prod, shapes.values())) * BF16.itemsize
    where = results.environment("bench_checkpoint", cores=str(os.cpu_count()))
    with tempfile.TemporaryDirectory() as folder:
        steps, nbytes = measure(args.model, args.layout, pathlib.Path(folder))
    page = results.page(
        f"A checkpoint of {args.model}",
        where,
        f"Random weights, {len(shapes)} tensors, recipe plain: from {before / 1e9:.2f} to "
        f"{nbytes / 1e9:.2f} GB. Peak: of the process, mapped files included.",
        "",
        "| | s | peak GB |",
        "|---|---|---|",
        *(f"| `{step.command}` | {step.seconds:.1f} | {step.peak / 1e9:.2f} |" for step in steps),
    )
    print(page)
    if args.out:
        document = {
            "environment": where,
            "bytes": {"bf16": before, "quantised": nbytes},
            "results": [dataclasses.asdict(step) for step in steps],
        }
        results.write(args.out, "checkpoint_cpu", page, document)


if __name__ == "__main__":
    main()
