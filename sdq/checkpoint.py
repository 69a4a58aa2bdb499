"""save and load: a parameter tree on disk, through Orbax, with a manifest that proves it whole.

    PATH/manifest.json     what every leaf is, and size and SHA-256 of every file
    PATH/data-<n>/         the arrays, one Orbax (zarr3) folder each, so that a damaged file names
                           its leaf; those of a leaf in a folder of their own if they were written
                           leaf by leaf (`checkpoint_stream.py`)

Atomic: a save writes a new data folder first and then replaces the manifest in one rename, so a
killed save leaves the old checkpoint or the new one. What a killed save left behind goes with the
next save.
"""

import concurrent.futures
import contextlib
import dataclasses
import importlib.metadata
import json
import logging
import math
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdq import formats, qtensor, rules
from sdq.files import abandoned
from sdq.manifest import (
    AT_ONCE,
    JOURNAL,
    MANIFEST,
    REMEDY,
    CheckpointError,
    LeafEntry,
    Manifest,
    files_in,
    fingerprint,
    read_manifest,
    verify_files,
    write_manifest,
)
from sdq.qtensor import QTensor
from sdq.tree import LeafReport


def save(
    path: str | os.PathLike,
    params: Any,
    *,
    reports: Iterable[LeafReport] = (),
    metadata: dict[str, Any] | None = None,
) -> None:
    """Write a tree of arrays and QTensors; replaces a checkpoint that is there already.

    Args:
      path: a folder, made if need be. Must not hold anything but a checkpoint.
      params: the tree. Sharded arrays are written by the processes that hold them.
      reports: from `quantize_params`, so that `sdq inspect` can show each leaf's error.
      metadata: anything JSON can hold, for the caller (model name, recipe, ...).
    """
    root = pathlib.Path(path).absolute()
    check_ours(root)
    try:
        json.dumps(metadata)
    except TypeError as error:
        raise ValueError(f"save: metadata: {error}") from None
    leaves = rules.flatten(params)
    described, arrays = entries(leaves, {r.path: r.sqnr_db for r in reports})
    data = root / f"data-{_same_everywhere(next_number(root))}"
    root.mkdir(parents=True, exist_ok=True)
    write_arrays(data, arrays)
    if jax.process_index() == 0:
        files = {name: fingerprint(data / name) for name in files_in(data)}
        finish(root, data, described, files, metadata)


def finish(
    root: pathlib.Path,
    data: pathlib.Path,
    leaves: Iterable[LeafEntry],
    files: dict[str, tuple[int, str]],
    metadata: dict[str, Any] | None,
) -> None:
    """Make what lies in `data` the checkpoint, in one rename, and remove what was before."""
    manifest = Manifest(
        data=data.name,
        leaves=tuple(leaves),
        files=files,
        written_by=versions(),
        metadata=metadata or {},
    )
    write_manifest(root, manifest)
    for old in root.glob("data-*"):
        if old != data:
            shutil.rmtree(old)
    for file in (*abandoned(root / MANIFEST), root / JOURNAL):
        file.unlink(missing_ok=True)


def versions() -> dict[str, str]:
    """Of what writes."""
    return {name: importlib.metadata.version(name) for name in ("sdq", "jax", "orbax-checkpoint")}


def load(path: str | os.PathLike, like: Any = None, *, verify: bool = True) -> Any:
    """Read a tree that `save` wrote.

    Args:
      path: the checkpoint's folder.
      like: a tree of the wanted structure, whose leaves (arrays, ShapeDtypeStructs, or QTensors of
        either) may carry shardings; see `abstract`. Default: nested dicts by path, on the default
        device.
      verify: check size and SHA-256 of every file first.
    Raises:
      CheckpointError: damaged, incomplete, of a newer version, or of a format this sdq does not
        know.
      ValueError: `like` is not the checkpoint's tree; every difference is listed.
    """
    root = pathlib.Path(path).absolute()
    manifest = read_manifest(root)
    stored = {entry.path: abstract_leaf(root / MANIFEST, entry) for entry in manifest.leaves}
    if verify:
        verify_files(root, manifest)
    wanted = stored if like is None else rules.flatten(like)
    _check_like(wanted, stored)
    arrays = _read_arrays(root, manifest, wanted)
    leaves = {entry.path: assemble(stored[entry.path], entry, arrays) for entry in manifest.leaves}
    if like is None:
        return nested(leaves)
    return jax.tree_util.tree_map_with_path(
        lambda keys, _: leaves[rules.path_of(keys)], like, is_leaf=rules.is_qtensor
    )


