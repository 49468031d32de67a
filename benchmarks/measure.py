"""What the benchmarks measure with: peak memory, times side by side, and tables and figures that are printed and saved."""

import csv
import gc
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch._C._autograd import _ProfilerResult
from torch._C._profiler import ProfilerActivity, ProfilerConfig, ProfilerState, RecordScope, _ExperimentalConfig

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler reports on stderr when it starts and stops


class Allocations:
    """Watches, inside a `with`, what torch's allocator gives out and takes back on the CPU, as torch.profiler records it.

    Operators are not recorded, only memory. What is freed of what was there before is not subtracted.

    Attributes:
        peak: most bytes, above those there before, that were allocated at one time; known when the `with` is left.
        kept: bytes that were allocated and are still there when it is left.
    """

    def __init__(self) -> None:
        self.peak = self.kept = 0
        self._config = ProfilerConfig(ProfilerState.KINETO, False, True, False, False, False, _ExperimentalConfig())  # True: memory

    def __enter__(self) -> "Allocations":
        gc.collect()
        self._record()
        return self

    def __exit__(self, *_: object) -> None:
        gc.collect()
        self._add(torch.autograd._disable_profiler())

    def settle(self) -> None:
        """Sum up, and forget, what was recorded so far: to be called now and then, since records of many steps fill the memory."""
        recorded = torch.autograd._disable_profiler()
        self._record()  # first, so that nothing is missed
        self._add(recorded)

    def _record(self) -> None:
        torch.autograd._prepare_profiler(self._config, {ProfilerActivity.CPU})
        torch.autograd._enable_profiler(self._config, {ProfilerActivity.CPU}, {RecordScope.USER_SCOPE})  # no operator is in this scope

    def _add(self, recorded: _ProfilerResult) -> None:
        for event in recorded.events():
            if event.name() == "[memory]":
                self.kept += event.nbytes()
                self.peak = max(self.peak, self.kept)


def peak(function: Callable[[], Any]) -> int:
    """Most bytes of tensors, above those there before, that are allocated at one time during a call."""
    with Allocations() as allocations:
        function()
    return allocations.peak


def seconds(candidates: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, np.ndarray]:
    """Seconds that a call of each candidate takes, by round: every round calls each once, in turn, so that entries of a round compare."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, function in candidates.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {name: np.array(values) for name, values in times.items()}


def compared(values: np.ndarray, base: np.ndarray) -> dict[str, float]:
    """Columns: median of seconds, as ms, and median and quartiles of the ratio to those of a base in the same rounds."""
    low, middle, high = np.percentile(values / base, [25, 50, 75])
    return {"ms": 1e3 * float(np.median(values)), "ratio": float(middle), "lower quartile": float(low), "upper quartile": float(high)}


def bars(panels: Mapping[str, Mapping[str, float]], label: str, path: Path) -> None:
    """Save a figure of horizontal bars, a panel for each title, with their numbers; what is not a number is left out."""
    shown = {title: {name: value for name, value in values.items() if value == value} for title, values in panels.items()}
    heights = [1 + len(values) for values in shown.values()]
    figure = Figure(figsize=(9, 0.28 * sum(heights) + 0.6 * len(heights)), layout="constrained")
    for axes, (title, values) in zip(figure.subplots(len(shown), height_ratios=heights, squeeze=False)[:, 0], shown.items(), strict=True):
        axes.bar_label(axes.barh(list(values), list(values.values()), color="#0072b2"), fmt="%.3g", padding=3)
        axes.invert_yaxis()
        axes.margins(x=0.1)
        axes.set_title(title, loc="left")
        axes.set_xlabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def all_met(requirements: Sequence[tuple[str, Any, str, Any]], path: Path) -> bool:
    """Report requirements: what is measured, the number, what is asked, and whether it is met, or "skipped"; whether none is missed."""
    rows = [
        {"requirement": what, "asked": asked, "measured": found, "result": met if isinstance(met, str) else "met" if met else "missed"}
        for what, found, asked, met in requirements
    ]
    report("requirements", rows, path)
    return all(row["result"] != "missed" for row in rows)


def report(title: str, rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Print rows, of the same columns, as a table; and save them as CSV, numbers in full."""
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*[f"{value:#.3g}".rstrip(".") if isinstance(value, float) else str(value) for value in row.values()])
    wide = Console(width=1000).measure(table).maximum
    Console(width=max(wide, Console().width)).print(table)  # no column is cut
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
