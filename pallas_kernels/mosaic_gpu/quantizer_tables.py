"""The quantiser's table: what one element says about its block's four shapes, in 64 bits.

The bin of |x| in half-units is read off one bf16 multiply-add, 4 |x| / 2^e + 127.5: its bits less
those of 127.5. That gives 65 entries for sdq's 64 bins: below 128 the steps of bf16 are halves, so
entries 0 and 1 are both bin 0, and entry j is bin j - 1.

  word 0   errors of shapes 1, 2, 3 beyond shape 0's: three fields of 10 bits, two bits up
  word 1   the index of the nearest magnitude in each shape, a byte each

Sums of 16 first words cannot overflow a field, and the two bits below each are free for the number
of the shape, so that the smallest field names its shape.
"""

import functools

import numpy as np

from sdq import formatbook
from sdq.formatbook import BINS, SHAPES_PER_TOP, Book

ENTRIES = BINS + 1
ENTRY_BYTES = 8
FIELD_BITS = 10
FIELD_BIAS = 1 << (FIELD_BITS - 1)
FIELD_MASK = ((1 << FIELD_BITS) - 1) << 2
SUMMED_ELEMENTS = 16


@functools.cache
def element_table(book: Book) -> np.ndarray:
    """uint32 `[tops, 65, 2]`, a row for each top of the book."""
    tops = [top - formatbook.FIRST_TOP for top in book.tops]
    bin_of = np.maximum(np.arange(ENTRIES) - 1, 0)
    errors = formatbook.coarse_shape_errors(book)[tops][:, bin_of, 1:].astype(np.int64)
    indices = formatbook.index_table(book).reshape(-1, SHAPES_PER_TOP, BINS)[tops][:, :, bin_of]
    indices = indices[:, : book.shapes].transpose(0, 2, 1).astype(np.int64)
    packed_errors = _packed(errors, FIELD_BITS) << 2
    packed_indices = _packed(indices, 8)
    return (np.stack([packed_errors, packed_indices], axis=-1) & 0xFFFFFFFF).astype(np.uint32)


def bias(shapes: int) -> int:
    """The word to start a sum with, so that no field is negative."""
    return sum(FIELD_BIAS << (2 + FIELD_BITS * field) for field in range(shapes - 1))


def _packed(fields: np.ndarray, bits: int) -> np.ndarray:
    """Signed fields of the last axis, the first one lowest."""
    return (fields << (bits * np.arange(fields.shape[-1]))).sum(axis=-1)
