"""Clips to files and data URIs: .webp, .gif, .mp4, and strips of frames as .png.

A clip is float `[F, H, W, 3]` in [0, 1], as in `video_metrics`. Values beyond are clipped, as a
screen would; values that are not finite are refused, since a picture would show them as black.
Files appear whole or not at all: an error leaves what was there before.
"""

import base64
import io
import math
import os
import pathlib
import subprocess
import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from sdq.files import write_atomically

if TYPE_CHECKING:
    import PIL.Image
    import PIL.ImageFont

SUFFIXES = (".webp", ".gif", ".mp4")
GAP = 2  # pixels between pictures side by side, before scaling
GAP_LEVEL = 0.5  # grey, told from both a light and a dark page

Video = jax.Array | np.ndarray


def write_video(
    video: Video, path: str | os.PathLike, *, fps: float = 8, scale: int = 4
) -> pathlib.Path:
    """Write a clip as an endless animation; returns the path.

    The suffix says how: `.webp` is lossless, `.gif` has 256 colours for the whole clip, `.mp4` is
    H.264 and needs the extra `video`.

    Args:
      video: float `[F, H, W, 3]` in [0, 1].
      path: what to write; its folder is made if need be.
      fps: frames a second.
      scale: pixels of the file for each pixel of the clip, each way; nearest neighbour.
    Raises:
      ValueError: wrong shape or dtype, values that are not finite, another suffix.
      ImportError: `.mp4` without the extra.
      OSError: the file cannot be written, for want of space for instance.
    """
    path = pathlib.Path(path)
    write_atomically(path, encode(video, path.suffix, fps=fps, scale=scale))
    return path


def write_strip(
    video: Video, path: str | os.PathLike, *, every: int = 2, scale: int = 4
) -> pathlib.Path:
    """Write every `every`-th frame, left to right, as one PNG; returns the path."""
    path = pathlib.Path(path)
    if path.suffix != ".png":
        raise ValueError(f"write_strip: {path} should end in .png")
    if every < 1:
        raise ValueError(f"write_strip: every is {every}, expected 1 or more")
    frames = to_uint8(video, "write_strip")[::every]
    strip = _beside(list(frames), GAP, round(255 * GAP_LEVEL))
    image = _images(strip[None], scale, "write_strip")[0]
    data = io.BytesIO()
    image.save(data, "PNG", optimize=True)
    write_atomically(path, data.getvalue())
    return path


def data_uri(video: Video, *, fps: float = 8, scale: int = 1) -> str:
    """A clip as a `data:` URI (lossless animated WebP), for the `src` of an HTML image."""
    data = encode(video, ".webp", fps=fps, scale=scale)
    return "data:image/webp;base64," + base64.b64encode(data).decode()


def side_by_side(
    videos: Sequence[Video],
    labels: Sequence[str] | None = None,
    *,
    scale: int = 4,
    gap: int = GAP,
) -> np.ndarray:
    """Clips of equal shape as one, left to right, each under its caption.

    Args:
      videos: float `[F, H, W, 3]` each.
      labels: a caption for each, wrapped to its width; None leaves captions out.
      scale: pixels for each pixel of a clip. Scaled here and not when it is written, so that
        captions are sharp: write the result with `scale=1`.
      gap: grey columns between clips, before scaling.
    Returns:
      float32 `[F, caption + scale * H, width, 3]`.
    """
    if not videos:
        raise ValueError("side_by_side: no videos")
    if labels is not None and len(labels) != len(videos):
        raise ValueError(f"side_by_side: {len(labels)} labels for {len(videos)} videos")
    _check_scale("side_by_side", scale)
    clips = [_scaled(to_uint8(video, "side_by_side"), scale) for video in videos]
    if len({clip.shape for clip in clips}) > 1:
        shapes = ", ".join(str(list(video.shape)) for video in videos)
        raise ValueError(f"side_by_side: videos of different shapes, {shapes}")
    joined = _beside(clips, gap * scale, round(255 * GAP_LEVEL))
    if labels is not None:
        captions = _captions(labels, clips[0].shape[2], gap * scale)
        captions = np.broadcast_to(captions, (len(joined), *captions.shape))
        joined = np.concatenate([captions, joined], axis=1)
    return joined.astype(np.float32) / 255


def encode(video: Video, suffix: str, *, fps: float = 8, scale: int = 4) -> bytes:
    """The contents of the file that `write_video` writes for a suffix."""
    if suffix not in SUFFIXES:
        raise ValueError(f"write_video: cannot write {suffix!r}, only {', '.join(SUFFIXES)}")
    if not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"write_video: fps is {fps}, expected a positive number")
    frames = to_uint8(video, "write_video")
    if suffix == ".mp4":
        return _mp4(_scaled(frames, _check_scale("write_video", scale)), fps)
    images = _images(frames, scale, "write_video")
    data = io.BytesIO()
    options = {"save_all": True, "duration": round(1000 / fps), "loop": 0}
    if suffix == ".webp":
        options["lossless"] = True
    else:
        images = _with_one_palette(images)
    images[0].save(data, suffix[1:].upper(), append_images=images[1:], **options)
    return data.getvalue()


