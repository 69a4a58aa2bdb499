"""Formatbooks: the dialects a block may choose from, and the look-up tables built from them.

A dialect is 8 ascending magnitudes out of the integers 0..15 (half-units), the first one 0. A book
arranges its dialects by top (the largest magnitude) and shape (how the other seven lie under it).
A dialect's id is `[top - 8 : 3 | shape : 2]`, so every book fits the 5 bits of a metadata byte.

Everything here is numpy, computed once for each book; which entry a block takes is decided in
`select.py`. `SDQ32` is frozen output of `scripts/fit_formatbook.py`.
"""

import dataclasses
import functools

import ml_dtypes
import numpy as np

FIRST_TOP = 8
SHAPES_PER_TOP = 4
DIALECT_SLOTS = 32
EXPONENT_WINDOW = 7  # a block's exponent lies at most this far below its row's
BINS = 64  # 6-bit magnitudes: quarters of a half-unit over [0, 16)
FINE_BINS = 2048  # 11-bit magnitudes, for the exhaustive choice
COARSE_LIMIT = 31  # |coarse shape error|, so that 16 of them sum into 10 signed bits


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Book:
    """A named set of dialects.

    Invariants: every dialect ascends through 8 magnitudes from 0 to its top; all tops have equally
    many shapes, and the shapes of a top are numbered from 0.
    """

    name: str
    dialects: tuple[tuple[int, ...], ...]

    @property
    def tops(self) -> tuple[int, ...]:
        """The distinct largest magnitudes, ascending."""
        return tuple(sorted({d[-1] for d in self.dialects}))

    @property
    def shapes(self) -> int:
        """Dialects of each top."""
        return len(self.dialects) // len(self.tops)

    @property
    def ids(self) -> tuple[int, ...]:
        """The ids in use, one for each row of `dialects`."""
        return tuple(
            (top - FIRST_TOP) * SHAPES_PER_TOP + shape
            for top in self.tops
            for shape in range(self.shapes)
        )


# The frozen output of scripts/fit_formatbook.py; tests/scripts rerun it and compare.
SDQ32 = Book(
    name="sdq32",
    dialects=(
        (0, 1, 2, 3, 4, 5, 6, 8),
        (0, 1, 2, 3, 4, 5, 7, 8),
        (0, 1, 2, 3, 4, 6, 7, 8),
        (0, 1, 2, 3, 5, 6, 7, 8),
        (0, 1, 2, 3, 4, 5, 6, 9),
        (0, 1, 2, 3, 4, 5, 7, 9),
        (0, 1, 2, 3, 4, 6, 7, 9),
        (0, 1, 2, 3, 4, 6, 8, 9),
        (0, 1, 2, 3, 4, 5, 6, 10),
        (0, 1, 2, 3, 4, 5, 7, 10),
        (0, 1, 2, 3, 4, 6, 8, 10),
        (0, 1, 2, 3, 5, 6, 8, 10),
        (0, 1, 2, 3, 4, 5, 7, 11),
        (0, 1, 2, 3, 4, 6, 8, 11),
        (0, 1, 2, 3, 4, 6, 9, 11),
        (0, 1, 2, 3, 5, 7, 9, 11),
        (0, 1, 2, 3, 4, 5, 7, 12),
        (0, 1, 2, 3, 4, 6, 8, 12),
        (0, 1, 2, 3, 5, 7, 9, 12),
        (0, 1, 2, 4, 6, 8, 10, 12),
        (0, 1, 2, 3, 4, 6, 8, 13),
        (0, 1, 2, 3, 5, 7, 9, 13),
        (0, 1, 2, 4, 6, 8, 10, 13),
        (0, 1, 3, 5, 7, 9, 11, 13),
        (0, 1, 2, 3, 4, 6, 9, 14),
        (0, 1, 2, 3, 5, 7, 10, 14),
        (0, 1, 2, 4, 6, 8, 11, 14),
        (0, 1, 3, 5, 7, 9, 12, 14),
        (0, 1, 2, 3, 5, 7, 11, 15),
        (0, 1, 2, 4, 6, 8, 10, 15),
        (0, 1, 2, 4, 6, 9, 12, 15),
        (0, 1, 3, 5, 7, 9, 12, 15),
    ),
)

