"""The quantiser's program: what every thread does, as PTX.

`threads` of a row hold its blocks in registers, thread t blocks t, t + threads, ...: x is read
once, ahead of time (`quantizer_fetch`). First the row's largest magnitude (in a thread, across its
warp, through shared memory), then each block on its own (`quantizer_block`).

The table lies in shared memory in as many copies as lanes read it at once, so that no two meet in
a bank.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from pallas_kernels.mosaic_gpu import quantizer_tables as tables
from pallas_kernels.mosaic_gpu.operands import STEP
from pallas_kernels.mosaic_gpu.ptx import Operand, Program, Register
from pallas_kernels.mosaic_gpu.quantizer_activation import activate
from pallas_kernels.mosaic_gpu.quantizer_block import (
    BIAS,
    HALF_BIN,
    NON_FINITE,
    LookUp,
    Masks,
    block_maximum,
    exponent_of,
    leave_residual,
    metadata_of_bad,
    quantize_block,
    row_exponent,
)
from pallas_kernels.mosaic_gpu.quantizer_fetch import (
    Block,
    Place,
    arrived,
    fetch,
    initialise,
    place_of,
)
from pallas_kernels.mosaic_gpu.quantizer_norm import modulation_of, normalise
from pallas_kernels.mosaic_gpu.quantizer_task import (
    DIALECT_BYTES,
    DIALECTS,
    MEETING,
    WARP,
    Task,
)
from sdq.codecs.dialect import BAD_ROW
from sdq.formatbook import FIRST_TOP

NANS = 0x7F7F7F7F


class Lane(NamedTuple):
    """What a thread keeps from row to row.

    Attributes:
      number: of the thread in its row, t.
      warp: of the thread in its row.
      group: which of the rows at once is its own.
      first: condition, t == 0.
      odd: condition, t is odd.
      in_last: condition, it has a block in the last slot; None where all have.
      warp_in_last: condition, some lane of its warp has.
      parity: 0 or the bytes of what warps tell each other, by turns.
      look_up: its tables.
      place: of its row.
    """

    number: Register
    warp: Register
    group: Register
    first: str
    odd: str
    in_last: str | None
    warp_in_last: str | None
    parity: Register
    look_up: LookUp
    place: Place


class Outputs(NamedTuple):
    """Addresses of what this thread writes of a row, its first block's."""

    values: Register
    exponent: Register
    metadata: Register | None


def program(task: Task) -> str:
    """The text of the whole kernel."""
    p = Program()
    thread = p.let("mov.u32", "%tid.x")
    _fill_tables(p, task, thread)
    initialise(p, task, thread)
    p.emit("bar.sync", 0)
    lane = _lane(p, task, thread)
    turn = p.let("mov.u32", "%ctaid.x")
    turns = p.let("mov.u32", "%nctaid.x")
    first = p.multiply_add(turn, task.rows_at_once, lane.group)
    step = p.multiply_add(turns, task.rows_at_once, 0)
    end = task.rows + task.residuals
    source = _source(p, task, first)
    fetch(p, task, lane.place, source, when=p.both_hold(lane.first, p.less(first, end)))
    if task.residuals:
        source = p.copy(source)

    def row(number: Register) -> None:
        own = p.copy(source) if task.residuals else number
        due = p.both_hold(lane.first, p.less(p.add(number, step), end))
        blocks = arrived(p, task, lane.place, lane.number, lane.in_last)

        def fetch_next() -> None:
            following = _source(p, task, p.add(number, step))
            fetch(p, task, lane.place, following, when=due)
            if task.residuals:
                p.emit("mov.b32", source, following)
                p.emit("setp.lt.u32", due, 0, 0)  # not again when the row goes round twice

        _row(p, task, lane, number, own, blocks, fetch_next)

    p.strided("ROW", first, end, step, row)
    return p.text()


def _fill_tables(p: Program, task: Task, thread: Register) -> None:
    """Both tables, the first in many copies."""
    shared = task.argument("shared")

    def copy_pairs(name: str, count: int, copies: int, to: int) -> None:
        def pair(index: Register) -> None:
            source = p.shift_right(index, copies.bit_length() - 1)
            words = p.load("global.nc", 2, p.address(task.argument(name), source, 8))
            p.store("shared", p.multiply_add(index, 8, shared), words, to)

        p.strided(name.upper(), thread, count, task.config.warps * WARP, pair)

    assert tables.ENTRY_BYTES == DIALECT_BYTES == 8
    copy_pairs("table", task.table_pairs, task.config.columns, 0)
    copy_pairs("dialects", DIALECTS, 1, task.dialects_at)


