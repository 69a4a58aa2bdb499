"""A progress bar over bytes."""

import contextlib
from collections.abc import Callable, Iterator

import rich.console
import rich.progress


@contextlib.contextmanager
def bytes_bar(name: str, total: int) -> Iterator[Callable[[str, int], None]]:
    """Draw a bar on stderr with the time left; yields what to call with a label and more bytes."""
    bar = rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.DownloadColumn(),
        rich.progress.TimeRemainingColumn(),
        rich.progress.TextColumn("{task.fields[label]}"),
        console=rich.console.Console(stderr=True),
    )
    with bar:
        task = bar.add_task(name, total=total, label="")
        yield lambda label, nbytes: bar.update(task, advance=nbytes, label=label)
