import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdq import video_metrics as vm


def clips(seed, shape=(3, 20, 27, 3), noise=0.1):
    """A smooth clip with an edge in it, and the same with noise; numpy float32 in [0, 1]."""
    rng = np.random.RandomState(seed)
    t, y, x = np.meshgrid(*(np.linspace(0, 1, n) for n in shape[:3]), indexing="ij")
    waves = [np.sin(3 * x + 2 * k * y + t) for k in range(3)]
    clean = 0.5 + 0.3 * np.stack(waves, axis=-1)
    clean[:, 5:12, 8:15] = rng.uniform(size=3)
    noisy = clean + noise * rng.standard_normal(clean.shape)
    return tuple(np.clip(v, 0, 1).astype(np.float32) for v in (clean, noisy))


def mean_under_window(image):
    """The Gaussian mean of `[H, W]` by its definition, pixel by pixel, in float64."""
    offset = np.arange(-5, 6)
    line = np.exp(-(offset**2) / (2 * 1.5**2))
    window = np.outer(line, line) / np.outer(line, line).sum()
    high, wide = image.shape
    return np.array(
        [
            [(window * image[i : i + 11, j : j + 11]).sum() for j in range(wide - 10)]
            for i in range(high - 10)
        ]
    )


def ssim_by_definition(x, y):
    x, y = x.astype(float), y.astype(float)
    mx, my = mean_under_window(x), mean_under_window(y)
    vx, vy = mean_under_window(x * x) - mx**2, mean_under_window(y * y) - my**2
    cov = mean_under_window(x * y) - mx * my
    c1, c2 = 1e-4, 9e-4
    return ((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean()


# skimage 0.26, frame by frame of clips(seed, noise=noise):
#   structural_similarity(x[t], y[t], data_range=1.0, channel_axis=2, gaussian_weights=True,
#                         sigma=1.5, use_sample_covariance=False)
SKIMAGE = {
    (0, 0.02): (0.9426012, 0.9551284, 0.9537099),
    (1, 0.1): (0.5503501, 0.5834121, 0.5975914),
    (2, 0.4): (0.1952340, 0.2071908, 0.1921476),
}


@pytest.mark.parametrize(("seed", "noise"), SKIMAGE)
def test_ssim_is_what_skimage_says(seed, noise):
    x, y = map(jnp.asarray, clips(seed, noise=noise))
    assert np.asarray(vm.ssim(x, y)) == pytest.approx(SKIMAGE[seed, noise], abs=1e-5)


def test_ssim_by_the_definition():
    x, y = clips(5)
    expected = [
        np.mean([ssim_by_definition(a[..., c], b[..., c]) for c in range(3)])
        for a, b in zip(x, y, strict=True)
    ]
    assert np.asarray(vm.ssim(jnp.asarray(x), jnp.asarray(y))) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("level", [0.0, 0.3, 1.0])
def test_ssim_of_flat_and_equal_clips_is_one(level):
    flat = jnp.full((2, 16, 16, 3), level)
    assert np.asarray(vm.ssim(flat, flat)) == pytest.approx(1, abs=1e-6)
    x = jnp.asarray(clips(0)[1])
    assert np.asarray(vm.ssim(x, x)) == pytest.approx(1, abs=1e-6)


def test_ssim_of_opposite_patterns_is_negative():
    squares = (np.indices((24, 24)).sum(axis=0) % 2).astype(np.float32)
    x = jnp.asarray(np.broadcast_to(squares[None, :, :, None], (1, 24, 24, 3)))
    assert float(vm.ssim(x, 1 - x)[0]) < -0.9


def test_psnr_by_the_definition():
    x, y = clips(1)
    squares = (x.astype(float) - y.astype(float)) ** 2
    a, b = jnp.asarray(x), jnp.asarray(y)
    assert float(vm.psnr_db(a, b)) == pytest.approx(-10 * np.log10(squares.mean()), abs=1e-4)
    frames = -10 * np.log10(squares.mean(axis=(1, 2, 3)))
    assert np.asarray(vm.psnr_db_per_frame(a, b)) == pytest.approx(frames, abs=1e-4)


def test_psnr_at_the_edges():
    x = jnp.zeros((2, 3, 3, 3))
    assert float(vm.psnr_db(x, x)) == np.inf
    assert float(vm.psnr_db(x, x + 1)) == 0
    # Squares of this difference are below float32's range, the difference is not nothing.
    assert float(vm.psnr_db(x, x + 1e-30)) == pytest.approx(600, abs=1e-3)
    one_frame = np.asarray(vm.psnr_db_per_frame(x, x.at[1].set(0.1)))
    assert one_frame[0] == np.inf and one_frame[1] == pytest.approx(20, abs=1e-4)


def test_flicker_counts_static_pixels_only():
    video = np.zeros((4, 6, 6, 3), np.float32)
    video[:, :3] = np.array([0, 0.5, 0, 0.5])[:, None, None, None]  # upper half moves
    video[:, 3:] = np.array([0, 0.1, 0.3, 0.3])[:, None, None, None]
    static = np.zeros((6, 6), bool)
    static[3:] = True
    assert float(vm.flicker(jnp.asarray(video), jnp.asarray(static))) == pytest.approx(0.1)
    assert float(vm.flicker(jnp.asarray(video), jnp.asarray(~static))) == pytest.approx(0.5)


def test_second_difference_ignores_rest_and_steady_fading():
    time = np.arange(5, dtype=np.float32)[:, None, None, None]
    steady = jnp.asarray(np.broadcast_to(0.1 * time, (5, 4, 4, 3)))
    assert float(vm.second_difference_energy(steady)) == pytest.approx(0, abs=1e-12)
    blinking = jnp.asarray(np.broadcast_to(0.5 * (time % 2), (5, 4, 4, 3)))
    assert float(vm.second_difference_energy(blinking)) == pytest.approx(1.0)  # (2 * 0.5)^2


def moving_ramp(dx, dy, frames=3, size=12):
    """Linear in x and y, so that bilinear sampling is exact; its content moves by (dx, dy)."""
    y, x = np.mgrid[:size, :size].astype(np.float32)
    return jnp.stack(
        [
            jnp.asarray(
                np.repeat((0.3 + 0.02 * (x - t * dx) + 0.03 * (y - t * dy))[..., None], 3, 2)
            )
            for t in range(frames)
        ]
    )


@pytest.mark.parametrize(("dx", "dy"), [(1.0, 0.0), (0.0, -2.0), (0.25, 1.5)])
def test_warping_error_of_true_motion_is_zero(dx, dy):
    video = moving_ramp(dx, dy)
    flow = jnp.broadcast_to(jnp.array([dx, dy]), (2, 12, 12, 2))
    valid = jnp.ones((2, 12, 12), bool)
    assert float(vm.warping_error(video, flow, valid)) == pytest.approx(0, abs=1e-6)
    still = float(vm.warping_error(video, jnp.zeros_like(flow), valid))
    assert still == pytest.approx(abs(0.02 * dx + 0.03 * dy), rel=1e-4)


def test_warping_error_uses_valid_pixels_that_stay_inside():
    video = moving_ramp(0, 0, frames=2).at[1, 4, 4].add(0.5)
    flow = np.zeros((1, 12, 12, 2), np.float32)
    valid = np.zeros((1, 12, 12), bool)
    valid[0, 4, 3:5] = True
    assert float(vm.warping_error(video, jnp.asarray(flow), jnp.asarray(valid))) == pytest.approx(
        0.25
    )
    flow[0, 4, 4] = (0, 30)  # out of the picture
    flow[0, 0, 0] = np.nan  # not valid, does not count
    assert float(vm.warping_error(video, jnp.asarray(flow), jnp.asarray(valid))) == 0
    flow[0, 4, 3] = np.nan
    assert np.isnan(vm.warping_error(video, jnp.asarray(flow), jnp.asarray(valid)))


def test_hf_sigma_measures_noise_and_not_what_it_lies_on(rng):
    y, x = np.mgrid[:40, :40] / 40
    smooth = np.stack([0.2 + 0.5 * x, 0.7 - 0.4 * y, 0.3 + x * 0 + y * 0], axis=-1)
    noise = 0.02 * rng.standard_normal((6, 40, 40, 3))
    flat = np.ones((40, 40), bool)
    flat[10:20, 10:20] = False
    video = (smooth + noise).astype(np.float32)
    video[:, 10:20, 10:20] = 1  # a thing with sharp edges
    # 26,000 samples of 3 x 3 weights: a standard error near 1 %.
    assert float(vm.hf_sigma(jnp.asarray(video), jnp.asarray(flat))) == pytest.approx(
        0.02, rel=0.04
    )
    clean = jnp.asarray(np.broadcast_to(smooth, (2, 40, 40, 3)), jnp.float32)
    assert float(vm.hf_sigma(clean, jnp.ones((40, 40), bool))) == pytest.approx(0, abs=1e-6)


def test_colour_drift_is_the_distance_of_mean_colours():
    x = jnp.asarray(clips(2)[0])
    drift = jnp.array([[0, 0, 0], [0.03, 0, 0.04], [-0.1, 0, 0]])
    got = np.asarray(vm.colour_drift(x, x + drift[:, None, None]))
    assert got == pytest.approx([0, 0.05, 0.1], abs=1e-6)
    noise = jnp.asarray(np.tile([[0.2, -0.2]], (3, 20, 14))[..., :26, None], jnp.float32)
    assert np.asarray(vm.colour_drift(x[:, :, :26], x[:, :, :26] + noise)) == pytest.approx(
        0, abs=1e-6
    )


MASK, MASKS = jnp.ones((20, 27), bool), jnp.ones((2, 20, 27), bool)
FLOW = jnp.zeros((2, 20, 27, 2))
SCALARS = {
    "psnr_db": lambda v: vm.psnr_db(v, jnp.zeros_like(v)),
    "psnr_db of y": lambda v: vm.psnr_db(jnp.zeros_like(v), v),
    "flicker": lambda v: vm.flicker(v, MASK),
    "second_difference_energy": vm.second_difference_energy,
    "warping_error": lambda v: vm.warping_error(v, FLOW, MASKS),
    "hf_sigma": lambda v: vm.hf_sigma(v, MASK),
}
FRAMES = {
    "psnr_db_per_frame": lambda v: vm.psnr_db_per_frame(v, jnp.zeros_like(v)),
    "ssim": lambda v: vm.ssim(jnp.zeros_like(v), v),
    "colour_drift": lambda v: vm.colour_drift(v, jnp.zeros_like(v)),
}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", SCALARS | FRAMES)
def test_what_is_not_finite_is_nan(name, bad):
    video = jnp.asarray(clips(3)[1]).at[1, 2, 3, 0].set(bad)
    if name in SCALARS:
        assert np.isnan(SCALARS[name](video))
    else:
        assert np.isnan(FRAMES[name](video)).tolist() == [False, True, False]


def test_empty_masks_are_nan():
    video = jnp.asarray(clips(3)[1])
    assert np.isnan(vm.flicker(video, ~MASK))
    assert np.isnan(vm.warping_error(video, FLOW, ~MASKS))
    thin = ~MASK.at[:, ::3].set(False)  # lines of one pixel have no flat neighbourhood
    assert np.isnan(vm.hf_sigma(video, thin))


@pytest.mark.parametrize("name", SCALARS | FRAMES)
def test_jit_and_vmap_change_nothing(name):
    function = (SCALARS | FRAMES)[name]
    batch = jnp.stack([jnp.asarray(clips(seed)[1]) for seed in range(2)])
    one_by_one = jnp.stack([function(video) for video in batch])
    got = jax.jit(jax.vmap(function))(batch)
    assert got.dtype == jnp.float32
    assert np.asarray(got) == pytest.approx(np.asarray(one_by_one), rel=1e-5)


def test_bfloat16_is_computed_in_float32():
    x, y = (jnp.asarray(v, jnp.bfloat16) for v in clips(4))
    wide = functools.partial(jnp.asarray, dtype=jnp.float32)
    for function in (vm.psnr_db, vm.ssim, vm.colour_drift):
        got = function(x, y)
        assert got.dtype == jnp.float32 and (got == function(wide(x), wide(y))).all()


GOOD = jnp.zeros((3, 20, 27, 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: vm.psnr_db(GOOD, GOOD[:2]), r"psnr_db: shapes differ, \[3, 20, 27, 3\] and"),
        (lambda: vm.psnr_db(GOOD[0], GOOD[0]), r"psnr_db: x is float32 \[20, 27, 3\], expected"),
        (lambda: vm.ssim(GOOD, GOOD.astype(jnp.uint8)), "ssim: y is uint8"),
        (lambda: vm.ssim(GOOD[:, :10], GOOD[:, :10]), "ssim: frames of 10 x 27 pixels are smaller"),
        (lambda: vm.colour_drift(GOOD[:0], GOOD[:0]), r"colour_drift: x is float32 \[0, "),
        (lambda: vm.flicker(GOOD[:1], MASK), "flicker: video has 1 frames, needs 2"),
        (lambda: vm.flicker(GOOD, MASK[:5]), r"static is bool \[5, 27\], expected bool \[20, 27\]"),
        (lambda: vm.flicker(GOOD, MASK.astype(jnp.int8)), "static is int8"),
        (lambda: vm.second_difference_energy(GOOD[:2]), "has 2 frames, needs 3"),
        (lambda: vm.warping_error(GOOD, FLOW[:1], MASKS), r"flow is float32 \[1, .*\[2, 20, 27, 2"),
        (lambda: vm.warping_error(GOOD, FLOW, MASKS[0]), r"valid is bool \[20, 27\], expected"),
        (lambda: vm.hf_sigma(GOOD[:, :2], MASK[:2]), "needs 3 x 3 pixels"),
    ],
)
def test_refusals_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
