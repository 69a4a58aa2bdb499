"""QTensor: a quantised array as a frozen pytree.

How codes and scales are computed is not here (`quantize.py`, `codecs/`).
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdq import packing
from sdq.codecs import Encoded, codec
from sdq.formats import Format


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("codes", "scales", "outer"),
    meta_fields=("format", "length", "axis", "dtype"),
)
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class QTensor:
    """An array quantised in blocks along one axis.

    The quantised axis is stored last; the other axes keep their order. With `lead` the other axes,
    K the logical length, b the block (K itself for row-wise formats) and G = ceil(K / b):

    Invariants (`validate` checks each):
      1. codes   uint8 `[*lead, ceil(G b / 2)]`, two 4-bit codes a byte, low nibble first;
                 int8 `[*lead, G b]` for int8
      2. scales  `[*lead, G]`: uint8 bytes (dialect metadata, E8M0 or E4M3 bits) or bfloat16
                 (integers, nf4)
      3. outer   row exponents int8 `[*lead, 1]` (dialects), matrix scales float32
                 `[*lead[:-1], 1, 1]` (nvfp4; `[1]` for a vector), or None;
                 all arrays have the rank of the logical array
      4. padding elements K..G b encode zero
      5. axis is negative, so that vmap and scan over leading axes leave it valid
      6. a row that held NaN or Inf dequantises to NaN throughout
      7. codes and scales are ones that the format can produce
    """

    codes: jax.Array
    scales: jax.Array
    outer: jax.Array | None
    format: Format
    length: int
    axis: int
    dtype: np.dtype

    @property
    def ndim(self) -> int:
        """Rank of the logical array."""
        return len(self.codes.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the logical array."""
        shape = list(self.codes.shape[:-1])
        shape.insert(self.ndim + self.axis, self.length)
        return tuple(shape)

    @property
    def size(self) -> int:
        """Elements of the logical array."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes stored: codes, scales and outer scales."""
        return sum(math.prod(part.shape) * part.dtype.itemsize for part in self.parts.values())

    @property
    def bits_per_element(self) -> float:
        """Bits stored for a logical element, scales and padding included; NaN if empty."""
        return 8 * self.nbytes / self.size if self.size else math.nan

    @property
    def parts(self) -> dict[str, jax.Array]:
        """The stored arrays by field name."""
        fields = {"codes": self.codes, "scales": self.scales, "outer": self.outer}
        return {name: part for name, part in fields.items() if part is not None}

    def __repr__(self) -> str:
        return (
            f"QTensor({self.format.name}, shape={self.shape}, axis={self.axis}, "
            f"dtype={self.dtype.name})"
        )


def pack(encoded: Encoded, *, fmt: Format, length: int, axis: int, dtype) -> QTensor:
    """Blocked codes `[..., G, b]` to the stored form."""
    codes = joined(encoded.codes)
    if fmt.element_bits == 4:
        odd = codes.shape[-1] % 2
        codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, odd)])
        codes = packing.pack_nibbles(codes)
    return QTensor(
        codes=codes,
        scales=encoded.scales,
        outer=encoded.outer,
        format=fmt,
        length=length,
        axis=axis,
        dtype=np.dtype(dtype),
    )


def unpack(q: QTensor) -> Encoded:
    """The inverse of pack: blocked codes `[..., G, b]`, the quantised axis last."""
    codes = packing.unpack_nibbles(q.codes) if q.format.element_bits == 4 else q.codes
    groups, block = blocks_of(q.length, q.format)
    codes = codes[..., : groups * block]
    return Encoded(
        codes=codes.reshape(*codes.shape[:-1], groups, block),
        scales=q.scales,
        outer=q.outer,
    )


def joined(blocks: jax.Array) -> jax.Array:
    """`[..., G, block]` -> `[..., G * block]`."""
    groups, block = blocks.shape[-2:]
    return blocks.reshape(*blocks.shape[:-2], groups * block)


