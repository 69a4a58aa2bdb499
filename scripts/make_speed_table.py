"""The README's table of speed and memory, from docs/results/full_size.json.

    python -m scripts.make_speed_table

Prints Markdown; a test compares the README with it.
"""

import argparse
import json
import pathlib

from scripts.bench_full_size import CASES, STEM, Result

RESULTS = pathlib.Path(__file__).parents[1] / "docs" / "results"
BEFORE, AFTER = "bf16", "plain_full_path"
HEADER = (
    "| model, video | a step in bf16 | in 4 bits, fast | accurate | weights | quantised in |\n"
    "|---|---|---|---|---|---|"
)


def to_markdown(results: dict[str, Result]) -> str:
    """A row for each model."""
    return "\n".join([HEADER, *(_row(model, result) for model, result in results.items())])


def _row(model: str, r: Result) -> str:
    def step(way: str) -> str:
        return f"{r.steps[way]:.2f} s, {r.peaks[way] / 1e9:.0f} GB"

    def fewer(mode: str) -> str:
        way = f"{AFTER}, {mode}"
        return f"{step(way)} ({r.steps[BEFORE] / r.steps[way]:.2f}x)"

    video = "x".join(map(str, CASES[model].size))
    weights = f"{r.bf16_bytes / 1e9:.1f} to {r.bytes / 1e9:.1f} GB"
    cells = [
        f"{model}, {video}",
        step(BEFORE),
        fewer("fast"),
        fewer("accurate"),
        weights,
        f"{r.quantise:.0f} s",
    ]
    return "| " + " | ".join(cells) + " |"


def table() -> str:
    """Of what was measured last."""
    document = json.loads((RESULTS / f"{STEM}.json").read_text())
    return to_markdown({name: Result(**row) for name, row in document["results"].items()})


def main() -> None:
    """Print it."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    print(table())


if __name__ == "__main__":
    main()
