"""Work spread over processes, each with a GPU of its own."""

import concurrent.futures
import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

Each = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]


@contextlib.contextmanager
def workers(count: int) -> Iterator[Each]:
    """Yields `each(function, items)`, an iterator over results as they come, in no order.

    One worker is this process. With more, this process must not touch a GPU before, for JAX would
    take its memory; functions, items and results are pickled.
    """
    if count == 1:
        yield map
        return
    context = multiprocessing.get_context("spawn")
    gpus = context.Queue()
    for gpu in range(count):
        gpus.put(gpu)
    pool = concurrent.futures.ProcessPoolExecutor(count, context, _take, (gpus,))

    def each(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        for done in concurrent.futures.as_completed([pool.submit(function, i) for i in items]):
            yield done.result()

    try:
        yield each
    finally:
        pool.shutdown(cancel_futures=True)


def _take(gpus: Any) -> None:
    """Runs once in each process, before it knows of any device."""
    os.environ["CUDA_VISIBLE_DEVICES"] = str(gpus.get())
    os.environ["TERM"] = "dumb"  # progress bars of several processes would overwrite each other
