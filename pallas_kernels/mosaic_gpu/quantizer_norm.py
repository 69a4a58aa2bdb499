"""Layer norm and modulation in front of the quantiser, on rows that threads hold in registers.

No more memory is read than x. Sums and sums of squares, in float32, come from tensor cores, which
the quantiser leaves idle, and cross the row together: the variance is the mean square less the
square of the mean. Where the mean is r times as large as the spread, numbers may come out some
r^2 2^-22 of the spread off; as bf16 they came in r 2^-9 off, which is more up to r = 8192.
A thread's gains and shifts lie in memory so that a warp reads 512 bytes in a row (`arranged`).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic_gpu.ptx import Program, Register, real
from pallas_kernels.mosaic_gpu.quantizer_task import WARP, Task

QUAD = 4  # numbers of a load
QUAD_BYTES = 2 * WARP * QUAD * 4  # of a warp's gains and shifts
EARLY = 2  # gains and shifts of so many loads come while the warps of a row wait for each other
ONES = 0x3F803F80  # two bf16 numbers


class Modulation(NamedTuple):
    """Of four numbers.

    Attributes:
      gains: float32 each.
      shifts: float32 each.
    """

    gains: list[Register]
    shifts: list[Register]


def arranged(gain: jax.Array, shift: jax.Array, task: Task) -> jax.Array:
    """float32 `[B, K]` each to `[B, tiles, quads, 2, lanes, 4]`: a tile is a block of each lane.

    Zero where a slot has no block.
    """
    both = jnp.stack([gain, shift], axis=1)
    length = task.slots * task.config.threads * task.block
    both = jnp.pad(both, ((0, 0), (0, 0), (0, length - task.length)))
    both = both.reshape(-1, 2, length // (WARP * task.block), WARP, task.block // QUAD, QUAD)
    return both.transpose(0, 2, 4, 1, 3, 5)


def modulation_of(
    p: Program, task: Task, row: Register, warp: Register, lane: Register
) -> Callable[[int], Modulation]:
    """What reads gains and shifts of four of a thread's numbers, counted from its first.

    Args:
      p: to be continued.
      task: with an eps.
      row: of x.
      warp: number of this thread's in its row.
      lane: number of this thread in its warp.
    """
    video = p.let("div.u32", row, task.rows // task.batch) if task.batch > 1 else p.copy(0)
    tile_bytes = task.block // QUAD * QUAD_BYTES
    warps = task.config.threads // WARP
    at: Register = p.address(task.argument("modulation"), video, task.slots * warps * tile_bytes)
    at = p.address(p.address(at, warp, tile_bytes), lane, 4 * QUAD)

    def read(four: int) -> Modulation:
        slot, in_block = divmod(four, task.block // QUAD)
        offset = slot * warps * tile_bytes + in_block * QUAD_BYTES
        # Not "global.nc": the compiler would load them once for all rows and registers spill.
        gains = p.load("global", QUAD, at, offset)
        return Modulation(gains, p.load("global", QUAD, at, offset + QUAD_BYTES // 2))

    return read


def normalise(
    p: Program,
    task: Task,
    blocks: Sequence[tuple[Sequence[Register], str | None]],
    lane: Register,
    modulation: Callable[[int], Modulation],
    sums_of_row: Callable[..., list[Register]],
) -> None:
    """Replace a row's numbers by LN(x) gain + shift, rounded to bf16.

    Args:
      p: to be continued.
      task: with an eps.
      blocks: this thread's, each its words, zero where it does not exist, and the condition that
        one of its warp's does, or None: all do.
      lane: number of this thread in its warp.
      modulation: what reads this thread's gains and shifts.
      sums_of_row: of float32 numbers that each warp has.
    """
    assert task.eps is not None
    every = [word for words, _ in blocks for word in words]
    of_warp = sums_of_warp(p, lane, every)
    early = [modulation(four) for four in range(EARLY)]
    total, squares = sums_of_row(*of_warp)
    mean, mean_square = (
        p.let("mul.rn.f32", one, real(1 / task.length)) for one in (total, squares)
    )
    negative = p.let("neg.f32", mean)
    variance = p.let("fma.rn.f32", negative, mean, mean_square)
    variance = p.let("max.NaN.f32", variance, real(0))
    inverse = p.let("rsqrt.approx.ftz.f32", p.let("add.rn.f32", variance, real(task.eps)))
    before = p.let("mul.rn.f32", negative, inverse)
    for slot, (words, exists) in enumerate(blocks):
        p.converge()  # else the compiler loads everything at once and registers spill
        if exists:
            p.jump("NORMED", when=f"!{exists}")
        for first in range(0, len(words), 2):
            four = (slot * len(words) + first) // 2
            gains, shifts = early[four] if four < EARLY else modulation(four)
            for half, word in enumerate(words[first : first + 2]):
                low, high = (
                    p.let("fma.rn.f32", p.let("fma.rn.f32", x, inverse, before), gain, shift)
                    for x, gain, shift in zip(
                        p.pair_as_reals(word),
                        gains[2 * half : 2 * half + 2],
                        shifts[2 * half : 2 * half + 2],
                        strict=True,
                    )
                )
                p.emit("cvt.rn.bf16x2.f32", word, high, low)
    p.label("NORMED")


def sums_of_warp(p: Program, lane: Register, words: Sequence[Register]) -> list[Register]:
    """Of all numbers of a warp, and of their squares, float32, in every lane.

    Operands are words as they were loaded, else they would be copied. Four are A, whose product
    with ones is sums of rows. Two are A and one of them is B: what four lanes have of it meets
    itself on the diagonal of half of the result; the other half means nothing.
    """
    zeros, ones = [p.copy(0)] * 4, p.copy(ONES)
    rows, upper, lower = zeros, zeros, zeros
    for first in range(0, len(words), 4):
        four = words[first : first + 4]
        rows = p.multiply_tiles(four, [ones, ones], rows)
        for two in (four[:2], four[2:]):
            upper = p.multiply_tiles(two, two[:1], upper)
            lower = p.multiply_tiles(two, two[1:], lower)
    total = p.let("add.rn.f32", rows[0], rows[2])  # the same in the four lanes of a row
    for distance in (4, 8, 16):
        total = p.let("add.rn.f32", total, p.of_lane_across(total, distance))
    row = p.shift_right(lane, 2)
    is_odd = p.equal(p.both(row, 1), 1)
    is_there = p.equal(p.shift_right(row, 1), p.both(lane, 3))
    parts = [p.select(is_odd, half[1], half[0]) for half in (upper[:2], lower[2:])]
    squares = p.select(is_there, p.let("add.rn.f32", *parts), 0)
    return [total, p.warp_sum(squares)]
