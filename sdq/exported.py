"""export and load_export: a quantised tree as safetensors, for programs that do not know Orbax.

Each array of a leaf is a tensor: `<leaf>.codes`, `<leaf>.scales`, `<leaf>.outer`; of a leaf that
was kept, `<leaf>`. The metadata of every file holds the manifest of the whole under METADATA.
docs/safetensors.md says what is in which byte.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdq import checkpoint, rules
from sdq.manifest import CheckpointError, LeafEntry, Manifest, manifest_from, to_document
from sdq.manifest import read_manifest as read_saved
from sdq.tensor_files import TensorFiles, open_tensors
from sdq.tensor_writer import Structs, bytes_of, nbytes_of, write_tensors

METADATA = "sdq"
REMEDY = "copy it again from where it is whole, or export again"


def export(
    source: Any,
    out: str | os.PathLike,
    *,
    metadata: dict[str, Any] | None = None,
    shard_size: int | None = None,
    on_part: Callable[[str, int], None] = lambda name, nbytes: None,
) -> list[pathlib.Path]:
    """Write a checkpoint, leaf by leaf, or a tree as safetensors.

    Args:
      source: the folder that `save` wrote, or a tree of arrays and QTensors.
      out: a .safetensors file, or a folder, new or empty.
      metadata: anything JSON can hold. Default: the checkpoint's.
      shard_size: most bytes in a file of a folder (default: 5e9).
      on_part: called with the name and bytes of each tensor that was written.
    Returns:
      The files; the one to open comes first.
    Raises:
      CheckpointError: the checkpoint cannot be read.
      ValueError: `out` is there already, or a dtype that safetensors files do not hold.
      OSError: no space, no permission; nothing is left.
    """
    entries: tuple[LeafEntry, ...]
    if isinstance(source, str | os.PathLike):
        manifest = read_saved(source)
        entries, metadata = manifest.leaves, manifest.metadata if metadata is None else metadata
    else:
        leaves = rules.flatten(source)
        entries = tuple(checkpoint.entries(leaves, {})[0])

    def read(entry: LeafEntry) -> Any:
        if isinstance(source, str | os.PathLike):
            return checkpoint.read_leaf(source, manifest, entry)
        return leaves[entry.path]

    named = [_with_tensor_names(entry) for entry in entries]
    structs: dict[str, jax.ShapeDtypeStruct] = {}
    for entry in named:
        for name, struct in _structs(entry, out).items():
            if name in structs:
                raise ValueError(f"export: two arrays would be the tensor {name!r}")
            structs[name] = struct

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for entry, renamed in zip(entries, named, strict=True):
            arrays = parts_of(read(entry))
            yield from ((name, np.asarray(arrays[part])) for part, name in renamed.arrays.items())

    def document(digests: Mapping[str, str]) -> dict[str, str]:
        whole = Manifest(
            data="",
            leaves=tuple(named),
            files={name: (nbytes_of(structs[name]), digests[name]) for name in structs},
            written_by=checkpoint.versions(),
            metadata=metadata or {},
        )
        return {METADATA: json.dumps(to_document(whole), allow_nan=False)}

    return write_tensors(
        out, structs, tensors(), metadata=document, shard_size=shard_size, on_tensor=on_part
    )


def load_export(path: str | os.PathLike, *, verify: bool = True) -> Any:
    """Read a tree that `export` wrote: nested dicts of arrays and QTensors, on the default device.

    Args:
      path: a .safetensors file, an .index.json of shards, or a folder that holds either.
      verify: check the SHA-256 of every tensor.
    Raises:
      FileNotFoundError: no such file.
      CheckpointError: damaged, incomplete, of a newer version, or not written by `export`.
    """
    tensors = open_tensors(path)
    manifest = _manifest(tensors)
    _check(tensors, manifest)
    leaves = {}
    for entry in manifest.leaves:
        arrays = {}
        for name in entry.arrays.values():
            tensor = tensors[name]
            if verify and hashlib.sha256(bytes_of(tensor)).hexdigest() != manifest.files[name][1]:
                raise CheckpointError(
                    f"{tensors.where}: {name} (leaf {entry.path!r}): contents changed (SHA-256); "
                    f"{REMEDY}"
                )
            arrays[name] = jnp.asarray(tensor)
        stored = checkpoint.abstract_leaf(tensors.where, entry)
        leaves[entry.path] = checkpoint.assemble(stored, entry, arrays)
    return checkpoint.nested(leaves)


def read_manifest(path: str | os.PathLike) -> Manifest:
    """What `export` wrote there. Reads no tensors.

    Raises:
      FileNotFoundError: no such file.
      CheckpointError: damaged, or not written by `export`.
    """
    return _manifest(open_tensors(path))


def is_exported(path: str | os.PathLike) -> bool:
    """Whether there are safetensors files, of whatever contents, and no checkpoint of `save`."""
    path = pathlib.Path(path)
    return path.is_file() or any(path.glob("*.safetensors"))


def parts_of(leaf: Any) -> dict[str, Any]:
    """The arrays of a leaf by part."""
    return leaf.parts if rules.is_qtensor(leaf) else {"array": leaf}


def _with_tensor_names(entry: LeafEntry) -> LeafEntry:
    names = {
        part: entry.path if entry.format is None else f"{entry.path}.{part}"
        for part in entry.arrays
    }
    return dataclasses.replace(entry, arrays=names)


def _structs(entry: LeafEntry, where: str | os.PathLike) -> Structs:
    """A leaf's tensors."""
    parts = parts_of(checkpoint.abstract_leaf(where, entry))
    return {name: parts[part] for part, name in entry.arrays.items()}


def _manifest(tensors: TensorFiles) -> Manifest:
    text = tensors.metadata.get(METADATA)
    if text is None:
        raise CheckpointError(
            f"{tensors.where}: not an exported checkpoint: its metadata has no {METADATA!r}"
        )
    return manifest_from(text, tensors.where)


def _check(tensors: TensorFiles, manifest: Manifest) -> None:
    """Every tensor there, as the manifest says; every difference is listed."""
    wanted: dict[str, jax.ShapeDtypeStruct] = {}
    for entry in manifest.leaves:
        wanted |= _structs(entry, tensors.where)
    problems = [f"- {name}: missing" for name in wanted.keys() - tensors.keys()]
    problems += [f"+ {name}: not in the manifest" for name in tensors.keys() - wanted.keys()]
    for name in wanted.keys() & tensors.keys():
        want = (wanted[name].shape, wanted[name].dtype)
        if (got := (tensors.shape(name), tensors.dtype(name))) != want:
            problems.append(
                f"! {name}: expected {want[1].name}{list(want[0])}, got {got[1].name}{list(got[0])}"
            )
    if problems:
        raise CheckpointError(
            f"{tensors.where}: not what was exported; open all shards by their index or folder:\n  "
            + "\n  ".join(sorted(problems))
        )