def blocks_of(length: int, fmt: Format) -> tuple[int, int]:
    """(G, block) of an axis: as many blocks as cover it, or one block if the format is row-wise."""
    block = fmt.block or max(length, 1)
    return -(-length // block), block


def validate(q: QTensor) -> None:
    """Check every invariant of QTensor; abstract arrays (`jax.eval_shape`) get the structural ones.

    Raises:
      ValueError: naming the first invariant that is broken, with what was expected and what came.
    """
    expected = expected_parts(q.format, q.codes.shape[:-1], q.length, has_outer=q.outer is not None)
    if not -q.ndim <= q.axis < 0:
        raise ValueError(f"axis: expected in [-{q.ndim}, -1], got {q.axis}")
    if q.format.outer is not None and q.outer is None:
        raise ValueError(f"outer: {q.format} needs outer scales, got None")
    if q.format.outer is None and q.outer is not None:
        raise ValueError(f"outer: {q.format} has no outer scales, got an array")
    for name, want in expected.items():
        got = q.parts[name]
        if got.shape != want.shape or got.dtype != want.dtype:
            raise ValueError(
                f"{name}: expected {want.dtype}{list(want.shape)} for {q!r}, "
                f"got {got.dtype}{list(got.shape)}"
            )
    if isinstance(q.codes, jax.ShapeDtypeStruct | jax.core.Tracer):
        return
    if found := [words for words, holds in _problems(q).items() if holds]:
        raise ValueError(f"{q!r}: {'; '.join(found)}")


@jax.jit
def _problems(q: QTensor) -> dict[str, jax.Array]:
    """Which impossible contents the arrays hold, by description."""
    encoded = unpack(q)
    padding = joined(codec(q.format).decode(encoded, q.format))[..., q.length :]
    return {
        **codec(q.format).problems(encoded, q.format),
        f"padding beyond element {q.length} does not encode zero": jnp.any(
            (padding != 0) & ~jnp.isnan(padding)
        ),
    }


def expected_parts(
    fmt: Format, lead: tuple[int, ...], length: int, *, has_outer: bool = True
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every array of a QTensor with these other axes and logical length."""
    groups, block = blocks_of(length, fmt)
    narrow = fmt.element_bits == 4
    width = -(-groups * block // 2) if narrow else groups * block
    byte_scales = fmt.scale_bits == 8
    parts = {
        "codes": jax.ShapeDtypeStruct((*lead, width), jnp.uint8 if narrow else jnp.int8),
        "scales": jax.ShapeDtypeStruct((*lead, groups), jnp.uint8 if byte_scales else jnp.bfloat16),
    }
    if fmt.outer == "row":
        parts["outer"] = jax.ShapeDtypeStruct((*lead, 1), jnp.int8)
    if fmt.outer == "matrix":
        ones = (*lead[:-1], 1, 1) if lead else (1,)
        parts["outer"] = jax.ShapeDtypeStruct(ones, jnp.float32)
    return parts


def shardings(q: QTensor, sharding: jax.sharding.NamedSharding) -> Any:
    """How to shard each stored array, given a sharding of the logical array.

    Args:
      q: a QTensor, concrete or abstract.
      sharding: of the logical shape.
    Returns:
      A QTensor of NamedShardings, for `jax.device_put`, `jax.jit` or `load`. Outer scales are
      replicated along the axes they span.
    Raises:
      ValueError: the quantised axis is sharded so that a device would hold part of a block.
    """
    mesh, spec = sharding.mesh, list(sharding.spec)
    spec += [None] * (q.ndim - len(spec))
    spec.append(spec.pop(q.ndim + q.axis))  # the quantised axis is stored last
    names = spec[-1] if isinstance(spec[-1], tuple) else (spec[-1],)
    pieces = math.prod(mesh.shape[name] for name in names if name is not None)
    if q.scales.shape[-1] % pieces:
        raise ValueError(
            f"{q!r}: {q.scales.shape[-1]} blocks cannot be split over {pieces} devices; "
            f"shard another axis or use a smaller block"
        )

    def of(part: jax.Array) -> jax.sharding.NamedSharding:
        full = part.shape[:-1] == q.codes.shape[:-1] and part.shape[-1] != 1
        kept = [s if full or n != 1 else None for s, n in zip(spec, part.shape, strict=True)]
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*kept))

    return jax.tree.map(of, q)
