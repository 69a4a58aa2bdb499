"""The quantiser's program: what every thread does, as PTX.

`threads` of a row hold its blocks in registers, thread t blocks t, t + threads, ...: x is read
once. First the row's largest magnitude (in a thread, across its warp, through shared memory), then
each block on its own:

  exponent  of its maximum, within 7 of the row's
  top       the maximum in half-units, rounded by a bf16 multiply-add
  shape     each element reads its entry of `quantiser_tables`, 64 bits; the sums of the first words
            are the four errors
  values    the second words name magnitudes; `prmt` picks four out of the dialect's eight

The table lies in shared memory in as many copies as lanes read it at once, so that no two meet in
a bank.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from sdq import formatbook
from sdq.formatbook import EXPONENT_WINDOW, FIRST_TOP, SHAPES_PER_TOP, Book
from sdq.formats import Format

from pallas_kernels.mosaic_gpu import quantiser_tables as tables
from pallas_kernels.mosaic_gpu.operands import STEP
from pallas_kernels.mosaic_gpu.ptx import Operand, Program, Register

WARP = 32
SMALLEST_EXPONENT = (
    5  # of a block's maximum, as bf16 writes it: 2^-122, so that steps are >= 2^-125
)
NON_FINITE = 255
BAD_ROW = -128
MAGNITUDES = 0x7FFF7FFF
SIGNS = 0x80808080
NANS = 0x7F7F7F7F
HALF_BIN = 0x42FF  # bf16 127.5
PAIR = 0x00010001  # the same number in both halves
EXPONENT_STEP = 0x0080  # of bf16
DIALECT_BYTES = 8
DIALECTS = 256


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """How the work is cut.

    Attributes:
      threads: of a row, a power of two of at least a warp.
      warps: of a thread block, a multiple of 4.
      columns: copies of the table; 16 leave no bank conflict.
      exchange: with blocks of 16, whether neighbours swap words to store 16 bytes at once, else
        each stores twice 8.
    """

    threads: int = 128
    warps: int = 16
    columns: int = 16
    exchange: bool = True

    def __post_init__(self):
        """Refuse what the program cannot be written for."""
        together = self.warps * WARP
        for name, value in (("threads", self.threads), ("columns", self.columns)):
            if value <= 0 or value & (value - 1):
                raise ValueError(f"{name}: expected a power of two, got {value}")
        if self.warps % 4 or not 0 < self.warps <= 32:
            raise ValueError(f"warps: expected a multiple of 4 up to 32, got {self.warps}")
        if not WARP <= self.threads <= together or together % self.threads:
            raise ValueError(f"threads: expected a divisor of {together} from 32, got {self}")
        if self.threads > WARP and together // self.threads > 15:
            raise ValueError(f"threads: at most 15 rows have a barrier each, got {self}")
        if self.columns > 16:
            raise ValueError(f"columns: expected at most 16, got {self.columns}")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """All that the text depends on.

    Attributes:
      rows: M.
      length: K, a multiple of 32.
      format: a dialect format with blocks of 16 or 32.
      config: how.
      metadata: whether the blocks' bytes are written.
      books: sub-formatbooks of a group: none, 1, or one for each block.
      residuals: rows that follow the M: what quantising left over of some of them.
    """

    rows: int
    length: int
    format: Format
    config: Config
    metadata: bool
    books: int = 0
    residuals: int = 0

    @property
    def block(self) -> int:
        """Channels of a block."""
        assert self.format.block is not None
        return self.format.block

    @property
    def blocks(self) -> int:
        """Of a row."""
        return self.length // self.block

    @property
    def slots(self) -> int:
        """Blocks of a thread, the last of which may not exist."""
        return -(-self.blocks // self.config.threads)

    @property
    def book(self) -> Book:
        """The dialects."""
        return formatbook.BOOKS[self.format.book or ""]

    @property
    def rows_at_once(self) -> int:
        """Of a thread block."""
        return self.config.warps * WARP // self.config.threads

    @property
    def arguments(self) -> tuple[str, ...]:
        """Names of what the text calls $0, $1, ...: 64-bit addresses, and shared memory's."""
        books = ("books", "group") if self.books else ()
        tokens = ("tokens",) if self.residuals else ()
        metadata = ("metadata",) if self.metadata else ()
        return (
            *("x", "table", "dialects", *books, *tokens),
            *("values", "exponents", *metadata),
            "shared",
        )

    def argument(self, name: str) -> str:
        """One of them."""
        return f"${self.arguments.index(name)}"

    @property
    def table_pairs(self) -> int:
        """Entries of the table, copies counted."""
        return len(self.book.tops) * tables.ENTRIES * self.config.columns

    @property
    def dialects_at(self) -> int:
        """Where shared memory holds the dialects, in bytes."""
        return self.table_pairs * tables.ENTRY_BYTES

    @property
    def maxima_at(self) -> int:
        """Where shared memory holds the maxima of warps, twice: for even and odd rows."""
        return self.dialects_at + DIALECTS * DIALECT_BYTES

    @property
    def shared_bytes(self) -> int:
        """Of shared memory."""
        return self.maxima_at + 2 * 4 * self.config.warps


