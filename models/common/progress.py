"""A progress bar over steps, also of those that run inside a jitted scan."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import rich.console
import rich.progress

_open: list[Callable[[], None]] = []  # what advances each open bar, the innermost last


@contextlib.contextmanager
def step_bar(name: str, total: int, done: int = 0) -> Iterator[Callable[[Any], None]]:
    """Draw a bar on stderr; yields a callback for `on_step`, to be called once a step.

    What was `done` before counts as such, but not for the time left.

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
        task = bar.add_task(name, total=total, completed=done)
        _open.append(lambda: bar.advance(task))
        try:
            yield _step_done
            jax.effects_barrier()
        finally:
            _open.pop()


def _step_done(_: Any) -> None:
    if _open:
        _open[-1]()
