"""The quantiser's arithmetic on one block that a thread holds in registers.

exponent  of its maximum, within 7 of the row's
top       the maximum in half-units, rounded by a bf16 multiply-add
shape     each element reads its entry of `quantizer_tables`, 64 bits; the sums of the first words
          are the shapes' errors
values    the second words name magnitudes; `prmt` picks four out of the dialect's eight
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

from pallas_kernels.mosaic_gpu import quantizer_tables as tables
from pallas_kernels.mosaic_gpu.ptx import Operand, Program, Register
from pallas_kernels.mosaic_gpu.quantizer_task import DIALECT_BYTES, Task
from sdq.codecs.dialect import LOWEST_EXPONENT
from sdq.formatbook import EXPONENT_WINDOW, FIRST_TOP, SHAPES_PER_TOP, Book

PAIR = 0x00010001  # the same number in both halves
EXPONENT_UNIT = 0x0080  # of bf16 bits
MAGNITUDES = 0x7FFF * PAIR
SIGNS = 0x80808080
HALF_BIN = 0x42FF  # bf16 127.5
BIAS = 127 + 3  # a maximum's exponent as bf16 writes it, less that of its block's steps
SMALLEST_MAXIMUM = BIAS + LOWEST_EXPONENT
NON_FINITE = 255


class RowExponent(NamedTuple):
    """Of maxima, as bf16 writes it.

    Attributes:
      largest: of the row, at least SMALLEST_MAXIMUM.
      smallest: that a block may have.
    """

    largest: Register
    smallest: Register


class LookUp(NamedTuple):
    """Addresses in shared memory.

    Attributes:
      table: of a thread's column of the table, less what the smallest top and bin add.
      dialects: of eight e4m3 magnitudes for each metadata byte.
    """

    table: Register
    dialects: Register


class Masks(NamedTuple):
    """Which shapes a block's tops may take: a byte each, at address + offset + top.

    Attributes:
      address: in global memory.
      offset: in bytes.
      exists: condition, the block exists; None if it does.
      freedom: bits to add to every mask, or None.
    """

    address: Register
    offset: int
    exists: str | None
    freedom: Register | None


def block_maximum(p: Program, words: Sequence[Register]) -> Register:
    """The largest magnitude, NaN above all, in both halves."""
    left = list(words)
    while len(left) > 1:
        pairs = zip(left[::2], left[1::2], strict=True)
        left = [p.pair_larger_magnitude(a, b) for a, b in pairs]
    swapped = p.permute(left[0], left[0], 0x1032)
    return p.both(p.pair_larger_magnitude(left[0], swapped), MAGNITUDES)


def exponent_of(p: Program, maximum: Register) -> Register:
    """As bf16 writes it."""
    return p.shift_right(maximum, 23)


def row_exponent(p: Program, exponent: Register) -> RowExponent:
    """From that of the row's maximum."""
    largest = p.larger(exponent, SMALLEST_MAXIMUM)
    lowest = p.larger(largest, EXPONENT_WINDOW + SMALLEST_MAXIMUM)
    return RowExponent(largest, p.subtract(lowest, EXPONENT_WINDOW))


