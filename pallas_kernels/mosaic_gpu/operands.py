"""How the Hopper kernels store both operands of a product: the same bits as a QTensor, reordered.

One `wgmma` takes 32 channels (a step). Of these, thread t of a row's four feeds two runs of four:
4 t .. 4 t + 3 and 16 + 4 t .. 19 + 4 t. The order of channels inside a product is free, as long as
both operands agree, so a thread is given eight neighbours instead, 8 t .. 8 t + 7: one 32-bit word
of codes, in one block of 16 or more, which needs one look-up of its dialect. The fp8 rows that it
meets lie in that order too (`rows.interleave`).

  word      codes of 8 neighbours; index j in bits 4 j .. 4 j + 2, the sign of j in bit 8 j + 7, or,
            from the fourth on, 8 (j - 4) + 3: where they need a mask, or a shift and a mask
  metadata  one 32-bit word for the 4 steps of a tile of 128 channels, a byte each. Blocks of 16
            have two words, for the first and the second half of every step

Both lie tile by tile: the kernel reads a few KiB in a row, not 64 bytes of each of many rows.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic_gpu import tables
from pallas_kernels.mosaic_gpu.config import TILE_K
from pallas_kernels.rows import row_scales
from sdq import QTensor, qtensor
from sdq.formats import Format

STEP = 32  # channels of one wgmma
TILE_N = 64  # rows, likewise the columns of the result: TMA copies whole tiles
TILE_M = 8  # rows of x and of the result


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TiledWeight:
    """A QTensor `[N, K]` as the matmul reads it, filled up to whole tiles with zeros.

    Attributes:
      words: codes, uint32 `[tiles, rows, 16]`.
      metadata: uint32 `[tiles, rows * halves]`, a row's halves side by side.
      scales: powers of two, float32 `[rows]`; NaN for a row that held NaN or Inf.
      format: of the numbers.
      count: N; rows is the next multiple of TILE_N.
      length: K.
    """

    words: jax.Array
    metadata: jax.Array
    scales: jax.Array
    format: Format = dataclasses.field(metadata={"static": True})
    count: int = dataclasses.field(metadata={"static": True})
    length: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the kernel of a linear: `[*lead, K, N]`."""
        return (*self.words.shape[:-3], self.length, self.count)

    @property
    def halves(self) -> int:
        """Words of metadata of a row and tile."""
        return halves_of(self.format)


def halves_of(fmt: Format) -> int:
    """Blocks that a step touches."""
    return 2 if fmt.block == STEP // 2 else 1


@jax.jit
def tile_weight(q: QTensor) -> TiledWeight:
    """A QTensor, its quantised axis K and one other axis N, in the kernel's order."""
    encoded = qtensor.unpack(q)
    assert q.format.block is not None
    bytes_, exponents = tables.metadata(encoded, q.format)
    codes = qtensor.joined(encoded.codes)[:, : q.length]
    count, tiles = len(codes), -(-q.length // TILE_K)
    more = -count % TILE_N
    codes = jnp.pad(codes, ((0, more), (0, tiles * TILE_K - q.length))).astype(jnp.uint32)
    per_byte = max(1, q.format.block // STEP)  # steps that share a byte
    metadata = jnp.repeat(bytes_, per_byte, axis=-1)
    halves = halves_of(q.format)
    width = tiles * 4 * halves
    missing = max(0, width - metadata.shape[1])
    metadata = jnp.pad(metadata, ((0, more), (0, missing)))[:, :width]
    metadata = metadata.reshape(-1, tiles, 4, halves)  # a step's halves are neighbours
    return TiledWeight(
        words=_words(codes.reshape(-1, tiles, TILE_K // 8, 8)).swapaxes(0, 1),
        metadata=_joined_bytes(metadata.transpose(1, 0, 3, 2)).reshape(tiles, -1),
        scales=jnp.pad(row_scales(exponents, bad=jnp.nan), (0, more)),
        format=q.format,
        count=count,
        length=q.length,
    )


def _words(codes: jax.Array) -> jax.Array:
    """uint32 codes `[..., 8]` to words `[...]`."""
    fields = [
        (codes[..., j] & 7) << (4 * j) | (codes[..., j] >> 3) << sign_bit(j) for j in range(8)
    ]
    return functools.reduce(jnp.bitwise_or, fields)


def sign_bit(j: int) -> int:
    """Where a word keeps the sign of its j-th code."""
    return 8 * j + 7 if j < 4 else 8 * (j - 4) + 3


def _joined_bytes(parts: jax.Array) -> jax.Array:
    """uint8 `[..., 4]` to uint32 `[...]`, the first byte lowest."""
    return functools.reduce(
        jnp.bitwise_or, [parts[..., i].astype(jnp.uint32) << (8 * i) for i in range(4)]
    )
