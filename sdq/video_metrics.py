"""How good a video is, against a reference or on its own. Pure functions, jit-able, vmap-able.

A clip is float `[F, H, W, 3]` in [0, 1]: frames, rows, columns, RGB; batches through `jax.vmap`.
Everything is computed in float32 whatever came in. Nothing is NaN by accident:

- Shapes and dtypes that a metric cannot serve are a ValueError: also a clip with too few frames.
- A result is NaN exactly if its clip (its frame, for results `[F]`) is not finite, or if the mask
  that selects its pixels selects none.
- Identical clips have a PSNR of +inf.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

SSIM_TAPS = 11
SSIM_SIGMA = 1.5
SSIM_K = (0.01, 0.03)


def psnr_db(x: jax.Array, y: jax.Array) -> jax.Array:
    """Peak signal to noise of a whole clip, -10 log10(mean (x - y)^2), float32 scalar in dB."""
    _check_pair("psnr_db", x, y)
    return _psnr_db(x.astype(jnp.float32), y.astype(jnp.float32))


def psnr_db_per_frame(x: jax.Array, y: jax.Array) -> jax.Array:
    """`psnr_db` of each frame, float32 `[F]`."""
    _check_pair("psnr_db_per_frame", x, y)
    return jax.vmap(_psnr_db)(x.astype(jnp.float32), y.astype(jnp.float32))


def ssim(x: jax.Array, y: jax.Array) -> jax.Array:
    """Structural similarity of each frame, float32 `[F]`; 1 means equal, it may be negative.

    Means, variances and covariance under an 11-tap Gaussian window of sigma 1.5, constants 0.01
    and 0.03, data range 1, averaged over channels and over the pixels where the window fits.
    """
    _check_pair("ssim", x, y)
    if min(x.shape[1:3]) < SSIM_TAPS:
        raise ValueError(
            f"ssim: frames of {x.shape[1]} x {x.shape[2]} pixels are smaller than the window, "
            f"{SSIM_TAPS} x {SSIM_TAPS}"
        )
    # Frame by frame: the five windowed maps would be ten times the clip.
    frames = (x.astype(jnp.float32), y.astype(jnp.float32))
    return jax.lax.map(lambda pair: _ssim(*pair), frames)


def flicker(video: jax.Array, static: jax.Array) -> jax.Array:
    """Mean |f[t+1] - f[t]| where nothing should change, float32 scalar.

    Args:
      video: `[F, H, W, 3]`, two frames at least.
      static: bool `[H, W]`, the pixels that show the same thing in every frame.
    Returns:
      0 for a still picture; NaN if no pixel is static.
    """
    _check_clip("flicker", "video", video, frames=2)
    _check_mask("flicker", "static", static, video.shape[1:3])
    video = video.astype(jnp.float32)
    change = jnp.abs(video[1:] - video[:-1]).mean(axis=(0, 3))
    return _nan_unless_finite(_masked_mean(change, static), video)


def second_difference_energy(video: jax.Array) -> jax.Array:
    """Mean (f[t+1] - 2 f[t] + f[t-1])^2, float32 scalar: what neither rests nor fades steadily.

    Real motion has some of it: compare with the same clip of the reference. Three frames at least.
    """
    _check_clip("second_difference_energy", "video", video, frames=3)
    video = video.astype(jnp.float32)
    bend = video[2:] - 2 * video[1:-1] + video[:-2]
    return _nan_unless_finite(jnp.square(bend).mean(), video)


def warping_error(video: jax.Array, flow: jax.Array, valid: jax.Array) -> jax.Array:
    """Mean |f[t](p) - f[t+1](p + flow[t](p))|, sampled bilinearly, float32 scalar.

    Args:
      video: `[F, H, W, 3]`, two frames at least.
      flow: float `[F - 1, H, W, 2]`, (x, y) in pixels: where what a pixel shows goes until the
        next frame.
      valid: bool `[F - 1, H, W]`, the pixels whose content is still visible in the next frame.
        Those that the flow carries out of the picture are left out too.
    Returns:
      NaN if no pixel is left, or where the flow of a valid pixel is not finite.
    """
    _check_clip("warping_error", "video", video, frames=2)
    steps, height, width = video.shape[0] - 1, *video.shape[1:3]
    if flow.shape != (steps, height, width, 2) or not _is_float(flow):
        raise ValueError(
            f"warping_error: flow is {_words(flow)}, expected float "
            f"{_list((steps, height, width, 2))} for a video of {steps + 1} frames"
        )
    _check_mask("warping_error", "valid", valid, (steps, height, width))
    video = video.astype(jnp.float32)
    flow = jnp.where(valid[..., None], flow.astype(jnp.float32), 0)
    x = flow[..., 0] + np.arange(width, dtype=np.float32)[None, None]
    y = flow[..., 1] + np.arange(height, dtype=np.float32)[None, :, None]
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    error = jnp.abs(video[:-1] - _bilinear(video[1:], x, y)).mean(axis=-1)
    return _nan_unless_finite(_masked_mean(error, valid & inside), video, flow)


def hf_sigma(video: jax.Array, flat: jax.Array) -> jax.Array:
    """Standard deviation of the fine noise on flat areas, float32 scalar.

    Frames are filtered with [1, -2, 1] along rows and columns, which is blind to any constant or
    ramp and multiplies the deviation of white noise by 6 (Immerkaer 1996).

    Args:
      video: `[F, H, W, 3]`.
      flat: bool `[H, W]`, the pixels that should be smooth in every frame. Used are those whose
        eight neighbours are flat as well.
    Returns:
      NaN if no such pixel exists.
    """
    _check_clip("hf_sigma", "video", video)
    _check_mask("hf_sigma", "flat", flat, video.shape[1:3])
    if min(video.shape[1:3]) < 3:
        raise ValueError(f"hf_sigma: video is {_words(video)}; it needs 3 x 3 pixels")
    video = video.astype(jnp.float32)
    rows = video[:, 2:] - 2 * video[:, 1:-1] + video[:, :-2]
    fine = rows[:, :, 2:] - 2 * rows[:, :, 1:-1] + rows[:, :, :-2]
    height, width = flat.shape
    shifted = [flat[i : height - 2 + i, j : width - 2 + j] for i in range(3) for j in range(3)]
    inner = jnp.stack(shifted).all(axis=0)
    variance = _masked_mean(jnp.square(fine).mean(axis=(0, 3)), inner)
    return _nan_unless_finite(jnp.sqrt(variance) / 6, video)


def colour_drift(x: jax.Array, y: jax.Array) -> jax.Array:
    """Euclidean distance between the mean colours of each pair of frames, float32 `[F]`.

    A tint that grows along the clip shows here even where every pixel looks right.
    """
    _check_pair("colour_drift", x, y)
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    distance = jnp.sqrt(jnp.square((y - x).mean(axis=(1, 2))).sum(axis=-1))
    return jax.vmap(_nan_unless_finite)(distance, x, y)


def _psnr_db(x: jax.Array, y: jax.Array) -> jax.Array:
    difference = jnp.abs(x - y)
    # Scaled by its largest value, so that the squares of tiny differences stay above zero.
    largest = difference.max()
    unit = jnp.where(largest > 0, largest, 1.0)
    decibels = -20 * jnp.log10(unit) - 10 * jnp.log10(jnp.square(difference / unit).mean())
    return _nan_unless_finite(jnp.where(largest == 0, jnp.inf, decibels), x, y)


def _ssim(x: jax.Array, y: jax.Array) -> jax.Array:
    """Scalar for frames `[H, W, 3]`."""
    c1, c2 = (k**2 for k in SSIM_K)
    # Variances ignore a shift and cancel less around zero, where squares are smaller.
    a, b = x - 0.5, y - 0.5
    a_mean, b_mean, aa, bb, ab = _window(jnp.stack([a, b, a * a, b * b, a * b]))
    a_var, b_var, cov = aa - a_mean * a_mean, bb - b_mean * b_mean, ab - a_mean * b_mean
    x_mean, y_mean = a_mean + 0.5, b_mean + 0.5
    similar = (2 * x_mean * y_mean + c1) * (2 * cov + c2)
    total = (x_mean * x_mean + y_mean * y_mean + c1) * (a_var + b_var + c2)
    return _nan_unless_finite((similar / total).mean(), x, y)


def _window(maps: jax.Array) -> jax.Array:
    """Gaussian mean of `[N, H, W, 3]` where the window fits: `[N, H - 10, W - 10, 3]`.

    Shifted sums instead of a convolution, which accelerators would round to fewer bits.
    """
    offset = np.arange(SSIM_TAPS) - SSIM_TAPS // 2
    weight = np.exp(-0.5 * (offset / SSIM_SIGMA) ** 2)
    weight = (weight / weight.sum()).tolist()
    for axis in (1, 2):
        length = maps.shape[axis] - SSIM_TAPS + 1
        taps = [
            w * jax.lax.slice_in_dim(maps, i, i + length, axis=axis) for i, w in enumerate(weight)
        ]
        maps = functools.reduce(jnp.add, taps)
    return maps


def _bilinear(frames: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """`[N, H, W, 3]` sampled at columns x and rows y, both `[N, H, W]`, clamped to the edge."""

    def one(channel: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        return jax.scipy.ndimage.map_coordinates(channel, [y, x], order=1, mode="nearest")

    channels = jax.vmap(one, in_axes=(2, None, None), out_axes=2)
    return jax.vmap(channels)(frames, x, y)


def _masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean over the pixels of the mask; NaN if there are none."""
    return jnp.where(mask, values, 0).sum() / mask.sum().astype(jnp.float32)