def quantize_block(
    p: Program,
    task: Task,
    look_up: LookUp,
    words: Sequence[Register],
    maximum: Register,
    row: RowExponent,
    masks: Masks | None,
) -> tuple[list[Register], Register]:
    """A block's e4m3 numbers, four a register, in their own order; and its metadata byte."""
    book = task.book
    exponent = p.larger(exponent_of(p, maximum), row.smallest)
    below = p.subtract(row.largest, exponent)
    # 4 / 2^e, twice
    quarters = p.multiply_add(
        exponent, -EXPONENT_UNIT * PAIR, (127 + 2 + BIAS) * EXPONENT_UNIT * PAIR
    )
    entry_bytes = tables.ENTRY_BYTES * task.config.columns
    entries, top, mask = look_up.table, None, None
    if len(book.tops) > 1:
        top = _nearest_top(p, maximum, quarters)
        entries = p.multiply_add(top, tables.ENTRIES * entry_bytes, look_up.table)
        mask = _mask(p, masks, top)

    half_bin = p.copy(HALF_BIN * PAIR)
    sums: list[Operand] = []
    indices: list[Register] = []
    for number, word in enumerate(words):
        if number % (tables.SUMMED_ELEMENTS // 2) == 0:
            sums.append(tables.bias(book.shapes))
        bins = p.pair_multiply_add(p.both(word, MAGNITUDES), quarters, half_bin)
        for half in range(2):
            at = p.half_times(bins, half, entry_bytes, entries)
            if book.shapes == 1:
                indices += p.load("shared", 1, at, 4)
                continue
            errors, index = p.load("shared", 2, at)
            sums[-1] = p.add(sums[-1], errors)
            indices.append(index)

    metadata, selector = _dialect(p, book, below, top, sums, mask)
    low, high = p.load("shared", 2, p.multiply_add(metadata, DIALECT_BYTES, look_up.dialects))
    numbers = []
    for four in range(len(words) // 2):
        i = indices[4 * four : 4 * four + 4]
        pairs = p.multiply_add(i[1], 16, i[0]), p.multiply_add(i[3], 16, i[2])
        magnitudes = p.permute(low, high, p.permute(*pairs, selector))
        high_bytes = p.permute(words[2 * four], words[2 * four + 1], 0x7531)
        numbers.append(p.merge(high_bytes, SIGNS, magnitudes))
    return numbers, metadata


def metadata_of_bad(p: Program, task: Task, maximum: Register, masks: Masks | None) -> Register:
    """As if all of the block's numbers were zero: the smallest top, its first (allowed) shape."""
    below = p.smaller(p.subtract(NON_FINITE, exponent_of(p, maximum)), EXPONENT_WINDOW)
    mask = _mask(p, masks, FIRST_TOP)
    if mask is None:
        return p.multiply_add(below, 32, task.book.ids[0])
    below_first = p.both(p.differ(mask, -1), p.add(mask, -1))
    return p.multiply_add(below, 32, p.let("popc.b32", below_first))


def leave_residual(
    p: Program, words: Sequence[Register], numbers: Sequence[Register], row: RowExponent
) -> None:
    """x - Q(x) in place of x, exactly.

    An e4m3 number's bits, read as bf16, are the number times 2^-120. The difference of x and its
    nearest magnitude needs no more bits than x has, so nothing rounds.
    """
    minus_unit = p.multiply_add(  # -2^e of the row
        row.largest, EXPONENT_UNIT * PAIR, (0x8000 + (127 - BIAS) * EXPONENT_UNIT) * PAIR
    )
    large, minus_zero = p.copy(0x7B80 * PAIR), p.copy(0x8000 * PAIR)  # 2^120
    for at, number in enumerate(numbers):
        for word, bytes_ in zip(words[2 * at : 2 * at + 2], (0x1404, 0x3424), strict=True):
            spread = p.permute(number, 0, bytes_)  # into the upper byte of each half
            magnitude = p.both(p.shift_right(spread, 4), 0x07F0 * PAIR)
            value = p.merge(spread, 0x8000 * PAIR, magnitude)
            value = p.pair_multiply_add(value, large, minus_zero)
            p.emit("fma.rn.bf16x2", word, value, minus_unit, word)


def _nearest_top(p: Program, maximum: Register, quarters: Register) -> Register:
    """8..15: the maximum in half-units, rounded to even, as the low bits of 128 + it."""
    halves = p.add(quarters, -2 * EXPONENT_UNIT * PAIR)
    rounded = p.pair_multiply_add(maximum, halves, p.copy(0x4300 * PAIR))  # bf16 128
    return p.smaller(p.larger(p.both(rounded, 31), FIRST_TOP), 15)


def _mask(p: Program, masks: Masks | None, top: Operand) -> Register | None:
    """The shapes that a top may take, as bits."""
    if masks is None:
        return None
    at, offset = masks.address, masks.offset
    if isinstance(top, str):
        at = p.address(at, top, 1)
    else:
        offset += top
    mask = p.copy(0xFF)
    p.load_byte_into(mask, "global.nc", at, offset, when=masks.exists)
    return p.either(mask, masks.freedom) if masks.freedom else mask


def _dialect(
    p: Program,
    book: Book,
    below: Register,
    top: Register | None,
    sums: Sequence[Operand],
    mask: Register | None,
) -> tuple[Register, Operand]:
    """The metadata byte; and which bytes of two words of indices, one a shape, are its shape's."""
    if top is None:
        assert book.shapes == 1, "one top, one shape"
        return p.multiply_add(below, 32, book.ids[0]), 0x40
    shape = _best_shape(p, book.shapes, sums, mask)
    dialect = p.multiply_add(top, SHAPES_PER_TOP, p.add(shape, -FIRST_TOP * SHAPES_PER_TOP))
    return p.multiply_add(below, 32, dialect), p.multiply_add(shape, 0x11, 0x40)


def _best_shape(
    p: Program, shapes: int, sums: Sequence[Operand], mask: Register | None
) -> Register:
    """The (allowed) shape of the smallest error, the first of equals."""
    errors: list[Operand] = [len(sums) * tables.FIELD_BIAS << 2]
    for shape in range(1, shapes):
        shift = tables.FIELD_BITS * (shape - 1)
        fields = [
            p.both(p.shift_right(word, shift) if shift else word, tables.FIELD_MASK)
            for word in sums
        ]
        errors.append(p.either(functools.reduce(p.add, fields), shape))
    if mask is not None:
        denied = p.differ(mask, 0xFF)
        beyond = 20  # a bit above all errors
        errors = [
            p.merge(p.shift_left(denied, beyond - shape), 1 << beyond, error)
            for shape, error in enumerate(errors)
        ]
    best = functools.reduce(p.smaller, errors[1:], errors[0])
    return p.both(best, SHAPES_PER_TOP - 1)
