"""4-bit codes to e4m3 numbers in registers: a table read and seven instructions for eight.

A byte permute (`prmt`) picks four bytes out of eight by the low bits of four nibbles: with the
eight magnitudes of a block's dialect, scaled by its exponent, as those bytes, it decodes four
codes. The signs lie in the word where they only need a mask. Numbers in bf16 take a permute for
their low bytes, one for their high bytes, and two that put them together.
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
from pallas_kernels.rows import interleave

WORDS_PER_STEP = STEP // 8
THREADS = 4  # that share a row
SIGNS = 0x80808080
INDICES = 0x77777777
PAIRS = (0x5140, 0x7362)  # of low and high bytes: the first two bf16 numbers of four, the others


def decode_magnitudes(
    words: jax.Array, metadata: Any, table: Any, *, halves: int, dtype: Any
) -> jax.Array:
    """The first part of decoding a weight tile: all that can be done before the signs.

    Args:
      words: uint32 `[rows, tile_k / 8]` in `word_layout()`.
      metadata: SMEM ref, uint32 `[rows * halves]`.
      table: SMEM ref, uint32 of `tables.look_up_table`.
      halves: words of metadata of a row.
      dtype: e4m3 or bf16.
    Returns:
      `[rows, tile_k]` in the layout of `wgmma`'s operand, for `add_signs` alone: in bf16 low and
      high bytes are still apart.
    """
    rows, width = words.shape
    steps = width // WORDS_PER_STEP
    wide = jnp.dtype(dtype).itemsize == 2

    @plgpu.inline_mgpu(
        arg_types=(word_layout(), plgpu.RefType(), plgpu.RefType()),
        return_type=_operand_type(rows, steps, dtype),
    )
    def emit(_, words, metadata, table):
        table_at = asm.address(table)
        metadata_at = asm.add(asm.address(metadata), _own_metadata(halves))
        held = words.registers.reshape(rows // 64, steps, 2)
        out = _no_registers(rows, steps, dtype)
        for part, eight in itertools.product(range(rows // 64), range(2)):
            bytes_ = asm.load(metadata_at, 4 * halves * (64 * part + 8 * eight))
            for step in range(steps):
                entry = asm.dot_bytes(bytes_, table_entry(dtype) << (8 * step), table_at)
                magnitudes = asm.load_words(entry, 4 if wide else 2)
                index = asm.both(asm.scalar(held[part, step, eight]), INDICES)
                for run in range(2):
                    selector = asm.shift_right(index, 16 * run)
                    for byte in range(len(magnitudes) // 2):
                        first, last = magnitudes[2 * byte : 2 * byte + 2]
                        four = asm.permute(first, last, selector)
                        out[part, step, run, byte, eight] = asm.as_vector(four, dtype)
        return _operand(out, rows, steps, dtype)

    return emit(words, metadata, table)


def add_signs(magnitudes: jax.Array, words: jax.Array) -> jax.Array:
    """The second part: the numbers of a weight tile, as `wgmma` takes them from registers.

    One instruction for four numbers, or two; in bf16 two more. Apart from the rest because the
    compiler makes every `wgmma` wait for the one before if its operand is defined while that one
    runs.
    """
    rows, width = words.shape
    steps, dtype = width // WORDS_PER_STEP, magnitudes.dtype

    @plgpu.inline_mgpu(
        arg_types=(_layouts(dtype)[0], word_layout()),
        return_type=_operand_type(rows, steps, dtype),
    )
    def emit(_, magnitudes, words):
        held = words.registers.reshape(rows // 64, steps, 2)
        out = magnitudes.registers.reshape(_no_registers(rows, steps, dtype).shape).copy()
        for part, step, run, eight in itertools.product(*map(range, (*held.shape[:2], 2, 2))):
            word = asm.scalar(held[part, step, eight])
            sign = asm.both(asm.shift_left(word, 4 * run), SIGNS)
            *low, high = (asm.from_vector(value) for value in out[part, step, run, :, eight])
            high = asm.either(high, sign)
            numbers = [asm.permute(low[0], high, pair) for pair in PAIRS] if low else [high]
            for at, number in enumerate(numbers):
                out[part, step, run, at, eight] = asm.as_vector(number, dtype)
        return _operand(out, rows, steps, dtype)

    return emit(magnitudes, words)


def table_entry(dtype: Any) -> int:
    """Bytes of the eight magnitudes of a metadata byte."""
    return 8 * jnp.dtype(dtype).itemsize


def _layouts(dtype: Any) -> tuple[Any, fa.TiledLayout]:
    """Of a register operand, as Pallas and as Mosaic call it."""
    if jnp.dtype(dtype).itemsize == 1:
        return plgpu.Layout.WGMMA_8BIT, fa.WGMMA_LAYOUT_8BIT
    return plgpu.Layout.WGMMA, fa.WGMMA_LAYOUT


def _operand_type(rows: int, steps: int, dtype: Any) -> plgpu.ShapeDtypeStruct:
    return plgpu.ShapeDtypeStruct((rows, steps * STEP), dtype, layout=_layouts(dtype)[0])


def _no_registers(rows: int, steps: int, dtype: Any) -> np.ndarray:
    """Room for them: 64 rows, step, run of four channels, register of a run, 8 rows."""
    return np.empty((rows // 64, steps, 2, jnp.dtype(dtype).itemsize, 2), dtype=object)


def _operand(registers: np.ndarray, rows: int, steps: int, dtype: Any) -> fa.FragmentedArray:
    _, layout = _layouts(dtype)
    shape = layout.registers_shape((rows, steps * STEP))
    return fa.FragmentedArray(_registers=registers.reshape(shape), _layout=layout, _is_signed=None)


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


def decoded(
    words: jax.Array, metadata: jax.Array, table: jax.Array, *, halves: int, dtype: Any
) -> jax.Array:
    """What both parts mean, in plain jnp; stands in for them where a kernel is interpreted."""
    rows, width = words.shape
    wide = jnp.dtype(dtype).itemsize
    table, metadata = table.reshape(256, wide, 2), metadata.reshape(rows, halves)
    steps = []
    for step in range(width // WORDS_PER_STEP):
        of_word = [metadata[:, t * halves // WORDS_PER_STEP] for t in range(WORDS_PER_STEP)]
        entry = (jnp.stack(of_word, axis=1) >> 8 * step) & 0xFF
        magnitudes = table[entry.astype(jnp.int32)]  # [rows, words, bytes, 2]
        word = words[:, WORDS_PER_STEP * step :][:, :WORDS_PER_STEP]
        bits = jnp.stack([_number(word, magnitudes, j) for j in range(8)], axis=-1)
        steps.append(interleave(bits.reshape(rows, STEP), run=4 // wide))
    unsigned = jnp.uint8 if wide == 1 else jnp.uint16
    return jax.lax.bitcast_convert_type(jnp.concatenate(steps, axis=1).astype(unsigned), dtype)


def _number(word: jax.Array, magnitudes: jax.Array, j: int) -> jax.Array:
    """The j-th of each word's eight, its bits."""
    index = (word >> (4 * j)) & 7
    wide = magnitudes.shape[-2]
    bits = ((word >> sign_bit(j)) & 1) << (8 * wide - 1)
    for byte in range(wide):
        four = jnp.where(index < 4, magnitudes[..., byte, 0], magnitudes[..., byte, 1])
        bits = bits | ((four >> (8 * (index & 3))) & 0xFF) << (8 * byte)
    return bits
