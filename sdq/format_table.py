"""How good every format is on the seeded distributions: as a table, as JSON, as a picture."""

import dataclasses
import json
import pathlib
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import rich.box
import rich.table

from sdq import distributions, formatbook, select
from sdq.formats import Format, parse
from sdq.metrics import sqnr_db
from sdq.quantize import DEFAULT_RULE, dequantize, quantize

FORMATS = (
    "sdq32:16",
    "dialectfp4:16",
    "nvfp4",
    "nvfp4:one_level",
    "int4:32",
    "sdq32:32",
    "dialectfp4:32",
    "e2m1:32",
    "mxfp4",
    "mxfp4:rceil",
    "mxfp4:even",
    "nf4:64",
    "int4",
    "int8",
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One format under one way to choose. `bits_per_element` leaves outer scales out."""

    format: Format
    select: str | None
    bits_per_element: float
    stored_bits_per_element: float
    sqnr_db: dict[str, float]


def measure(names: Iterable[str] = FORMATS, seed: int = 0) -> list[Row]:
    """SQNR of each format, for each way to choose, on each distribution (float32 256 x 2048)."""
    data = {
        name: jnp.asarray(distributions.sample(name, seed)) for name in distributions.DISTRIBUTIONS
    }
    return [_measure(fmt, rule, data) for fmt in map(parse, names) for rule in select_rules(fmt)]


def select_rules(fmt: Format) -> list[str | None]:
    """The ways to choose that a format has; [None] where there is nothing to choose."""
    if not fmt.has_choice:
        return [None]
    return [r for r in select.RULES if r != "blockdialect" or fmt.book == "dialectfp4"]


def _measure(fmt: Format, rule: str | None, data: dict[str, jax.Array]) -> Row:
    scores, stored = {}, 0.0
    for name, x in data.items():
        q = quantize(x, fmt, select=rule)
        scores[name] = round(float(sqnr_db(x, dequantize(q))), 3)
        stored = q.bits_per_element
    return Row(
        format=fmt,
        select=rule,
        bits_per_element=fmt.bits_per_element,
        stored_bits_per_element=stored,
        sqnr_db=scores,
    )


def to_json(rows: list[Row], seed: int) -> str:
    """The rows and what made them."""
    return json.dumps(
        {
            "seed": seed,
            "shape": distributions.SHAPE,
            "jax": jax.__version__,
            "device": jax.devices()[0].device_kind,
            "rows": [
                {
                    "format": str(row.format),
                    "select": row.select,
                    "bits_per_element": row.bits_per_element,
                    "outer": row.format.outer,
                    "outer_bits": row.format.outer_bits,
                    "stored_bits_per_element": row.stored_bits_per_element,
                    "sqnr_db": row.sqnr_db,
                }
                for row in rows
            ],
        },
        indent=1,
    )


def to_rich(rows: list[Row]) -> rich.table.Table:
    """For a terminal; the best of each column among formats of at most 4.5 bits stands out."""
    table = rich.table.Table(
        title="SQNR in dB on seeded data (256 x 2048, more is better)",
        caption="bits: block scales included, scales shared by a row or a matrix not",
        box=rich.box.SIMPLE_HEAD,
        padding=0,
    )
    table.add_column("format", style="bold", no_wrap=True)
    table.add_column("bits", justify="right", no_wrap=True)
    table.add_column("choice", no_wrap=True)
    for name in distributions.DISTRIBUTIONS:
        header = name.replace(" ", "\n").replace("-", "-\n")
        table.add_column(header, justify="right", no_wrap=True)
    best = {
        name: max(row.sqnr_db[name] for row in rows if row.bits_per_element <= 4.5)
        for name in distributions.DISTRIBUTIONS
    }
    previous: Format | None = None
    for row in rows:
        first = row.format != previous
        table.add_row(
            str(row.format) if first else "",
            f"{row.bits_per_element:g}" if first else "",
            row.select or "",
            *(
                f"[green]{score:.2f}[/]" if score == best[name] else f"{score:.2f}"
                for name, score in row.sqnr_db.items()
            ),
        )
        previous = row.format
    return table


def to_markdown(rows: list[Row]) -> str:
    """The exhaustive rows and the two-stage rows of the dialect formats, for the README."""
    shown = [
        row
        for row in rows
        if row.select in (None, DEFAULT_RULE, "blockdialect")
        or (row.select == "two_stage" and row.format.book == "sdq32")
    ]
    names = list(distributions.DISTRIBUTIONS)
    lines = [
        "| format | bits | choice | " + " | ".join(names) + " |",
        "|---|---|---|" + "---|" * len(names),
    ]
    for row in shown:
        scores = " | ".join(f"{row.sqnr_db[name]:.2f}" for name in names)
        lines.append(
            f"| `{row.format}` | {row.bits_per_element:g} | {row.select or ''} | {scores} |"
        )
    return "\n".join(lines)


def plot(rows: list[Row], file: str | pathlib.Path) -> None:
    """A PNG: what every format scores, and the dialects that make up sdq32."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [r for r in rows if r.select in (None, DEFAULT_RULE) and r.bits_per_element <= 4.5]
    figure, (scores, book) = plt.subplots(
        1, 2, figsize=(15, 7.5), width_ratios=(3, 2), layout="constrained"
    )
    _plot_scores(scores, shown)
    _plot_book(book)
    pathlib.Path(file).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _plot_scores(axes, rows: list[Row]) -> None:
    names = list(distributions.DISTRIBUTIONS)
    markers = ("o", "s", "^", "D", "v")
    for place, row in enumerate(reversed(rows)):
        ours = row.format.book == "sdq32"
        values = [row.sqnr_db[name] for name in names]
        axes.hlines(place, min(values), max(values), color="0.8", zorder=1)
        for name, marker, value in zip(names, markers, values, strict=True):
            axes.scatter(
                value,
                place,
                marker=marker,
                s=55,
                color="tab:red" if ours else "0.35",
                label=name if place == 0 else None,
                zorder=2,
            )
    labels = [f"{row.format}  {row.bits_per_element:g} b" for row in reversed(rows)]
    axes.set_yticks(range(len(rows)), labels)
    axes.set_xlabel("SQNR in dB (more is better)")
    axes.set_title("Formats of at most 4.5 bits on five kinds of data")
    axes.legend(loc="upper left", title="red: sdq32")
    axes.grid(axis="x", alpha=0.3)


def _plot_book(axes) -> None:
    for row, dialect in enumerate(formatbook.SDQ32.dialects):
        place = row + 0.8 * (row // formatbook.SHAPES_PER_TOP)
        axes.hlines(place, 0, dialect[-1], color="0.9", zorder=1)
        axes.scatter(dialect, [place] * 8, s=16, color="tab:red", zorder=2)
    places = [4.8 * top + 1.5 for top in range(8)]
    axes.set_yticks(places, [f"top {top}" for top in formatbook.SDQ32.tops])
    axes.set_xticks(range(16))
    axes.set_xlabel("magnitude in half-units (times a power of two)")
    axes.set_title("The book sdq32: 8 tops x 4 shapes; a block takes one row")
    axes.grid(axis="x", alpha=0.3)
