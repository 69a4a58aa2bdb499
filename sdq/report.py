"""One self-contained HTML page that shows what quantised sampling is worth against a reference.

The page loads nothing and runs nothing: animations are data URIs, plots are inline SVG that takes
its colours from the page, so that both follow the reader's light or dark mode.
"""

import dataclasses
import importlib.resources
import io
import itertools
import math
import os
import pathlib
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from sdq import video_files, video_metrics
from sdq.files import write_atomically
from sdq.leaf_table import size_text

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure

TEMPLATE = "report.html.j2"
AMPLIFY = 4  # of the difference animation
EMBEDDED_WIDTH = 320  # pixels; wider clips are shrunk by a whole factor
PIXELATED_WIDTH = 160  # clips up to here are enlarged pixel by pixel
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

Video = jax.Array | np.ndarray
Numbers = Sequence[float] | jax.Array | np.ndarray


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Clip:
    """One prompt, sampled by both models from the same noise with the same steps.

    Attributes:
      prompt: what was asked for.
      reference_video, quantised_video: float `[F, H, W, 3]` in [0, 1].
      psnr_db, ssim: one number a frame; `measure_clip` computes them.
      verdicts: attribute -> {"reference": right or not, "quantised": right or not}.
    """

    prompt: str
    reference_video: Video
    quantised_video: Video
    psnr_db: Numbers
    ssim: Numbers
    verdicts: Mapping[str, Mapping[str, bool]] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        where = f"Clip {self.prompt!r}"
        shape, other = np.shape(self.reference_video), np.shape(self.quantised_video)
        if shape != other or len(shape) != 4:
            raise ValueError(
                f"{where}: videos are {list(shape)} and {list(other)}, expected [F, H, W, 3] twice"
            )
        for name in ("psnr_db", "ssim"):
            if (count := len(getattr(self, name))) != shape[0]:
                raise ValueError(f"{where}: {count} values of {name} for {shape[0]} frames")
        for attribute, verdict in self.verdicts.items():
            if set(verdict) != {"reference", "quantised"}:
                raise ValueError(
                    f"{where}: the verdict of {attribute!r} has the keys {sorted(verdict)}, "
                    "expected 'quantised' and 'reference'"
                )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What is compared, in words: "sdq32:16", "sdq32:16, two-stage", "bfloat16"."""

    weights: str
    activations: str
    reference: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of a group of weights before and after; `elements` of them give bits per weight."""

    name: str
    reference_bytes: int
    quantised_bytes: int
    elements: int | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Report:
    """Everything the page says. What is empty or None is left out of it.

    Attributes:
      title: the headline.
      model: name and size, in words.
      recipe: formats of weights and activations, and the reference.
      clips: in the order of the page.
      memory: the weights in groups; their sum is the page's headline figure.
      layer_sqnr_db: name of a layer -> SQNR of its output at each depth.
      step_sqnr_db: SQNR of the velocity at each step, teacher-forced.
      noise_floor_db: PSNR between two runs of the reference that differ in rounding alone: the
        best that could be expected.
      environment: versions, device, date and so on; the key "command" is shown as code.
      notes: paragraphs.
    """

    title: str
    model: str
    recipe: Recipe
    clips: Sequence[Clip] = ()
    memory: Sequence[Memory] = ()
    layer_sqnr_db: Mapping[str, Numbers] = dataclasses.field(default_factory=dict)
    step_sqnr_db: Numbers = ()
    noise_floor_db: float | None = None
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    notes: Sequence[str] = ()


def measure_clip(
    prompt: str,
    reference_video: Video,
    quantised_video: Video,
    verdicts: Mapping[str, Mapping[str, bool]] | None = None,
) -> Clip:
    """A Clip with PSNR and SSIM measured; videos float `[F, H, W, 3]`, at least 11 x 11 pixels."""
    x, y = jnp.asarray(reference_video), jnp.asarray(quantised_video)
    return Clip(
        prompt=prompt,
        reference_video=reference_video,
        quantised_video=quantised_video,
        psnr_db=np.asarray(video_metrics.psnr_db_per_frame(x, y)).tolist(),
        ssim=np.asarray(video_metrics.ssim(x, y)).tolist(),
        verdicts=verdicts or {},
    )


def write_report(report: Report, path: str | os.PathLike) -> pathlib.Path:
    """Write the page; returns the path. Whole or not at all, as `write_atomically`.

    Raises:
      ValueError: a video is not one, or holds values that are not finite.
      OSError: the file cannot be written.
    """
    path = pathlib.Path(path)
    write_atomically(path, to_html(report).encode())
    return path


