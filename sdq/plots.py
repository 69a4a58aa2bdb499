"""Plots as SVG that stands inside a page and takes its colours from it."""

import io
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure

CELLS_WITH_NUMBERS = 16  # columns of the layer map

# Stand-ins that matplotlib draws with, and what the page's style sheet calls them.
INK, LINE, CARD, ACCENT, BAD = "#010101", "#020202", "#030303", "#040404", "#050505"
COLOURS = {
    INK: "currentColor",
    LINE: "var(--line)",
    CARD: "var(--card)",
    ACCENT: "var(--accent)",
    BAD: "var(--bad)",
}

Numbers = Sequence[float] | jax.Array | np.ndarray


def decibels(value: float) -> str:
    """A number of dB in words."""
    if math.isinf(value):
        return "\N{INFINITY} dB" if value > 0 else "-\N{INFINITY} dB"
    return f"{value:.1f} dB" if math.isfinite(value) else "NaN"


def finite_range(values: Numbers) -> tuple[float, float]:
    """Smallest and largest of the finite values."""
    finite = [value for value in values if math.isfinite(value)]
    return (min(finite), max(finite)) if finite else (0.0, 1.0)


def limits_around(values: Numbers, least: float) -> tuple[float, float]:
    """Of an axis: some room around the finite values."""
    low, high = finite_range(values)
    margin = max(0.08 * (high - low), least)
    return low - margin, high + margin


def line_plot(
    name: str,
    values: Numbers,
    y_label: str,
    x_label: str,
    limits: tuple[float, float],
    *,
    first: int = 0,
    floor: float | None = None,
) -> str:
    """An SVG line over frames or steps; values that are not finite are marked at the edges."""
    import matplotlib.ticker

    figure, axes = _figure(3.9, 1.9)
    y = np.asarray(values, np.float64)
    x = np.arange(first, first + len(y))
    axes.plot(x, np.where(np.isfinite(y), y, np.nan), color=ACCENT, marker="o", markersize=3)
    edge = axes.get_xaxis_transform()  # x in data, y from 0 to 1
    for where, height, marker, colour, meaning in (
        (y == math.inf, 0.96, "^", ACCENT, "no difference"),
        (~np.isfinite(y) & (y != math.inf), 0.06, "x", BAD, "not a number"),
    ):
        if where.any():
            heights = np.full(where.sum(), height)
            axes.plot(
                x[where],
                heights,
                marker,
                color=colour,
                transform=edge,
                label=meaning,
                clip_on=False,
            )
    if floor is not None and math.isfinite(floor):
        room = 0.15 * (max(limits[1], floor) - limits[0])  # for the words above the line
        limits = (min(limits[0], floor), max(limits[1], floor + room))
        axes.axhline(floor, color=INK, linewidth=0.8, dashes=(4, 3))
        axes.annotate(
            "rounding alone",
            (1, floor),
            xycoords=("axes fraction", "data"),
            xytext=(0, 2),
            textcoords="offset points",
            ha="right",
            color=INK,
            fontsize=8,
            bbox={"facecolor": CARD, "edgecolor": "none", "pad": 0.5},
        )
    if axes.get_legend_handles_labels()[1]:
        axes.legend(
            loc="lower right",
            bbox_to_anchor=(1, 1),  # above the plot, where no point can be
            ncols=2,
            frameon=False,
            labelcolor=INK,
            fontsize=8,
            borderaxespad=0,
            handletextpad=0.2,
        )
    axes.set_ylim(*limits)
    axes.set_xlim(x[0] - 0.5, x[-1] + 0.5)
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    axes.set_xlabel(x_label)
    axes.set_title(y_label, loc="left", color=INK, fontsize=9)
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    return _svg(figure, name, f"{y_label} over {x_label}s, from {_numbers(y)}")


def _numbers(values: np.ndarray) -> str:
    low, high = finite_range(values.tolist())
    return f"{low:.4g} to {high:.4g}"


