"""The Hopper attention on a Hopper GPU: JAX_PLATFORMS=cuda python -m pytest <this file>."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Projected, device, quantized_attention
from pallas_kernels.mosaic_gpu.attention_operands import Rounded, rounded
from tests.pallas_kernels.test_attention import exact, relative

pytestmark = pytest.mark.skipif(not device.current().is_hopper, reason="needs a Hopper GPU")

# As `exact` rounds: without what may be done before.
ours = functools.partial(quantized_attention, implementation="mosaic_gpu", center=False)


def operands(rng, b, s, length, h, spread=1.0, width=128):
    q = spread * rng.randn(b, s, h, width)
    return [jnp.asarray(x, jnp.bfloat16) for x in (q, *rng.randn(2, b, length, h, width))]


@pytest.mark.parametrize("formats", [("sdq32:16", "sdq32:16"), ("sdq32:32", None), (None, None)])
@pytest.mark.parametrize("spread", [0.3, 1.5, 4.0])
@pytest.mark.parametrize(
    "b, s, length, h, width",
    [
        (1, 1024, 1024, 2, 128),
        (2, 1000, 517, 3, 128),
        (1, 77, 4096, 1, 128),
        (1, 8192, 8192, 1, 128),
        (2, 1000, 1000, 2, 64),
    ],
)
def test_against_float64(rng, b, s, length, h, width, spread, formats):
    x = operands(rng, b, s, length, h, spread, width)
    y = ours(*x, fmt_qk=formats[0], fmt_pv=formats[1])
    assert y.shape == (b, s, h, width) and y.dtype == jnp.bfloat16
    expected = exact(*rounded(*x, *formats), scale=width**-0.5)
    assert relative(y, expected) < 0.05
    # And the errors are without direction: the mean is where it should be.
    of_mean = np.asarray(y, np.float64).mean(axis=1) - expected.mean(axis=1)
    assert np.linalg.norm(of_mean) < 0.02 * np.linalg.norm(expected.mean(axis=1))


@pytest.mark.parametrize("causal", [128, 300, 1560])
def test_block_by_block(rng, causal):
    x = operands(rng, 2, 4680, 4680, 2)
    parts = rounded(*x, None, None)
    assert relative(ours(*x, causal=causal), exact(*parts, causal=causal)) < 0.05


def test_values_of_one_sign(rng):
    """Where sums that stay in the tensor cores are a fifth wrong."""
    q, k, v = operands(rng, 1, 128, 32768, 1, 0.5)
    y = ours(q, k, abs(v))
    assert relative(y, exact(*rounded(q, k, abs(v), None, None))) < 2e-3


def test_masked_keys(rng):
    q, k, v = operands(rng, 2, 256, 700, 2)
    mask = jnp.asarray(rng.rand(2, 700) < 0.5).at[1].set(False)
    spoilt = [jnp.where(mask[:, :, None, None], x, bad) for x, bad in ((k, 1e4), (v, jnp.nan))]
    y = ours(q, *(x.astype(jnp.bfloat16) for x in spoilt), mask=mask)
    clean = [jnp.where(mask[:, :, None, None], x, 0).astype(jnp.bfloat16) for x in (k, v)]
    first = [Rounded(x.values[:1], x.scales[:1]) for x in rounded(q, *clean, None, None)]
    assert relative(y[:1], exact(*first, mask[:1])) < 0.05
    assert not np.asarray(y[1], np.float32).any()


def test_extremes(rng):
    """Equal keys, one far above all others, a NaN, scores that fall by hundreds of octaves."""
    q, k, v = operands(rng, 1, 128, 1024, 4)
    k = k.at[:, :, 0].set(k[:, :1, 0])
    k = k.at[:, 300, 1].set(100 * q[:, 0, 1]).at[:, 5, 2, 3].set(jnp.nan)
    falling = jnp.linspace(40, -40, 1024, dtype=jnp.bfloat16)[None, :, None]
    k = k.at[:, :, 3].set(falling * q[:, :1, 3])
    q = q.at[:, :, 1].set(q[:, :1, 1]).at[:, :, 3].set(q[:, :1, 3])
    parts = rounded(q, k, v, None, None)
    y, expected = np.asarray(ours(q, k, v), np.float64), exact(*parts)
    for head, most in ((0, 0.01), (1, 0.01), (3, 0.05)):
        assert relative(y[:, :, head], expected[:, :, head]) < most, head
    assert np.isnan(y[:, :, 2]).all() and np.isfinite(np.delete(y, 2, axis=2)).all()


@pytest.mark.parametrize("length", [100, 1024])
def test_a_nan_query_is_not_swallowed(rng, length):
    q, k, v = operands(rng, 1, 64, length, 1)
    y = np.asarray(ours(q.at[0, 9, 0, 5].set(jnp.nan), k, v), np.float32)
    np.testing.assert_array_equal(np.isnan(y).any(axis=(0, 2, 3)), np.arange(64) == 9)


def test_runs_agree(rng):
    """No race: the same bits every time."""
    x = operands(rng, 1, 4096, 4096, 4)
    first = np.asarray(ours(*x), np.float32)
    for _ in range(20):
        np.testing.assert_array_equal(np.asarray(ours(*x), np.float32), first)


@pytest.mark.parametrize("tokens, h, width", [(5000, 40, 128), (333, 3, 64)])
def test_from_linears(rng, tokens, h, width):
    """Norm, rotary embedding, rotation and rounding by kernels, against plain jnp."""
    angles = 6 * rng.rand(tokens, width // 2)
    rope = jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)
    x = [jnp.asarray(3 * rng.randn(2, tokens, h * width), jnp.bfloat16) for _ in "qk"]
    x[1] = x[1] + 4 * x[1][:, :1]  # keys with a mean
    gain = jnp.asarray(1 + rng.rand(h * width), jnp.float32)
    q, k = (Projected(x=each, gain=gain, rope=rope, heads=h, eps=1e-6) for each in x)
    v = jnp.asarray(rng.randn(2, tokens, h, width) + 0.5, jnp.bfloat16)
    options = {"rotate": True, "fmt_qk": None, "fmt_pv": None}
    y, plain = (
        quantized_attention(q, k, v, implementation=name, **options)
        for name in ("mosaic_gpu", "plain")
    )
    # Few of the e4m3 numbers differ, by one step; scores of the plain path by their float32 sums.
    assert relative(y, np.asarray(plain, np.float64)) < 0.01
