"""4-bit codes to e4m3 numbers in registers: a table read and seven instructions for eight.

A byte permute (`prmt`) picks four bytes out of eight by the low bits of four nibbles: with the
eight magnitudes of a block's dialect, scaled by its exponent, as those bytes, it decodes four
codes. The signs lie in the word where they only need a mask.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import registers as asm
from pallas_kernels.mosaic_gpu.operands import STEP, sign_bit

WORDS_PER_STEP = STEP // 8
THREADS = 4  # that share a row
SIGNS = 0x80808080
INDICES = 0x77777777
TABLE_ENTRY = 8  # bytes


def decode_magnitudes(words: jax.Array, metadata: Any, table: Any, *, halves: int) -> jax.Array:
    """The first part of decoding a weight tile: everything but the signs.

    Args:
      words: uint32 `[rows, tile_k / 8]` in `word_layout()`.
      metadata: SMEM ref, uint32 `[rows * halves]`.
      table: SMEM ref, uint32 of `tables.look_up_table`.
      halves: words of metadata of a row.
    Returns:
      e4m3 `[rows, tile_k]` in `Layout.WGMMA_8BIT`.
    """
    rows, width = words.shape
    steps = width // WORDS_PER_STEP

    @plgpu.inline_mgpu(
        arg_types=(word_layout(), plgpu.RefType(), plgpu.RefType()),
        return_type=_operand_type(rows, steps),
    )
    def emit(_, words, metadata, table):
        table_at = asm.address(table)
        metadata_at = asm.add(asm.address(metadata), _own_metadata(halves))
        held = words.registers.reshape(rows // 64, steps, 2)
        out = np.empty((rows // 64, steps, 2, 2), dtype=object)  # 64 rows, step, run, 8 rows
        for part, eight in itertools.product(range(rows // 64), range(2)):
            bytes_ = asm.load(metadata_at, 4 * halves * (64 * part + 8 * eight))
            for step in range(steps):
                entry = asm.dot_bytes(bytes_, TABLE_ENTRY << (8 * step), table_at)
                low, high = asm.load_pair(entry)
                index = asm.both(asm.scalar(held[part, step, eight]), INDICES)
                for run in range(2):
                    four = asm.permute(low, high, asm.shift_right(index, 16 * run))
                    out[part, step, run, eight] = asm.as_e4m3(four)
        return _operand(out, rows, steps)

    return emit(words, metadata, table)


def add_signs(magnitudes: jax.Array, words: jax.Array) -> jax.Array:
    """The second part: the numbers of a weight tile, as `wgmma` takes them from registers.

    One instruction for four numbers, or two. Apart from the rest because the compiler makes every
    `wgmma` wait for the one before if its operand is defined while that one runs.
    """
    rows, width = words.shape
    steps = width // WORDS_PER_STEP

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA_8BIT, word_layout()),
        return_type=_operand_type(rows, steps),
    )
    def emit(_, magnitudes, words):
        held = words.registers.reshape(rows // 64, steps, 2)
        out = magnitudes.registers.reshape(rows // 64, steps, 2, 2).copy()
        for part, step, run, eight in np.ndindex(out.shape):
            word = asm.scalar(held[part, step, eight])
            sign = asm.both(asm.shift_left(word, 4 * run), SIGNS)
            number = asm.either(asm.from_e4m3(out[part, step, run, eight]), sign)
            out[part, step, run, eight] = asm.as_e4m3(number)
        return _operand(out, rows, steps)

    return emit(magnitudes, words)


def _operand_type(rows: int, steps: int) -> plgpu.ShapeDtypeStruct:
    return plgpu.ShapeDtypeStruct(
        (rows, steps * STEP), jnp.float8_e4m3fn, layout=plgpu.Layout.WGMMA_8BIT
    )


def _operand(registers: np.ndarray, rows: int, steps: int) -> fa.FragmentedArray:
    shape = fa.WGMMA_LAYOUT_8BIT.registers_shape((rows, steps * STEP))
    return fa.FragmentedArray(
        _registers=registers.reshape(shape), _layout=fa.WGMMA_LAYOUT_8BIT, _is_signed=None
    )


def _own_metadata(halves: int) -> asm.Register:
    """Bytes to the metadata of this thread's first row: 16 rows a warp, four threads a row."""
    thread = asm.thread()
    row = asm.add(
        asm.multiply(asm.shift_right(thread, 5), 16), asm.both(asm.shift_right(thread, 2), 7)
    )
    at = asm.multiply(row, 4 * halves)
    return (
        at if halves == 1 else asm.add(at, asm.multiply(asm.both(asm.shift_right(thread, 1), 1), 4))
    )


def word_layout() -> Any:
    """A thread holds, of each of its rows, the word of its eight channels in each step."""
    tiling = fa.Tiling(((64, THREADS), (16, THREADS), (8, THREADS), (1,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-7,), lane_dims=(-3, -2), vector_dim=-1)


def decoded(words: jax.Array, metadata: jax.Array, table: jax.Array, *, halves: int) -> jax.Array:
    """What both parts mean, in plain jnp; stands in for them where a kernel is interpreted."""
    rows, width = words.shape
    steps = width // WORDS_PER_STEP
    table, metadata = table.reshape(256, 2), metadata.reshape(rows, halves)
    runs = []
    for step in range(steps):
        of_word = [metadata[:, t * halves // WORDS_PER_STEP] for t in range(WORDS_PER_STEP)]
        entry = (jnp.stack(of_word, axis=1) >> 8 * step) & 0xFF
        pair = table[entry.astype(jnp.int32)]  # [rows, words, 2]
        word = words[:, WORDS_PER_STEP * step :][:, :WORDS_PER_STEP]
        numbers = jnp.stack([_number(word, pair, j) for j in range(8)], axis=-1)
        runs.append(numbers.reshape(rows, WORDS_PER_STEP, 2, 4).swapaxes(1, 2).reshape(rows, STEP))
    return jax.lax.bitcast_convert_type(jnp.concatenate(runs, axis=1), jnp.float8_e4m3fn)


def _number(word: jax.Array, pair: jax.Array, j: int) -> jax.Array:
    """The j-th of each word's eight, as a byte."""
    index = (word >> (4 * j)) & 7
    magnitude = jnp.where(index < 4, pair[..., 0], pair[..., 1]) >> (8 * (index & 3))
    sign = (word >> sign_bit(j)) & 1
    return ((magnitude & 0xFF) | (sign << 7)).astype(jnp.uint8)