def to_html(report: Report) -> str:
    """The page as text."""
    import jinja2

    template = importlib.resources.files("sdq").joinpath(TEMPLATE).read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(template).render(
        report=report,
        amplify=AMPLIFY,
        tiles=_tiles(report),
        clips=_clips(report),
        memory=_memory(report),
        layers=_layers(report),
        steps=_steps(report),
    )


def _tiles(report: Report) -> list[dict[str, Any]]:
    """The summary: label, value and lines below."""
    tiles = []
    if report.clips:
        psnr = [pooled_psnr_db(clip.psnr_db) for clip in report.clips]
        floor = report.noise_floor_db
        tiles.append(
            {
                "label": "PSNR",
                "value": _decibels(pooled_psnr_db(psnr)),
                "below": [
                    f"worst clip {_decibels(min(psnr, key=_nan_first))}",
                    *([] if floor is None else [f"rounding alone {_decibels(floor)}"]),
                ],
            }
        )
        ssim = [_mean(clip.ssim) for clip in report.clips]
        worst = min(ssim, key=_nan_first)
        tiles.append(
            {
                "label": "SSIM",
                "value": _similarity(_mean(ssim)),
                "below": [f"worst clip {_similarity(worst)}"],
            }
        )
    verdicts = [v for clip in report.clips for v in clip.verdicts.values()]
    if verdicts:
        right = {who: sum(v[who] for v in verdicts) for who in ("reference", "quantised")}
        tiles.append(
            {
                "label": "Attributes right",
                "value": f"{right['quantised']} of {len(verdicts)}",
                "below": [f"reference {right['reference']} of {len(verdicts)}"],
            }
        )
    total = _total(report.memory)
    if report.memory and total.quantised_bytes:
        tiles.append(
            {
                "label": "Smaller weights",
                "value": _times(total.reference_bytes / total.quantised_bytes),
                "below": [
                    f"from {size_text(total.reference_bytes)}",
                    f"to {size_text(total.quantised_bytes)}",
                ],
            }
        )
    if total.elements:
        tiles.append(
            {
                "label": "Bits per weight",
                "value": f"{8 * total.quantised_bytes / total.elements:.2f}",
                "below": [f"reference {8 * total.reference_bytes / total.elements:.4g}"],
            }
        )
    return tiles


def _clips(report: Report) -> list[dict[str, Any]]:
    # One scale for all clips, so that they compare at a glance.
    psnr_limits = _limits([v for clip in report.clips for v in clip.psnr_db], 1.0)
    ssim_limits = _limits([v for clip in report.clips for v in clip.ssim], 0.01)
    shown = []
    for number, clip in enumerate(report.clips):
        videos = []
        for who in ("reference", "quantised"):
            video = getattr(clip, f"{who}_video")
            video_files.to_uint8(video, f"report: {who} video of {clip.prompt!r}")
            videos.append(np.clip(np.asarray(video).astype(np.float32), 0, 1))
        difference = np.clip(AMPLIFY * np.abs(videos[1] - videos[0]), 0, 1)
        factor = math.ceil(difference.shape[2] / EMBEDDED_WIDTH)
        reference, quantised, difference = (_shrunk(v, factor) for v in (*videos, difference))
        # Both in one animation, because two would drift apart.
        pair = video_files.side_by_side([reference, quantised], scale=1, gap=1)
        shown.append(
            {
                "prompt": clip.prompt,
                "pair": video_files.data_uri(pair),
                "widths": (pair.shape[2], difference.shape[2]),
                "difference": video_files.data_uri(difference),
                "factor": factor,
                "pixelated": difference.shape[2] <= PIXELATED_WIDTH,
                "psnr": _decibels(pooled_psnr_db(clip.psnr_db)),
                "ssim": _similarity(_mean(clip.ssim)),
                "verdicts": [(name, *_verdict(v)) for name, v in clip.verdicts.items()],
                "psnr_plot": _line_plot(
                    f"psnr {number}",
                    clip.psnr_db,
                    "PSNR in dB",
                    "frame",
                    psnr_limits,
                    floor=report.noise_floor_db,
                ),
                "ssim_plot": _line_plot(f"ssim {number}", clip.ssim, "SSIM", "frame", ssim_limits),
            }
        )
    return shown


def _verdict(verdict: Mapping[str, bool]) -> tuple[bool, bool, str]:
    reference, quantised = bool(verdict["reference"]), bool(verdict["quantised"])
    change = {(True, False): "lost", (False, True): "gained"}.get((reference, quantised), "")
    return reference, quantised, change


