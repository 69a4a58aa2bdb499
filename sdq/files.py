"""Files written whole or not at all."""

import contextlib
import errno
import os
import pathlib
import uuid
from collections.abc import Iterator
from typing import BinaryIO


def abandoned(path: pathlib.Path) -> list[pathlib.Path]:
    """What writers of `path` that were killed have left beside it."""
    return list(path.parent.glob(f".{path.name}.*.tmp"))


def write_atomically(path: str | os.PathLike, data: bytes) -> None:
    """Make `path` hold `data`: a reader sees the old file or the new one, never a part.

    Makes the folder if need be. An OSError says what failed and leaves the old file as it was.
    """
    with replacing(path, len(data)) as file, explained(path, len(data)):
        file.write(data)


@contextlib.contextmanager
def replacing(path: str | os.PathLike, nbytes: int | None = None) -> Iterator[BinaryIO]:
    """A new file, of so many bytes in the end, that becomes `path` unless the block raises.

    Makes the folder if need be. What is written in the block wants `explained`.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with explained(path, nbytes):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(temporary, "wb")  # noqa: SIM115 (closed below)
        with file:
            yield file
            with explained(path, nbytes):
                file.flush()
                os.fsync(file.fileno())
        with explained(path, nbytes):
            os.replace(temporary, path)
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)  # the rename itself
            finally:
                os.close(folder)
    finally:
        with contextlib.suppress(OSError):  # gone already, or never there
            temporary.unlink()


@contextlib.contextmanager
def explained(path: str | os.PathLike, nbytes: int | None = None) -> Iterator[None]:
    """OSErrors of the block say that `path`, of so many bytes, cannot be written, and why."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            what = "" if nbytes is None else f" for {nbytes} bytes"
            reason = f"no space{what}; free some or choose another folder"
        raise OSError(error.errno, f"cannot write {path}: {reason}") from error
