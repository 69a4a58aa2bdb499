"""How far off sums are that stay in Hopper's tensor cores, by a model of them in numpy.

The model: a `wgmma` adds 32 products of fp8 numbers to a sum; each of them loses what lies more
than 13 binary places below the first digit of the largest. Measured on one H100, x and w >= 0,
K = 5120, largest error of a row: 1.7e-5, 4.4e-4 and 6.6e-2 with float32 taking over after 256
channels, after 512 and never.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdq
from pallas_kernels.mosaic_gpu.config import MODES, TILE_K

PLACES = 13
STEP = 32


def summed(x, w, promote):
    """x `[m, K]` times w `[n, K]`, float32 taking over after `promote` tiles of K."""
    total = acc = np.zeros((len(x), len(w)))
    for at in range(0, x.shape[1], STEP):
        if promote and at % (promote * TILE_K) == 0:
            total, acc = total + acc, np.zeros_like(acc)
        terms = x[:, None, at : at + STEP] * w[None, :, at : at + STEP]
        terms = np.concatenate([terms, acc[..., None]], axis=-1)
        _, exponent = np.frexp(abs(terms).max(axis=-1, keepdims=True))
        unit = np.ldexp(1.0, exponent - 1 - PLACES)
        acc = (np.trunc(terms / unit) * unit).sum(axis=-1)
    return total + acc


def error(x, w, promote):
    """The largest of a row."""
    q = [sdq.quantize(jnp.asarray(part, jnp.float32), "sdq32:16") for part in (x, w)]
    x, w = (np.asarray(sdq.dequantize(part), np.float64) for part in q)
    exact = x @ w.T
    off = np.linalg.norm(summed(x, w, promote) - exact, axis=-1)
    return (off / np.linalg.norm(exact, axis=-1)).max()


@pytest.mark.parametrize("promote, measured", [(2, 1.7e-5), (4, 4.4e-4), (0, 6.6e-2)])
def test_the_model_is_what_was_measured(rng, promote, measured):
    x, w = abs(rng.randn(4, 5120)), abs(rng.randn(16, 5120))
    assert measured / 3 < error(x, w, promote) < measured * 1.5


def loud(x):
    """One channel of 97 is thirty times as loud."""
    return np.where(np.arange(x.shape[1]) % 97, 1, 30)


CASES = {
    "signs mix": lambda rng, x: x,
    "x, w >= 0": lambda rng, x: abs(x),
    "long tails": lambda rng, x: np.exp(x),
    "uniform": lambda rng, x: rng.rand(*x.shape),
    "nearly equal": lambda rng, x: 1 + 0.1 * rng.rand(*x.shape),
    "loud channels of x": lambda rng, x: abs(x) * (1 if len(x) > 4 else loud(x)),
    "GELU outputs": lambda rng, x: np.asarray(jax.nn.gelu(jnp.asarray(x, jnp.float32)), float),
    "blocks over 3 octaves": lambda rng, x: (
        abs(x) * np.repeat(2.0 ** -rng.randint(0, 4, (len(x), x.shape[1] // 16)), 16, axis=1)
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_accurate_mode_is_right_to_a_thousandth(rng, case):
    x, w = (CASES[case](rng, rng.randn(count, 2560)) for count in (4, 16))
    assert error(x, w, MODES["accurate"].promote) < 1e-3


@pytest.mark.parametrize("case", ["uniform", "blocks over 3 octaves"])
def test_why_it_does_not_promote_later(rng, case):
    """After 256 channels, because after 384 some sums are not right to a thousandth."""
    x, w = (CASES[case](rng, rng.randn(count, 2560)) for count in (4, 16))
    assert error(x, w, 2) < 1e-3 < error(x, w, 3)


def test_what_it_does_not_cure(rng):
    """Loud in the same channels of both operands, and nothing has a sign: the rest is cut off."""
    x, w = (abs(rng.randn(count, 2560)) for count in (4, 16))
    errors = [error(x * loud(x), w * loud(w), promote) for promote in (1, 2, 0)]
    assert 1e-3 < errors[0] < errors[1] < 4e-3 < 1e-2 < errors[2]
