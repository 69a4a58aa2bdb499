"""How the published text-to-video models are sampled: one table, after their own pipelines."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from models.common.sampler import Sampler, timesteps
from models.families import family_of

Size = tuple[int, int, int]  # of a video (width, height, frames), or of latents (T, H, W)

SMALL = 600_000  # pixels of a frame: Wan 2.1 was published for 480p below, for 720p above
OSCILLATES_FROM = 10  # step


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """One model's defaults, and what a video's file needs to know.

    Attributes:
      text: by which encoders its text is read, one of `text_encoders.ENCODERS`.
      vae: diffusers' class that turns latents into pixels.
      steps: evaluations of the velocity.
      solver: see `Sampler`.
      shift: see `Sampler`, of the latents' (T, H, W).
      guidance: how far the text is followed; 1 is none. An input of the network where its config
        has guidance, else classifier-free.
      oscillates: whether guidance rests at every odd step from OSCILLATES_FROM on.
      boundary: from this share of noise up, the first of two experts computes; None: there is one.
      guidance_low: guidance of the second.
      compression: pixels of a latent along (t, h, w).
      fps: frames a second.
    """

    text: str
    vae: str
    solver: str
    shift: Callable[[Size], float]
    guidance: float
    steps: int = 50
    oscillates: bool = False
    boundary: float | None = None
    guidance_low: float | None = None
    compression: tuple[int, int, int] = (4, 8, 8)
    fps: int = 24

    def scales(self, sampler: Sampler, guidance: float, guidance_low: float) -> list[float]:
        """Of classifier-free guidance, for each step."""
        scales = [guidance if high else guidance_low for high in self.is_high(sampler)]
        if self.oscillates:
            scales[OSCILLATES_FROM + 1 :: 2] = [1.0] * len(scales[OSCILLATES_FROM + 1 :: 2])
        return scales

    def is_high(self, sampler: Sampler) -> list[bool]:
        """Whether the first of two experts computes, for each step; with one, it always does."""
        boundary = -math.inf if self.boundary is None else 1000 * self.boundary
        return [bool(t >= np.float32(boundary)) for t in timesteps(sampler)]


def published(model: str) -> Published:
    """What there is to know of a model.

    Raises:
      ValueError: unknown, or one that needs more than text.
    """
    family_of(model)
    if model not in PUBLISHED:
        raise ValueError(f"{model}: makes videos of an image; of text do {', '.join(PUBLISHED)}")
    return PUBLISHED[model]


def latent_size(model: str, size: Size) -> Size:
    """(T, H, W) of the latents of a video of (width, height, frames).

    Raises:
      ValueError: the model makes no such videos; says the nearest.
    """
    width, height, frames = size
    pt, ph, pw = family_of(model).sizes[model].patch
    ct, ch, cw = published(model).compression
    right = (
        max(1, round(width / (cw * pw))) * cw * pw,
        max(1, round(height / (ch * ph))) * ch * ph,
        max(0, round((frames - 1) / (ct * pt))) * ct * pt + 1,
    )
    if size != right:
        raise ValueError(
            f"size: {model} makes videos of a width that {cw * pw} divides, a height that "
            f"{ch * ph} divides and 1 + {ct * pt} n frames; not {_words(size)}, but {_words(right)}"
        )
    return (frames - 1) // ct + 1, height // ch, width // cw


def _words(size: Size) -> str:
    return "x".join(map(str, size))


def _of_pixels(size: Size) -> float:
    _, height, width = size
    return 3.0 if 64 * height * width < SMALL else 5.0


def _of_tokens(size: Size) -> float:
    """A line through 1 at 256 tokens a frame and 3 at 4096, times the root of the frames."""
    frames, height, width = size
    return (1 + (height * width / 4 - 256) * 2 / 3840) * math.sqrt(frames)


_WAN_2_1 = Published(
    text="wan",
    vae="AutoencoderKLWan",
    solver="unipc",
    shift=_of_pixels,
    guidance=5.0,
    fps=16,
)
PUBLISHED = {
    "wan2.1-t2v-1.3b": _WAN_2_1,
    "wan2.1-t2v-14b": _WAN_2_1,
    "wan2.2-t2v-a14b": dataclasses.replace(
        _WAN_2_1,
        steps=40,
        shift=lambda _: 12.0,
        guidance=4.0,
        boundary=0.875,
        guidance_low=3.0,
    ),
    "wan2.2-ti2v-5b": dataclasses.replace(
        _WAN_2_1, shift=lambda _: 5.0, compression=(4, 16, 16), fps=24
    ),
    "open-sora-2.0": Published(
        text="open-sora",
        vae="AutoencoderKLHunyuanVideo",
        solver="euler",
        shift=_of_tokens,
        guidance=7.5,
        oscillates=True,
    ),
    "hunyuanvideo": Published(
        text="hunyuanvideo",
        vae="AutoencoderKLHunyuanVideo",
        solver="euler",
        shift=lambda _: 7.0,
        guidance=6.0,
    ),
}