def layer_map(layers: Mapping[str, Numbers], low: float, high: float) -> str:
    """An SVG map: a row for each layer, a column for each depth, brighter is better."""
    depths = max(len(values) for values in layers.values())
    label = max(len(name) for name in layers)
    numbers = depths <= CELLS_WITH_NUMBERS
    cell = 0.46 if numbers else 0.26
    figure, axes = _figure(0.3 + 0.075 * label + cell * depths, 0.5 + 0.29 * len(layers))
    grid = np.full((len(layers), depths), np.nan)
    for row, values in enumerate(layers.values()):
        for depth, value in enumerate(map(float, values)):
            grid[row, depth] = value if math.isfinite(value) else np.nan
            if math.isfinite(value):
                words, colour = f"{value:.1f}", _readable(value, low, high)
            else:
                words, colour = decibels(value).removesuffix(" dB"), BAD
            if numbers or not math.isfinite(value):
                axes.text(
                    depth, row, words, color=colour, fontsize=8, ha="center", va="center_baseline"
                )
    axes.pcolormesh(
        np.arange(depths),
        np.arange(len(layers)),
        np.ma.masked_invalid(grid),
        cmap=_colour_map(),
        vmin=low,
        vmax=max(high, low + 1e-6),
        edgecolors=CARD,
        linewidth=1.5,
    )
    axes.invert_yaxis()
    # A name may hold a dollar sign, which is not meant as the start of a formula.
    axes.set_yticks(range(len(layers)), list(layers), parse_math=False)
    axes.set_xticks(range(0, depths, 1 if numbers else 4))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("depth")
    return _svg(figure, "layers", f"SQNR of layers by depth, from {low:.4g} to {high:.4g} dB")


def _colour_map():
    """Viridis without its darkest part, which a dark page would swallow."""
    import matplotlib
    import matplotlib.colors

    colours = matplotlib.colormaps["viridis"](np.linspace(0.18, 0.97, 64))
    return matplotlib.colors.ListedColormap(colours)


def _readable(value: float, low: float, high: float) -> str:
    """White or black, whichever is read better on the map's colour of a value."""
    red, green, blue, _ = _colour_map()((value - low) / max(high - low, 1e-6))
    return "#ffffff" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.52 else "#101316"


def map_colours(count: int) -> list[str]:
    """Colours of the layer map, evenly from its lowest value to its highest, as "#rrggbb"."""
    colours = _colour_map()(np.linspace(0, 1, count))[:, :3]
    return ["#" + "".join(f"{round(255 * part):02x}" for part in colour) for colour in colours]


def _figure(width: float, height: float) -> "tuple[matplotlib.figure.Figure, matplotlib.axes.Axes]":
    """A figure in the page's colours, without pyplot and its global state."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure((width, height), layout="constrained")
    axes = figure.subplots()
    for item in (figure.patch, axes.patch):
        item.set_visible(False)
    axes.tick_params(colors=INK, labelsize=8.5, color=LINE)
    axes.xaxis.label.set(color=INK, fontsize=8.5)
    axes.spines[:].set_color(LINE)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: "matplotlib.figure.Figure", name: str, label: str) -> str:
    """A figure as SVG to stand inside HTML: text stays text, colours are the page's.

    Plots share a page, so each needs a name of its own: it keeps their ids apart.
    """
    import matplotlib

    file = io.StringIO()
    settings: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": name}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # The browser brings the fonts, so a glyph that matplotlib's own font lacks is no loss.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    for unwanted in (
        r"<metadata>.*?</metadata>",
        r"<style.*?</style>",  # would hold for the whole page
        r" font-family: [^;]*;",
        r' transform="rotate\(-0 [^"]*"',
        r' (xmlns(:\w+)?|version)="[^"]*"',
        r'(?<=<g) id="[^"]*"',  # nothing refers to these
    ):
        text = re.sub(unwanted, "", text, flags=re.DOTALL)
    text = text.replace("xlink:href", "href")
    for stand_in, colour in COLOURS.items():
        text = text.replace(f": {stand_in}", f": {colour}")
    natural = f"{96 * figure.get_figwidth():.0f}px"
    tag = f'<svg role="img" aria-label="{label}" style="--natural: {natural}"'
    return re.sub(r'<svg width="[^"]*" height="[^"]*"', tag, text, count=1).strip()
