"""Latents to pixels through diffusers' VAEs; needs the extra `pixels`. Nothing is downloaded."""

import json
import os
import pathlib
from typing import Any

import numpy as np

from models import latents
from models.published import published
from sdq.video_files import SUFFIXES, write_video

CONFIG = "config.json"


def decode(
    source: str | os.PathLike,
    vae: str | os.PathLike,
    out: str | os.PathLike,
    *,
    fps: float | None = None,
    tiling: bool = False,
) -> pathlib.Path:
    """Write the video of a file of latents; returns the path.

    Args:
      source: what `sdq sample` wrote.
      vae: folder of diffusers' VAE, or of the pipeline that holds it.
      out: .mp4, .webp or .gif.
      fps: frames a second (default: the model's).
      tiling: decode tile after tile, which takes less memory and changes pixels a little.
    Raises:
      FileNotFoundError: no latents, or no VAE there.
      ValueError: not latents, or another model's VAE.
      ImportError: the extra is not installed.
    """
    out = pathlib.Path(out)
    if out.suffix not in SUFFIXES:
        raise ValueError(f"{out}: expected a name that ends in {', '.join(SUFFIXES)}")
    values, facts = latents.load(source)
    known = published(facts["model"])
    folder = _folder(pathlib.Path(vae), known.vae)
    video = decoded(values, folder, known.vae, tiling=tiling)
    return write_video(video[0], out, fps=known.fps if fps is None else fps, scale=1)


def decoded(
    values: np.ndarray, folder: pathlib.Path, class_name: str, *, tiling: bool = False
) -> np.ndarray:
    """Latents `[B, T, H, W, C]` to videos float32 `[B, F, H, W, 3]`; 0 is black, 1 is white."""
    try:
        import diffusers
        import torch
    except ImportError as error:
        raise ImportError(f'sdq decode needs pip install "sdq[pixels]" ({error})') from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = getattr(diffusers, class_name).from_pretrained(
        folder, torch_dtype=torch.float32, low_cpu_mem_usage=False
    )
    model = model.to(device).eval()
    if tiling:
        model.enable_tiling()
    z = torch.from_numpy(_as_encoded(values, model.config)).movedim(-1, 1).to(device)
    with torch.no_grad():
        video = model.decode(z, return_dict=False)[0]
    return video.movedim(1, -1).float().cpu().numpy() / 2 + 0.5


def _as_encoded(values: np.ndarray, config: Any) -> np.ndarray:
    """Latents as the VAE's encoder made them: the transformer's are normalised."""
    if (scaling := getattr(config, "scaling_factor", None)) is not None:
        return values.astype(np.float32) / np.float32(scaling)
    mean, std = (np.array(x, np.float32) for x in (config.latents_mean, config.latents_std))
    if values.shape[-1] != len(mean):
        raise ValueError(f"vae: of {len(mean)} channels, the latents have {values.shape[-1]}")
    return values.astype(np.float32) * std + mean


def _folder(given: pathlib.Path, class_name: str) -> pathlib.Path:
    """Where the VAE's config lies."""
    for folder in (given, given / "vae"):
        if (folder / CONFIG).is_file():
            found = json.loads((folder / CONFIG).read_text()).get("_class_name")
            if found != class_name:
                raise ValueError(f"{folder}: holds a {found}, this model's is a {class_name}")
            return folder
    raise FileNotFoundError(f"{given}: holds no {CONFIG} of a VAE, nor does {given / 'vae'}")