class Lane(NamedTuple):
    """Registers of a thread that outlast a row.

    Attributes:
      number: of the thread in its row, t.
      warp: of the thread in its block.
      group: which of the rows at once is its own.
      first: condition, t == 0.
      odd: condition, t is odd.
      in_last: condition, it has a block in the last slot; None where all have.
      warp_in_last: condition, some lane of its warp has.
      table: where its column of the table is, less what the smallest top and bin add.
      dialects: where they are.
      parity: 0 or the size of the maxima, by turns.
    """

    number: Register
    warp: Register
    group: Register
    first: str
    odd: str
    in_last: str | None
    warp_in_last: str | None
    table: Register
    dialects: Register
    parity: Register


class Block(NamedTuple):
    """A block of x in registers.

    Attributes:
      words: two bf16 numbers each.
      exists: a condition, or None: it does.
    """

    words: list[Register]
    exists: str | None


class Outputs(NamedTuple):
    """Addresses of what this thread writes of a row, its first block's."""

    values: Register
    exponent: Register
    metadata: Register | None


class RowExponent(NamedTuple):
    """Biased as in bf16.

    Attributes:
      largest: of the row, at least SMALLEST_EXPONENT.
      smallest: that a block may have.
    """

    largest: Register
    smallest: Register


class Masks(NamedTuple):
    """Which shapes a block's tops may take: a byte each, at address + offset + its top."""

    address: Register
    offset: int


def program(task: Task) -> str:
    """The text of the whole kernel."""
    p = Program()
    thread = p.let("mov.u32", "%tid.x")
    _fill_shared(p, task, thread)
    lane = _lane(p, task, thread)
    turn = p.let("mov.u32", "%ctaid.x")
    turns = p.let("mov.u32", "%nctaid.x")
    first = p.multiply_add(turn, task.rows_at_once, lane.group)
    step = p.multiply_add(turns, task.rows_at_once, 0)
    p.strided("ROW", first, task.rows + task.residuals, step, lambda row: _row(p, task, lane, row))
    return p.text()


def _fill_shared(p: Program, task: Task, thread: Register) -> None:
    """Both tables, the first in many copies."""
    shared = task.argument("shared")

    def copy_pairs(name: str, count: int, copies: int, to: int) -> None:
        def pair(index: Register) -> None:
            source = p.shift_right(index, copies.bit_length() - 1)
            words = p.load("global.nc", 2, p.address(task.argument(name), source, 8))
            p.store("shared", p.multiply_add(index, 8, shared), words, to)

        p.strided(name.upper(), thread, count, task.config.warps * WARP, pair)

    copy_pairs("table", task.table_pairs, task.config.columns, 0)
    copy_pairs("dialects", DIALECTS, 1, task.dialects_at)
    p.emit("bar.sync", 0)


def _lane(p: Program, task: Task, thread: Register) -> Lane:
    config = task.config
    shared = task.argument("shared")
    number = p.both(thread, config.threads - 1)
    in_last = warp_in_last = None
    if rest := task.blocks % config.threads:
        in_last = p.less(number, rest)
        warp_in_last = p.less(p.both(number, config.threads - WARP), rest)
    entry = tables.ENTRY_BYTES * config.columns
    smallest_top = FIRST_TOP * tables.ENTRIES if len(task.book.tops) > 1 else 0
    column = p.multiply_add(p.both(thread, config.columns - 1), tables.ENTRY_BYTES, shared)
    return Lane(
        number=number,
        warp=p.shift_right(thread, 5),
        group=p.shift_right(thread, config.threads.bit_length() - 1),
        first=p.equal(number, 0),
        odd=p.equal(p.both(number, 1), 1),
        in_last=in_last,
        warp_in_last=warp_in_last,
        table=p.add(column, -entry * (smallest_top + HALF_BIN)),
        dialects=p.add(shared, task.dialects_at),
        parity=p.copy(0),
    )