def _memory(report: Report) -> list[dict[str, str]]:
    """Rows of the table in words; the total, last, where there are several."""
    rows = [*report.memory]
    if len(rows) > 1:
        rows.append(_total(rows))
    return [
        {
            "name": row.name,
            "reference": size_text(row.reference_bytes),
            "quantised": size_text(row.quantised_bytes),
            "ratio": _times(row.reference_bytes / row.quantised_bytes)
            if row.quantised_bytes
            else "",
            "kept": f"{min(100 * row.quantised_bytes / max(row.reference_bytes, 1), 100):.1f}",
            "bits": f"{8 * row.quantised_bytes / row.elements:.2f}" if row.elements else "",
        }
        for row in rows
    ]


def _total(memory: Sequence[Memory]) -> Memory:
    elements = [row.elements for row in memory if row.elements is not None]
    return Memory(
        name="Total",
        reference_bytes=sum(row.reference_bytes for row in memory),
        quantised_bytes=sum(row.quantised_bytes for row in memory),
        elements=sum(elements) if len(elements) == len(memory) else None,
    )


def _layers(report: Report) -> dict[str, Any] | None:
    cells = [
        (float(value), name, depth)
        for name, values in report.layer_sqnr_db.items()
        for depth, value in enumerate(values)
    ]
    if not cells:
        return None
    value, name, depth = min(cells, key=lambda cell: _nan_first(cell[0]))
    low, high = _range([value for value, _, _ in cells])
    return {
        "plot": _layer_map(report.layer_sqnr_db, low, high),
        "low": _decibels(low),
        "high": _decibels(high),
        "gradient": ", ".join(_hex(_colour_map()(x)) for x in np.linspace(0, 1, 6)),
        "worst": f"{name} at depth {depth}, {_decibels(value)}",
    }


def _steps(report: Report) -> dict[str, str] | None:
    values = [float(value) for value in report.step_sqnr_db]
    if not values:
        return None
    value, step = min(zip(values, itertools.count(1)), key=lambda pair: _nan_first(pair[0]))
    return {
        "plot": _line_plot("steps", values, "SQNR in dB", "step", _limits(values, 1.0), first=1),
        "worst": f"step {step} of {len(values)}, {_decibels(value)}",
    }


def pooled_psnr_db(values: Numbers) -> float:
    """PSNR of frames (or clips) taken together: of their mean squared error, not the mean of dB.

    A frame without any error would make a mean of dB infinite. NaN if any value is.
    """
    error = np.mean(np.power(10.0, -np.asarray(values, np.float64) / 10))
    return float(-10 * np.log10(error)) if error else math.inf


def _mean(values: Numbers) -> float:
    return float(np.mean(np.asarray(values, np.float64)))


def _decibels(value: float) -> str:
    if math.isinf(value):
        return "\N{INFINITY} dB" if value > 0 else "-\N{INFINITY} dB"
    return f"{value:.1f} dB" if math.isfinite(value) else "NaN"


def _similarity(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "NaN"


def _times(ratio: float) -> str:
    return f"{ratio:.2f}\N{MULTIPLICATION SIGN}"


def _nan_first(value: float) -> float:
    """Sort key: NaN is the worst."""
    return -math.inf if math.isnan(value) else value


def _range(values: Numbers) -> tuple[float, float]:
    finite = [value for value in values if math.isfinite(value)]
    return (min(finite), max(finite)) if finite else (0.0, 1.0)


def _limits(values: Numbers, least: float) -> tuple[float, float]:
    """Of an axis: some room around the finite values."""
    low, high = _range(values)
    margin = max(0.08 * (high - low), least)
    return low - margin, high + margin


def _shrunk(video: np.ndarray, factor: int) -> np.ndarray:
    """Means of factor x factor pixels; what is left over at the far edges is cut off."""
    frames, height, width, _ = video.shape
    height, width = max(height // factor, 1), max(width // factor, 1)
    video = video[:, : height * factor, : width * factor]
    return video.reshape(frames, height, -1, width, factor, 3).mean(axis=(2, 4))


def _line_plot(
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
    low, high = _range(values.tolist())
    return f"{low:.4g} to {high:.4g}"


def _layer_map(layers: Mapping[str, Numbers], low: float, high: float) -> str:
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
                words, colour = _decibels(value).removesuffix(" dB"), BAD
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


def _hex(colour: Sequence[float]) -> str:
    return "#" + "".join(f"{round(255 * part):02x}" for part in colour[:3])


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
