"""A checkpoint's named tensors become a parameter tree: strictly, leaf by leaf."""

import dataclasses
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdq.rules import path_of
from sdq.tensor_files import TensorFiles

Layout = Callable[[np.ndarray], np.ndarray]

_BLOCK = re.compile(r"(blocks\.)(\d+)\.")  # of all that is stacked


def as_stored(tensor: np.ndarray) -> np.ndarray:
    """No change."""
    return tensor


def transposed(tensor: np.ndarray) -> np.ndarray:
    """A linear's `[out, in]` -> a kernel `[in, out]`."""
    return tensor.T


def without_batch(tensor: np.ndarray) -> np.ndarray:
    """`[1, ...]` -> `[...]`."""
    return tensor[0]


def patch_kernel(tensor: np.ndarray) -> np.ndarray:
    """A convolution over patches, `[out, C, pt, ph, pw]` -> `[pt * ph * pw * C, out]`."""
    return tensor.transpose(2, 3, 4, 1, 0).reshape(-1, len(tensor))


def in_turn(*layouts: Layout) -> Layout:
    """One layout after the other."""

    def all_of_them(tensor: np.ndarray) -> np.ndarray:
        for layout in layouts:
            tensor = layout(tensor)
        return tensor

    return all_of_them


def undo(layout: Layout, part: np.ndarray, tensor: np.ndarray) -> None:
    """The inverse of a layout: set those elements of `tensor` that it makes `part` of.

    A layout only moves elements and leaves some out, so it says itself where each belongs: most
    are views, into which one can write; the others are shown the elements' numbers.
    """
    view = layout(tensor)
    if view.shape != part.shape:
        raise ValueError(f"expected {list(view.shape)}, got {list(part.shape)}")
    if np.may_share_memory(view, tensor):
        view[...] = part
    else:
        numbers = layout(np.arange(tensor.size).reshape(tensor.shape))
        tensor.reshape(-1)[numbers] = part


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """Where a leaf comes from.

    Attributes:
      name: of the tensor; "{}" stands for a block's number, and the blocks are stacked on axis 0.
      layout: from the tensor as it is stored to the leaf.
    """

    name: str
    layout: Layout = as_stored

    def names(self, blocks: int) -> list[str]:
        """The tensors that make the leaf."""
        return [self.name.format(n) for n in range(blocks)] if self.is_stacked else [self.name]

    @property
    def is_stacked(self) -> bool:
        """Whether there is one for each block."""
        return "{}" in self.name


def params_from_tensors(
    tensors: TensorFiles,
    sources: Mapping[str, Source],
    abstract: Any,
    *,
    ignored: Collection[str] = (),
    leaf: Callable[[str, jax.Array], Any] = lambda path, array: array,
) -> Any:
    """Read every leaf of a tree; every tensor must be used once and every leaf filled.

    Args:
      tensors: an open checkpoint.
      sources: of every leaf, by path.
      abstract: the tree of shapes; dtypes stay as they are stored.
      ignored: names (with "{}" for a block's number) that may be there and are not read.
      leaf: what becomes of a leaf once it is read, `(path, array) -> leaf`. Here a large model is
        cast, sharded or quantised without ever being in memory whole.
    Returns:
      A tree like `abstract`.
    Raises:
      ValueError: names or shapes differ (one error that lists all differences), or NaN or Inf.
    """
    check(tensors, sources, abstract, ignored)

    def read(keys, shape):
        path = path_of(keys)
        parts = list(parts_of(tensors, sources[path], shape.shape[0] if shape.shape else 1))
        return leaf(path, jnp.stack(parts) if sources[path].is_stacked else parts[0])

    return jax.tree_util.tree_map_with_path(read, abstract)


def check(
    tensors: TensorFiles,
    sources: Mapping[str, Source],
    abstract: Any,
    ignored: Collection[str] = (),
) -> None:
    """Raise a ValueError that lists all names and shapes that differ, as `params_from_tensors`."""
    expected = {path_of(keys): x for keys, x in jax.tree_util.tree_leaves_with_path(abstract)}
    if unmapped := expected.keys() ^ sources.keys():
        raise ValueError(f"sources do not fit the tree: {sorted(unmapped)}")
    if problems := _differences(tensors, sources, expected, ignored):
        raise ValueError(
            f"{tensors.where}: not a checkpoint of this model:\n  " + "\n  ".join(problems)
        )


def parts_of(tensors: TensorFiles, source: Source, blocks: int) -> Iterator[jax.Array]:
    """What a leaf consists of, one block after the other.

    Raises:
      ValueError: NaN or Inf; lists every tensor of the checkpoint that holds any.
    """
    for name in source.names(blocks):
        on_device: Any = jnp.asarray(tensors[name])  # which rearranges faster
        array = jnp.asarray(source.layout(on_device))
        if not jnp.isfinite(array).all():
            every = [name for name in tensors if not _is_finite(tensors[name])]
            raise ValueError(f"{tensors.where}: NaN or Inf in {', '.join(every)}")
        yield array


def _is_finite(tensor: np.ndarray) -> bool:
    return bool(jnp.isfinite(jnp.asarray(tensor)).all())


def _differences(
    tensors: TensorFiles,
    sources: Mapping[str, Source],
    expected: Mapping[str, jax.ShapeDtypeStruct],
    ignored: Collection[str],
) -> list[str]:
    """One line for each difference, the same difference of many blocks in one line."""
    found: dict[str, list[str]] = {}  # what is wrong -> the names
    used = set()
    for path, source in sources.items():
        shape = expected[path].shape
        wanted = shape[1:] if "{}" in source.name else shape
        for name in source.names(shape[0]):
            used.add(name)
            if name not in tensors:
                found.setdefault(f"- {_folded(name)}: missing", []).append(name)
                continue
            stored = tensors.shape(name)
            if (got := _shape_after(source.layout, stored)) != wanted:
                what = f"! {_folded(name)}: expected {list(wanted)}, got {list(got or stored)}"
                found.setdefault(what, []).append(name)
    for name in tensors.keys() - used:
        if _folded(name) not in ignored:
            found.setdefault(f"+ {_folded(name)}: not a weight of this model", []).append(name)
    return sorted(
        what + (f" (blocks {_ranges(names)})" if "{}" in what else "")
        for what, names in found.items()
    )


def _folded(name: str) -> str:
    """The name with "{}" for a block's number: blocks.3.ffn.0.weight -> blocks.{}.ffn.0.weight."""
    return _BLOCK.sub(r"\1{}.", name, count=1)


def _ranges(names: list[str]) -> str:
    """The numbers that `_folded` took out, as "0-3, 7"."""
    numbers = sorted({int(found[2]) for name in names if (found := _BLOCK.search(name))})
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _shape_after(layout: Layout, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape that a layout gives; None if the tensor has too few axes for it."""
    try:
        return layout(np.broadcast_to(np.int8(0), shape)).shape
    except (ValueError, IndexError, TypeError):
        return None
