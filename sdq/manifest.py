"""The manifest of a checkpoint: what every leaf is, and size and SHA-256 of every file.

Written atomically, carries its own checksum. What is wrong with a checkpoint is said here, with the
file, the leaf and the remedy.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import math
import os
import pathlib
from typing import Any

from sdq.files import write_atomically

VERSION = 1
MANIFEST = "manifest.json"
JOURNAL = "unfinished.jsonl"  # of leaves that are there before the manifest is
AT_ONCE = min(8, os.cpu_count() or 1)  # files that are read
REMEDY = "copy the checkpoint again from where it is whole, or quantise and save again"


class CheckpointError(ValueError):
    """A checkpoint that cannot be read. The message names the file, the leaf and the remedy."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LeafEntry:
    """One leaf of a checkpoint, as its manifest describes it.

    `arrays` maps part names ("codes", "scales", "outer"; "array" for a plain leaf) to array
    folders, or to `<folder of the leaf>/<array>`.
    """

    path: str
    format: str | None
    shape: tuple[int, ...]
    dtype: str
    axis: int | None
    nbytes: int
    sqnr_db: float | None
    arrays: dict[str, str]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a checkpoint holds.

    `files` maps file names in the folder `data` to (bytes, SHA-256). In an exported checkpoint
    (`exported.py`) `data` is empty, and `files` are tensors.
    """

    data: str
    leaves: tuple[LeafEntry, ...]
    files: dict[str, tuple[int, str]]
    written_by: dict[str, str]
    metadata: dict[str, Any]


def read_manifest(path: str | os.PathLike) -> Manifest:
    """The manifest of a checkpoint, checked for version and damage. Reads no arrays."""
    file = pathlib.Path(path).absolute() / MANIFEST
    if not file.is_file():
        raise CheckpointError(
            f"{file}: no such file, so {file.parent} is no sdq checkpoint; "
            "give the folder that `sdq.save` wrote"
        )
    return manifest_from(file.read_bytes(), file)


def manifest_from(text: str | bytes, where: str | os.PathLike) -> Manifest:
    """The inverse of `to_document`'s JSON, checked likewise; `where` it was found is for errors."""
    try:
        document = json.loads(text)
        version, body = document["version"], document["body"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{where}: damaged ({error!r}); {REMEDY}") from None
    if version != VERSION:
        raise CheckpointError(
            f"{where}: checkpoint version {version}, this sdq reads version {VERSION}; "
            "install a newer sdq, or save the checkpoint again with this one"
        )
    if document.get("sha256") != digest_of(body):
        raise CheckpointError(f"{where}: damaged (its checksum differs); {REMEDY}")
    return Manifest(
        data=body["data"],
        leaves=tuple(leaf_entry(leaf) for leaf in body["leaves"]),
        files={name: tuple(facts) for name, facts in body["files"].items()},
        written_by=body["written_by"],
        metadata=body["metadata"],
    )


def leaf_entry(leaf: dict[str, Any]) -> LeafEntry:
    """From what JSON made of it."""
    sqnr_db = leaf["sqnr_db"]
    return LeafEntry(
        **{
            **leaf,
            "shape": tuple(leaf["shape"]),
            "sqnr_db": None if sqnr_db is None else float(sqnr_db),
        }
    )


def verify_files(root: pathlib.Path, manifest: Manifest, only: str | None = None) -> None:
    """Every file present, of its size and with its SHA-256; or those that one leaf needs."""
    leaf_of = {
        name.split("/")[0]: entry.path
        for entry in manifest.leaves
        for name in entry.arrays.values()
    }

    def check(name: str) -> None:
        file, leaf = root / manifest.data / name, leaf_of.get(name.split("/")[0])
        if only is not None and leaf not in (only, None):
            return
        nbytes, digest = manifest.files[name]
        where = f"{file}" + (f" (leaf {leaf!r})" if leaf else "")
        if not file.is_file():
            raise CheckpointError(f"{where}: missing; {REMEDY}")
        if (size := file.stat().st_size) != nbytes:
            raise CheckpointError(f"{where}: {size} bytes instead of {nbytes}; {REMEDY}")
        if fingerprint(file)[1] != digest:
            raise CheckpointError(f"{where}: contents changed (SHA-256); {REMEDY}")

    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(check, manifest.files))  # which raises what the first of them does


def write_manifest(root: pathlib.Path, manifest: Manifest) -> None:
    """Replace the manifest in one rename: a reader sees the old one or the new one."""
    text = json.dumps(to_document(manifest), indent=1, allow_nan=False)
    write_atomically(root / MANIFEST, text.encode())


def to_document(manifest: Manifest) -> dict[str, Any]:
    """As JSON, with version and checksum."""
    body = dataclasses.asdict(manifest)
    for leaf in body["leaves"]:
        leaf["sqnr_db"] = to_json_number(leaf["sqnr_db"])
    return {"version": VERSION, "sha256": digest_of(body), "body": body}


def to_json_number(value: float | None) -> float | str | None:
    """JSON has no Infinity and no NaN: those become strings, which `float` reads back."""
    return value if value is None or math.isfinite(value) else str(value)


def digest_of(body: dict) -> str:
    """SHA-256 of a JSON document, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def fingerprint(file: pathlib.Path) -> tuple[int, str]:
    """Size and SHA-256 of a file."""
    with open(file, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return file.stat().st_size, digest


def files_in(folder: pathlib.Path) -> list[str]:
    """The files below a folder, relative to it, sorted."""
    return sorted(
        file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()
    )