def to_uint8(video: Video, function: str = "to_uint8") -> np.ndarray:
    """A checked clip as uint8 `[F, H, W, 3]`, rounded to nearest; `function` is for errors."""
    shape, dtype = tuple(np.shape(video)), getattr(video, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{function}: the video is {dtype or type(video)}, expected float")
    if len(shape) != 4 or shape[3] != 3 or 0 in shape:
        raise ValueError(f"{function}: the video is {list(shape)}, expected [F, H, W, 3]")
    values = np.asarray(video).astype(np.float32)
    finite = np.isfinite(values)
    if not finite.all():
        first = int(np.argmin(finite.all(axis=(1, 2, 3))))
        raise ValueError(
            f"{function}: {finite.size - finite.sum()} of {finite.size} values of the video are "
            f"not finite, the first in frame {first}; a picture would hide that"
        )
    return np.rint(255 * np.clip(values, 0, 1)).astype(np.uint8)


def _mp4(frames: np.ndarray, fps: float) -> bytes:
    """H.264 in the pixel format that every player knows."""
    try:
        import imageio_ffmpeg

        ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        raise ImportError(
            'write_video: .mp4 needs ffmpeg; pip install "sdq[video]", or write .webp'
        ) from error
    # That format halves the colours' resolution, so sizes are made even.
    frames = np.pad(frames, [(0, 0), *((0, n % 2) for n in frames.shape[1:3]), (0, 0)], "edge")
    size = f"{frames.shape[2]}x{frames.shape[1]}"
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", size, "-r", str(fps), "-i", "-"]
    coded = ["-c:v", "libx264", "-crf", "16", "-pix_fmt", "yuv420p", "-movflags", "+faststart"]
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder, "video.mp4")
        command = [ffmpeg, "-loglevel", "error", *raw, *coded, str(file)]
        done = subprocess.run(command, input=frames.tobytes(), capture_output=True)
        if done.returncode:
            reason = done.stderr.decode(errors="replace").strip().splitlines()
            raise OSError(f"write_video: ffmpeg failed in {folder}: {' / '.join(reason[-2:])}")
        return file.read_bytes()


def _images(frames: np.ndarray, scale: int, function: str) -> "list[PIL.Image.Image]":
    import PIL.Image

    scaled = _scaled(frames, _check_scale(function, scale))
    return [PIL.Image.fromarray(frame) for frame in scaled]


def _with_one_palette(images: "list[PIL.Image.Image]") -> "list[PIL.Image.Image]":
    """256 colours chosen for all images together: a palette for each frame would flicker."""
    import PIL.Image

    width, height = images[0].size
    stacked = PIL.Image.new("RGB", (width, height * len(images)))
    for i, image in enumerate(images):
        stacked.paste(image, (0, i * height))
    palette = stacked.quantize(256)
    return [image.quantize(palette=palette, dither=PIL.Image.Dither.NONE) for image in images]


def _scaled(frames: np.ndarray, scale: int) -> np.ndarray:
    return frames.repeat(scale, axis=1).repeat(scale, axis=2)


def _check_scale(function: str, scale: int) -> int:
    if scale != int(scale) or scale < 1:
        raise ValueError(f"{function}: scale is {scale}, expected a positive integer")
    return int(scale)


def _beside(pictures: Sequence[np.ndarray], gap: int, level: int) -> np.ndarray:
    """Arrays `[..., W, 3]` joined along W with grey columns between."""
    column = np.full((*pictures[0].shape[:-2], gap, 3), level, np.uint8)
    parts = [part for picture in pictures for part in (column, picture)]
    return np.concatenate(parts[1:], axis=-2)


def _captions(labels: Sequence[str], width: int, gap: int) -> np.ndarray:
    """Labels, each centred over its `width` pixels: uint8 `[H, len(labels) * (width + gap), 3]`."""
    import PIL.Image
    import PIL.ImageDraw
    import PIL.ImageFont

    size = min(max(width // 14, 10), 28)
    font = PIL.ImageFont.load_default(size)
    texts = [_wrapped(label, width - size // 2, font) for label in labels]
    line = round(1.35 * size)
    height = line * max(len(lines) for lines in texts) + size
    image = PIL.Image.new("RGB", (len(labels) * (width + gap) - gap, height), "white")
    draw = PIL.ImageDraw.Draw(image)
    for i, lines in enumerate(texts):
        for row, words in enumerate(lines):
            middle = (i * (width + gap) + width / 2, size / 2 + (row + 0.5) * line)
            draw.text(middle, words, fill="#1c2024", font=font, anchor="mm")
    return np.asarray(image)


def _wrapped(
    text: str, width: int, font: "PIL.ImageFont.FreeTypeFont | PIL.ImageFont.ImageFont"
) -> list[str]:
    """Lines of at most `width` pixels, broken between words, or inside one that is too wide."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines
