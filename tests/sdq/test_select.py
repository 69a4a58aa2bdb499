"""Each way to choose, against a slow definition in numpy written from the description alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdq import distributions, formatbook, select
from sdq.formatbook import BOOKS, DIALECTFP4, E2M1, SDQ32

EVERY_BOOK = pytest.mark.parametrize("book", BOOKS.values(), ids=BOOKS)
BLOCKS = pytest.mark.parametrize("block", [8, 16, 32, 128])


def magnitudes(block, rows=96, seed=0, dtype=np.float32):
    """u of blocks of all kinds of data, some lifted by the exponent window (maximum below 8)."""
    kinds = [distributions.sample(n, seed, (rows, 2 * block)) for n in distributions.DISTRIBUTIONS]
    x = np.abs(np.concatenate(kinds).reshape(-1, 2, block)).astype(dtype).astype(np.float32)
    u = x / 2.0 ** (np.floor(np.log2(x.max(axis=-1, keepdims=True))) - 3)
    u[::7] /= 4
    u[3] = 0
    return u.astype(np.float32)


def true_errors(u, book):
    """Squared error of every dialect, float64 [dialects, ..., G]."""
    distances = [np.abs(u[..., None].astype(float) - np.array(d)) for d in book.dialects]
    return np.stack([np.square(d.min(axis=-1)).sum(axis=-1) for d in distances])


def numpy_bins(u, count=64):
    return np.clip(np.rint(u.astype(float) * count / 16 - 0.5), 0, count - 1).astype(int)


@EVERY_BOOK
@BLOCKS
def test_exhaustive_is_the_best_to_its_resolution(book, block):
    u = magnitudes(block)
    ids = np.asarray(select.exhaustive(jnp.asarray(u), book))
    errors = true_errors(u, book)
    chosen = np.take_along_axis(errors, np.vectorize(book.ids.index)(ids)[None], axis=0)[0]
    # A bin is 1/128 wide, so a magnitude is off by 1/256 at most and a difference of two squared
    # errors by 2 * (distance between the two nearest magnitudes, at most 8) / 256; table entries
    # round to 1/64.
    assert (chosen - errors.min(axis=0) <= block * (16 / 256 + 1 / 64)).all()
    assert np.mean(chosen - errors.min(axis=0)) <= 1e-3 * np.mean(chosen)


@EVERY_BOOK
@BLOCKS
@pytest.mark.parametrize(("rule", "count"), [(select.exhaustive, 2048), (select.lut, 64)])
def test_choice_is_the_argmin_of_summed_table_errors(book, block, rule, count):
    u = magnitudes(block)
    table = formatbook.error_table(book, count)[list(book.ids)].astype(int)
    sums = table[:, numpy_bins(u, count)].sum(axis=-1)
    expected = np.array(book.ids)[sums.argmin(axis=0)]
    np.testing.assert_array_equal(rule(jnp.asarray(u), book), expected)


@EVERY_BOOK
@BLOCKS
def test_two_stage_by_its_definition(book, block):
    u = magnitudes(block)
    wanted = np.clip(np.rint(u.max(axis=-1)), 8, 15)
    top = np.array(book.tops)[np.abs(wanted[..., None] - np.array(book.tops)).argmin(axis=-1)] - 8
    sums = formatbook.coarse_shape_errors(book)[top[..., None], numpy_bins(u)].sum(axis=-2)
    expected = top * 4 + sums.argmin(axis=-1)
    np.testing.assert_array_equal(select.two_stage(jnp.asarray(u), book), expected)


@BLOCKS
def test_packed_fields_survive_the_extremes(block):
    """Blocks of one repeated magnitude drive every packed sum to its limit."""
    u = np.repeat(np.arange(0, 16, 0.125, np.float32)[:, None, None], block, axis=-1)
    u[..., 0] = 15.9
    sums = formatbook.coarse_shape_errors(SDQ32)[7, numpy_bins(u)].sum(axis=-2)
    np.testing.assert_array_equal(
        select.two_stage(jnp.asarray(u), SDQ32), 28 + sums.argmin(axis=-1)
    )


@pytest.mark.parametrize("rule", [select.exhaustive, select.lut, select.two_stage])
def test_importance_of_one_changes_nothing_and_zero_ignores(rule):
    u = magnitudes(16)
    plain = rule(jnp.asarray(u), SDQ32)
    np.testing.assert_array_equal(rule(jnp.asarray(u), SDQ32, jnp.ones(u.shape)), plain)
    # Elements of no importance may be anything; the maximum still fixes the first stage.
    weight = (np.arange(16) < 8).astype(np.float32)
    u[..., 0] = u.max(axis=-1)
    other = u.copy()
    other[..., 8:] = np.minimum(other[..., 8:][..., ::-1] / 2, u[..., :1])
    weights = jnp.broadcast_to(jnp.asarray(weight), u.shape)
    np.testing.assert_array_equal(
        rule(jnp.asarray(u), SDQ32, weights), rule(jnp.asarray(other), SDQ32, weights)
    )


def test_importance_lowers_the_weighted_error(rng):
    u = magnitudes(16)
    weights = np.exp(rng.standard_normal(u.shape)).astype(np.float32)
    distances = [np.abs(u[..., None] - np.array(d)).min(axis=-1) for d in SDQ32.dialects]
    errors = np.stack([(np.square(d) * weights).sum(axis=-1) for d in distances])

    def weighted(ids):
        return np.take_along_axis(errors, np.asarray(ids)[None], axis=0).sum()

    plain = weighted(select.exhaustive(jnp.asarray(u), SDQ32))
    aware = weighted(select.exhaustive(jnp.asarray(u), SDQ32, jnp.asarray(weights)))
    assert aware < plain and aware == pytest.approx(errors.min(axis=0).sum(), rel=1e-3)


@pytest.mark.parametrize("rule", [select.exhaustive, select.lut, select.two_stage])
def test_choice_does_not_depend_on_order_or_batch(rule, rng):
    u = magnitudes(32)
    ids = np.asarray(rule(jnp.asarray(u), SDQ32))
    shuffled = u[..., rng.permutation(32)]
    np.testing.assert_array_equal(rule(jnp.asarray(shuffled), SDQ32), ids)
    mapped = jax.vmap(lambda v: rule(v, SDQ32))(jnp.asarray(u))
    np.testing.assert_array_equal(mapped, ids)


# Transcribed from the published ranges, in values (half of our half-units); see docs/formats.md.
PUBLISHED_RANGES = {
    15: ((5.00, 6.50), (3.75, 5.00)),
    14: ((5.00, 6.25), (3.75, 5.00)),
    13: ((4.50, 5.75), (3.50, 4.50)),
    12: ((4.50, 5.50), (3.50, 4.50)),
    11: ((4.00, 5.00), (3.25, 4.00)),
    10: ((4.00, 4.75), (3.25, 4.00)),
    9: ((3.75, 4.25), (3.25, 3.75)),
    8: ((3.25, 3.75), (2.25, 2.75)),
}


def test_beneficial_ranges_are_the_published_ones():
    ranges = select._beneficial_ranges(DIALECTFP4) / 2
    for top, pair in PUBLISHED_RANGES.items():
        np.testing.assert_array_equal(ranges[top - 8], pair)


def test_blockdialect_by_its_definition():
    u = magnitudes(32)
    expected = np.empty(u.shape[:-1], int)
    for at in np.ndindex(u.shape[:-1]):
        values = np.floor(2 * u[at]) / 4  # 5 bits: a quarter, truncated
        top = int(np.clip(np.floor(2 * values.max()), 8, 15))
        counts = [sum(low <= v < high for v in values) for low, high in PUBLISHED_RANGES[top]]
        expected[at] = (top - 8) * 4 + (counts[1] > counts[0])
    np.testing.assert_array_equal(select.blockdialect(jnp.asarray(u), DIALECTFP4), expected)


def test_blockdialect_refuses_what_it_cannot_do():
    u = jnp.asarray(magnitudes(16))
    with pytest.raises(ValueError, match="two shapes"):
        select.blockdialect(u, SDQ32)
    with pytest.raises(ValueError, match="importance"):
        select.blockdialect(u, DIALECTFP4, jnp.ones(u.shape))


def test_bins_are_closed_below_on_whole_half_units():
    for count in (formatbook.BINS, formatbook.FINE_BINS):
        per_half = count // 32
        edges = jnp.arange(32, dtype=jnp.float32) / 2.0
        np.testing.assert_array_equal(select.bins(edges, count), np.arange(32) * per_half)
        below = jnp.nextafter(edges[1:], jnp.zeros(31))
        np.testing.assert_array_equal(select.bins(below, count), np.arange(1, 32) * per_half - 1)


def test_one_dialect_needs_no_choice():
    for rule in (select.exhaustive, select.lut, select.two_stage):
        assert set(np.unique(rule(jnp.asarray(magnitudes(16)), E2M1))) == {E2M1.ids[0]}
