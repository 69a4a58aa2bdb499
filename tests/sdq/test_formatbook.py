import itertools

import ml_dtypes
import numpy as np
import pytest

from sdq import formatbook
from sdq.formatbook import BINS, BOOKS, DIALECTFP4, E2M1, SDQ32

EVERY_BOOK = pytest.mark.parametrize("book", BOOKS.values(), ids=BOOKS)


@EVERY_BOOK
def test_dialects_ascend_from_zero_to_their_top(book):
    for dialect in book.dialects:
        assert len(dialect) == 8 and dialect[0] == 0 and dialect[-1] in range(8, 16)
        assert all(low < high for low, high in itertools.pairwise(dialect))
    assert len(set(book.dialects)) == len(book.dialects) == len(book.ids)
    assert [d[-1] for d in book.dialects] == sorted(d[-1] for d in book.dialects)
    for id_, dialect in zip(book.ids, book.dialects, strict=True):
        assert id_ >> 2 == dialect[-1] - 8 and id_ & 3 < book.shapes


def test_sizes_of_the_books():
    assert (len(SDQ32.tops), SDQ32.shapes) == (8, 4)
    assert (len(DIALECTFP4.tops), DIALECTFP4.shapes) == (8, 2)
    assert E2M1.dialects == ((0, 1, 2, 3, 4, 6, 8, 12),)


def test_dialectfp4_holds_e2m1_and_differs_by_one_value_in_each_pair():
    assert E2M1.dialects[0] in DIALECTFP4.dialects
    for top in DIALECTFP4.tops:
        first, second = (set(d) for d in DIALECTFP4.dialects if d[-1] == top)
        assert len(first - second) == len(second - first) == 1


@EVERY_BOOK
def test_index_table_is_the_nearest_magnitude_all_bins(book):
    table = formatbook.index_table(book)
    for id_, dialect in zip(book.ids, book.dialects, strict=True):
        for bin_ in range(BINS):
            # Anywhere in the bin, its closed lower edge included; a tie goes up.
            for u in (bin_ / 4, bin_ / 4 + 0.1, bin_ / 4 + 0.2499):
                if u == bin_ / 4 and bin_ % 2:
                    continue  # edges between whole half-units decide nothing
                distances = [abs(u - m) for m in dialect]
                nearest = max(i for i, d in enumerate(distances) if d == min(distances))
                assert table[id_, bin_] == nearest


@EVERY_BOOK
@pytest.mark.parametrize("bins", [BINS, formatbook.FINE_BINS])
def test_error_table_by_the_definition(book, bins):
    table = formatbook.error_table(book, bins)
    centres = (np.arange(bins) + 0.5) * (16 / bins)
    for id_, dialect in zip(book.ids, book.dialects, strict=True):
        expected = ((centres[None] - np.array(dialect)[:, None]) ** 2).min(axis=0)
        np.testing.assert_array_equal(table[id_], np.rint(64 * expected))
    assert 16 * table.max() < 2**16, "16 errors must sum inside their packed field"


@EVERY_BOOK
def test_coarse_errors_fit_their_field(book):
    coarse = formatbook.coarse_shape_errors(book)
    assert coarse.shape == (8, BINS, book.shapes)
    assert 16 * np.abs(coarse).max() < 512
    assert (coarse[..., 0] == 0).all()


def test_coarse_errors_by_the_definition():
    errors = formatbook.error_table(SDQ32).reshape(8, 4, BINS)
    expected = np.clip(np.rint((errors - errors[:, :1]) / 16), -31, 31).transpose(0, 2, 1)
    np.testing.assert_array_equal(formatbook.coarse_shape_errors(SDQ32), expected)


@EVERY_BOOK
def test_fp8_table_is_exact_for_all_256_bytes(book):
    table = formatbook.fp8_table(book)
    assert table.dtype == ml_dtypes.float8_e4m3fn and table.shape == (256, 8)
    for byte in range(256):
        if byte & 31 in book.ids:
            dialect = np.array(book.dialects[book.ids.index(byte & 31)])
            np.testing.assert_array_equal(table[byte].astype(float), dialect / 2.0 ** (byte >> 5))


def test_tables_cannot_be_written():
    with pytest.raises(ValueError, match="read-only"):
        formatbook.index_table(SDQ32)[0, 0] = 1
