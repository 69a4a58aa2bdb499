"""Progress bars: over steps that run inside a jitted scan, and over bytes."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import rich.console
import rich.progress

_open: list[Callable[[], None]] = []  # what advances each open bar, the innermost last


@contextlib.contextmanager
def step_bar(name: str, total: int) -> Iterator[Callable[[Any], None]]:
    """Draw a bar on stderr; yields a callback for `on_step`, to be called once a step.

    It is the same callback in every bar: to `jit` another one would be another program.
    """
    bar = rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeRemainingColumn(),
        console=rich.console.Console(stderr=True),
    )
    with bar:
        task = bar.add_task(name, total=total)
        _open.append(lambda: bar.advance(task))
        try:
            yield _step_done
            jax.effects_barrier()
        finally:
            _open.pop()


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


def _step_done(_: Any) -> None:
    if _open:
        _open[-1]()
