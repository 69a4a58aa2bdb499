"""The leaves of a quantised tree as a table for the terminal: format, size and error of each."""

import math
from collections.abc import Sequence

import rich.box
import rich.table

from sdq.tree import LeafReport, totals


def leaf_table(reports: Sequence[LeafReport], caption: str = "") -> rich.table.Table:
    """A row for each leaf and a row of totals; print it with `rich.print`."""
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, padding=0, caption=caption, show_footer=True)
    before, after = totals(reports)
    ratio = f"{before / after:.2f}x smaller" if after else ""
    table.add_column("leaf", f"{len(reports)} leaves", style="bold", overflow="fold")
    table.add_column("format", ratio)
    table.add_column("shape", no_wrap=True)
    table.add_column("before", size_text(before), justify="right")
    table.add_column("after", size_text(after), justify="right")
    table.add_column("bits", justify="right")
    table.add_column("SQNR dB", justify="right")
    for report in reports:
        bits = bits_per_element(report)
        table.add_row(
            report.path,
            f"[green]{report.format}[/]" if report.format else report.dtype,
            " x ".join(map(str, report.shape)) or "scalar",
            size_text(report.bytes_before),
            size_text(report.bytes_after),
            "" if bits is None else f"{bits:.3f}",
            "" if report.sqnr_db is None else f"{report.sqnr_db:.2f}",
        )
    return table


def bits_per_element(report: LeafReport) -> float | None:
    """Bits stored for an element; None for a leaf without elements."""
    elements = math.prod(report.shape)
    return 8 * report.bytes_after / elements if elements else None


def size_text(nbytes: int) -> str:
    """1536 -> "1.5 KiB"."""
    size = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"
