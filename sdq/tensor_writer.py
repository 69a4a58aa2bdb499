"""Tensors written one by one into safetensors files, single or sharded, whole or not at all.

    OUT.safetensors                        one file, or in a folder
    OUT/STEM.safetensors                   the same, or above a size
    OUT/STEM-00001-of-00003.safetensors    shards and
    OUT/STEM.safetensors.index.json        which tensor is in which

Headers need no tensors, so that no more than one is in memory; digests of what was written take
their place in the headers at the end.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import math
import os
import pathlib
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import BinaryIO

import jax
import numpy as np

from sdq.files import abandoned, explained, replacing
from sdq.tensor_files import DTYPES

SHARD_SIZE = 5 * 10**9  # bytes
SUFFIX = ".safetensors"
INDEX = ".safetensors.index.json"

Structs = Mapping[str, jax.ShapeDtypeStruct]  # tensors to come, by name
Metadata = Mapping[str, str]

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_NO_DIGEST = "0" * 64


def write_tensors(
    out: str | os.PathLike,
    structs: Structs,
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    metadata: Metadata | Callable[[Mapping[str, str]], Metadata],
    stem: str = "model",
    shard_size: int | None = None,
    on_tensor: Callable[[str, int], None] = lambda name, nbytes: None,
) -> list[pathlib.Path]:
    """Write tensors as they come.

    Args:
      out: a .safetensors file, or a folder, new or empty.
      structs: all tensors. Shards are filled in this order; in a file, tensors lie by falling size
        of their numbers, so that all are aligned.
      tensors: each once, in any order.
      metadata: of every file; or what makes it of the tensors' SHA-256, in as many bytes for any.
      stem: of the names of files in a folder.
      shard_size: most bytes of tensors in a file, but for a tensor that is larger. Default: in a
        folder SHARD_SIZE.
      on_tensor: called with the name and bytes of each tensor that was written.
    Returns:
      The files; the one to open comes first.
    Raises:
      ValueError: `out` is there, a dtype that the files cannot hold, tensors other than `structs`.
      OSError: a file cannot be written; nothing is left.
    """
    out = pathlib.Path(out)
    for name, wanted in structs.items():
        if wanted.dtype not in _NAMES:
            raise ValueError(f"{name}: safetensors files hold no numbers of type {wanted.dtype}")
    shards = _shards(out, stem, structs, shard_size)
    index = out / f"{stem}{INDEX}" if len(shards) > 1 else None
    files = [*([index] if index else []), *(shard.path for shard in shards)]
    _check_new(out, files)
    digests = dict.fromkeys(structs, _NO_DIGEST) if callable(metadata) else {}

    def describe() -> Metadata:
        return metadata(digests) if callable(metadata) else metadata

    with contextlib.ExitStack() as stack:
        if index is not None:
            _write_index(stack.enter_context(replacing(index)), index, shards)  # appears last
        places: dict[str, _Shard] = {}
        for shard in shards:
            shard.file = stack.enter_context(replacing(shard.path))
            shard.write_header(describe())
            places |= dict.fromkeys(shard.structs, shard)
        for name, tensor in tensors:
            if name not in places:
                raise ValueError(f"{name}: no such tensor is to come, or it came already")
            data = places.pop(name).write(name, tensor)
            if name in digests:
                digests[name] = hashlib.sha256(data).hexdigest()
            on_tensor(name, data.nbytes)
        if places:
            raise ValueError(f"tensors that did not come: {', '.join(sorted(places)[:3])}, ...")
        if digests:
            for shard in shards:
                shard.write_header(describe())
    return files


@dataclasses.dataclass(slots=True)
class _Shard:
    """A file with a part of the tensors, by falling size of their numbers."""

    path: pathlib.Path
    structs: dict[str, jax.ShapeDtypeStruct]
    file: BinaryIO = dataclasses.field(default_factory=io.BytesIO)
    starts: dict[str, int] = dataclasses.field(default_factory=dict)  # of each tensor's bytes

    def write_header(self, metadata: Metadata) -> None:
        """Of the same length each time."""
        entries: dict[str, object] = {"__metadata__": dict(metadata)}
        starts, end = {}, 0
        for name, wanted in sorted(self.structs.items(), key=lambda one: -one[1].dtype.itemsize):
            starts[name], end = end, end + nbytes_of(wanted)
            entries[name] = {
                "dtype": _NAMES[wanted.dtype],
                "shape": list(wanted.shape),
                "data_offsets": [starts[name], end],
            }
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # so that what follows is aligned
        header = struct.pack("<Q", len(text)) + text
        starts = {name: len(header) + start for name, start in starts.items()}
        if self.starts not in ({}, starts):
            raise ValueError("metadata must have as many bytes whatever the digests")
        self.starts = starts
        with explained(self.path):
            self.file.seek(0)
            self.file.write(header)

    def write(self, name: str, tensor: np.ndarray) -> memoryview:
        """The bytes that were written."""
        wanted = self.structs[name]
        if (tensor.shape, tensor.dtype) != (wanted.shape, wanted.dtype):
            raise ValueError(
                f"{name}: expected {wanted.dtype.name}{list(wanted.shape)}, "
                f"got {tensor.dtype.name}{list(tensor.shape)}"
            )
        data = bytes_of(tensor)
        with explained(self.path, data.nbytes):
            self.file.seek(self.starts[name])
            self.file.write(data)
        return data


def bytes_of(tensor: np.ndarray) -> memoryview:
    """A tensor's bytes in the order of its axes."""
    return np.asarray(tensor, order="C").reshape(-1).view(np.uint8).data


