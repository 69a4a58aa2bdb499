"""Which Config a product gets: one that was measured, else what the heuristic says."""

import dataclasses
import functools
import importlib.resources
import json
import re
from typing import Any

from pallas_kernels.device import Device
from pallas_kernels.mosaic_gpu.config import (
    FEW,
    MODES,
    Config,
    FewConfig,
    fitted,
    heuristic,
    rows_of_few,
)

REACH = 2.0  # a measured m speaks for others up to so many times larger or smaller


def choose(
    mode: str, m: int, k: int, n: int, device: Device, out_bytes: int = 2
) -> Config | FewConfig:
    """The way to cut the product of x `[m, k]` and w `[n, k]`.

    Of many rows, what was measured with another m only says in which order to take the tiles.
    """
    measured = [
        entry
        for entry in table(device.kind)
        if (entry["mode"], entry["k"], entry["n"]) == (measured_mode(mode, m), k, n)
        and (entry["m"] <= FEW) == (m <= FEW)
        and max(entry["m"], m) <= REACH * min(entry["m"], m)
    ]
    by_rule = heuristic(mode, m, n, out_bytes, device.cores)
    if not measured:
        return by_rule
    nearest = min(measured, key=lambda entry: max(entry["m"], m) / min(entry["m"], m))
    if isinstance(by_rule, FewConfig):
        few = FewConfig(**nearest["config"] | {"rows": rows_of_few(m)})
        return fitted(few, out_bytes)
    config = Config(**nearest["config"])
    if nearest["m"] != m:
        return dataclasses.replace(by_rule, width=config.width)
    return config if out_bytes <= 2 else fitted(config, out_bytes, most=config.stages)


def measured_mode(mode: str, m: int) -> str:
    """Under which mode m rows are measured: few are the same kernel in all that read fp8 rows."""
    return "fast" if m <= FEW and mode in MODES else mode


@functools.cache
def table(device: str) -> list[dict[str, Any]]:
    """What `scripts.tune` found on a device; empty if it never ran there."""
    file = importlib.resources.files("pallas_kernels") / "tuned" / file_name(device)
    return json.loads(file.read_text())["entries"] if file.is_file() else []


def file_name(device: str) -> str:
    """Of the table of a device."""
    return re.sub(r"[^a-z0-9]+", "_", device.lower()) + ".json"


def as_entry(mode: str, m: int, k: int, n: int, config: Config | FewConfig) -> dict[str, Any]:
    """A row of a table."""
    return {"mode": mode, "m": m, "k": k, "n": n, "config": dataclasses.asdict(config)}