def read_leaf(path: str | os.PathLike, manifest: Manifest, entry: LeafEntry) -> Any:
    """One leaf of a checkpoint, verified, on the default device.

    Raises:
      CheckpointError: as `load`.
    """
    root = pathlib.Path(path).absolute()
    stored = abstract_leaf(root / MANIFEST, entry)
    verify_files(root, manifest, only=entry.path)
    alone = dataclasses.replace(manifest, leaves=(entry,))
    return assemble(stored, entry, _read_arrays(root, alone, {entry.path: stored}))


def leaf_reports(manifest: Manifest) -> list[LeafReport]:
    """What `quantize_params` reported, for every leaf of a checkpoint."""
    return [leaf_report(entry) for entry in manifest.leaves]


def leaf_report(entry: LeafEntry) -> LeafReport:
    """The same for one."""
    return LeafReport(
        path=entry.path,
        format=None if entry.format is None else formats.parse(entry.format),
        shape=entry.shape,
        dtype=entry.dtype,
        bytes_before=math.prod(entry.shape) * np.dtype(entry.dtype).itemsize,
        bytes_after=entry.nbytes,
        sqnr_db=entry.sqnr_db,
    )


def abstract(path: str | os.PathLike) -> Any:
    """A checkpoint's tree without its numbers: (QTensors of) ShapeDtypeStructs in nested dicts."""
    root = pathlib.Path(path).absolute()
    entries = read_manifest(root).leaves
    return nested({entry.path: abstract_leaf(root / MANIFEST, entry) for entry in entries})


def entries(
    leaves: dict[str, Any], sqnr_db: dict[str, float | None]
) -> tuple[list[LeafEntry], dict[str, jax.Array]]:
    """What a manifest says of leaves, and their arrays by folder name."""
    found: list[LeafEntry] = []
    arrays: dict[str, jax.Array] = {}
    for path, leaf in leaves.items():
        if not rules.is_qtensor(leaf) and not isinstance(leaf, jax.Array | np.ndarray):
            raise ValueError(f"save: leaf {path!r} is no array but {type(leaf).__name__}")
        quantised = rules.is_qtensor(leaf)
        parts = leaf.parts if quantised else {"array": leaf}
        names = {}
        for part, array in parts.items():
            stem = path.replace("/", ".") + (f".{part}" if quantised else "")
            name = stem
            while name in arrays:  # "a.b" beside "a/b"
                name += "_"
            arrays[name], names[part] = array, name
        found.append(
            LeafEntry(
                path=path,
                format=str(leaf.format) if quantised else None,
                shape=tuple(leaf.shape),
                dtype=np.dtype(leaf.dtype).name,
                axis=leaf.axis if quantised else None,
                nbytes=sum(a.nbytes for a in parts.values()),
                sqnr_db=sqnr_db.get(path),
                arrays=names,
            )
        )
    return found, arrays


def abstract_leaf(where: str | os.PathLike, entry: LeafEntry) -> Any:
    """ShapeDtypeStruct, or a QTensor of them; `where` the entry was found is for errors."""
    dtype = np.dtype(entry.dtype)
    if entry.format is None:
        return jax.ShapeDtypeStruct(entry.shape, dtype)
    try:
        fmt = formats.parse(entry.format)
    except ValueError as error:
        raise CheckpointError(
            f"{where}: leaf {entry.path!r}: {error}; install the sdq that knows this format"
        ) from None
    lead, axis = list(entry.shape), int(entry.axis or 0)
    length = lead.pop(axis)
    parts: dict[str, Any] = qtensor.expected_parts(fmt, tuple(lead), length)
    return QTensor(
        codes=parts["codes"],
        scales=parts["scales"],
        outer=parts.get("outer"),
        format=fmt,
        length=length,
        axis=axis,
        dtype=dtype,
    )


def assemble(leaf: Any, entry: LeafEntry, arrays: Mapping[str, Any]) -> Any:
    """A leaf of its arrays by name, given what `abstract_leaf` says of it."""
    parts = {part: arrays[name] for part, name in entry.arrays.items()}
    if not rules.is_qtensor(leaf):
        return parts["array"]
    return dataclasses.replace(leaf, **parts)


def _check_like(wanted: dict[str, Any], stored: dict[str, Any]) -> None:
    problems = [f"- {path}: wanted, not in the checkpoint" for path in wanted.keys() - stored]
    problems += [f"+ {path}: in the checkpoint, not wanted" for path in stored.keys() - wanted]
    for path in wanted.keys() & stored.keys():
        if (want := _signature(wanted[path])) != (have := _signature(stored[path])):
            problems.append(f"! {path}: wanted {want}, stored {have}")
    if problems:
        listed = "\n  ".join(sorted(problems))
        raise ValueError(f"load: `like` is not the checkpoint's tree:\n  {listed}")