def nbytes_of(struct: jax.ShapeDtypeStruct) -> int:
    """Of a tensor to come."""
    return math.prod(struct.shape) * struct.dtype.itemsize


def _shards(out: pathlib.Path, stem: str, structs: Structs, shard_size: int | None) -> list[_Shard]:
    """Cut where a file would hold too much; at least one."""
    if out.suffix == SUFFIX:
        if shard_size is not None:
            raise ValueError(f"{out}: one file has no shards; give a folder or no shard size")
        return [_Shard(out, dict(structs))]
    if shard_size is not None and shard_size <= 0:
        raise ValueError(f"shard_size: expected bytes, got {shard_size}")
    parts: list[dict[str, jax.ShapeDtypeStruct]] = [{}]
    held = 0
    for name, wanted in structs.items():
        nbytes = nbytes_of(wanted)
        if parts[-1] and held + nbytes > (shard_size or SHARD_SIZE):
            parts.append({})
            held = 0
        parts[-1][name] = wanted
        held += nbytes
    if len(parts) == 1:
        return [_Shard(out / f"{stem}{SUFFIX}", parts[0])]
    return [
        _Shard(out / f"{stem}-{n:05}-of-{len(parts):05}{SUFFIX}", part)
        for n, part in enumerate(parts, 1)
    ]


def _check_new(out: pathlib.Path, files: Sequence[pathlib.Path]) -> None:
    """Nothing there but what a killed writer has left, which goes."""
    rest = [file for path in files for file in abandoned(path)]
    if out.is_dir() and out.suffix != SUFFIX:
        if not set(out.iterdir()) <= set(rest):
            raise ValueError(f"{out} is not empty; give a new folder or a {SUFFIX} file")
    elif out.exists():
        raise ValueError(f"{out} exists; give another name")
    for file in rest:
        file.unlink(missing_ok=True)


def _write_index(file: BinaryIO, path: pathlib.Path, shards: Sequence[_Shard]) -> None:
    document = {
        "metadata": {"total_size": sum(nbytes_of(x) for s in shards for x in s.structs.values())},
        "weight_map": {name: shard.path.name for shard in shards for name in shard.structs},
    }
    with explained(path):
        file.write((json.dumps(document, indent=1) + "\n").encode())
