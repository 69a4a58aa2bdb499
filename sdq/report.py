"""One self-contained HTML page that shows what quantised sampling is worth against a reference.

The page loads nothing and runs nothing: animations are data URIs, plots are inline SVG that takes
its colours from the page, so that both follow the reader's light or dark mode.
"""

import dataclasses
import importlib.resources
import itertools
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdq import video_files, video_metrics
from sdq.files import write_atomically
from sdq.leaf_table import size_text
from sdq.plots import (
    Numbers,
    decibels,
    finite_range,
    layer_map,
    limits_around,
    line_plot,
    map_colours,
)

TEMPLATE = "report.html.j2"
AMPLIFY = 4  # of the difference animation
EMBEDDED_WIDTH = 320  # pixels; wider clips are shrunk by a whole factor
PIXELATED_WIDTH = 160  # clips up to here are enlarged pixel by pixel

Video = jax.Array | np.ndarray


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
                "value": decibels(pooled_psnr_db(psnr)),
                "below": [
                    f"worst clip {decibels(min(psnr, key=_nan_first))}",
                    *([] if floor is None else [f"rounding alone {decibels(floor)}"]),
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
    psnr_limits = limits_around([v for clip in report.clips for v in clip.psnr_db], 1.0)
    ssim_limits = limits_around([v for clip in report.clips for v in clip.ssim], 0.01)
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
                "psnr": decibels(pooled_psnr_db(clip.psnr_db)),
                "ssim": _similarity(_mean(clip.ssim)),
                "verdicts": [(name, *_verdict(v)) for name, v in clip.verdicts.items()],
                "psnr_plot": line_plot(
                    f"psnr {number}",
                    clip.psnr_db,
                    "PSNR in dB",
                    "frame",
                    psnr_limits,
                    floor=report.noise_floor_db,
                ),
                "ssim_plot": line_plot(f"ssim {number}", clip.ssim, "SSIM", "frame", ssim_limits),
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
    low, high = finite_range([value for value, _, _ in cells])
    return {
        "plot": layer_map(report.layer_sqnr_db, low, high),
        "low": decibels(low),
        "high": decibels(high),
        "gradient": ", ".join(map_colours(6)),
        "worst": f"{name} at depth {depth}, {decibels(value)}",
    }


def _steps(report: Report) -> dict[str, str] | None:
    values = [float(value) for value in report.step_sqnr_db]
    if not values:
        return None
    value, step = min(zip(values, itertools.count(1)), key=lambda pair: _nan_first(pair[0]))
    return {
        "plot": line_plot(
            "steps", values, "SQNR in dB", "step", limits_around(values, 1.0), first=1
        ),
        "worst": f"step {step} of {len(values)}, {decibels(value)}",
    }


def pooled_psnr_db(values: Numbers) -> float:
    """PSNR of frames (or clips) taken together: of their mean squared error, not the mean of dB.

    A frame without any error would make a mean of dB infinite. NaN if any value is.
    """
    error = np.mean(np.power(10.0, -np.asarray(values, np.float64) / 10))
    return float(-10 * np.log10(error)) if error else math.inf


def _mean(values: Numbers) -> float:
    return float(np.mean(np.asarray(values, np.float64)))


def _similarity(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "NaN"


def _times(ratio: float) -> str:
    return f"{ratio:.2f}\N{MULTIPLICATION SIGN}"


def _nan_first(value: float) -> float:
    """Sort key: NaN is the worst."""
    return -math.inf if math.isnan(value) else value


def _shrunk(video: np.ndarray, factor: int) -> np.ndarray:
    """Means of factor x factor pixels; what is left over at the far edges is cut off."""
    frames, height, width, _ = video.shape
    height, width = max(height // factor, 1), max(width // factor, 1)
    video = video[:, : height * factor, : width * factor]
    return video.reshape(frames, height, -1, width, factor, 3).mean(axis=(2, 4))
