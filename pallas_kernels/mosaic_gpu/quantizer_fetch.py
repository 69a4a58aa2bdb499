"""Rows of x come to shared memory by themselves, while the threads work on those before.

A row's place is free once its threads have the numbers in registers: then its first thread asks
for the next. Nobody holds registers for what is on its way.
"""

from typing import NamedTuple

from pallas_kernels.mosaic_gpu.ptx import Program, Register
from pallas_kernels.mosaic_gpu.quantizer_task import ARRIVAL_BYTES, Task

PIECE_BYTES = 16  # of a load
BANKS_BYTES = 128


class Place(NamedTuple):
    """For one row in shared memory.

    Attributes:
      row: its address.
      arrival: of its barrier.
      phase: of the barrier, which ends next.
    """

    row: Register
    arrival: Register
    phase: Register


class Block(NamedTuple):
    """A block of x in registers.

    Attributes:
      words: two bf16 numbers each; zero where the block does not exist.
      exists: a condition, or None: it does.
    """

    words: list[Register]
    exists: str | None


def initialise(p: Program, task: Task, thread: Register) -> None:
    """All barriers of a thread block; its threads have to meet before somebody fetches."""
    is_first = p.equal(thread, 0)
    for row in range(task.rows_at_once):
        at = task.arrivals_at + ARRIVAL_BYTES * row
        p.initialise_arrival(task.argument("shared"), at, when=is_first)
    p.emit("fence.proxy.async.shared::cta")


def place_of(p: Program, task: Task, group: Register) -> Place:
    """Of the rows at once, one's."""
    shared = task.argument("shared")
    return Place(
        row=p.multiply_add(group, task.row_bytes, p.add(shared, task.rows_at)),
        arrival=p.multiply_add(group, ARRIVAL_BYTES, p.add(shared, task.arrivals_at)),
        phase=p.copy(0),
    )


def fetch(p: Program, task: Task, place: Place, row: Register, *, when: str) -> None:
    """Let a row of x come, which may lie in two arrays. One thread of a row's does so."""
    p.expect(place.arrival, task.row_bytes, when=when)
    there = 0
    for name, channels in (("x", task.length - task.more), ("more", task.more)):
        if channels:
            source = p.address(task.argument(name), row, 2 * channels)
            p.fetch(place.row, there, source, 2 * channels, place.arrival, when=when)
            there += 2 * channels


def arrived(
    p: Program, task: Task, place: Place, number: Register, in_last: str | None
) -> list[Block]:
    """Blocks of one of a row's threads, once the row is there.

    The 8 lanes that read at once meet in no bank: where blocks lie in the same banks, lanes begin
    with different pieces. Their piece i is number i ^ turn, so that they have to swap registers.

    Args:
      p: to be continued.
      task: what for.
      place: of the row.
      number: of the thread in its row.
      in_last: condition, it has a block in the last slot; None where all have.
    """
    p.wait("ARRIVAL", place.arrival, place.phase)
    p.emit("xor.b32", place.phase, place.phase, 1)
    block_bytes = 2 * task.block
    pieces = block_bytes // PIECE_BYTES
    same_turn = BANKS_BYTES // block_bytes  # lanes whose blocks are in different banks
    turn = p.both(p.shift_right(number, same_turn.bit_length() - 1), pieces - 1)
    first = p.multiply_add(number, block_bytes, place.row)
    starts = [p.multiply_add(p.differ(turn, i), PIECE_BYTES, first) for i in range(pieces)]
    swaps = [(by, p.equal(p.both(turn, by), by)) for by in (1, 2) if by < pieces]
    blocks = []
    for slot in range(task.slots):
        exists = in_last if slot == task.slots - 1 else None
        offset = slot * task.config.threads * block_bytes
        read = [_piece(p, start, offset, exists) for start in starts]
        for by, swapped in swaps:
            read = [
                [p.select(swapped, b, a) for a, b in zip(read[i], read[i ^ by], strict=True)]
                for i in range(pieces)
            ]
        blocks.append(Block([word for piece in read for word in piece], exists))
    return blocks


def _piece(p: Program, start: Register, offset: int, exists: str | None) -> list[Register]:
    """Four words."""
    words = [p.copy(0) if exists else p.new() for _ in range(PIECE_BYTES // 4)]
    p.load_into(words, "shared", start, offset, when=exists)
    return words
