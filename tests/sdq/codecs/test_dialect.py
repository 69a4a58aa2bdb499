"""The dialect codec against a definition in float64: values, window, fp8, bad rows, idempotence."""

import jax.numpy as jnp
import numpy as np
import pytest

import sdq
from sdq import formatbook, packing, qtensor, select
from sdq.codecs import dialect

NAMES = pytest.mark.parametrize("name", ["sdq32:16", "sdq32:32", "dialectfp4:16", "e2m1:32"])
RULES = pytest.mark.parametrize("rule", ["exhaustive", "lut", "two_stage"])


def rough(rng, rows=64, length=256):
    """Rows with blocks of very unequal size, zero blocks, exact ties and one all-zero row."""
    x = rng.standard_normal((rows, length)) * np.exp2(
        rng.randint(-12, 12, (rows, length // 16))
    ).repeat(16, 1)
    x[3] = 0
    x[4, :32] = 0
    x[5] = np.rint(x[5] * 4) / 4
    return x.astype(np.float32)


def quantize(x, name, rule=None):
    return sdq.quantize(jnp.asarray(x), name, select=rule if sdq.format(name).has_choice else None)


def definition(x, q):
    """dequantize(quantize(x)) from the definition, given only the dialects that were chosen."""
    fmt = q.format
    book = formatbook.BOOKS[fmt.book]
    _, ids = packing.unpack_metadata(q.scales)
    blocks = x.astype(float).reshape(len(x), -1, fmt.block)
    with np.errstate(divide="ignore"):
        exponent = np.floor(np.log2(np.abs(blocks).max(axis=-1))) - 3
    row = exponent.max(axis=-1, keepdims=True).clip(-125, None)
    exponent = exponent.clip((row - 7).clip(-125, None), row)
    u = np.abs(blocks) / 2.0 ** exponent[..., None]
    table = np.array(book.dialects)[np.vectorize(book.ids.index)(np.asarray(ids))]
    distance = np.abs(u[..., None] - table[..., None, :])
    nearest = 7 - distance[..., ::-1].argmin(axis=-1)  # ties to the larger magnitude
    value = np.take_along_axis(table[..., None, :], nearest[..., None], axis=-1)[..., 0]
    return (np.sign(blocks) * value * 2.0 ** exponent[..., None]).reshape(x.shape), row, exponent


@NAMES
@RULES
def test_every_value_is_the_definitions(name, rule, rng):
    x = rough(rng)
    q = quantize(x, name, rule)
    expected, row, exponent = definition(x, q)
    np.testing.assert_array_equal(sdq.dequantize(q), expected)
    np.testing.assert_array_equal(q.outer, row)
    below, _ = packing.unpack_metadata(q.scales)
    np.testing.assert_array_equal(below, row - exponent)


@NAMES
def test_decode_of_all_metadata_bytes_and_codes(name):
    """All 256 bytes x 16 codes, through the tables, against the formula."""
    fmt = sdq.format(name)
    book = formatbook.BOOKS[fmt.book]
    codes = np.tile(np.arange(16, dtype=np.uint8), (256, 1, fmt.block // 16))
    encoded = dialect.Encoded(
        codes=jnp.asarray(codes),
        scales=jnp.arange(256, dtype=jnp.uint8)[:, None],
        outer=jnp.full((256, 1), 3, jnp.int8),
    )
    got = np.asarray(dialect.decode(encoded, fmt))
    fp8, exponents = dialect.decode_fp8(encoded, fmt)
    for byte in range(256):
        if byte & 31 not in book.ids:
            continue
        magnitude = np.array(book.dialects[book.ids.index(byte & 31)])
        values = np.concatenate([magnitude, -magnitude]) * 2.0 ** (3 - (byte >> 5))
        np.testing.assert_array_equal(got[byte, 0, :16], values)
        as_float = np.asarray(fp8[byte, 0, :16]).astype(float) * 2.0 ** int(exponents[byte, 0])
        np.testing.assert_array_equal(as_float, values)


@NAMES
def test_to_fp8_is_lossless(name, rng):
    q = quantize(rough(rng), name)
    values, exponents = sdq.to_fp8(q)
    assert values.dtype == jnp.float8_e4m3fn and exponents.dtype == jnp.int8
    exact = np.asarray(values).astype(np.float64) * np.exp2(np.asarray(exponents, np.float64))
    np.testing.assert_array_equal(exact, np.asarray(sdq.dequantize(q), np.float64))


def test_to_fp8_keeps_the_quantised_axis_last(rng):
    x = jnp.asarray(rng.standard_normal((40, 3, 5)), jnp.float32)
    q = sdq.quantize(x, "sdq32:16", axis=0)
    values, exponents = sdq.to_fp8(q)
    assert values.shape == (3, 5, 40) and exponents.shape == (3, 5, 1)
    exact = values.astype(jnp.float32) * jnp.exp2(exponents.astype(jnp.float32))
    np.testing.assert_array_equal(jnp.moveaxis(exact, -1, 0), sdq.dequantize(q))


def test_to_fp8_refuses_other_formats():
    for name in ("nvfp4", "mxfp4", "int4:32", "int8", "nf4:64"):
        with pytest.raises(ValueError, match="to_fp8"):
            sdq.to_fp8(sdq.quantize(jnp.ones((2, 64)), name))


@NAMES
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_row_is_nan_and_marked(name, bad, rng):
    x = rough(rng, 6, 64)
    x[2, 5] = bad
    q = quantize(x, name)
    y = np.asarray(sdq.dequantize(q))
    assert np.isnan(y[2]).all() and np.isfinite(np.delete(y, 2, 0)).all()
    assert int(q.outer[2, 0]) == dialect.BAD_ROW
    assert np.isnan(np.asarray(sdq.to_fp8(q)[0])[2].astype(float)).all()


@NAMES
@RULES
def test_values_survive_a_second_quantisation(name, rule, rng):
    """quantize(dequantize(q)) gives the same values wherever a block's exponent survives.

    two_stage always keeps it: the block maximum becomes its dialect's top, at least 8. The other
    rules may pick a dialect whose nearest magnitude to the maximum is below 8; then the block is
    read one exponent lower.
    """
    y = np.asarray(sdq.dequantize(quantize(rough(rng, 512), name, rule)))
    again = quantize(y, name, rule)
    z = np.asarray(sdq.dequantize(again))
    first = quantize(rough(np.random.RandomState(0), 512), name, rule)
    _, _, exponent = definition(y, again)
    below, _ = packing.unpack_metadata(first.scales)
    kept = np.asarray(first.outer - below.astype(jnp.int8)) == exponent
    block = first.format.block
    same = (y == z).reshape(len(y), -1, block).all(axis=-1)
    assert same[kept].all()
    nonzero = (y != 0).reshape(len(y), -1, block).any(axis=-1)
    if rule == "two_stage" or not first.format.has_choice:
        assert same.all()
    assert kept[nonzero].mean() > 0.99


@NAMES
def test_sign_of_small_and_zero_values(name):
    x = jnp.array([[1.0, -1e-3, 1e-3, -0.0, 0.0] + [0.0] * 11])
    q = sdq.quantize(x, name)
    codes = np.asarray(qtensor.unpack(q).codes)[0, 0, :5]
    assert (codes >> 3).tolist() == [0, 1, 0, 1, 0]
    np.testing.assert_array_equal(sdq.dequantize(q)[0, 1:], 0)


@NAMES
def test_the_ends_of_float32(name):
    """No overflow at the top, and at the bottom values fade to zero without a wrong exponent."""
    largest = float(jnp.finfo(jnp.float32).max)
    for top in (largest, 2.0**-122, 2.0**-125, 2.0**-126):
        x = jnp.linspace(-top, top, 64)[None]
        y = sdq.dequantize(sdq.quantize(x, name))
        assert bool(jnp.isfinite(y).all())
        # The lowest exponent is -125, so half a unit there is the coarsest step.
        assert float(jnp.abs(y - x).max()) <= max(top / 4, 2.0**-125)


def test_window_costs_little_even_with_wild_outliers(rng):
    """Blocks more than 7 exponents below their row's are coarser; the row hardly notices."""
    x = rng.standard_normal((256, 2048)).astype(np.float32)
    x[:, rng.permutation(2048)[:20]] *= 300
    clamped = float(
        sdq.sqnr_db(jnp.asarray(x), sdq.dequantize(sdq.quantize(jnp.asarray(x), "sdq32:16")))
    )
    blocks = jnp.asarray(x.reshape(-1, 16))  # every block a row of its own: no window
    free = float(sdq.sqnr_db(blocks, sdq.dequantize(sdq.quantize(blocks, "sdq32:16"))))
    assert free - clamped <= 0.1


def test_select_rules_order_by_quality(rng):
    x = jnp.asarray(rng.standard_normal((256, 1024)), jnp.float32)
    scores = {
        rule: float(sdq.sqnr_db(x, sdq.dequantize(sdq.quantize(x, "sdq32:16", select=rule))))
        for rule in select.RULES
        if rule != "blockdialect"
    }
    assert scores["exhaustive"] >= scores["lut"] >= scores["exhaustive"] - 0.1
    assert scores["exhaustive"] >= scores["two_stage"] >= scores["exhaustive"] - 0.25
