"""The quantiser on a Hopper GPU: JAX_PLATFORMS=cuda python -m pytest <this file>."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import device
from pallas_kernels.mosaic_gpu.quantizer import Norm, SubFormatbooks, quantize
from pallas_kernels.mosaic_gpu.quantizer_task import Config
from sdq import formatbook, formats
from tests.pallas_kernels.mosaic_gpu.test_quantizer import check, dequantised, expected, rows

pytestmark = pytest.mark.skipif(not device.current().is_hopper, reason="needs a Hopper GPU")


def run(x, fmt, **options):
    call = functools.partial(
        quantize, fmt=formats.parse(fmt), metadata=True, num_sms=device.current().cores
    )
    out = jax.jit(functools.partial(call, **options))(jnp.asarray(x))
    of_rows = [(part.values, part.exponents) for part in (out.rows, out.residuals) if part]
    joined = [
        np.concatenate([np.asarray(part) for part in parts]) for parts in zip(*of_rows, strict=True)
    ]
    return [*joined, np.asarray(out.metadata)]


def bits(x, fmt, allowed=None):
    """Of sdq, on the same GPU."""
    return expected(x, formats.parse(fmt), allowed, largest=None)


@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize("book", formatbook.BOOKS)
@pytest.mark.parametrize("shape", [(1000, 1536), (515, 5120), (300, 13824), (77, 32), (40, 28672)])
def test_every_bit_is_sdqs(rng, shape, book, block):
    x = rows(*shape, rng)
    check(run(x, f"{book}:{block}"), bits(x, f"{book}:{block}"))


@pytest.mark.parametrize(
    "change",
    [
        {"exchange": False},
        {"columns": 1},
        {"warps": 8},
        {"threads": 64},
        {"threads": 96, "warps": 12},
        {"threads": 160, "warps": 20},
        {"threads": 512},
    ],
)
def test_every_cut_gives_the_same_bits(rng, change):
    x = rows(515, 5120, rng)
    check(run(x, "sdq32:16", config=Config(**change)), bits(x, "sdq32:16"))


@pytest.mark.parametrize("fmt", ["sdq32:16", "sdq32:32"])
@pytest.mark.parametrize("by_block", [False, True])
def test_sub_formatbooks_and_residuals(rng, fmt, by_block):
    x = rows(400, 1536, rng)
    blocks = 1536 // formats.parse(fmt).block if by_block else 1
    books = rng.randint(1, 16, (65, blocks, 8)).astype(np.uint8)
    group = rng.randint(0, 65, 400).astype(np.int32)
    tokens = rng.permutation(250)[:100].astype(np.int32)  # rows without NaN or Inf
    want = bits(x, fmt, books[group])
    left = x.astype(np.float32) - dequantised(*want[:2])
    more = bits(left[tokens].astype(ml_dtypes.bfloat16), fmt)
    sub = SubFormatbooks(jnp.asarray(books), jnp.asarray(group))
    got = run(x, fmt, sub_formatbooks=sub, residual_of=jnp.asarray(tokens))
    check(got, [np.concatenate(parts) for parts in zip(want, more, strict=True)])


@pytest.mark.parametrize("length, mean", [(1536, 1), (3072, 1), (5120, 1), (5120, -100)])
def test_norm_in_front(rng, length, mean):
    x = (3 * rng.randn(256, length) + mean).astype(ml_dtypes.bfloat16)
    gain, shift = rng.randn(2, 2, length).astype(np.float32)
    norm = Norm(jnp.asarray(gain), jnp.asarray(shift), 1e-6)
    got = run(x, "sdq32:16", norm=norm)
    x = x.astype(np.float64)
    x = x - x.mean(axis=1, keepdims=True)
    x = x / np.sqrt(np.square(x).mean(axis=1, keepdims=True) + 1e-6)
    x = (x * gain.repeat(128, axis=0) + shift.repeat(128, axis=0)).astype(ml_dtypes.bfloat16)
    want = bits(x, "sdq32:16")
    alike = (got[1] == want[1])[:, 0]
    assert alike.mean() > 0.98  # another float32 sum may move a maximum over a power of two
    assert np.mean((got[0].view(np.uint8) != want[0].view(np.uint8))[alike]) < 1e-3


@pytest.mark.parametrize("length", [8960, 13824])
def test_gelu_in_front(rng, length):
    x = (2 * rng.randn(256, length)).astype(ml_dtypes.bfloat16)
    got = run(x, "sdq32:16", activation="gelu")
    gelu = jax.nn.gelu(jnp.asarray(x, jnp.float32))
    want = bits(np.asarray(gelu.astype(jnp.bfloat16)), "sdq32:16")
    alike = (got[1] == want[1])[:, 0]
    assert alike.mean() > 0.98  # as above
    values = [part[0].astype(np.float32) for part in (got, want)]  # zeros of either sign
    assert np.mean((values[0] != values[1])[alike]) < 5e-3


def test_channels_in_two_arrays(rng):
    x = rows(400, 15360, rng)
    own, more = (jnp.asarray(part) for part in (x[:, :3072], x[:, 3072:]))
    check(run(own, "sdq32:16", more=more), run(x, "sdq32:16"))


def test_runs_agree(rng):
    """No race: the same bits every time."""
    x = rows(4096, 5120, rng)
    first = run(x, "sdq32:16")
    for _ in range(20):
        check(run(x, "sdq32:16"), first)
