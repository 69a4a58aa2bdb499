import itertools

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import sdq
from pallas_kernels.mosaic_gpu.decode import decoded
from pallas_kernels.mosaic_gpu.operands import TILE_K, WORDS, grouped, tile_weight
from pallas_kernels.mosaic_gpu.tables import look_up_table, misfit
from pallas_kernels.rows import deinterleave, interleave
from sdq import formatbook, formats
from sdq.codecs import Encoded
from sdq.qtensor import pack

FORMATS = ["sdq32:16", "sdq32:32", "sdq32:64", "dialectfp4:16", "e2m1:32"]


def decode_all(tiled, dtype=jnp.float8_e4m3fn):
    table = jnp.asarray(look_up_table(tiled.format, dtype))
    tiles = [
        np.concatenate([decoded(group, table, dtype=dtype) for group in groups])
        for groups in tiled.groups
    ]
    bits = np.dtype(f"u{np.dtype(dtype).itemsize}")
    numbers = np.concatenate([np.asarray(tile).view(bits) for tile in tiles], axis=1)
    assert not numbers[tiled.count :].any()
    return numbers[: tiled.count]


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("k", [32, 128, 416])
def test_decoding_gives_the_interleaved_numbers(rng, fmt, k):
    q = sdq.quantize(jnp.asarray(rng.standard_t(3, (24, k)), jnp.float32), fmt)
    values, exponents = sdq.to_fp8(q)
    tiled = tile_weight(q)
    filled = np.pad(np.asarray(values).view(np.uint8), ((0, 0), (0, -k % TILE_K)))
    np.testing.assert_array_equal(decode_all(tiled), interleave(filled))
    np.testing.assert_array_equal(tiled.scales[:24], np.exp2(np.float32(exponents[:, 0])))


@pytest.mark.parametrize("fmt", [*FORMATS, "mxfp4"])
def test_numbers_in_bf16_are_the_same_in_their_own_order(rng, fmt):
    tiled = tile_weight(sdq.quantize(jnp.asarray(rng.randn(24, 160), jnp.float32), fmt))
    numbers = deinterleave(decode_all(tiled).view(ml_dtypes.float8_e4m3fn))
    wide = decode_all(tiled, jnp.bfloat16).view(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(wide, interleave(numbers.astype(ml_dtypes.bfloat16), run=2))


def test_every_table_entry_and_code():
    """All 256 metadata bytes with all 16 codes, bit for bit."""
    codes = np.tile(np.arange(16, dtype=np.uint8), (256, 1)).reshape(256, 1, 16)
    metadata = np.arange(256, dtype=np.uint8).reshape(256, 1)
    fmt = formats.parse("sdq32:16")
    encoded = Encoded(
        codes=jnp.asarray(codes), scales=jnp.asarray(metadata), outer=jnp.zeros((256, 1), jnp.int8)
    )
    q = pack(encoded, fmt=fmt, length=16, axis=-1, dtype=jnp.float32)
    got = decode_all(tile_weight(q))[:, :TILE_K]
    table = np.asarray(formatbook.fp8_table(formatbook.SDQ32)).view(np.uint8)
    expected = np.concatenate([table, table | 0x80], axis=1)
    order = interleave(np.arange(32))
    np.testing.assert_array_equal(got[:, np.argsort(order)[:16]], expected)


def test_mxfp4_is_exact_within_its_window(rng):
    """Blocks up to 14 octaves below the largest of their row, a bad row, zeros, small scales."""
    x = rng.randn(40, 8, 32) * np.exp2(-rng.randint(0, 13, (40, 8, 1)))
    x[:, 3] *= 4.0
    x[1] *= 2.0**-105
    x[2] = 0
    x[3, 2, 1] = np.nan
    q = sdq.quantize(jnp.asarray(x.reshape(40, 256), jnp.float32), "mxfp4")
    tiled = tile_weight(q)
    numbers = decode_all(tiled).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    scales = np.asarray(tiled.scales[:40], np.float64)
    good = np.isfinite(scales)
    assert np.flatnonzero(~good).tolist() == [3]
    expected = interleave(np.asarray(sdq.dequantize(q), np.float64)[good].astype(np.float32))
    got = (numbers * scales[:, None])[good].astype(np.float32)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("halves", [1, 2])
def test_each_thread_s_words_lie_together(halves):
    """What `decode._own` reads: nothing else on a CPU does it in the kernel's way."""
    words = np.arange(128 * 3 * 16, dtype=np.uint32).reshape(128, 3, 16)
    metadata = np.arange(128 * 3 * halves, dtype=np.uint32).reshape(128, 3, halves)
    found = np.asarray(grouped(jnp.asarray(words), jnp.asarray(metadata)))
    assert found.shape == (3, 2, WORDS + 64 * halves)
    for group, thread, step, eight in itertools.product(range(2), range(128), range(4), range(2)):
        warp, lane = divmod(thread, 32)
        row = 64 * group + 16 * warp + 8 * eight + lane // 4  # as wgmma has it
        at = 512 * (step // 2) + 4 * thread + 2 * (step % 2) + eight
        assert found[1, group, at] == words[row, 1, 4 * step + lane % 4]
        half = lane % 4 // 2 if halves == 2 else 0
        at = WORDS + 2 * (halves * (thread // 4) + half) + eight
        assert found[2, group, at] == metadata[row, 2, half]


def test_the_bits_are_only_reordered(rng):
    q = sdq.quantize(jnp.asarray(rng.randn(64, 256), jnp.float32), "sdq32:16")
    tiled = tile_weight(q)
    parts = tiled.groups[..., :WORDS], tiled.groups[..., WORDS:]
    for part, other in zip(parts, (q.codes, q.scales), strict=True):
        assert part.nbytes == other.nbytes
        ones = [np.unpackbits(np.asarray(array).view(np.uint8)).sum() for array in (part, other)]
        assert ones[0] == ones[1]


@pytest.mark.parametrize("fmt", ["nvfp4", "int4:32", "sdq32:8", "nf4:64"])
def test_what_does_not_fit_says_why(fmt):
    assert fmt in (misfit(formats.parse(fmt)) or "")
    assert misfit(formats.parse("sdq32:16")) is None
