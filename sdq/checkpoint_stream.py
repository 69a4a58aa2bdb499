"""save_leaves: a checkpoint written leaf by leaf; killed, it goes on where it stopped.

    PATH/unfinished.jsonl       whose job it is, and a line for each leaf that is done
    PATH/data-<n>/<leaf>/       that leaf's arrays, an Orbax folder

A checkpoint like any other when the manifest takes the place of the journal; what was there before
stays readable until then.
"""

import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

from sdq import checkpoint
from sdq.files import write_atomically
from sdq.manifest import (
    JOURNAL,
    LeafEntry,
    files_in,
    fingerprint,
    leaf_entry,
    to_json_number,
)
from sdq.tree import LeafReport

Made = tuple[Any, float | None]  # a leaf, and its SQNR in decibels if it was quantised


@dataclasses.dataclass(frozen=True, slots=True)
class Done:
    """A leaf that is on disk: its entry without data folder, and its files' sizes and digests."""

    entry: LeafEntry
    files: dict[str, tuple[int, str]]


def save_leaves(
    path: str | os.PathLike,
    leaves: Mapping[str, Callable[[], Made]],
    *,
    job: Any,
    metadata: dict[str, Any] | None = None,
    on_leaf: Callable[[LeafReport, bool], None] | None = None,
) -> None:
    """Make and write leaves one after the other, so that no more than one is in memory.

    Args:
      path: a folder, made if need be, that holds nothing but a checkpoint or this job, unfinished.
      leaves: by path, what makes each: an array or a QTensor, and its error.
      job: anything JSON can hold that tells this job from others: source, plan, versions.
      metadata: as for `save`.
      on_leaf: called after each leaf, and whether it was there already.
    Raises:
      ValueError: the folder holds another job's leaves, or other things.
    """
    root = pathlib.Path(path).absolute()
    checkpoint.check_ours(root)
    for name, document in (("job", job), ("metadata", metadata)):
        try:
            json.dumps(document)
        except TypeError as error:
            raise ValueError(f"save_leaves: {name}: {error}") from None
    data, done = _resumed(root, job)
    if data is None:
        data = root / f"data-{checkpoint.next_number(root)}"
        data.mkdir(parents=True)
        _append(root / JOURNAL, {"job": job, "data": data.name})
    done = {leaf: one for leaf, one in done.items() if leaf in leaves and _is_whole(data, one)}
    kept = {_folder_of(one) for one in done.values()}
    for rest in data.iterdir():  # half-written
        if rest.name not in kept:
            shutil.rmtree(rest)
    for number, (leaf, make) in enumerate(leaves.items()):
        is_new = leaf not in done
        if is_new:
            folder = f"{number:04d}.{leaf.replace('/', '.')}"
            done[leaf] = _written(data, folder, leaf, *make())
            line = dataclasses.asdict(done[leaf])
            line["entry"]["sqnr_db"] = to_json_number(line["entry"]["sqnr_db"])
            _append(root / JOURNAL, line)
        if on_leaf is not None:
            on_leaf(checkpoint.leaf_report(done[leaf].entry), not is_new)
    files = {name: facts for leaf in leaves for name, facts in done[leaf].files.items()}
    checkpoint.finish(root, data, [done[leaf].entry for leaf in leaves], files, metadata)


def _written(data: pathlib.Path, folder: str, path: str, leaf: Any, sqnr_db: float | None) -> Done:
    (entry,), arrays = checkpoint.entries({path: leaf}, {path: sqnr_db})
    place = data / folder
    checkpoint.write_arrays(place, arrays)
    files = {f"{folder}/{name}": fingerprint(place / name) for name in files_in(place)}
    names = {part: f"{folder}/{name}" for part, name in entry.arrays.items()}
    return Done(dataclasses.replace(entry, arrays=names), files)


def _resumed(root: pathlib.Path, job: Any) -> tuple[pathlib.Path | None, dict[str, Done]]:
    """Folder and leaves of this job; None and none if it has not begun."""
    journal = root / JOURNAL
    if not journal.exists():
        return None, {}
    *written, torn = journal.read_text().split("\n")  # a line that a kill has torn has no end
    if torn:
        write_atomically(journal, "".join(f"{line}\n" for line in written).encode())
    if not written:
        return None, {}
    lines = [json.loads(line) for line in written]
    if lines[0]["job"] != json.loads(json.dumps(job)):
        raise ValueError(
            f"{root} holds an unfinished job: {written[0]}; finish it with the same source and "
            "options, give another folder, or remove this one"
        )
    done = [
        Done(leaf_entry(one["entry"]), {name: tuple(facts) for name, facts in one["files"].items()})
        for one in lines[1:]
    ]
    data = root / lines[0]["data"]
    data.mkdir(exist_ok=True)
    return data, {one.entry.path: one for one in done}


def _is_whole(data: pathlib.Path, one: Done) -> bool:
    """Whether all files are there, in their sizes."""
    return all(
        (data / name).is_file() and (data / name).stat().st_size == size
        for name, (size, _) in one.files.items()
    )


def _folder_of(one: Done) -> str:
    return next(iter(one.entry.arrays.values())).split("/")[0]


def _append(journal: pathlib.Path, line: Any) -> None:
    """A line that survives the power going off."""
    with open(journal, "a") as file:
        file.write(json.dumps(line, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
