"""The command `python -m benchmarks.reproduce`."""

import argparse
import functools
import time
from collections.abc import Mapping
from pathlib import Path

from benchmarks.pool import QUICK_NOTE, Workers, add_options, alone, end_after, parsed
from benchmarks.reproduce.fine_tune import perform, pretrain, pretrainings
from benchmarks.reproduce.plan import FULL, QUICK, QUICK_STUDIES, STUDIES, Scale
from benchmarks.reproduce.rows import Rows, Run
from benchmarks.reproduce.tables import write

ROOT = Path(__file__).parents[2]


def main(arguments: list[str] | None = None) -> None:
    """Do the runs that have no row yet, then write tables and figures of all rows."""
    parser = argparse.ArgumentParser("python -m benchmarks.reproduce", description=main.__doc__)
    parser.add_argument("studies", nargs="*", help=f"of {', '.join(STUDIES)}; all in this order by default")
    add_options(parser, "docs/results, or benchmarks/results/quick")
    chosen = parsed(parser, arguments)
    if unknown := [study for study in chosen.studies if study not in STUDIES]:
        parser.error(f"there is no study {unknown[0]!r}: choose from {', '.join(STUDIES)}")
    folder = chosen.out or ROOT / ("benchmarks/results/quick" if chosen.quick else "docs/results")
    end = end_after(chosen.minutes)
    with alone(folder):
        rows = Rows(folder)
        if not chosen.tables:
            studies = chosen.studies or list(QUICK_STUDIES if chosen.quick else STUDIES)
            work(rows, studies, QUICK if chosen.quick else FULL, device=chosen.device, jobs=chosen.jobs, end=end)
        write(rows, QUICK_NOTE if chosen.quick else "")


def work(rows: Rows, studies: list[str], scale: Scale, *, device: str = "cpu", jobs: int = 1, end: float = float("inf")) -> None:
    """Do the runs of studies that have no row yet.

    Args:
        rows: the finished runs; new ones are added.
        studies: their names.
        scale: how much is run.
        device: of networks and images.
        jobs: processes; 1 is this one.
        end: of `time.monotonic()`, after which no run begins.
    """
    with Workers(jobs) as workers:
        for study in studies:
            for plan in (STUDIES[study].tuning, STUDIES[study].tests):
                runs = [run for run in plan(rows, scale) if run not in rows]
                how = {"scale": scale, "device": device}
                for _ in workers.finished(functools.partial(pretrain, **how), pretrainings(runs, scale), end):
                    pass
                started = time.monotonic()
                for done, (run, numbers) in enumerate(workers.finished(functools.partial(perform, **how), runs, end), start=1):
                    rows.add(run, numbers)
                    minutes = (time.monotonic() - started) / 60
                    print(f"{study}, {run.stage}: {done} of {len(runs)} runs in {minutes:.1f} minutes; {_shown(run, numbers)}", flush=True)
                if time.monotonic() > end:
                    return


def _shown(run: Run, numbers: Mapping[str, object]) -> str:
    strength = "" if run.strength is None else f", strength {run.strength:g}"
    accuracy = numbers.get("test", numbers.get("accuracy", numbers.get("validation")))
    return f"{run.method} with {run.optimizer}, rate {run.lr:g}{strength}, seed {run.seed}: {accuracy} %"


if __name__ == "__main__":
    main()
