"""Time of one optimizer step against the number of parameters; and the memory bandwidth it attains, against that of a plain sum.

Bandwidth is that of c = a + b or of a += b, 12 bytes an element, whichever is faster, the best of some. They differ where a processor reads
what it is about to overwrite: c = a + b then moves 16 bytes, and what works in place, as optimizers do, no more than is counted.
"""

import gc
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from matplotlib.figure import Figure
from measure import all_met, bars, report, seconds
from sets import ADAMW_FUSED, NOTHING, RATE, adam_like, drawn, made

COLUMNS, MATRICES, SIZES = 1024, 4, 8
SMALLEST, BEYOND_CACHE = 1e5, 3e6
SLOPE = 0.9, 1.1
TRIAD, BEST = 1 << 26, 15  # elements, tries
SECONDS, FEWEST, MOST = 2.0, 5, 200  # of steps at one size
FRACTION = "of the bandwidth"
NAMES = ADAMW_FUSED, f"{NOTHING}, fused", f"{RATE}, fused", "AdamP, fused"


def bandwidths(elements: int) -> tuple[float, float]:
    """GB/s of c = a + b and of a += b."""
    a, b, c = torch.ones(elements), torch.ones(elements), torch.ones(elements)
    times = seconds({"triad": lambda: torch.add(a, b, out=c), "in place": lambda: torch.add(a, b, out=a)}, BEST)
    triad, in_place = (12 * elements / values.min() / 1e9 for values in times.values())
    return triad, in_place


def step_time(name: str, numbers: int) -> float:
    """Median seconds of a step; NaN where there is no such backend."""
    opt = made(adam_like(["fused"])[name], drawn([(numbers // COLUMNS // MATRICES, COLUMNS)] * MATRICES))
    if opt is None:
        return np.nan
    opt.step()
    opt.step()
    start = time.perf_counter()
    opt.step()
    rounds = int(np.clip(SECONDS / (time.perf_counter() - start), FEWEST, MOST))
    return float(np.median(seconds({name: opt.step}, rounds)[name]))


def slope(numbers: list[int], times: list[float]) -> float:
    """Of log time over log size, beyond the cache; NaN where there are not two times."""
    beyond = [(np.log(count), np.log(taken)) for count, taken in zip(numbers, times, strict=True) if count >= BEYOND_CACHE and taken > 0]
    return float(np.polyfit(*zip(*beyond, strict=True), 1)[0]) if len(beyond) > 1 else np.nan


def plot(numbers: list[int], times: dict[str, list[float]], path: Path) -> None:
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for name, values in times.items():
        axes.loglog(numbers, [1e3 * value for value in values], marker="o", label=name)
    axes.axvline(BEYOND_CACHE, color="gray", linestyle=":")
    axes.set_xlabel("parameters; the slope is fitted right of the line")
    axes.set_ylabel("ms a step")
    axes.grid(alpha=0.3)
    axes.legend()
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main(
    largest: Annotated[float, typer.Option(help="Parameters; 24 bytes each are needed.")] = 3e8,
    threads: int = 2,
    out: Annotated[Path, typer.Option(help="Directory to save tables, as CSV, and figures in.")] = Path("benchmarks/results"),
) -> None:
    """Print, and save, times by size, slopes and bandwidths; fail if a requirement is not met."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    unit = MATRICES * COLUMNS
    numbers = [unit * max(1, round(count / unit)) for count in np.geomspace(SMALLEST, largest, SIZES)]
    times: dict[str, list[float]] = {name: [] for name in NAMES}
    for count in numbers:
        for name in NAMES:
            times[name].append(step_time(name, count))
            gc.collect()
    triad, in_place = bandwidths(min(TRIAD, numbers[-1]))
    touched = {name: candidate.touched(torch.float32) for name, candidate in adam_like(["fused"]).items() if name in NAMES}
    by_size: list[dict[str, Any]] = [
        {"parameters": count, **{f"{name} (ms)": 1e3 * times[name][i] for name in NAMES}} for i, count in enumerate(numbers)
    ]
    report("time of a step, float32", by_size, out / "scaling.csv")
    bandwidth = max(triad, in_place)
    rows: list[dict[str, Any]] = [
        {"what": what, "bytes / number": 12, "GB/s": speed, FRACTION: speed / bandwidth}
        for what, speed in (("c = a + b", triad), ("a += b", in_place))
    ]
    for name in NAMES:
        speed = touched[name] * numbers[-1] / times[name][-1] / 1e9
        rows.append({"what": name, "bytes / number": touched[name], "GB/s": speed, FRACTION: speed / bandwidth})
    report(f"memory bandwidth, {threads} threads, {numbers[-1]:,} parameters", rows, out / "roofline.csv")
    plot(numbers, times, out / "scaling.png")
    panels = {
        "bytes a parameter that a step has to touch": {row["what"]: row["bytes / number"] for row in rows},
        f"fraction of the bandwidth, {bandwidth:.3g} GB/s": {row["what"]: row[FRACTION] for row in rows},
    }
    bars(panels, "", out / "roofline.png")
    low, high = SLOPE
    slopes = {name: slope(numbers, times[name]) for name in NAMES}
    requirements = [
        (f"slope of log time over log size, {name}", found, f"in [{low}, {high}]", low <= found <= high) for name, found in slopes.items()
    ]
    raise typer.Exit(0 if all_met(requirements, out / "scaling_requirements.csv") else 1)


if __name__ == "__main__":
    typer.run(main)
