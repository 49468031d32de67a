"""The command `python -m benchmarks.arena`."""

import argparse
import functools
import itertools
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.arena.arms import ARMS, BASES
from benchmarks.arena.runs import Cell, Group, groups, perform
from benchmarks.arena.tables import write
from benchmarks.arena.tasks import TASKS
from benchmarks.pool import QUICK_NOTE, Workers, add_options, alone, end_after, parsed
from benchmarks.reproduce.rows import Rows

ROOT = Path(__file__).parents[2]
SEEDS = 5
QUICK_ARMS = "constant", "linear", "learn", "learn, total_steps", "Prodigy"


def main(arguments: list[str] | None = None) -> None:
    """Do the runs that have no row yet, then write tables and figures of all rows."""
    parser = argparse.ArgumentParser("python -m benchmarks.arena", description=main.__doc__)
    parser.add_argument("tasks", nargs="*", help=f"of {', '.join(TASKS)}; all in this order by default")
    parser.add_argument("--bases", nargs="+", choices=BASES, default=list(BASES), help="optimizers whose rate is chosen")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help=f"of {', '.join(ARMS)}")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    add_options(parser, "docs/results/arena, or benchmarks/results/arena")
    chosen = parsed(parser, arguments)
    if unknown := [task for task in chosen.tasks if task not in TASKS]:
        parser.error(f"there is no task {unknown[0]!r}: choose from {', '.join(TASKS)}")
    if chosen.seeds < 1:
        parser.error("--seeds must be at least 1")
    folder = chosen.out or ROOT / ("benchmarks/results/arena" if chosen.quick else "docs/results/arena")
    end = end_after(chosen.minutes)
    with alone(folder):
        rows = Rows(folder, Cell)
        if not chosen.tables:
            tasks, how = chosen.tasks or list(TASKS), {"jobs": chosen.jobs, "end": end, "device": chosen.device}
            if chosen.quick:
                work(rows, groups(tasks, ["adamw"], QUICK_ARMS, 2), steps=20, **how)
            else:  # all tasks with the first base, then with the next
                each = (groups(tasks, [base], chosen.arms, chosen.seeds) for base in chosen.bases)
                work(rows, itertools.chain.from_iterable(each), **how)
        write(rows, QUICK_NOTE if chosen.quick else "")


def work(
    rows: Rows, planned: Iterator[Group], *, jobs: int = 1, end: float = float("inf"), steps: int | None = None, device: str = "cpu"
) -> None:
    """Do the runs of groups that have no row yet.

    Args:
        rows: the finished runs; new ones are added.
        planned: what is to be run.
        jobs: processes; 1 is this one.
        end: of `time.monotonic()`, after which no group begins.
        steps: fewer than each task's.
        device: of parameters and examples.
    """
    run = functools.partial(perform, steps=steps, device=device)
    missing = [left for group in planned if (left := tuple(cell for cell in group if cell not in rows))]
    started = time.monotonic()
    with Workers(jobs) as workers:
        for done, (group, results) in enumerate(workers.finished(run, missing, end), start=1):
            for cell, numbers in zip(group, results, strict=True):
                rows.add(cell, numbers)
            first, minutes = group[0], (time.monotonic() - started) / 60
            shown = f"{first.task}, {first.base}, {first.arm}, from {first.rate:g}: validation loss {results[0]['loss_1']}"
            print(f"{done} of {len(missing)} groups in {minutes:.1f} minutes; {shown}", flush=True)


if __name__ == "__main__":
    main()