# BlockDialect (ICML 2025), figure 4, in half-units; two shapes for each top.
DIALECTFP4 = Book(
    name="dialectfp4",
    dialects=(
        (0, 1, 2, 3, 4, 6, 7, 8),
        (0, 1, 2, 3, 4, 5, 6, 8),
        (0, 1, 2, 3, 4, 6, 8, 9),
        (0, 1, 2, 3, 4, 6, 7, 9),
        (0, 1, 2, 3, 4, 6, 9, 10),
        (0, 1, 2, 3, 4, 6, 7, 10),
        (0, 1, 2, 3, 4, 6, 9, 11),
        (0, 1, 2, 3, 4, 6, 7, 11),
        (0, 1, 2, 3, 4, 6, 10, 12),
        (0, 1, 2, 3, 4, 6, 8, 12),
        (0, 1, 2, 3, 4, 6, 10, 13),
        (0, 1, 2, 3, 4, 6, 8, 13),
        (0, 1, 2, 3, 4, 6, 11, 14),
        (0, 1, 2, 3, 4, 6, 9, 14),
        (0, 1, 2, 3, 4, 6, 11, 15),
        (0, 1, 2, 3, 4, 6, 9, 15),
    ),
)

E2M1 = Book(name="e2m1", dialects=((0, 1, 2, 3, 4, 6, 8, 12),))

BOOKS = {book.name: book for book in (SDQ32, DIALECTFP4, E2M1)}


@functools.cache
def magnitudes(book: Book) -> np.ndarray:
    """int32 `[32 ids, 8]`; ids that the book does not use hold zeros."""
    table = np.zeros((DIALECT_SLOTS, 8), np.int32)
    table[list(book.ids)] = book.dialects
    return _frozen(table)


def bin_centres(bins: int = BINS) -> np.ndarray:
    """float64 `[bins]`: the middle of each bin of [0, 16), in half-units."""
    return (np.arange(bins) + 0.5) * 16 / bins


@functools.cache
def index_table(book: Book) -> np.ndarray:
    """uint8 `[32 ids, 64 bins]`: which of the 8 magnitudes is nearest.

    Bins are a quarter wide and magnitudes whole, so no decision boundary lies inside a bin: the
    index of an element's bin is exactly its nearest magnitude (a tie goes to the larger one).
    """
    distance = np.abs(bin_centres()[None, :, None] - magnitudes(book)[:, None, :])
    return _frozen(distance.argmin(axis=-1).astype(np.uint8))


@functools.cache
def error_table(book: Book, bins: int = BINS) -> np.ndarray:
    """int32 `[32 ids, bins]`: squared error at the bin's centre, in 1/64 of a squared half-unit.

    A table of integers: sums are exact, so a choice never depends on the order of a sum or on the
    backend. Entries stay below 4096, so that 16 of them sum inside 16 bits.
    """
    distance = np.abs(bin_centres(bins)[None, :, None] - magnitudes(book)[:, None])
    errors = np.rint(64 * np.square(distance.min(axis=-1))).astype(np.int32)
    errors[[d for d in range(DIALECT_SLOTS) if d not in book.ids]] = 0
    assert errors.max() < 4096, f"{book.name}: an error does not fit its field"
    return _frozen(errors)


@functools.cache
def coarse_shape_errors(book: Book) -> np.ndarray:
    """int32 `[8 tops, 64 bins, shapes]`: error beyond shape 0's, in 1/4 of a squared half-unit.

    Clipped to +-31, so that 16 elements sum inside 10 bits and the three differences of four shapes
    share one 32-bit word: a kernel reads and adds once an element. Tops that the book lacks hold
    zeros.
    """
    errors = error_table(book).reshape(-1, SHAPES_PER_TOP, BINS)[:, : book.shapes]
    beyond_first = (errors - errors[:, :1]).transpose(0, 2, 1)
    coarse = np.rint(beyond_first / 16).astype(np.int32)
    coarse = np.clip(coarse, -COARSE_LIMIT, COARSE_LIMIT)
    coarse[[t for t in range(8) if t + FIRST_TOP not in book.tops]] = 0
    return _frozen(coarse)


@functools.cache
def fp8_table(book: Book) -> np.ndarray:
    """e4m3 `[256 metadata bytes, 8]`: every magnitude times 2^-(exponent below the row's), exactly.

    A block is `sign * fp8_table[metadata, index] * 2^row_exponent`. Magnitudes have 4 significant
    bits and the window is 7 wide, so nothing rounds.
    """
    below = np.arange(EXPONENT_WINDOW + 1)[:, None, None]
    values = magnitudes(book)[None] * 2.0**-below
    exact = values.astype(ml_dtypes.float8_e4m3fn)
    assert (exact.astype(np.float64) == values).all(), "a dialect value left e4m3"
    return _frozen(exact.reshape(256, 8))


def _frozen(table: np.ndarray) -> np.ndarray:
    """Cached tables are shared: nobody may write into one."""
    table.setflags(write=False)
    return table
