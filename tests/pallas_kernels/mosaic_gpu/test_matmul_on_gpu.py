"""The Hopper kernel on a Hopper GPU: JAX_PLATFORMS=cuda python -m pytest <this file>."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdq
from pallas_kernels import Onto, device, quantized_matmul, which
from pallas_kernels.mosaic_gpu.config import MODES, FewConfig, fitted, heuristic
from pallas_kernels.mosaic_gpu.operands import tile_weight

pytestmark = pytest.mark.skipif(not device.current().is_hopper, reason="needs a Hopper GPU")

TOLERANCE = {"fast": 4e-3, "accurate": 1e-3}  # of operands whose signs mix
ours = functools.partial(quantized_matmul, implementation="mosaic_gpu")


def quantised(rng, m, n, k, fmt="sdq32:16"):
    numbers = rng.randn(m, k) * np.exp2(rng.randint(-20, 20, (m, 1)))
    x = sdq.quantize(jnp.asarray(numbers, jnp.float32), fmt)
    return x, sdq.quantize(jnp.asarray(rng.standard_t(4, (n, k)), jnp.float32), fmt)


def exact(x, w):
    x, w = (np.asarray(sdq.dequantize(q), np.float64) for q in (x, w))
    return x @ w.T


def relative(y, expected):
    """Row by row, because rows differ by many powers of two."""
    y = np.asarray(y, np.float64)
    return (np.linalg.norm(y - expected, axis=-1) / np.linalg.norm(expected, axis=-1)).max()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fmt", ["sdq32:16", "sdq32:32", "dialectfp4:16", "e2m1:32"])
@pytest.mark.parametrize(
    "m, n, k",
    [(256, 256, 512), (1000, 1536, 1536), (264, 200, 800), (3, 40, 32), (2000, 136, 5120)],
)
def test_against_float64(rng, m, n, k, fmt, mode):
    x, w = quantised(rng, m, n, k, fmt)
    assert relative(ours(x, w, mode=mode), exact(x, w)) < TOLERANCE[mode]


@pytest.mark.parametrize("fmt", ["sdq32:16", "sdq32:32", "mxfp4"])
@pytest.mark.parametrize("m, n, k", [(1000, 1536, 1536), (264, 200, 800), (3, 40, 32)])
def test_unquantised_rows_against_float64(rng, m, n, k, fmt):
    x = jnp.asarray(rng.randn(m, k) * np.exp2(rng.randint(-20, 20, (m, 1))), jnp.bfloat16)
    w = sdq.quantize(jnp.asarray(rng.standard_t(4, (n, k)), jnp.float32), fmt)
    assert which(x, w).implementation == "mosaic_gpu"
    expected = np.asarray(x, np.float64) @ np.asarray(sdq.dequantize(w), np.float64).T
    assert relative(ours(x, w, out_dtype="float32"), expected) < 1e-5  # float32 sums


@pytest.mark.parametrize("m", [1, 16, 40, 64])
@pytest.mark.parametrize("n, k", [(5120, 5120), (200, 800), (13824, 96)])
def test_few_rows_against_float64(rng, m, n, k):
    x, w = quantised(rng, m, n, k)
    assert relative(ours(x, w, out_dtype="float32"), exact(x, w)) < 1e-5
    x = jnp.asarray(rng.randn(m, k), jnp.bfloat16)
    expected = np.asarray(x, np.float64) @ np.asarray(sdq.dequantize(w), np.float64).T
    assert relative(ours(x, w, out_dtype="float32"), expected) < 1e-5


@pytest.mark.parametrize(
    "change", [{"warpgroups": 1}, {"warpgroups": 3, "stages": 9}, {"stages": 4}]
)
def test_few_rows_however_they_are_cut(rng, change):
    x, w = quantised(rng, 24, 1536, 1536)
    config = dataclasses.replace(FewConfig(rows=24), **change)
    # Float32 results: only the order of sums differs.
    assert relative(ours(x, w, config=config), np.asarray(ours(x, w), np.float64)) < 1e-5


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"tile_m": 128, "cluster": 1},
        {"tile_m": 128, "cluster": 2},
        {"tile_m": 184, "cluster": 1},  # pieces of 64 and one of 56 rows
        {"stages": 2},
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_every_cut_gives_the_same_bits(rng, mode, change):
    """The order of sums does not depend on how the work is cut."""
    x, w = quantised(rng, 1000, 1536, 1536)
    config = dataclasses.replace(heuristic(mode, 1000, 1536, 4), **change)
    config = fitted(config, 4, most=config.stages)
    expected = ours(x, w, mode=mode)
    np.testing.assert_array_equal(ours(x, w, config=config), expected)


@pytest.mark.parametrize("k", [5120, 13824])
def test_sums_of_one_sign(rng, k):
    x = sdq.quantize(jnp.asarray(abs(rng.randn(128, k)), jnp.float32), "sdq32:16")
    w = sdq.quantize(jnp.asarray(abs(rng.randn(256, k)), jnp.float32), "sdq32:16")
    assert relative(ours(x, w), exact(x, w)) < TOLERANCE["accurate"]


def test_bias_gelu_and_rounding(rng):
    x, w = quantised(rng, 300, 320, 256)
    x = sdq.quantize(jnp.asarray(rng.randn(300, 256), jnp.bfloat16), "sdq32:16")
    bias = jnp.asarray(rng.randn(320), jnp.float32)
    y = ours(x, tile_weight(w), bias=bias, activation="gelu")
    expected = jax.nn.gelu(jnp.asarray(exact(x, w), jnp.float32) + bias[None], approximate=True)
    assert y.dtype == jnp.bfloat16
    error = np.asarray(y, np.float64) - np.asarray(expected, np.float64)
    assert abs(error).max() < 2**-7 * abs(np.asarray(expected)).max()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("m, n, k", [(1000, 1536, 1536), (264, 200, 800), (40, 200, 800)])
def test_a_result_is_added_to_something(rng, m, n, k, dtype, mode):
    x = sdq.quantize(jnp.asarray(rng.randn(m, k), jnp.float32), "sdq32:16")
    w = sdq.quantize(jnp.asarray(rng.randn(n, k), jnp.float32), "sdq32:16")
    there = jnp.asarray(50 * rng.randn(m, n), dtype)
    for gates in (None, (1, n), (m, n)):  # the last by XLA
        gate = None if gates is None else jnp.asarray(rng.randn(*gates), jnp.float32)
        expected = np.asarray(there, np.float64) + exact(x, w) * (
            1 if gate is None else np.asarray(gate, np.float64)
        )
        y = ours(x, w, onto=Onto(x=there, gate=gate), mode=mode)
        assert y.dtype == there.dtype
        rounding = 2**-8 if dtype == "bfloat16" else 0  # twice where XLA adds
        assert relative(y, expected) < rounding + TOLERANCE[mode]


def test_leading_axes_and_the_choice(rng):
    x, w = quantised(rng, 64, 128, 256)
    both = jax.tree.map(lambda part: part.reshape(4, 16, *part.shape[1:]), x)
    assert which(both, w).implementation == "mosaic_gpu"
    y = quantized_matmul(both, w)
    np.testing.assert_array_equal(y.reshape(64, 128), quantized_matmul(x, w))


@pytest.mark.parametrize("mode", MODES)
def test_bad_zero_and_huge_rows(rng, mode):
    numbers = rng.randn(200, 512).astype(np.float32)
    kernel = rng.randn(128, 512).astype(np.float32)
    numbers[3, 5], numbers[9, 0], numbers[20], numbers[30] = (
        np.nan,
        np.inf,
        0,
        numbers[30] * 2.0**90,
    )
    kernel[7, 2], kernel[8] = np.nan, 0
    x, w = (sdq.quantize(jnp.asarray(part), "sdq32:16") for part in (numbers, kernel))
    y = np.asarray(ours(x, w, mode=mode))
    bad = np.zeros(y.shape, bool)
    bad[[3, 9]] = bad[:, 7] = True
    np.testing.assert_array_equal(np.isnan(y), bad)
    good = np.delete(np.arange(200), [3, 9, 20])
    columns = np.delete(np.arange(128), 7)
    assert not y[20, columns].any() and not y[good][:, 8].any()
    expected = exact(x, w)[np.ix_(good, columns)]
    assert relative(y[np.ix_(good, columns)], expected) < TOLERANCE[mode]


def test_runs_agree(rng):
    """No race: the same bits every time."""
    x, w = quantised(rng, 4096, 1536, 1536)
    tiled = tile_weight(w)
    first = np.asarray(ours(x, tiled))
    for _ in range(20):
        np.testing.assert_array_equal(np.asarray(ours(x, tiled)), first)
