"""Tables and the figure of the rows: `index.md` and `start.png`."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.arena.arms import ARMS, STARTS
from benchmarks.arena.tasks import TASKS
from benchmarks.reproduce.rows import Row, Rows
from benchmarks.reproduce.statistics import Estimate, estimate

JUDGED = tuple(start for start in STARTS if start >= 1e-5)
"""Starts that the protocol judges by."""

PEER_START = 1e-3
"""Where our rates start when they are compared with methods that have no start: AdamW's default."""

PEERS = [arm for arm in ARMS if arm not in ("constant", "linear", "cosine", "learn", "learn, total_steps")]
COLORS = {"constant": "#999999", "linear": "#56b4e9", "learn": "#d55e00", "learn, total_steps": "#0072b2"}

Losses = dict[str, float]
"""Validation losses at the end, by seed."""


def losses(rows: Rows, task: str, base: str, arm: str) -> dict[float, Losses]:
    """The losses at the end, by rate, in increasing order."""
    found: dict[float, Losses] = {}
    for row in rows.of(task, base=base, arm=arm):
        found.setdefault(float(row["rate"]), {})[row["seed"]] = _finite(row)
    return dict(sorted(found.items()))


def _finite(row: Row) -> float:
    loss = float(row["loss_1"])
    return loss if math.isfinite(loss) else math.inf


def tuned(by_rate: Mapping[float, Losses]) -> tuple[float, Losses] | None:
    """The rate with the lowest mean loss, and its losses."""
    return min(by_rate.items(), key=lambda item: _mean(item[1].values()).mean, default=None)


def _mean(values: Iterable[float]) -> Estimate:
    values = list(values)
    return estimate(values) if all(map(math.isfinite, values)) else Estimate(math.inf, math.nan, len(values))


def shown(value: Estimate) -> str:
    """A mean with its standard error."""
    if not math.isfinite(value.mean):
        return "diverged"
    digits = 4 if value.mean < 1 else 3
    return f"{value.mean:.{digits}f} ± {value.error:.{digits}f}" if math.isfinite(value.error) else f"{value.mean:.{digits}f}"


def is_within(ours: Estimate, best: Estimate) -> bool:
    """Whether a mean is at most one standard error of the tuned arm above that arm's mean."""
    return ours.mean <= best.mean + best.error


def judged(rows: Rows, tasks: Sequence[str], base: str, arm: str, against: Sequence[str]) -> list[str]:
    """The table of one of our arms, from each start, against the best of tuned arms."""
    lines = [
        f"| task | tuned {' or '.join(against)} | " + " | ".join(f"from {start:g}" for start in STARTS) + " | within one standard error |",
        "| --- | --- |" + " --- |" * (len(STARTS) + 1),
    ]
    for task in tasks:
        options = [(name, *best) for name in against if (best := tuned(losses(rows, task, base, name)))]
        ours = {start: _mean(each.values()) for start, each in losses(rows, task, base, arm).items()}
        if not options or not ours:
            continue
        name, rate, found = min(options, key=lambda option: _mean(option[2].values()).mean)
        best = _mean(found.values())
        cells = [
            f"{'**' if start in ours and is_within(ours[start], best) else ''}{shown(ours[start])}"
            f"{'**' if is_within(ours[start], best) else ''}"
            if start in ours
            else ""
            for start in STARTS
        ]
        count = sum(start in ours and is_within(ours[start], best) for start in JUDGED)
        lines.append(f"| {task} | {shown(best)} ({name}, {rate:g}) | " + " | ".join(cells) + f" | {count} of {len(JUDGED)} |")
    return lines


def compared(rows: Rows, tasks: Sequence[str]) -> list[str]:
    """The table of methods without tuning, and of ours from one start: means, and wins of ours by twice the standard error."""
    lines = ["| method | " + " | ".join(tasks) + " | `learn` | `learn`, `total_steps` |", "| --- |" + " --- |" * (len(tasks) + 2)]
    ours = {arm: {task: losses(rows, task, "adamw", arm).get(PEER_START, {}) for task in tasks} for arm in ("learn", "learn, total_steps")}
    for arm, by_task in ours.items():
        lines.append(
            f"| {arm}, from {PEER_START:g} | "
            + " | ".join(shown(_mean(each.values())) if each else "" for each in by_task.values())
            + " | | |"
        )
    for peer in PEERS:
        if ARMS[peer].rates == "starts":
            rates: Sequence[float] = (1e-5, 1e-3, 1e-1)
        else:
            rates = (0.0025,) if peer == "schedule-free" else (1.0,)
        for rate in rates:
            found = {task: losses(rows, task, "adamw", peer).get(rate, {}) for task in tasks}
            if not any(found.values()):
                continue
            name = peer if len(rates) == 1 else f"{peer}, from {rate:g}"
            means = [shown(_mean(each.values())) if each else "" for each in found.values()]
            lines.append(f"| {name} | " + " | ".join(means) + " | " + " | ".join(_wins(each, found) for each in ours.values()) + " |")
    return lines


