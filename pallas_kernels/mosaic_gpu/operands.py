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

What a warpgroup needs of such a tile, words and metadata of 64 rows, lies together, so that one
copy brings it, and in the order of threads, so that each reads its own four words at a time.
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
STEPS = TILE_K // STEP
TILE_N = 64  # rows of a group, likewise the columns of the result
TILE_M = 8  # rows of x and of the result
WORDS = TILE_N * TILE_K // 8  # of a group
ROWS_OF_GROUP = (4, 2, 8)  # warps, registers and lanes that hold one each


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TiledWeight:
    """A QTensor `[N, K]` as the matmul reads it, filled up to whole tiles with zeros.

    Attributes:
      groups: of `grouped`, uint32 `[tiles, rows / 64, WORDS + 64 * halves]`.
      scales: powers of two, float32 `[rows]`; NaN for a row that held NaN or Inf.
      format: of the numbers.
      count: N; rows is the next multiple of TILE_N.
      length: K.
    """

    groups: jax.Array
    scales: jax.Array
    format: Format = dataclasses.field(metadata={"static": True})
    count: int = dataclasses.field(metadata={"static": True})
    length: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the kernel of a linear: `[*lead, K, N]`."""
        return (*self.groups.shape[:-3], self.length, self.count)

    @property
    def rows(self) -> int:
        """Filled up."""
        return self.groups.shape[-2] * TILE_N

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
        groups=grouped(
            _words(codes.reshape(-1, tiles, TILE_K // 8, 8)),
            _joined_bytes(metadata.transpose(0, 1, 3, 2)),
        ),
        scales=jnp.pad(row_scales(exponents, bad=jnp.nan), (0, more)),
        format=q.format,
        count=count,
        length=q.length,
    )


def grouped(words: jax.Array, metadata: jax.Array) -> jax.Array:
    """Words `[rows, tiles, 16]` and metadata `[rows, tiles, halves]`, as the kernel reads them.

    A lane takes its rows and words of two steps at once, a quarter of its warp those of a row.
    """
    tiles, halves = metadata.shape[1:]
    words = words.reshape(-1, *ROWS_OF_GROUP, tiles, STEPS // 2, 2, 4)
    words = words.transpose(4, 0, 5, 1, 3, 7, 6, 2)
    metadata = metadata.reshape(-1, *ROWS_OF_GROUP, tiles, halves).transpose(4, 0, 1, 3, 5, 2)
    parts = [part.reshape(*part.shape[:2], -1) for part in (words, metadata)]
    return jnp.concatenate(parts, axis=-1)


def ungrouped(group: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The inverse for one group: words `[64, 16]` and metadata `[64, halves]`."""
    warps, eights, lanes = ROWS_OF_GROUP
    words = group[:WORDS].reshape(STEPS // 2, warps, lanes, 4, 2, eights)
    metadata = group[WORDS:].reshape(warps, lanes, -1, eights)
    return (
        words.transpose(1, 5, 2, 0, 4, 3).reshape(TILE_N, -1),
        metadata.transpose(0, 3, 1, 2).reshape(TILE_N, -1),
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
