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
from pallas_kernels.mosaic_gpu.config import ROWS, THREADS, TILE_K
from pallas_kernels.mosaic_gpu.operands import STEP, STEPS, WORDS, sign_bit, ungrouped
from pallas_kernels.rows import interleave

WORDS_PER_STEP = STEP // 8
SHARING = 4  # threads that share a row
WORDS_READ = 4  # at once
SIGNS = 0x80808080
INDICES = 0x77777777
PAIRS = (0x5140, 0x7362)  # of low and high bytes: the first two bf16 numbers of four, the others


def places() -> jax.Array:
    """Bytes from the beginning of a group to each thread's words, uint32 `[THREADS]`.

    For `decode_magnitudes`, once for all tiles: made anew for each, it would delay the reads that
    everything waits for.
    """

    @plgpu.inline_mgpu(arg_types=(), return_type=_places_type())
    def emit(_):
        place = asm.kept(asm.multiply(asm.thread(), WORDS_READ * 4))
        registers = asm.as_vectors([place])
        layout = _places_type().layout.to_mgpu()
        return fa.FragmentedArray(_registers=registers, _layout=layout, _is_signed=False)

    return emit()


def _places_type() -> plgpu.ShapeDtypeStruct:
    layout = plgpu.Layout.WG_STRIDED((THREADS,), 1)
    return plgpu.ShapeDtypeStruct((THREADS,), jnp.uint32, layout=layout)


def decode_magnitudes(
    group: Any, table: Any, places: jax.Array, *, halves: int, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """The first part of decoding a weight tile: all that can be done before the signs.

    Args:
      group: SMEM ref, uint32 of `operands.grouped`.
      table: SMEM ref, uint32 of `tables.look_up_table`.
      places: of `places`.
      halves: words of metadata of a row.
      dtype: e4m3 or bf16.
    Returns:
      Magnitudes `[64, TILE_K]` in the layout of `wgmma`'s operand, and words `[64, TILE_K / 8]` in
      `word_layout()`: for `add_signs` alone, since in bf16 low and high bytes are still apart.
    """
    wide = jnp.dtype(dtype).itemsize == 2

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.RefType(), _places_type().layout),
        return_type=(
            _operand_type(dtype),
            plgpu.ShapeDtypeStruct((ROWS, TILE_K // 8), jnp.uint32, layout=word_layout()),
        ),
    )
    def emit(_, group, table, places):
        table_at = asm.address(table)
        place = asm.scalar(places.registers.flat[0])
        words, metadata = _own(asm.address(group), place, halves)
        out = _no_registers(dtype)
        for eight, step in itertools.product(range(2), range(STEPS)):
            entry = asm.dot_bytes(metadata[eight], table_entry(dtype) << (8 * step), table_at)
            magnitudes = asm.load_words(entry, 4 if wide else 2)
            index = asm.both(words[step][eight], INDICES)
            for run in range(2):
                selector = asm.shift_right(index, 16 * run)
                for byte in range(len(magnitudes) // 2):
                    first, last = magnitudes[2 * byte : 2 * byte + 2]
                    four = asm.permute(first, last, selector)
                    out[step, run, byte, eight] = asm.as_vector(four, dtype)
        layout = word_layout().to_mgpu()
        shape = layout.registers_shape((ROWS, TILE_K // 8))
        held = asm.as_vectors([word for of_step in words for word in of_step]).reshape(shape)
        kept = fa.FragmentedArray(_registers=held, _layout=layout, _is_signed=False)
        return _operand(out, dtype), kept

    return emit(group, table, places)


def add_signs(magnitudes: jax.Array, words: jax.Array) -> jax.Array:
    """The second part: the numbers of a weight tile, as `wgmma` takes them from registers.

    One instruction for four numbers, or two; in bf16 two more. Apart from the rest because the
    compiler makes every `wgmma` wait for the one before if its operand is defined while that one
    runs.
    """
    dtype = magnitudes.dtype

    @plgpu.inline_mgpu(
        arg_types=(_layouts(dtype)[0], word_layout()), return_type=_operand_type(dtype)
    )
    def emit(_, magnitudes, words):
        held = words.registers.reshape(STEPS, 2)
        out = magnitudes.registers.reshape(_no_registers(dtype).shape).copy()
        for step, run, eight in itertools.product(range(STEPS), range(2), range(2)):
            word = asm.scalar(held[step, eight])
            sign = asm.both(asm.shift_left(word, 4 * run), SIGNS)
            *low, high = (asm.from_vector(value) for value in out[step, run, :, eight])
            high = asm.either(high, sign)
            numbers = [asm.permute(low[0], high, pair) for pair in PAIRS] if low else [high]
            for at, number in enumerate(numbers):
                out[step, run, at, eight] = asm.as_vector(number, dtype)
        return _operand(out, dtype)

    return emit(magnitudes, words)


def table_entry(dtype: Any) -> int:
    """Bytes of the eight magnitudes of a metadata byte."""
    return 8 * jnp.dtype(dtype).itemsize


def _layouts(dtype: Any) -> tuple[Any, fa.TiledLayout]:
    """Of a register operand, as Pallas and as Mosaic call it."""
    if jnp.dtype(dtype).itemsize == 1:
        return plgpu.Layout.WGMMA_8BIT, fa.WGMMA_LAYOUT_8BIT
    return plgpu.Layout.WGMMA, fa.WGMMA_LAYOUT


def _operand_type(dtype: Any) -> plgpu.ShapeDtypeStruct:
    return plgpu.ShapeDtypeStruct((ROWS, TILE_K), dtype, layout=_layouts(dtype)[0])


def _no_registers(dtype: Any) -> np.ndarray:
    """Room for them: step, run of four channels, register of a run, 8 rows."""
    return np.empty((STEPS, 2, jnp.dtype(dtype).itemsize, 2), dtype=object)


def _operand(registers: np.ndarray, dtype: Any) -> fa.FragmentedArray:
    _, layout = _layouts(dtype)
    shape = layout.registers_shape((ROWS, TILE_K))
    return fa.FragmentedArray(_registers=registers.reshape(shape), _layout=layout, _is_signed=None)


def _own(
    group: asm.Register, place: asm.Register, halves: int
) -> tuple[list[list[asm.Register]], list[asm.Register]]:
    """This thread's words, by step and row, and its rows' metadata; see `operands.grouped`.

    The metadata first: what it says is to be looked up, what the words say is not.
    """
    sharing = SHARING // halves  # threads that read the same pair of words
    own = asm.both(asm.shift_right(place, (2 * sharing).bit_length() - 1), -(2 * 4))
    metadata = asm.load_words(asm.add(group, own), 2, 4 * WORDS)
    words = []
    for pair in range(STEPS // 2):
        at = 4 * WORDS_READ * THREADS * pair
        four = asm.load_words(asm.add(group, place), WORDS_READ, at)
        words += [four[:2], four[2:]]
    return words, metadata


def word_layout() -> Any:
    """A thread holds, of each of its rows, the word of its eight channels in each step."""
    tiling = fa.Tiling(((ROWS, SHARING), (16, SHARING), (8, SHARING), (1,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-7,), lane_dims=(-3, -2), vector_dim=-1)


def decoded(group: jax.Array, table: jax.Array, *, dtype: Any) -> jax.Array:
    """What both parts mean, in plain jnp; stands in for them where a kernel is interpreted."""
    words, metadata = ungrouped(group)
    rows, halves = metadata.shape
    wide = jnp.dtype(dtype).itemsize
    table = table.reshape(256, wide, 2)
    steps = []
    for step in range(STEPS):
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
