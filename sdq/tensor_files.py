"""safetensors files: read lazily, single or sharded; written atomically; bfloat16 as it is."""

import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


class TensorFiles(Mapping[str, np.ndarray]):
    """The tensors of some safetensors files by name, each read from disk when it is asked for."""

    def __init__(self, where: pathlib.Path, files: Mapping[str, pathlib.Path]):
        self.where = where  # for messages
        self._files = dict(files)  # name -> file
        self._open = {path: _opened(path) for path in dict.fromkeys(files.values())}

    def __getitem__(self, name: str) -> np.ndarray:
        # Opened anew, so that what was read does not stay mapped into memory.
        return _opened(self._files[name]).get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __contains__(self, name: object) -> bool:  # Mapping's own would read the tensor
        return name in self._files

    @property
    def stem(self) -> str:
        """The file's name, or that of the index, without its endings."""
        return self.where.name.removesuffix(".index.json").removesuffix(".safetensors")

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata of all files, merged."""
        merged: dict[str, str] = {}
        for file in self._open.values():
            merged |= file.metadata() or {}
        return merged

    @property
    def changed(self) -> dict[str, int]:
        """When each file was changed last, in nanoseconds."""
        return {path.name: path.stat().st_mtime_ns for path in self._open}

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        return tuple(self._open[self._files[name]].get_slice(name).get_shape())

    def nbytes(self, name: str) -> int:
        """A tensor's bytes, likewise."""
        return math.prod(self.shape(name)) * self.dtype(name).itemsize

    def dtype(self, name: str) -> np.dtype:
        """A tensor's dtype, likewise."""
        stored = self._open[self._files[name]].get_slice(name).get_dtype()
        try:
            return DTYPES[stored]
        except KeyError:
            raise ValueError(f"{self._files[name]}: {name}: numbers of type {stored}") from None


def open_tensors(path: str | os.PathLike) -> TensorFiles:
    """Open a .safetensors file, an .index.json of shards, or a folder that holds either.

    Raises:
      FileNotFoundError: nothing there, or a shard that the index names is missing.
      ValueError: a file is damaged or no safetensors file, or the index and a shard disagree.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        path = _only_candidate(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix != ".json":
        return TensorFiles(path, dict.fromkeys(_opened(path).keys(), path))
    try:
        shards = json.loads(path.read_text())["weight_map"].items()
        files = {name: path.parent / shard for name, shard in shards}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not an index of safetensors shards ({error!r})") from None
    if missing := sorted({str(file) for file in files.values() if not file.exists()}):
        raise FileNotFoundError(f"{path}: shards are missing: {', '.join(missing)}")
    tensors = TensorFiles(path, files)
    for file in dict.fromkeys(files.values()):
        listed = {name for name, where in files.items() if where == file}
        held = set(_opened(file).keys())
        if listed != held:
            raise ValueError(
                f"{path} and {file.name} disagree:\n  "
                + "\n  ".join(
                    [f"- {name}: listed, not in the shard" for name in sorted(listed - held)]
                    + [f"+ {name}: in the shard, not listed" for name in sorted(held - listed)]
                )
            )
    return tensors


def save_tensors(
    tensors: Mapping[str, np.ndarray],
    path: str | os.PathLike,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write one file: the old or the new one is there at any time, never a part.

    Raises:
      OSError: it cannot be written (no space, no permission); names the file.
    """
    path = pathlib.Path(path)
    part = path.with_name(f".{path.name}.part")
    tensors = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        safetensors.numpy.save_file(tensors, part, dict(metadata or {}))
        os.replace(part, path)
    except (OSError, safetensors.SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error}") from error


def _opened(path: pathlib.Path):
    try:
        return safetensors.safe_open(path, "numpy").__enter__()
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: damaged or no safetensors file ({error})") from None


def _only_candidate(folder: pathlib.Path) -> pathlib.Path:
    """The index in a folder, else its only .safetensors file."""
    for pattern in ("*.safetensors.index.json", "*.safetensors"):
        found = sorted(folder.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(file.name for file in found)
            raise ValueError(f"{folder}: several candidates ({names}); name one of them")
    raise FileNotFoundError(f"{folder}: holds no .safetensors file")