def _nan_unless_finite(value: jax.Array, *inputs: jax.Array) -> jax.Array:
    finite = jnp.stack([jnp.isfinite(x).all() for x in inputs]).all()
    return jnp.where(finite, value, jnp.nan)


def _check_pair(function: str, x: jax.Array, y: jax.Array) -> None:
    _check_clip(function, "x", x)
    _check_clip(function, "y", y)
    if x.shape != y.shape:
        raise ValueError(f"{function}: shapes differ, {_list(x.shape)} and {_list(y.shape)}")


def _check_clip(function: str, name: str, video: jax.Array, frames: int = 1) -> None:
    if video.ndim != 4 or video.shape[3] != 3 or not video.size or not _is_float(video):
        raise ValueError(f"{function}: {name} is {_words(video)}, expected float [F, H, W, 3]")
    if video.shape[0] < frames:
        raise ValueError(f"{function}: {name} has {video.shape[0]} frames, needs {frames}")


def _check_mask(function: str, name: str, mask: jax.Array, shape: Sequence[int]) -> None:
    if mask.shape != tuple(shape) or mask.dtype != jnp.bool_:
        raise ValueError(f"{function}: {name} is {_words(mask)}, expected bool {_list(shape)}")


def _is_float(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _words(x: jax.Array) -> str:
    return f"{x.dtype} {_list(x.shape)}"


def _list(shape: Sequence[int]) -> str:
    return str(list(shape))
