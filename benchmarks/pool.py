"""Work in several processes, one thread each, that begins nothing after a given time."""

import itertools
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def finished(work: Callable[[T], R], items: Iterable[T], *, jobs: int = 1, end: float = float("inf")) -> Iterator[tuple[T, R]]:
    """Items with what was made of them, in the order in which they finish.

    Args:
        work: function at the top of a module.
        items: of the work; each is taken when a process is free.
        jobs: processes; 1 is this one.
        end: of `time.monotonic()`, after which no item is begun.
    """
    if jobs == 1:
        for item in itertools.takewhile(lambda _: time.monotonic() < end, items):
            yield item, work(item)
        return
    waiting, working = iter(items), dict[Future[R], T]()
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        while True:
            for item in itertools.islice(waiting, jobs - len(working) if time.monotonic() < end else 0):
                working[pool.submit(work, item)] = item
            if not working:
                return
            for future in wait(working, return_when=FIRST_COMPLETED).done:
                yield working.pop(future), future.result()
