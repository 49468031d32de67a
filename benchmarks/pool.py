"""Runs that go on where they stopped: options of the command, and processes that begin nothing after a given time."""

import argparse
import fcntl
import itertools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


QUICK_NOTE = "These are short runs to try the harness, and no evidence."


def add_options(parser: argparse.ArgumentParser, folders: str) -> None:
    """Add the options that all such commands have.

    Args:
        parser: of the command.
        folders: where rows are written by default, for the help.
    """
    parser.add_argument("--quick", action="store_true", help="few short runs in under 5 minutes, to see that all of it works; no evidence")
    parser.add_argument("--out", type=Path, help=f"folder of rows, tables and figures; {folders}")
    parser.add_argument("--jobs", type=int, default=1, help="processes, each with one thread")
    parser.add_argument("--minutes", type=float, help="begin no run after so many minutes")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of models and examples; cpu by default")
    parser.add_argument("--tables", action="store_true", help="only write tables and figures")


def parsed(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """Arguments of such a command, with the values of these options checked."""
    chosen = parser.parse_args(arguments)
    if chosen.jobs < 1:
        parser.error("--jobs must be at least 1")
    if chosen.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no such device here")
    return chosen


def device_name(device: str) -> str:
    """What rows call a device: "cpu", or the model of the GPU."""
    return "cpu" if device == "cpu" else torch.cuda.get_device_name(device)


def end_after(minutes: float | None) -> float:
    """The time of `time.monotonic()` after so many minutes; None is never."""
    return float("inf") if minutes is None else time.monotonic() + 60 * minutes


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Let no other process add rows to a folder meanwhile; it is made if need be. A process that ends, or is killed, lets go of it.

    Raises:
        SystemExit: another process adds rows there; the message says what to do.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise SystemExit(f"another process adds rows to {folder}: wait until it ends, or give another folder with --out") from None
    finally:
        os.close(descriptor)


class Workers:
    """Processes, which start when they are first needed; a context manager.

    Args:
        jobs: how many; 1 is this process.
    """

    def __init__(self, jobs: int) -> None:
        self._jobs = jobs
        self._pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) if jobs > 1 else None

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown()

    def finished(self, work: Callable[[T], R], items: Iterable[T], end: float = float("inf")) -> Iterator[tuple[T, R]]:
        """Items with what was made of them, in the order in which they finish.

        Args:
            work: function at the top of a module.
            items: of the work; each is taken when a process is free.
            end: of `time.monotonic()`, after which no item is begun.
        """
        if self._pool is None:
            for item in itertools.takewhile(lambda _: time.monotonic() < end, items):
                yield item, work(item)
            return
        waiting, working = iter(items), dict[Future[R], T]()
        while True:
            for item in itertools.islice(waiting, self._jobs - len(working) if time.monotonic() < end else 0):
                working[self._pool.submit(work, item)] = item
            if not working:
                return
            for future in wait(working, return_when=FIRST_COMPLETED).done:
                yield working.pop(future), future.result()