def _lane(p: Program, task: Task, thread: Register) -> Lane:
    config = task.config
    shared = task.argument("shared")
    # The same in all lanes. Of a maximum the compiler knows that: rows are then counted in
    # registers that lanes share, and branches by them do not part a warp.
    warp = p.warp_maximum(p.shift_right(thread, 5))
    group = p.let("div.u32", warp, config.threads // WARP)
    number = p.multiply_add(group, -config.threads, thread)
    in_last = warp_in_last = None
    if rest := task.blocks % config.threads:
        in_last = p.less(number, rest)
        warp_in_last = p.less(p.both(number, -WARP), rest)
    smallest_top = FIRST_TOP * tables.ENTRIES if len(task.book.tops) > 1 else 0
    smallest = tables.ENTRY_BYTES * config.columns * (smallest_top + HALF_BIN)
    column = p.multiply_add(p.both(thread, config.columns - 1), tables.ENTRY_BYTES, shared)
    return Lane(
        number=number,
        warp=p.multiply_add(group, -config.threads // WARP, warp),
        group=group,
        first=p.equal(number, 0),
        odd=p.equal(p.both(number, 1), 1),
        in_last=in_last,
        warp_in_last=warp_in_last,
        parity=p.copy(0),
        look_up=LookUp(p.add(column, -smallest), p.add(shared, task.dialects_at)),
        place=place_of(p, task, group),
    )


def _row(
    p: Program,
    task: Task,
    lane: Lane,
    row: Register,
    source: Register,
    blocks: list[Block],
    fetch_next: Callable[[], None],
) -> None:
    """Quantise one row, `source` of x, which is in `blocks`; once all have it, fetch the next.

    One beyond M is what that left over of another, so it goes round twice.
    """
    unfinished = p.less(task.rows - 1, row) if task.residuals else None
    if task.activation is not None:
        for block in blocks:
            activate(p, task.activation, block.words)
    masks = _masks(p, task, lane, source)
    if task.eps is not None:
        in_warp = p.both(lane.number, WARP - 1)

        def sums_of_row(*of_warp: Register) -> list[Register]:
            sums = _across_row(p, task, lane, "add.rn.f32", *of_warp)
            fetch_next()
            return sums

        normalise(
            p,
            task,
            [(words, exists and lane.warp_in_last) for words, exists in blocks],
            in_warp,
            modulation_of(p, task, source, lane.warp, in_warp),
            sums_of_row,
        )

    out = _outputs(p, task, lane, row, unfinished)  # behind a norm, which needs the registers

    p.label("AGAIN")
    maxima = [block_maximum(p, block.words) for block in blocks]
    of_thread = functools.reduce(p.larger, maxima)
    (of_everybody,) = _across_row(p, task, lane, "max.u32", p.warp_maximum(of_thread))
    if task.eps is None:
        fetch_next()
    exponent = exponent_of(p, of_everybody)
    of_row = row_exponent(p, exponent)
    bad = p.equal(exponent, NON_FINITE)
    unit = p.select(bad, BAD_ROW, p.add(of_row.largest, -BIAS))
    p.store("global", out.exponent, [unit], size=8, when=lane.first)

    p.jump("BAD", when=bad)
    for slot, (block, maximum) in enumerate(zip(blocks, maxima, strict=True)):
        if slot:
            p.converge()  # else the compiler overlaps blocks until registers spill
        if block.exists:
            p.jump("ALL_BLOCKS", when=f"!{lane.warp_in_last}")
        numbers, byte = quantize_block(
            p, task, lane.look_up, block.words, maximum, of_row, masks[slot]
        )
        if unfinished:
            p.jump(f"STORE_{slot}", when=f"!{unfinished}")
            leave_residual(p, block.words, numbers, of_row)
            p.jump(f"STORED_{slot}")
            p.label(f"STORE_{slot}")
        _store(p, task, out, slot, block.exists, _arranged(p, task, lane, numbers), byte)
        p.label(f"STORED_{slot}")
    p.label("ALL_BLOCKS")
    if unfinished:
        p.jump("ROW_NEXT", when=f"!{unfinished}")
        p.emit("setp.lt.u32", unfinished, 0, 0)  # false
        if masks[0] and masks[0].freedom:
            p.emit("mov.b32", masks[0].freedom, 0xFF)
        p.jump("AGAIN")
    p.jump("ROW_NEXT")

    p.label("BAD")
    for slot, (block, maximum) in enumerate(zip(blocks, maxima, strict=True)):
        bad_byte = metadata_of_bad(p, task, maximum, masks[slot]) if task.metadata else 0
        _store(p, task, out, slot, block.exists, [NANS] * (task.block // 4), bad_byte)


def _source(p: Program, task: Task, row: Register) -> Register:
    """Which row of x to read; means nothing where no row is left."""
    if not task.residuals:
        return row
    row = p.smaller(row, task.rows + task.residuals - 1)
    source = p.copy(row)
    at = p.address(task.argument("tokens"), p.subtract(row, task.rows), 4)
    p.load_into([source], "global.nc", at, when=p.less(task.rows - 1, row))
    return source


def _masks(p: Program, task: Task, lane: Lane, row: Register) -> list[Masks | None]:
    """Of each slot. A residual chooses freely."""
    if not task.books:
        return [None] * task.slots
    freedom = p.copy(0) if task.residuals else None
    (group,) = p.load("global.nc", 1, p.address(task.argument("group"), row, 4))
    address = p.address(task.argument("books"), group, 8 * task.books)
    stride = 0
    if task.books > 1:
        address = p.address(address, lane.number, 8)
        stride = 8 * task.config.threads
    last = task.slots - 1
    return [
        Masks(address, slot * stride - FIRST_TOP, lane.in_last if slot == last else None, freedom)
        for slot in range(task.slots)
    ]


def _outputs(p: Program, task: Task, lane: Lane, row: Register, is_residual: str | None) -> Outputs:
    metadata = None
    if task.metadata:
        metadata = p.address(task.argument("metadata"), row, task.blocks)
        metadata = p.address(metadata, lane.number, 1)
    values, exponents = task.argument("values"), task.argument("exponents")
    if is_residual:
        row = p.select(is_residual, p.subtract(row, task.rows), row)
        values, exponents = (
            p.select_address(is_residual, task.argument(f"residual_{name}"), task.argument(name))
            for name in ("values", "exponents")
        )
    values = p.address(values, row, task.length)
    return Outputs(
        values=p.address(values, *_first_value(p, task, lane)),
        exponent=p.address(exponents, row, 1),
        metadata=metadata,
    )


def _across_row(
    p: Program, task: Task, lane: Lane, join: str, *of_warp: Register
) -> list[Register]:
    """What all warps of a row have, joined: of each number that all lanes of a warp know.

    Warps meet at the row's own barrier once: the next time they write elsewhere, and nobody is two
    times ahead.
    """
    assert len(of_warp) <= MEETING
    warps = task.config.threads // WARP
    if warps == 1:
        return list(of_warp)
    array = 4 * task.places * task.rows_at_once
    shared = p.add(task.argument("shared"), lane.parity)
    of_row = p.multiply_add(lane.group, 4 * task.places, shared)
    place = p.multiply_add(lane.warp, 4, of_row)
    in_warp = p.both(lane.number, WARP - 1)
    for number, one in enumerate(of_warp):
        at = task.warps_at + number * array
        p.store("shared", place, [one], at, when=p.equal(in_warp, 0))
    p.emit("bar.sync", p.add(lane.group, 1), task.config.threads)
    joined = []
    for number in range(len(of_warp)):
        parts = []
        for first in range(0, task.places, 4):
            at = task.warps_at + number * array + 4 * first
            parts += p.load("shared", min(4, task.places), of_row, at)
        joined.append(functools.reduce(lambda a, b: p.let(join, a, b), parts[:warps]))
    p.emit("xor.b32", lane.parity, lane.parity, MEETING * array)
    return joined


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


def _first_value(p: Program, task: Task, lane: Lane) -> tuple[Register, int]:
    """Where this thread's first values go in a row: an index and a stride."""
    if task.block == STEP or task.config.exchange:
        return lane.number, task.block
    # Two runs of 8 bytes: of 32, the odd thread's are the second and fourth.
    return p.multiply_add(p.shift_right(lane.number, 1), 2, lane.number), 8


def _arranged(p: Program, task: Task, lane: Lane, words: list[Register]) -> list[Register]:
    """A block's words in the order of `rows.interleave`: of 32 channels', even ones first.

    A block of 16 is half of that. Of the pair of threads that share 32 channels the even one gets
    the even words: it gives its odd ones for the other's even ones.
    """
    if task.block == STEP or not task.config.exchange:
        return words[::2] + words[1::2]
    kept = [p.select(lane.odd, words[i + 1], words[i]) for i in (0, 2)]
    given = [p.select(lane.odd, words[i], words[i + 1]) for i in (0, 2)]
    taken = [p.of_lane_across(word, 1) for word in given]
    pairs = zip(kept + taken, taken + kept, strict=True)
    return [p.select(lane.odd, odd, even) for even, odd in pairs]


def _pieces(task: Task, words: Sequence[Operand]) -> list[tuple[int, Sequence[Operand]]]:
    """What to store at once, and how far apart."""
    if task.block == STEP // 2 and not task.config.exchange:
        return [(0, words[:2]), (STEP // 2, words[2:])]
    return [(4 * first, words[first : first + 4]) for first in range(0, len(words), 4)]
