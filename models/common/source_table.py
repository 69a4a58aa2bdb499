"""What tensors a quantised checkpoint was made of, small enough for its metadata.

    {"blocks.{}.ffn.0.weight": ["bfloat16", [8960, 1536]], "head.head.bias": ...}

"{}" stands for the number of any block, where all blocks agree; else each has a line.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from models.common.weights import Source
from sdq.tensor_files import TensorFiles

TENSORS = "tensors"  # where it is in the metadata
Table = dict[str, list[Any]]  # name -> [dtype, shape]


def table_of(
    tensors: TensorFiles, sources: Mapping[str, Source], blocks: Mapping[str, int]
) -> Table:
    """Of the tensors that are read; `blocks` says how many make each stacked leaf."""
    table: Table = {}
    for path, source in sources.items():
        rows = {
            name: [tensors.dtype(name).name, list(tensors.shape(name))]
            for name in source.names(blocks.get(path, 1))
        }
        first, *rest = rows.values()
        table |= {source.name: first} if all(row == first for row in rest) else rows
    return table


def structs(table: Table, source: Source, blocks: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Name, shape and dtype of the tensors that make a leaf, in the order of blocks.

    Raises:
      KeyError: the table has no such tensor.
    """
    found = {}
    for name in source.names(blocks):
        dtype, shape = table[name] if name in table else table[source.name]
        found[name] = jax.ShapeDtypeStruct(tuple(shape), np.dtype(dtype))
    return found
