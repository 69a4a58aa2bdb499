"""Layer norm and modulation in front of the quantiser, on rows that threads hold in registers.

The mean first, then the mean square of what is left, both in float32: no more memory is read than
x. A thread's gains and shifts lie in memory so that a warp reads 512 bytes in a row (`arranged`).
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic_gpu.ptx import Program, Register, real
from pallas_kernels.mosaic_gpu.quantizer_task import WARP, Task

QUAD = 4  # numbers of a load
QUAD_BYTES = 2 * WARP * QUAD * 4  # of a warp's gains and shifts


def arranged(gain: jax.Array, shift: jax.Array, task: Task) -> jax.Array:
    """float32 `[B, K]` each to `[B, tiles, quads, 2, lanes, 4]`: a tile is a block of each lane.

    Zero where a slot has no block.
    """
    both = jnp.stack([gain, shift], axis=1)
    length = task.slots * task.config.threads * task.block
    both = jnp.pad(both, ((0, 0), (0, 0), (0, length - task.length)))
    both = both.reshape(-1, 2, length // (WARP * task.block), WARP, task.block // QUAD, QUAD)
    return both.transpose(0, 2, 4, 1, 3, 5)


def normalise(
    p: Program,
    task: Task,
    blocks: Sequence[tuple[Sequence[Register], str | None]],
    modulation: Register,
    sum_of_row: Callable[[Register], Register],
) -> None:
    """Replace a row's numbers by LN(x) gain + shift, rounded to bf16.

    Args:
      p: to be continued.
      task: with an eps.
      blocks: this thread's, each its words and the condition that it exists, or None.
      modulation: where this lane's first gain is.
      sum_of_row: float32, of what each thread has.
    """
    assert task.eps is not None
    mean = _mean_of_row(p, task, sum_of_row, [_sum(p, words) for words, _ in blocks])
    squares = []
    for words, exists in blocks:
        total = _sum_of_squares(p, words, mean)
        squares.append(p.select(exists, total, 0) if exists else total)
    variance = _mean_of_row(p, task, sum_of_row, squares)
    inverse = p.let("rsqrt.approx.ftz.f32", p.let("add.rn.f32", variance, real(task.eps)))
    tile_bytes = task.block // QUAD * QUAD_BYTES
    for slot, (words, _) in enumerate(blocks):
        p.converge()  # else the compiler loads everything at once and registers spill
        at = slot * task.config.threads // WARP * tile_bytes
        for first in range(0, len(words), 2):
            offset = at + first // 2 * QUAD_BYTES
            gains = p.load("global.nc", QUAD, modulation, offset)
            shifts = p.load("global.nc", QUAD, modulation, offset + QUAD_BYTES // 2)
            for half, word in enumerate(words[first : first + 2]):
                low, high = (
                    p.let("fma.rn.f32", p.let("mul.rn.f32", x, inverse), gain, shift)
                    for x, gain, shift in zip(
                        _less(p, p.pair_as_reals(word), mean),
                        gains[2 * half : 2 * half + 2],
                        shifts[2 * half : 2 * half + 2],
                        strict=True,
                    )
                )
                p.emit("cvt.rn.bf16x2.f32", word, high, low)


def _mean_of_row(
    p: Program,
    task: Task,
    sum_of_row: Callable[[Register], Register],
    parts: Sequence[Register],
) -> Register:
    total = sum_of_row(functools.reduce(lambda a, b: p.let("add.rn.f32", a, b), parts))
    return p.let("mul.rn.f32", total, real(1 / task.length))


def _sum(p: Program, words: Sequence[Register]) -> Register:
    numbers = [number for word in words for number in p.pair_as_reals(word)]
    return functools.reduce(lambda a, b: p.let("add.rn.f32", a, b), numbers)


def _sum_of_squares(p: Program, words: Sequence[Register], mean: Register) -> Register:
    """Of the differences from the mean."""
    total = real(0)
    for word in words:
        for number in _less(p, p.pair_as_reals(word), mean):
            total = p.let("fma.rn.f32", number, number, total)
    return total


def _less(p: Program, numbers: Sequence[Register], mean: Register) -> list[Register]:
    return [p.let("sub.rn.f32", number, mean) for number in numbers]
