"""mxfp4, nvfp4, integers and nf4 equal numpy and ml_dtypes references in every code and scale."""

import statistics

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import sdq
from sdq import qtensor
from sdq.codecs import e2m1, nf4, nvfp4

E2M1 = ml_dtypes.float4_e2m1fn
E4M3 = ml_dtypes.float8_e4m3fn
BF16 = ml_dtypes.bfloat16


def hard_data(rng):
    """float32 [96, 256]: exact ties of every format, zero blocks and rows, huge and tiny rows."""
    x = rng.standard_normal((96, 256)) * np.exp2(rng.randint(-20, 20, (96, 1)))
    x[1] = 0
    x[2, :64] = 0
    x[3] = np.resize(np.arange(-6, 6.25, 0.25), 256)  # E2M1 ties at a scale of 1
    x[4] = np.resize([7, -7, *(np.arange(-14, 15) / 2)], 256)  # int4 ties
    x[5] = np.resize([127, -127, *(np.arange(-100, 100) + 0.5)], 256)  # int8 ties
    x[6] *= np.exp2(rng.randint(-14, 0, 256 // 16)).repeat(16)  # E4M3 subnormal block scales
    x[7, 0], x[8, 0] = 1e4, 3e4  # saturation
    x[9] = 1.75 * 2.0 ** rng.randint(-3, 3, 256)  # where the scale rules part
    x[10] = 6.0 * 2.0 ** rng.randint(-3, 3, 256)
    x[11] = np.nextafter(np.float32(6), np.float32(7))
    x[12:16] *= 1e-30
    x[16:20] *= 1e30
    return x.astype(np.float32)


def e2m1_codes(y):
    return y.astype(E2M1).view(np.uint8) & 15


def stored(q):
    encoded = qtensor.unpack(q)
    return np.asarray(encoded.codes), np.asarray(encoded.scales), encoded.outer


def test_e2m1_equals_ml_dtypes_at_ties_and_around():
    values = np.arange(0, 7, 0.25, dtype=np.float32)
    y = np.concatenate([values, np.nextafter(values, 10), np.nextafter(values, -10), [1e9, 1e-40]])
    y = np.concatenate([y, -y]).astype(np.float32)
    np.testing.assert_array_equal(e2m1.encode(jnp.asarray(y)), e2m1_codes(y))
    codes = np.arange(16, dtype=np.uint8)
    np.testing.assert_array_equal(
        e2m1.decode(jnp.asarray(codes)), codes.view(E2M1).astype(np.float32)
    )


@pytest.mark.parametrize("rule", ["floor", "rceil", "even"])
def test_mxfp4_equals_the_reference(rule, rng):
    x = hard_data(rng)
    blocks = x.reshape(96, 8, 32).astype(np.float64)
    amax = np.abs(blocks).max(axis=-1)
    half, power = np.frexp(amax)
    significand = 2 * half  # amax = significand * 2^(power - 1)
    beyond = {
        "floor": 0,
        "rceil": significand > 1.5,  # 6 = 1.5 * 4
        "even": np.floor(2 * significand + 0.5) / 2 == 2,  # one mantissa bit, half up
    }[rule]
    exponent = np.where(amax == 0, -127, power - 1 - 2 + beyond).clip(-127, 127)
    codes, scales, outer = stored(sdq.quantize(jnp.asarray(x), sdq.format(f"mxfp4:{rule}")))
    np.testing.assert_array_equal(scales, exponent + 127)
    expected = e2m1_codes((blocks / 2.0 ** exponent[..., None]).astype(np.float32))
    np.testing.assert_array_equal(codes, expected)
    assert outer is None
    as_scale = scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    values = codes.view(E2M1).astype(np.float64) * as_scale[..., None]
    y = sdq.dequantize(sdq.quantize(jnp.asarray(x), f"mxfp4:{rule}"))
    np.testing.assert_array_equal(y, values.reshape(x.shape))


@pytest.mark.parametrize("levels", [1, 2])
def test_nvfp4_equals_the_reference(levels, rng):
    x = hard_data(rng)
    if levels == 2:
        x[12:20] = x[20:28]  # one matrix scale cannot span 1e-30 and 1e30
    blocks = x.reshape(96, 16, 16)
    amax = np.abs(blocks).max(axis=-1)
    unit = np.float32(amax.max() / np.float32(448 * 6)) if levels == 2 else np.float32(1)
    scale = np.minimum(amax / np.float32(6) / unit, np.float32(448)).astype(E4M3)
    step = scale.astype(np.float32) * unit
    with np.errstate(divide="ignore", invalid="ignore"):
        reciprocal = (np.float32(1) / unit) / scale.astype(np.float32)[..., None]
        y = np.where(scale[..., None] > 0, blocks * reciprocal, np.copysign(0, blocks))
    q = sdq.quantize(jnp.asarray(x), "nvfp4" if levels == 2 else "nvfp4:one_level")
    codes, scales, outer = stored(q)
    np.testing.assert_array_equal(scales, scale.view(np.uint8))
    np.testing.assert_array_equal(codes, e2m1_codes(y.astype(np.float32)))
    assert (outer is None) if levels == 1 else (np.asarray(outer) == unit).all()
    values = codes.view(E2M1).astype(np.float32) * step[..., None]
    np.testing.assert_array_equal(sdq.dequantize(q), values.reshape(x.shape))
    assert (scale.view(np.uint8) < 8).any(), "no subnormal block scale was tested"


def test_e4m3_rounds_once_at_every_tie():
    """Every number, every tie and their neighbours; a cast through bfloat16 errs here."""
    every = np.arange(0x7F, dtype=np.uint8).view(E4M3).astype(np.float32)
    points = np.concatenate([every, (every[1:] + every[:-1]) / 2])
    x = np.concatenate(
        [np.nextafter(points, np.float32(0)), points, np.nextafter(points, np.float32(1e9))]
    )
    x = x[(x <= 448) & (np.abs(x) >= 2.0**-126)]
    np.testing.assert_array_equal(nvfp4.e4m3_bits(jnp.asarray(x)), x.astype(E4M3).view(np.uint8))
    np.testing.assert_array_equal(nvfp4.e4m3_value(jnp.arange(0x7F, dtype=jnp.uint8)), every)
    assert nvfp4.e4m3_bits(jnp.array([449.0, 1e30])).tolist() == [0x7E, 0x7E]


@pytest.mark.parametrize(
    ("name", "largest"), [("int4:32", 7), ("int4", 7), ("int8", 127), ("int8:64", 127)]
)
def test_integers_equal_the_reference(name, largest, rng):
    x = hard_data(rng)
    q = sdq.quantize(jnp.asarray(x), name)
    blocks = x.reshape(96, -1, q.format.block or 256)
    amax = np.abs(blocks).max(axis=-1)
    scale = (amax / np.float32(largest)).astype(BF16)
    step = scale.astype(np.float32)[..., None]
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.where(step > 0, np.rint(blocks / step), 0).clip(-largest, largest)
    got, scales, outer = stored(q)
    np.testing.assert_array_equal(scales.view(np.uint16), scale.view(np.uint16))
    signed = got.astype(int) if largest == 127 else (got.astype(int) ^ 8) - 8
    np.testing.assert_array_equal(signed, codes)
    assert outer is None
    np.testing.assert_array_equal(
        sdq.dequantize(q), (codes * step).astype(np.float32).reshape(x.shape)
    )


def test_int4_codes_equal_ml_dtypes_int4():
    x = jnp.concatenate([jnp.arange(-7.0, 8.0), jnp.zeros(17)])[None]
    codes, _, _ = stored(sdq.quantize(x, "int4:32"))
    expected = np.arange(-7, 8).astype(ml_dtypes.int4).view(np.uint8) & 15
    np.testing.assert_array_equal(codes[0, 0, :15], expected)


def test_nf4_equals_the_reference(rng):
    x = hard_data(rng)
    blocks = x.reshape(96, 4, 64)
    scale = np.abs(blocks).max(axis=-1).astype(BF16)
    step = scale.astype(np.float32)[..., None]
    with np.errstate(divide="ignore", invalid="ignore"):
        y = np.where(step > 0, blocks / step, 0).astype(np.float32)
    levels = nf4.LEVELS
    expected = np.searchsorted((levels[1:] + levels[:-1]) / 2, y, side="left")
    codes, scales, _ = stored(sdq.quantize(jnp.asarray(x), "nf4:64"))
    np.testing.assert_array_equal(codes, expected)
    np.testing.assert_array_equal(scales.view(np.uint16), scale.view(np.uint16))


def test_nf4_levels_are_normal_quantiles():
    """The paper's construction: quantiles of N(0, 1), 7 negative, zero and 8 positive levels."""
    offset = 0.5 * (1 / 32 + 1 / 30)
    inverse = statistics.NormalDist().inv_cdf
    positive = [inverse(p) for p in np.linspace(1 - offset, 0.5, 9)[:-1]]
    negative = [-inverse(p) for p in np.linspace(1 - offset, 0.5, 8)[:-1]]
    levels = np.sort([*positive, 0.0, *negative]) / max(positive)
    np.testing.assert_allclose(nf4.LEVELS, levels, atol=2e-4)


BASELINES = [
    "mxfp4",
    "mxfp4:rceil",
    "mxfp4:even",
    "nvfp4",
    "nvfp4:one_level",
    "int4:32",
    "int4",
    "int8",
    "nf4:64",
]


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_row_is_nan_and_no_other(name, bad, rng):
    x = rng.standard_normal((6, 128)).astype(np.float32)
    clean = np.asarray(sdq.dequantize(sdq.quantize(jnp.asarray(x), name)))
    x[2, 5] = bad
    y = np.asarray(sdq.dequantize(sdq.quantize(jnp.asarray(x), name)))
    assert np.isnan(y[2]).all() and np.isfinite(np.delete(y, 2, 0)).all()
    if sdq.format(name).outer != "matrix":
        np.testing.assert_array_equal(np.delete(y, 2, 0), np.delete(clean, 2, 0))


# Formats whose values come back unchanged from a second quantisation, for any input in range.
@pytest.mark.parametrize(
    "name", ["mxfp4", "mxfp4:rceil", "mxfp4:even", "int4:32", "int4", "int8", "nf4:64"]
)
def test_values_survive_a_second_quantisation(name, rng):
    y = sdq.dequantize(sdq.quantize(jnp.asarray(hard_data(rng)), name))
    np.testing.assert_array_equal(sdq.dequantize(sdq.quantize(y, name)), y)


def test_nvfp4_values_survive_where_the_scale_does(rng):
    """One level: a block comes back unchanged where its E4M3 scale is normal, below 448, or zero.

    A normal scale is within 1/16 of amax / 6, so the maximum rounds to 6 and the scale is found
    again. Subnormal scales round more coarsely, and two levels move the matrix scale with the
    largest maximum.
    """
    x = hard_data(rng)
    first = sdq.quantize(jnp.asarray(x), "nvfp4:one_level")
    y = np.asarray(sdq.dequantize(first))
    z = np.asarray(sdq.dequantize(sdq.quantize(jnp.asarray(y), "nvfp4:one_level")))
    scales = np.asarray(first.scales)
    kept = ((scales >= 8) & (scales < 0x7E)) | (scales == 0)
    same = (y == z).reshape(96, 16, 16).all(axis=-1)
    assert same[kept].all() and kept.mean() > 0.5


def test_matrix_scale_is_one_for_each_matrix(rng):
    """Stacked layers and batches do not share NVFP4's second level."""
    x = jnp.asarray(rng.standard_normal((3, 8, 64)) * [[[1]], [[10]], [[100]]], jnp.float32)
    stacked = sdq.quantize(x, "nvfp4")
    assert stacked.outer.shape == (3, 1, 1)
    for layer in range(3):
        alone = sdq.dequantize(sdq.quantize(x[layer], "nvfp4"))
        np.testing.assert_array_equal(sdq.dequantize(stacked)[layer], alone)
    assert sdq.quantize(x[0, 0], "nvfp4").outer.shape == (1,)