def _signature(leaf: Any) -> str:
    if rules.is_qtensor(leaf):
        return repr(leaf)
    return f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"


def write_arrays(data: pathlib.Path, arrays: dict[str, jax.Array]) -> None:
    """Into a new folder, one folder each."""
    # Orbax refuses arrays without elements; the manifest alone restores them.
    kept = {name: array for name, array in arrays.items() if array.size}
    if not kept:
        data.mkdir()
        return
    with _orbax() as (ocp, checkpointer):
        checkpointer.save(data, args=ocp.args.PyTreeSave(kept))


def _read_arrays(
    root: pathlib.Path, manifest: Manifest, wanted: dict[str, Any]
) -> dict[str, jax.Array]:
    targets: dict[str, Any] = {}
    for entry in manifest.leaves:
        leaf = wanted[entry.path]
        parts = leaf.parts if rules.is_qtensor(leaf) else {"array": leaf}
        targets |= {name: parts[part] for part, name in entry.arrays.items()}
    arrays = {n: jnp.zeros(t.shape, t.dtype) for n, t in targets.items() if not t.size}
    stored = {name: t for name, t in targets.items() if name not in arrays}
    if not stored:
        return arrays
    folders: dict[pathlib.Path, dict[str, Any]] = {}  # of Orbax; one, or one for each leaf
    for name, target in stored.items():
        place = root / manifest.data / name
        folders.setdefault(place.parent, {})[place.name] = target
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with _orbax() as (ocp, checkpointer):

        def read(folder: pathlib.Path) -> dict[str, jax.Array]:
            targets = folders[folder]
            restore_args = {
                name: ocp.ArrayRestoreArgs(
                    sharding=getattr(target, "sharding", None) or here,
                    global_shape=target.shape,
                    dtype=target.dtype,
                )
                for name, target in targets.items()
            }
            structs = {n: jax.ShapeDtypeStruct(t.shape, t.dtype) for n, t in targets.items()}
            try:
                args = ocp.args.PyTreeRestore(
                    item=structs, restore_args=restore_args, partial_restore=True
                )
                return checkpointer.restore(folder, args=args)
            except Exception as error:
                # Whatever tensorstore or Orbax made of damaged files that nobody verified.
                raise CheckpointError(
                    f"{folder}: cannot be read ({error}); "
                    f"load with verify=True to learn which file; {REMEDY}"
                ) from error

        # Several processes wait for each other in each folder: in the same order then.
        at_once = AT_ONCE if jax.process_count() == 1 else 1
        with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
            for folder, found in zip(folders, pool.map(read, folders), strict=True):
                prefix = folder.relative_to(root / manifest.data)
                arrays |= {(prefix / name).as_posix(): array for name, array in found.items()}
    return arrays


@contextlib.contextmanager
def _orbax() -> Iterator[tuple[Any, Any]]:
    """Orbax and a checkpointer that writes one folder for each array.

    Imported here because Orbax takes a second to import, which `import sdq` need not pay.
    """
    import orbax.checkpoint as ocp

    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=True)
    absl, checkpointer = logging.getLogger("absl"), ocp.Checkpointer(handler)
    level = absl.level
    absl.setLevel(logging.ERROR)  # it warns about features that are not used here
    try:
        yield ocp, checkpointer
    finally:
        absl.setLevel(level)
        checkpointer.close()


def check_ours(root: pathlib.Path) -> None:
    """Refuse to write into a folder of something else."""
    if root.is_file():
        raise ValueError(f"save: {root} is a file; give a folder")
    ours = [file.name for file in abandoned(root / MANIFEST)]
    strangers = [
        item.name
        for item in (root.iterdir() if root.is_dir() else ())
        if not item.name.startswith((MANIFEST, JOURNAL, "data-")) and item.name not in ours
    ]
    if strangers:
        raise ValueError(
            f"save: {root} holds other things ({', '.join(sorted(strangers)[:3])}, ...); "
            "give a new folder"
        )


def next_number(root: pathlib.Path) -> int:
    """Of a new data folder."""
    taken = [
        int(number)
        for folder in root.glob("data-*")
        if (number := folder.name.removeprefix("data-").split(".")[0]).isdigit()
    ]
    return max(taken, default=0) + 1


def _same_everywhere(number: int) -> int:
    """Process 0's number, on every process."""
    if jax.process_count() == 1:
        return number
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def nested(leaves: dict[str, Any]) -> Any:
    """Leaves by path -> nested dicts; a lone leaf with the empty path is the tree itself."""
    if set(leaves) == {""}:
        return leaves[""]
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *folders, name = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = leaf
    return tree
