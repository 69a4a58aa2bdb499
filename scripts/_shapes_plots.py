"""Pictures beside the tables of `make_shapes_table`."""

import pathlib
from collections.abc import Mapping
from typing import Any

from models.common.recipes import KEEP
from scripts._shapes_tables import Table

AGAINST = "nvfp4"  # the row that others are compared with, where there is one


def sqnr_db(summary: Mapping[str, Any]) -> dict[str, float]:
    """Mean over the steps; older results know no error."""
    steps = [float(step) for step in summary["step_sqnr_db"]]
    return summary.get("sqnr_db", {"mean": sum(steps) / max(1, len(steps)), "error": 0.0})


def plot(table: Table, measured: Mapping[str, Any], path: pathlib.Path) -> pathlib.Path:
    """PSNR, SQNR and accuracy of every row with error bars, group by group.

    Where inconsistency was measured, also how it depends on the frames between two tokens: of the
    groups about SeDA, if there are any.
    """
    import matplotlib.figure

    groups = {
        heading: [recipe.name for recipe in recipes if recipe.name in measured]
        for heading, recipes in table.groups.items()
    }
    groups = {heading: names for heading, names in groups.items() if names}
    rows = sum(map(len, groups.values())) + len(groups)
    compared = [h for h in groups if "SeDA" in h] or list(groups)
    shared = [n for h in compared for n in groups[h] if "by_distance" in measured[n]]
    shared = list(dict.fromkeys(shared))
    extra = 3.2 if shared else 0.0
    figure = matplotlib.figure.Figure(figsize=(11, 1.2 + 0.26 * rows + extra), layout="constrained")
    above, below = figure, None
    if shared:
        heights = [0.26 * rows + 1.2, extra]
        above, below = figure.subfigures(2, 1, height_ratios=heights)  # type: ignore[misc]
    panels = above.subplots(1, 3, sharey=True)
    labels: list[str] = []
    drawn: list[str] = []
    places: list[int] = []
    for heading, names in groups.items():
        labels += [heading.upper()] if heading else []
        places += range(len(labels), len(labels) + len(names))
        labels += names
        drawn += names
    for axes, title, numbers, scale in (
        (panels[0], "SQNR of the velocity, dB", [sqnr_db(measured[name]) for name in drawn], 1),
        (panels[1], "PSNR to bf16, dB", [measured[name]["psnr_db"] for name in drawn], 1),
        (panels[2], "right, %", [measured[name]["accuracy"]["all"] for name in drawn], 100),
    ):
        means, errors = ([scale * number[key] for number in numbers] for key in ("mean", "error"))
        axes.errorbar(means, places, xerr=errors, fmt="o", color="C0", markersize=4)
        axes.set_title(title, fontsize=10)
        axes.grid(axis="x", alpha=0.3)
    panels[2].axvline(100 * measured[KEEP]["accuracy"]["all"]["mean"], color="C2", linestyle=":")
    panels[2].text(
        100 * measured[KEEP]["accuracy"]["all"]["mean"], -0.6, f"{KEEP} ", color="C2", ha="right"
    )
    if AGAINST in measured:
        for axes, number in zip(
            panels, (sqnr_db(measured[AGAINST]), measured[AGAINST]["psnr_db"]), strict=False
        ):
            axes.axvline(number["mean"], color="C3", linestyle=":")
    panels[0].set_yticks(range(len(labels)), labels, fontsize=8)
    panels[0].set_ylim(len(labels) - 0.5, -1.2)
    if below is not None:
        axes = below.subplots()
        for number, name in enumerate(shared):
            means = [share["mean"] for share in measured[name]["by_distance"]]
            dashes = "-" if number <= 10 else "--"  # colours come again after ten
            style = {"linewidth": 0.8, "linestyle": dashes}
            if number == 0:
                style = {"linewidth": 2, "color": "black"}
            axes.plot([100 * m if m is not None else None for m in means], label=name, **style)
        axes.set_xlabel("frames of tokens between the two")
        axes.set_ylabel("inconsistency, %")
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    return path