def _row(p: Program, task: Task, lane: Lane, row: Register) -> None:
    """Quantise one row; one beyond M is what that left over of another, so it goes round twice."""
    source, unfinished = row, None
    if task.residuals:
        source, unfinished = _source(p, task, row)
    blocks = _load(p, task, lane, source)
    masks = _masks(p, task, lane, source)
    out = _outputs(p, task, lane, row)
    freedom = p.copy(0) if task.residuals and task.books else None
    p.label("AGAIN")
    maxima = [block_maximum(p, block.words) for block in blocks]
    of_thread = functools.reduce(p.larger, maxima)
    exponent = p.shift_right(_row_maximum(p, task, lane, of_thread), 23)
    bad = p.equal(exponent, NON_FINITE)
    largest = p.larger(exponent, SMALLEST_EXPONENT)
    lowest = p.larger(largest, EXPONENT_WINDOW + SMALLEST_EXPONENT)
    of_row = RowExponent(largest, p.subtract(lowest, EXPONENT_WINDOW))
    step = p.select(bad, BAD_ROW, p.add(largest, -130))
    p.store("global", out.exponent, [step], size=8, when=lane.first)

    p.jump("BAD", when=bad)
    for slot, (block, maximum) in enumerate(zip(blocks, maxima, strict=True)):
        if slot:
            p.converge()  # else the compiler overlaps blocks until registers spill
        if block.exists:
            p.jump("ALL_BLOCKS", when=f"!{lane.warp_in_last}")
        mask = functools.partial(_mask, p, masks[slot], block.exists, freedom)
        numbers, byte = quantise_block(p, task, lane, block.words, maximum, of_row, mask)
        if unfinished:
            p.jump(f"STORE_{slot}", when=f"!{unfinished}")
            _leave_residual(p, block.words, numbers, largest)
            p.jump(f"STORED_{slot}")
            p.label(f"STORE_{slot}")
        _store(p, task, out, slot, block.exists, _arranged(p, task, lane, numbers), byte)
        p.label(f"STORED_{slot}")
    p.label("ALL_BLOCKS")
    if unfinished:
        p.jump("ROW_NEXT", when=f"!{unfinished}")
        p.emit("setp.lt.u32", unfinished, 0, 0)  # false
        if freedom:
            p.emit("mov.b32", freedom, 0xFF)
        p.jump("AGAIN")
    p.jump("ROW_NEXT")

    p.label("BAD")
    for slot, (block, maximum) in enumerate(zip(blocks, maxima, strict=True)):
        byte = 0
        if task.metadata:
            mask = functools.partial(_mask, p, masks[slot], block.exists, freedom)
            byte = _metadata_of_bad(p, task, maximum, mask)
        _store(p, task, out, slot, block.exists, [NANS] * (task.block // 4), byte)


def _source(p: Program, task: Task, row: Register) -> tuple[Register, str]:
    """Which row of x to read; and the condition that it is for its residual."""
    is_residual = p.less(task.rows - 1, row)
    source = p.copy(row)
    at = p.address(task.argument("tokens"), p.subtract(row, task.rows), 4)
    p.load_into([source], "global.nc", at, when=is_residual)
    return source, is_residual


def _load(p: Program, task: Task, lane: Lane, row: Register) -> list[Block]:
    """This thread's blocks; one that does not exist is zero."""
    at = p.address(task.argument("x"), row, 2 * task.length)
    at = p.address(at, lane.number, 2 * task.block)
    blocks = []
    for slot in range(task.slots):
        exists = lane.in_last if slot == task.slots - 1 else None
        words = [p.new() for _ in range(task.block // 2)]
        if exists:
            for word in words:
                p.emit("mov.b32", word, 0)
        for first in range(0, len(words), 4):
            offset = 2 * slot * task.config.threads * task.block + 4 * first
            p.load_into(words[first : first + 4], "global.nc", at, offset, when=exists)
        blocks.append(Block(words, exists))
    return blocks


def _outputs(p: Program, task: Task, lane: Lane, row: Register) -> Outputs:
    values = p.address(task.argument("values"), row, task.length)
    metadata = None
    if task.metadata:
        metadata = p.address(task.argument("metadata"), row, task.blocks)
        metadata = p.address(metadata, lane.number, 1)
    return Outputs(
        values=p.address(values, *_first_value(p, task, lane)),
        exponent=p.address(task.argument("exponents"), row, 1),
        metadata=metadata,
    )


def _store(
    p: Program,
    task: Task,
    out: Outputs,
    slot: int,
    exists: str | None,
    words: Sequence[Operand],
    byte: Operand,
) -> None:
    """A block's numbers, arranged, and its metadata."""
    first = slot * task.config.threads
    for at, piece in _pieces(task, words):
        p.store("global", out.values, piece, first * task.block + at, when=exists)
    if out.metadata is not None:
        p.store("global", out.metadata, [byte], first, size=8, when=exists)


def _leave_residual(
    p: Program, words: Sequence[Register], numbers: Sequence[Register], largest: Register
) -> None:
    """x - Q(x) in place of x, exactly.

    An e4m3 number's bits, read as bf16, are the number times 2^-120. The difference of x and its
    nearest magnitude needs no more bits than x has, so nothing rounds.
    """
    less_unit = p.multiply_add(largest, EXPONENT_STEP * PAIR, (0x8000 - 3 * EXPONENT_STEP) * PAIR)
    large, minus_zero = p.copy(0x7B80 * PAIR), p.copy(0x8000 * PAIR)  # 2^120
    for at, number in enumerate(numbers):
        for word, bytes_ in zip(words[2 * at : 2 * at + 2], (0x1404, 0x3424), strict=True):
            spread = p.permute(number, 0, bytes_)  # into the upper byte of each half
            magnitude = p.both(p.shift_right(spread, 4), 0x07F0 * PAIR)
            value = p.merge(spread, 0x8000 * PAIR, magnitude)
            value = p.pair_multiply_add(value, large, minus_zero)
            p.emit("fma.rn.bf16x2", word, value, less_unit, word)


def block_maximum(p: Program, words: Sequence[Register]) -> Register:
    """The largest magnitude, NaN above all, in both halves."""
    left = list(words)
    while len(left) > 1:
        pairs = zip(left[::2], left[1::2], strict=True)
        left = [p.pair_larger_magnitude(a, b) for a, b in pairs]
    swapped = p.permute(left[0], left[0], 0x1032)
    return p.both(p.pair_larger_magnitude(left[0], swapped), MAGNITUDES)


def _row_maximum(p: Program, task: Task, lane: Lane, of_thread: Register) -> Register:
    """The largest of all threads of a row.

    Warps meet at the row's own barrier once: the next row writes elsewhere, and nobody is two rows
    ahead.
    """
    of_warp = p.warp_maximum(of_thread)
    warps = task.config.threads // WARP
    if warps == 1:
        return of_warp
    shared = task.argument("shared")
    place = p.add(p.multiply_add(lane.warp, 4, shared), lane.parity)
    in_warp = p.both(lane.number, WARP - 1)
    p.store("shared", place, [of_warp], task.maxima_at, when=p.equal(in_warp, 0))
    p.emit("bar.sync", p.add(lane.group, 1), task.config.threads)
    place = p.add(p.multiply_add(lane.group, 4 * warps, shared), lane.parity)
    parts = []
    for first in range(0, warps, 4):
        parts += p.load("shared", min(4, warps), place, task.maxima_at + 4 * first)
    p.emit("xor.b32", lane.parity, lane.parity, 4 * task.config.warps)
    return functools.reduce(p.larger, parts)


def quantise_block(
    p: Program,
    task: Task,
    lane: Lane,
    words: Sequence[Register],
    maximum: Register,
    row: RowExponent,
    mask_of: Callable[[Operand], Register | None],
) -> tuple[list[Register], Register]:
    """A block's e4m3 numbers, four a register, in their own order; and its metadata byte."""
    book = task.book
    exponent = p.larger(p.shift_right(maximum, 23), row.smallest)
    below = p.subtract(row.largest, exponent)
    # 4 / 2^e as bf16, twice: exponent 259 less the biased one
    quarters = p.multiply_add(exponent, -EXPONENT_STEP * PAIR, 259 * EXPONENT_STEP * PAIR)
    entry_bytes = tables.ENTRY_BYTES * task.config.columns
    entries, top, mask = lane.table, None, None
    if len(book.tops) > 1:
        top = _nearest_top(p, maximum, quarters)
        entries = p.multiply_add(top, tables.ENTRIES * entry_bytes, lane.table)
        mask = mask_of(top)

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
    low, high = p.load("shared", 2, p.multiply_add(metadata, DIALECT_BYTES, lane.dialects))
    numbers = []
    for four in range(len(words) // 2):
        i = indices[4 * four : 4 * four + 4]
        nibbles = p.permute(
            p.multiply_add(i[1], 16, i[0]), p.multiply_add(i[3], 16, i[2]), selector
        )
        high_bytes = p.permute(words[2 * four], words[2 * four + 1], 0x7531)
        numbers.append(p.merge(high_bytes, SIGNS, p.permute(low, high, nibbles)))
    return numbers, metadata


def _nearest_top(p: Program, maximum: Register, quarters: Register) -> Register:
    """8..15: the maximum in half-units, rounded to even, as the low bits of 128 + it."""
    halves = p.add(quarters, -2 * EXPONENT_STEP * PAIR)
    rounded = p.pair_multiply_add(maximum, halves, p.copy(0x4300 * PAIR))  # bf16 128
    return p.smaller(p.larger(p.both(rounded, 31), FIRST_TOP), 15)


def _dialect(
    p: Program,
    book: Book,
    below: Register,
    top: Register | None,
    sums: Sequence[Operand],
    mask: Register | None,
) -> tuple[Register, Operand]:
    """The metadata byte, and the bytes of two pairs of indices that belong to its shape."""
    if top is None:
        assert book.shapes == 1, "one top, one shape"
        return p.multiply_add(below, 32, (book.tops[0] - FIRST_TOP) * SHAPES_PER_TOP), 0x40
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


def _masks(p: Program, task: Task, lane: Lane, row: Register) -> list[Masks | None]:
    """Of each slot."""
    if not task.books:
        return [None] * task.slots
    (group,) = p.load("global.nc", 1, p.address(task.argument("group"), row, 4))
    address = p.address(task.argument("books"), group, 8 * task.books)
    if task.books == 1:
        return [Masks(address, -FIRST_TOP)] * task.slots
    address = p.address(address, lane.number, 8)
    stride = 8 * task.config.threads
    return [Masks(address, slot * stride - FIRST_TOP) for slot in range(task.slots)]


def _mask(
    p: Program, masks: Masks | None, exists: str | None, freedom: Register | None, top: Operand
) -> Register | None:
    """The shapes that a block's top may take; `freedom` is all ones for a residual."""
    if masks is None:
        return None
    at, offset = masks.address, masks.offset
    if isinstance(top, str):
        at = p.address(at, top, 1)
    else:
        offset += top
    mask = p.copy(0xFF)
    p.emit("ld.global.nc.u8", mask, f"[{at}+{offset}]", when=exists)
    return p.either(mask, freedom) if freedom else mask


def _metadata_of_bad(
    p: Program, task: Task, maximum: Register, mask_of: Callable[[Operand], Register | None]
) -> Register:
    """As if all of the block's numbers were zero: the smallest top, its first (allowed) shape."""
    below = p.smaller(p.subtract(NON_FINITE, p.shift_right(maximum, 23)), EXPONENT_WINDOW)
    mask = mask_of(FIRST_TOP)
    if mask is None:
        return p.multiply_add(below, 32, task.book.ids[0])
    below_first = p.both(p.differ(mask, -1), p.add(mask, -1))
    return p.multiply_add(below, 32, p.let("popc.b32", below_first))


def _first_value(p: Program, task: Task, lane: Lane) -> tuple[Register, int]:
    """Where this thread's first values go in a row: an index and a stride."""
    if task.block == STEP or task.config.exchange:
        return lane.number, task.block
    # two runs of 8 bytes: of 32, the odd thread's are the second and fourth
    return p.multiply_add(p.shift_right(lane.number, 1), 2, lane.number), 8


def _arranged(p: Program, task: Task, lane: Lane, words: list[Register]) -> list[Register]:
    """A block's words in the order of `operands.interleave`: of 32 channels' words, even ones first.

    A block of 16 is half of that. Of the pair of threads that share 32 channels the even one gets
    the even words: it gives its odd ones for the other's even ones.
    """
    if task.block == STEP or not task.config.exchange:
        return words[::2] + words[1::2]
    kept = [p.select(lane.odd, words[i + 1], words[i]) for i in (0, 2)]
    given = [p.select(lane.odd, words[i], words[i + 1]) for i in (0, 2)]
    taken = [p.of_neighbour(word) for word in given]
    pairs = list(zip(kept + taken, taken + kept, strict=True))
    return [p.select(lane.odd, odd, even) for even, odd in pairs]


def _pieces(task: Task, words: Sequence[Operand]) -> list[tuple[int, Sequence[Operand]]]:
    """What to store at once, and how far apart."""
    if task.block == STEP // 2 and not task.config.exchange:
        return [(0, words[:2]), (STEP // 2, words[2:])]
    return [(4 * first, words[first : first + 4]) for first in range(0, len(words), 4)]
