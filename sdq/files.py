"""Files written whole or not at all."""

import errno
import os
import pathlib
import uuid


def abandoned(path: pathlib.Path) -> list[pathlib.Path]:
    """What writers of `path` that were killed have left beside it."""
    return list(path.parent.glob(f".{path.name}.*.tmp"))


def write_atomically(path: str | os.PathLike, data: bytes) -> None:
    """Make `path` hold `data`: a reader sees the old file or the new one, never a part.

    Makes the folder if need be. An OSError says what failed and leaves the old file as it was.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)  # the rename itself
            finally:
                os.close(folder)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = f"no space for {len(data)} bytes; free some or choose another folder"
        raise OSError(error.errno, f"cannot write {path}: {reason}") from error