def _wins(ours: Mapping[str, Losses], theirs: Mapping[str, Losses]) -> str:
    """How often ours is better, equal within two standard errors of the paired differences, and worse."""
    counts = [0, 0, 0]
    for task, found in theirs.items():
        seeds = ours[task].keys() & found.keys()
        if len(seeds) < 2:
            continue
        differences = [ours[task][seed] - found[seed] for seed in sorted(seeds)]
        if not all(map(math.isfinite, differences)):
            counts[0 if math.isfinite(sum(ours[task].values())) else 2] += 1
            continue
        difference = estimate(differences)
        counts[1 if abs(difference.mean) <= 2 * difference.error else 0 if difference.mean < 0 else 2] += 1
    return "{}-{}-{}".format(*counts)


def worse_than_untrained(rows: Rows, tasks: Sequence[str]) -> tuple[int, int]:
    """How many runs of ours end more than 1 % above their untrained start, and how many there are."""
    ours = [row for task in tasks for arm in ("learn", "learn, total_steps") for row in rows.of(task, arm=arm)]
    return sum(not _finite(row) <= 1.01 * float(row["loss_0"]) for row in ours), len(ours)


def write(rows: Rows, note: str = "") -> None:
    """Write `index.md` and the figure beside the rows."""
    rows.folder.mkdir(parents=True, exist_ok=True)
    halves = {"Held-out tasks": [name for name, task in TASKS.items() if task.held_out]}
    halves["Tasks that the recipe was found on"] = [name for name in TASKS if name not in halves["Held-out tasks"]]
    text = ["# Arena of learned learning rates", "", *([note, ""] if note else []), *INTRODUCTION.splitlines(), ""]
    if _draw(rows, rows.folder / "start.png"):
        text += ["![Validation loss at the end against the learning rate, or its start, for each task.](start.png)", ""]
    for title, names in halves.items():
        text += [f"## {title}", ""]
        tasks = [task for task in names if rows.of(task)]
        if not tasks:
            text += ["Not run yet.", ""]
            continue
        for base in ("adamw", "sgd", "lion", "muon"):
            for arm, against in (("learn", ["constant"]), ("learn, total_steps", ["linear", "cosine"])):
                table = judged(rows, tasks, base, arm, against)
                if len(table) > 2:
                    text += [f"**{base}, {arm}**", "", *table, ""]
        table = compared(rows, tasks)
        if len(table) > 4:
            text += ["**Methods without tuning, for AdamW**", "", *table, ""]
        bad, count = worse_than_untrained(rows, tasks)
        text += [f"{bad} of {count} learned runs end more than 1 % above their untrained start.", ""]
    (rows.folder / "index.md").write_text("\n".join(text))


INTRODUCTION = """\
Validation losses at the end of training, of rates that `hn.learn` learns by default and of tuned ones: means over seeds with
their standard errors. Bold is within one standard error of the tuned arm, whose rate is the best of seven for these very
seeds. The [protocol](../arena-protocol.md) was written before the held-out tasks were run.
`make arena` makes the runs, and goes on where it stopped; `python -m benchmarks.arena --tables` writes this page.

In the tables of methods without tuning, the last two columns count tasks where ours is better, equal within two standard
errors of paired differences, and worse."""


def _draw(rows: Rows, path: Path) -> bool:
    """Final loss against the rate or its start, a panel a task; whether there is anything to draw."""
    tasks = [task for task in TASKS if rows.of(task, base="adamw", arm="constant")]
    if not tasks:
        return False
    figure = Figure(figsize=(11, 2.6 * math.ceil(len(tasks) / 4)), layout="constrained")
    all_axes = figure.subplots(math.ceil(len(tasks) / 4), 4, squeeze=False).flatten()
    for axes in all_axes[len(tasks) :]:
        axes.remove()
    for axes, task in zip(all_axes, tasks, strict=False):
        lowest, start = math.inf, float(rows.of(task)[0]["loss_0"])
        for arm, color in COLORS.items():
            by_rate = {rate: _mean(each.values()) for rate, each in losses(rows, task, "adamw", arm).items()}
            points = {rate: min(each.mean, start) for rate, each in by_rate.items()}
            if points:
                lowest = min(lowest, *points.values())
                style = "o-" if arm.startswith("learn") else ".--"
                axes.plot(list(points), list(points.values()), style, color=color, label=arm, markersize=4)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_title(f"{task}{' (held out)' if TASKS[task].held_out else ''}", fontsize=9)
        axes.tick_params(labelsize=7)
    all_axes[0].legend(fontsize=7)
    figure.supxlabel("learning rate, or its start", fontsize=9)
    figure.supylabel("validation loss at the end", fontsize=9)
    figure.savefig(path, dpi=110)
    return True
