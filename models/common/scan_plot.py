"""A picture of the data-free scan."""

import pathlib
from collections.abc import Mapping, Sequence

import numpy as np


def heat_map(
    sqnr_db: Mapping[str, np.ndarray],
    chosen: Mapping[str, Sequence[int]],
    title: str,
    path: pathlib.Path,
) -> pathlib.Path:
    """Layers down, steps across, colour by SQNR; layers of the plan have a mark at their end.

    Args:
      sqnr_db: by site `[steps, blocks]`.
      chosen: blocks of the plan, by site.
      title: above the picture.
      path: PNG or whatever matplotlib writes.
    """
    import matplotlib.figure
    import matplotlib.ticker

    rows = np.concatenate([per_step.T for per_step in sqnr_db.values()])  # [sites * blocks, steps]
    steps, blocks = next(iter(sqnr_db.values())).shape
    finite = rows[np.isfinite(rows)]
    figure = matplotlib.figure.Figure(figsize=(9, 1.2 + 0.16 * len(rows)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(
        rows,
        aspect="auto",
        interpolation="nearest",
        cmap="viridis",
        vmin=finite.min() if finite.size else None,
        vmax=finite.max() if finite.size else None,
    )
    for number, site in enumerate(sqnr_db):
        first = number * blocks
        if number:
            axes.axhline(first - 0.5, color="white", linewidth=2)
        for block in chosen.get(site, ()):
            end = 1.01 * steps - 0.5, first + block
            axes.plot(*end, "<", color="crimson", clip_on=False, markersize=6)
    axes.set_yticks(
        [number * blocks + (blocks - 1) / 2 for number in range(len(sqnr_db))],
        [site.removeprefix("blocks/") for site in sqnr_db],
    )
    axes.yaxis.set_minor_locator(matplotlib.ticker.FixedLocator(range(len(rows))))
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    axes.set_xlim(-0.5, steps - 0.5)
    axes.set_xlabel("sampling step")
    axes.set_ylabel(f"input of the linears, block 0 above to {blocks - 1} below")
    axes.set_title(f"{title}\nmarked: decomposed by the plan", fontsize=10)
    figure.colorbar(image, ax=axes, label="dB; dark costs most")
    figure.savefig(path, dpi=120)
    return path
