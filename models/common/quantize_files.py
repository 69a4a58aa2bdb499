"""A checkpoint's tensors become a quantised checkpoint, block by block.

Of a leaf only the 4-bit numbers are in memory as a whole, while they are written more than once,
beside the tensor of one block; a job that was killed goes
on with the leaf that it was at.
"""

import functools
import os
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sdq
from models.common.recipes import Recipe, plan
from models.common.source_table import TENSORS, table_of
from models.common.weights import Source, check, parts_of
from sdq.checkpoint_stream import Made, save_leaves
from sdq.rules import LeafPlan, Plan, path_of
from sdq.tensor_files import TensorFiles
from sdq.tree import LeafReport


def quantize_files(
    tensors: TensorFiles,
    sources: Mapping[str, Source],
    abstract: Any,
    recipe: Recipe,
    out: str | os.PathLike,
    *,
    sites: Collection[str],
    ignored: Collection[str] = (),
    metadata: dict[str, Any] | None = None,
    on_part: Callable[[str, int], None] = lambda path, nbytes: None,
    on_leaf: Callable[[LeafReport], None] = lambda report: None,
) -> None:
    """Quantise the weights of a recipe and save them, with those that it keeps.

    Args:
      tensors: an open checkpoint.
      sources: of every leaf, by path.
      abstract: the tree of shapes.
      recipe: whose weights are rounded as they are; what it does to inputs needs nothing here.
      out: folder of the checkpoint.
      sites: of the model's inputs.
      ignored: names that may be there and are not read.
      metadata: for the manifest, which also gets `TENSORS`, what was read (`source_table.py`).
      on_part: called with a leaf's path and the bytes that were read of it, also of leaves that an
        earlier run has left.
      on_leaf: called after each leaf.
    Raises:
      ValueError: the recipe does not fit or needs the model to run, `out` holds another job, or
        names, shapes or numbers are wrong: before anything is written, but for NaN and Inf.
    """
    if recipe.needs_scan or any(rule.rotate for rule in recipe.inputs):
        raise ValueError(
            f"recipe {recipe.name!r} prepares weights by what the model does with them; "
            "here they are rounded one by one"
        )
    check(tensors, sources, abstract, ignored)
    planned = _plan(tensors, sources, abstract, recipe, sites)
    depths = {path: leaf.shape[0] for path, leaf in planned.leaves.items() if leaf.shape}
    metadata = {**(metadata or {}), TENSORS: table_of(tensors, sources, depths)}
    makers = {
        path: functools.partial(
            _made, tensors, sources[path], leaf, functools.partial(on_part, path)
        )
        for path, leaf in planned.leaves.items()
    }

    def finished(report: LeafReport, was_there: bool) -> None:
        if was_there:
            on_part(report.path, report.bytes_before)
        on_leaf(report)

    job = {
        "source": str(tensors.where.resolve()),
        "changed": tensors.changed,
        "plan": planned.to_json(),
        "sdq": sdq.__version__,
    }
    save_leaves(out, makers, job=job, metadata=metadata, on_leaf=finished)


def _plan(
    tensors: TensorFiles,
    sources: Mapping[str, Source],
    abstract: Any,
    recipe: Recipe,
    sites: Collection[str],
) -> Plan:
    """With the dtypes that are stored."""

    def stored(keys: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        first = sources[path_of(keys)].names(1)[0]
        return jax.ShapeDtypeStruct(leaf.shape, tensors.dtype(first))

    return plan(jax.tree_util.tree_map_with_path(stored, abstract), recipe, sites)


def _made(
    tensors: TensorFiles, source: Source, planned: LeafPlan, on_part: Callable[[int], None]
) -> Made:
    """A leaf on the host, and its SQNR."""
    parts, powers = [], np.zeros(2)
    for array in parts_of(tensors, source, planned.shape[0] if planned.shape else 1):
        part: Any = array
        if planned.format is not None:
            part = sdq.quantize(array, planned.format, axis=planned.axis, select=planned.select)
            powers += [float(power) for power in _powers(array, part)]
        parts.append(jax.device_get(part))
        on_part(array.nbytes)
    leaf = jax.tree.map(lambda *each: np.stack(each), *parts) if source.is_stacked else parts[0]
    if planned.format is None:
        return leaf, None
    signal, noise = powers
    return leaf, float("inf") if noise == 0 else float(10 * np.log10(signal / noise))


@jax.jit
def _powers(x: jax.Array, q: sdq.QTensor) -> tuple[jax.Array, jax.Array]:
    """Of an array, and of its error."""
    x = x.astype(jnp.float32)
    return jnp.sum(jnp.square(x)), jnp.sum(jnp.square(x - sdq.dequantize(q, jnp.float32)))
