"""What the demo shows: a table of accuracies, and a figure."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, median, stdev

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table

from ftp.demo.data import SHIFTS
from ftp.demo.methods import HIGH_LR, LOW_LR, METHODS, Method
from ftp.demo.train import IN_DISTRIBUTION, Outcome

Outcomes = Mapping[str, Sequence[Outcome]]

_COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7")


def table(outcomes: Outcomes) -> Table:
    """Accuracy in percent, mean and standard error over the seeds: a row a method, a column a condition; and the time of a step."""
    seeds = len(next(iter(outcomes.values())))
    found = Table(
        title="Fine-tuned on clean digits 5 to 9: test accuracy in percent",
        caption=f"Mean ± standard error over {seeds} seed{'s' if seeds > 1 else ''}. ID: in distribution; OOD: mean of the shifts, "
        "which are the next columns; ms: median processor time of a step, TPGM's projections included. Deliberately wrong: the learning "
        f"rate of SGD and SGDP, {HIGH_LR:g}, is too high; {LOW_LR:g} is too low for AdamW, and is where the learned rate starts. The other "
        "settings are those with the best ID accuracy on validation images.",
        box=SIMPLE_HEAD,
        padding=0,
        show_lines=True,
    )
    found.add_column("method")
    for heading in ("ID", "OOD", *SHIFTS):
        found.add_column(heading, justify="right")
    found.add_column("ms", justify="right")
    for method in METHODS:
        runs = outcomes[method.name]
        columns = [
            [run.accuracy[IN_DISTRIBUTION] for run in runs],
            [run.shifts for run in runs],
            *([run.accuracy[shift] for run in runs] for shift in SHIFTS),
        ]
        found.add_row(f"{method.name}\n  lr {_lr(method, runs)}", *map(_cell, columns), f"{_time(method, runs):.0f}")
    return found


def figure(outcomes: Outcomes) -> Figure:
    """Three panels: accuracy in and out of distribution, the learned radii, and the learned learning rate."""
    made = Figure(figsize=(15, 4.8), layout="constrained")
    accuracy, radius, lr = made.subplots(1, 3, width_ratios=(1.25, 1, 1))
    _accuracy(accuracy, outcomes)
    _radius(radius, outcomes)
    _lr_over_time(lr, outcomes)
    for axes in (accuracy, radius, lr):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    return made


def save(outcomes: Outcomes, path: Path) -> None:
    """Write the figure as a PNG."""
    figure(outcomes).savefig(path, format="png", dpi=120)


def _accuracy(axes: Axes, outcomes: Outcomes) -> None:
    rows = range(len(METHODS))
    labels = [f"{method.name}\nlr {_lr(method, outcomes[method.name])}" for method in METHODS]
    inside = [[run.accuracy[IN_DISTRIBUTION] for run in outcomes[method.name]] for method in METHODS]
    outside = [[run.shifts for run in outcomes[method.name]] for method in METHODS]
    for values, color, name in ((outside, _COLORS[1], "mean of shifts"), (inside, _COLORS[0], IN_DISTRIBUTION)):
        axes.errorbar([mean(v) for v in values], rows, xerr=[_error(v) for v in values], fmt="o", color=color, capsize=3, label=name)
    axes.hlines(rows, [mean(v) for v in outside], [mean(v) for v in inside], color="0.85", zorder=0)
    axes.set_yticks(rows, labels)
    axes.invert_yaxis()
    axes.set(title="Accuracy in and out of distribution", xlabel="test accuracy (%), mean ± standard error")
    _legend(axes, 2)


def _radius(axes: Axes, outcomes: Outcomes) -> None:
    styles = {"AdamP": "-", "SGDP": "--"}
    layers = [label for label in outcomes["AdamP"][0].trace["radius"] if "conv" in label]
    for color, layer in zip(_COLORS, layers, strict=True):
        for name, style in styles.items():
            values = outcomes[name][0].trace["radius"][layer]
            axes.plot(range(1, len(values) + 1), values, style, color=color, label=f"{name}, {layer.split('.')[1]}")
    axes.set(title="Learned radius per layer, first seed", xlabel="step", ylabel="radius (MARS norm)")
    _legend(axes, 4)


def _lr_over_time(axes: Axes, outcomes: Outcomes) -> None:
    runs = [run.trace["lr"]["group 0"] for run in outcomes["AdamW, learned lr"]]
    steps = range(1, len(runs[0]) + 1)
    for i, values in enumerate(runs):
        axes.plot(steps, values, color=_COLORS[0], alpha=0.35, label=None if i else "a seed")
    axes.plot(steps, [mean(values) for values in zip(*runs, strict=True)], color=_COLORS[0], linewidth=2, label="mean")
    tuned = next(method.lr for method in METHODS if method.name == "AdamW")
    axes.axhline(tuned, color=_COLORS[1], linestyle=":", label=f"tuned: {tuned:g}")
    axes.set_yscale("log")
    axes.set(title="Learned learning rate of AdamW", xlabel="step", ylabel="learning rate")
    _legend(axes, 3)


def _legend(axes: Axes, columns: int) -> None:
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=columns, frameon=False, fontsize="small", columnspacing=1)


def _lr(method: Method, runs: Sequence[Outcome]) -> str:
    """Learning rate of a method; where it is learned, from its start to its mean at the end."""
    if "lr" not in runs[0].trace:
        return f"{method.lr:g}"
    return f"{method.lr:g} → {mean(run.trace['lr']['group 0'][-1] for run in runs):.1g}"


def _time(method: Method, runs: Sequence[Outcome]) -> float:
    """Median processor time of a step in milliseconds, over all runs; steps between two projections share the time of the second."""
    rounds = [run.times[start : start + method.every] for run in runs for start in range(0, len(run.times), method.every)]
    return median(map(mean, rounds))


def _cell(values: Sequence[float]) -> str:
    return f"{mean(values):.1f}\n±{_error(values):.1f}" if len(values) > 1 else f"{mean(values):.1f}"


def _error(values: Sequence[float]) -> float:
    """Standard error of the mean; 0 of a single value."""
    return float(stdev(values) / len(values) ** 0.5) if len(values) > 1 else 0.0
