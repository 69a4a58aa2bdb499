"""A quantised checkpoint becomes the tensors that it was made of, dequantised, block by block.

No more than the leaves of one tensor, as they are stored, and the tensor of one block are in
memory.
"""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

import sdq
from models.common.source_table import Table, structs
from models.common.weights import Source, undo
from sdq.rules import is_qtensor
from sdq.tensor_writer import nbytes_of, write_tensors


@dataclasses.dataclass(frozen=True, slots=True)
class Group:
    """Tensors of one name but for the block's number, and the leaves that were made of them."""

    tensors: dict[str, jax.ShapeDtypeStruct]  # in the order of blocks
    leaves: tuple[str, ...]


def groups_of(
    shapes: Mapping[str, tuple[int, ...]], sources: Mapping[str, Source], table: Table
) -> list[Group]:
    """What there is to write.

    Args:
      shapes: of the leaves, by path.
      sources: of every leaf of the model.
      table: of all tensors.
    Raises:
      ValueError: leaves or tensors are not those of the sources.
    """
    if shapes.keys() != sources.keys():
        differ = ", ".join(sorted(shapes.keys() ^ sources.keys())[:3])
        raise ValueError(f"leaves are not those of the model: {differ}, ...")
    leaves: dict[str, list[str]] = {}
    for path, source in sources.items():
        leaves.setdefault(source.name, []).append(path)
    try:
        return [
            Group(structs(table, sources[first], (*shapes[first], 1)[0]), (first, *rest))
            for first, *rest in leaves.values()
        ]
    except KeyError as error:
        raise ValueError(f"the table does not tell of tensor {error}") from None


def dequantize_files(
    read: Callable[[str], Any],
    groups: list[Group],
    sources: Mapping[str, Source],
    out: str | os.PathLike,
    *,
    metadata: Mapping[str, str],
    stem: str,
    shard_size: int | None = None,
    on_tensor: Callable[[str, int], None] = lambda name, nbytes: None,
) -> list[pathlib.Path]:
    """Write the tensors as safetensors, in their own names, shapes and dtypes.

    Args:
      read: a leaf, an array or a QTensor, by its path; called once for each.
      groups: from `groups_of`.
      sources: of every leaf, by path.
      out: a .safetensors file, or a folder, new or empty.
      metadata: for the header of every file.
      stem: of the names of files in a folder.
      shard_size: most bytes in a file of a folder.
      on_tensor: called with the name and bytes of each tensor that was written.
    Returns:
      The files; the one to open comes first.
    Raises:
      ValueError: `out` is there already, or leaves of other shapes.
      OSError: no space, no permission; nothing is left.
    """

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for group in groups:
            leaves = {path: jax.tree.map(np.asarray, read(path)) for path in group.leaves}
            for number, (name, wanted) in enumerate(group.tensors.items()):
                tensor, filled = np.empty(wanted.shape, wanted.dtype), 0
                for path, leaf in leaves.items():
                    part = _dequantised(leaf, number if sources[path].is_stacked else None)
                    undo(sources[path].layout, part, tensor)
                    filled += part.size
                if filled != tensor.size:
                    raise ValueError(f"{name}: {filled} of {tensor.size} numbers are known")
                yield name, tensor

    return write_tensors(
        out,
        {name: struct for group in groups for name, struct in group.tensors.items()},
        tensors(),
        metadata=metadata,
        stem=stem,
        shard_size=shard_size,
        on_tensor=on_tensor,
    )


def nbytes_of_groups(groups: list[Group]) -> int:
    """Of all tensors."""
    return sum(nbytes_of(struct) for group in groups for struct in group.tensors.values())


def _dequantised(leaf: Any, block: int | None) -> np.ndarray:
    """A leaf on the host, or one block of it, as a plain array."""
    part = leaf if block is None else jax.tree.map(lambda array: array[block], leaf)
    if not is_qtensor(part):
        return part
    return np.moveaxis(np.asarray(_in_stored_order(part)), -1, part.axis)


@jax.jit
def _in_stored_order(q: sdq.QTensor) -> jax.Array:
    """With the quantised axis last, which is how linears lie in checkpoints: no transposition."""
    return sdq.dequantize(dataclasses.replace(q, axis=-1))
