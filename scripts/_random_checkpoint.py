"""Checkpoints of published models with random numbers: in memory, or as shards."""

import math
import pathlib
import zlib
from collections import defaultdict
from collections.abc import Iterator

import jax
import ml_dtypes
import numpy as np

from models.common.weights import Source
from models.families import family_of
from sdq.rules import path_of
from sdq.tensor_files import TensorFiles
from sdq.tensor_writer import write_tensors

POOL = 1 << 27  # numbers; all tensors are cut from them, most without a copy
BF16 = np.dtype(ml_dtypes.bfloat16)


class RandomTensors(TensorFiles):
    """bf16 tensors of a model in a key layout, as if they had been opened."""

    def __init__(self, model: str, layout: str):
        self.where = pathlib.Path(f"{model}, random")
        self._shapes = shapes_of(model, layout)
        pool = np.random.default_rng(0).standard_normal(POOL, np.float32)
        self._pool = (0.02 * pool).astype(BF16)

    def __getitem__(self, name: str) -> np.ndarray:
        shape = self._shapes[name]
        pool, count = self._pool[zlib.crc32(name.encode()) % 997 :], math.prod(shape)
        return (pool[:count] if count <= len(pool) else np.resize(pool, count)).reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def __contains__(self, name: object) -> bool:
        return name in self._shapes

    @property
    def changed(self) -> dict[str, int]:
        """Never."""
        return {}

    @property
    def stem(self) -> str:
        """Of files that it might have."""
        return "random"

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""
        return self._shapes[name]

    def dtype(self, name: str) -> np.dtype:
        """bf16."""
        del name
        return BF16


def shapes_of(model: str, layout: str) -> dict[str, tuple[int, ...]]:
    """Of every tensor of a checkpoint, by name."""
    family = family_of(model)
    config = family.sizes[model]
    abstract = family.params.abstract_params(config)
    leaves = {path_of(keys): x.shape for keys, x in jax.tree_util.tree_leaves_with_path(abstract)}
    made: dict[str, list[tuple[Source, tuple[int, ...]]]] = defaultdict(list)  # of each template
    sources = family.params.sources(config, layout)
    for path, source in sources.items():
        shape = leaves[path][1:] if source.is_stacked else leaves[path]
        made[source.name].append((source, shape))
    blocks = {source.name: leaves[path][0] for path, source in sources.items()}
    found = {}
    for parts in made.values():
        shape = _stored(parts, (config.in_channels, *config.patch))
        for name in parts[0][0].names(blocks[parts[0][0].name]):
            found[name] = shape
    return found


def _stored(parts: list[tuple[Source, tuple[int, ...]]], patch: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of which every part's layout makes its leaf."""
    first, outputs = parts[0][1], sum(shape[-1] for _, shape in parts)
    candidates = [(outputs, *first[:-1]), (outputs,), first, (1, *first), (outputs, *patch)]
    for shape in candidates:
        tensor = np.broadcast_to(np.int8(0), shape)
        try:
            if all(source.layout(tensor).shape == leaf for source, leaf in parts):
                return shape
        except (ValueError, IndexError):
            continue
    raise ValueError(f"{parts[0][0].name}: no known shape makes {[leaf for _, leaf in parts]}")


def write(model: str, layout: str, folder: pathlib.Path) -> None:
    """Shards with an index."""
    tensors = RandomTensors(model, layout)
    structs = {name: jax.ShapeDtypeStruct(tensors.shape(name), BF16) for name in tensors}
    write_tensors(folder, structs, ((name, tensors[name]) for name in tensors), metadata={})
