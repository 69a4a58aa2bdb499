"""Work spread over processes, each with a GPU."""

import concurrent.futures
import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

Each = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]


@contextlib.contextmanager
def workers(gpus: Sequence[str] = ()) -> Iterator[Each]:
    """Yields `each(function, items)`, an iterator over results as they come, in no order.

    Args:
      gpus: a process for each; one that is named twice is shared by two, so that one computes
        while the other compiles. None: the work is done in this process, one after the other.
        Otherwise this process must not touch a GPU before, for JAX would take its memory;
        functions, items and results are pickled.
    """
    if not gpus:
        yield map
        return
    context = multiprocessing.get_context("spawn")
    free = context.Queue()
    for gpu in gpus:
        free.put(gpu)
    shared = len(set(gpus)) < len(gpus)
    pool = concurrent.futures.ProcessPoolExecutor(len(gpus), context, _take, (free, shared))

    def each(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        for done in concurrent.futures.as_completed([pool.submit(function, i) for i in items]):
            yield done.result()

    try:
        yield each
    finally:
        pool.shutdown(cancel_futures=True)


def _take(free: Any, shared: bool) -> None:
    """Runs once in each process, before it knows of any device."""
    os.environ["CUDA_VISIBLE_DEVICES"] = free.get()
    if shared:  # each takes the memory that it needs, not most of the GPU's
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    os.environ["TERM"] = "dumb"  # progress bars of several processes would overwrite each other
