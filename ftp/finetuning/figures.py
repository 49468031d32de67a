"""Figures of a report, as inline SVG; needs matplotlib.

A method has one color and one marker in all figures. The colors are chosen for color-blind readers; they repeat after eleven methods, with
other markers and lines.
"""

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from html import escape
from io import StringIO
from statistics import mean
from typing import Any, Literal, NamedTuple

import matplotlib
import numpy
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter, StrMethodFormatter
from torch import Tensor

from ftp.finetuning.comparison import Estimate, Runs, accuracy, best_epoch, corruption_set
from ftp.finetuning.result import Result

Line = Literal["-", "--", ":", "-."]

_COLORS = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#888888"),  # Okabe and Ito, and a gray
    *("#882255", "#999933", "#332288"),  # Tol
)
_MARKERS = "osD^vPX*<>hpd"
_LINES: tuple[Line, ...] = ("-", "--", ":", "-.")
_RC: dict[Any, Any] = {
    "text.parse_math": False,  # a class may be called $5
    "svg.fonttype": "none",
    "svg.image_inline": True,
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}
_MANY = 8  # tensors, beyond which a line each can no longer be told apart


class Style(NamedTuple):
    """How a method is drawn."""

    color: str
    marker: str
    linestyle: Line


def styles(labels: Sequence[str]) -> dict[str, Style]:
    """Choose a style for each method.

    Args:
        labels: of the methods, in order.

    Returns:
        A style by label; all differ up to 143 methods.
    """
    return {
        label: Style(_COLORS[i % len(_COLORS)], _MARKERS[(i + i // len(_COLORS)) % len(_MARKERS)], _LINES[i // len(_COLORS) % len(_LINES)])
        for i, label in enumerate(labels)
    }


def svg(draw: Callable[[], Figure], description: str) -> str:
    """Render a figure.

    Args:
        draw: returns the figure.
        description: what it shows, for those who do not see it; unique on a page.

    Returns:
        An `<svg>` element that needs no other file: equal for equal figures.
    """
    file = StringIO()
    with matplotlib.rc_context({**_RC, "svg.hashsalt": description}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the font of the layout lacks it, the browser's need not
        draw().savefig(file, format="svg", dpi=144, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # these repeat from figure to figure
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(description)}" ', 1)


def scatter(runs: Runs, panels: Mapping[str, Sequence[str]], inside: str) -> Figure:
    """Plot accuracy out of distribution against accuracy in distribution.

    Args:
        runs: of each method.
        panels: by title, test sets whose mean is the ordinate of a panel.
        inside: the test set of the abscissa.

    Returns:
        The figure: a panel for each.
    """
    figure = Figure(figsize=(min(11, 4.3 * len(panels) + 2.4), 4.2))
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, sets) in zip(all_axes, panels.items(), strict=True):
        for own, style in zip(runs.values(), styles([*runs]).values(), strict=True):
            x, y = accuracy(own, [inside]), accuracy(own, sets)
            if x and y:
                axes.errorbar(
                    100 * x.value,
                    100 * y.value,
                    xerr=100 * x.error,
                    yerr=100 * y.error,
                    color=style.color,
                    marker=style.marker,
                    markersize=6,
                    elinewidth=1,
                    capsize=2,
                    linestyle="none",
                )
        axes.set(title=title, xlabel=f"accuracy on {_short(inside)} (%)", ylabel="accuracy (%)")
        axes.margins(0.12)
    _legend(figure, styles([*runs]), beside=True)
    return figure


def severity(runs: Runs) -> Figure:
    """Plot accuracy against the severity of each corruption.

    Args:
        runs: of each method.

    Returns:
        The figure: a panel for each corruption, and one for their mean; severity 0 is the test set without corruption.
    """
    sets = {name: each for own in runs.values() for run in own for name in run.evaluations if (each := corruption_set(name))}
    several = len({each.of for each in sets.values()}) > 1
    panels: dict[str, dict[int, list[str]]] = {}
    for name, each in sets.items():
        for title in ("mean", f"{each.of}: {each.name}" if several else each.name):
            levels = panels.setdefault(title, {0: []})
            levels[0] += [each.of] if each.of not in levels[0] else []
            levels.setdefault(each.severity, []).append(name)
    if len(panels) == 2:
        del panels["mean"]
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(11 if columns > 2 else 5 * columns, 2.1 * rows + 0.6))
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes, (title, levels) in zip(grid.flat, panels.items(), strict=False):
        for own, style in zip(runs.values(), styles([*runs]).values(), strict=True):
            estimates = {level: value for level in sorted(levels) if (value := accuracy(own, levels[level]))}
            if estimates:
                _line(axes, estimates, style)
        axes.set_title(title.replace("_", " "), fontweight="bold" if title == "mean" else "normal")
        axes.set_xticks(sorted(levels))
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for column in range(columns):
        last = [axes for axes in grid[:, column] if axes.get_visible()][-1]
        last.set_xlabel("severity")
        last.tick_params(labelbottom=True)
    for axes in grid[:, 0]:
        axes.set_ylabel("accuracy (%)")
    _legend(figure, styles([*runs]))
    return figure


def history(runs: Runs) -> Figure:
    """Plot training loss, validation loss and validation accuracy over the epochs.

    Args:
        runs: of each method.

    Returns:
        The figure: thick lines are means over the seeds, thin ones are seeds, markers are the epochs that runs end with.
    """
    figure = Figure(figsize=(11, 3.4))
    panels = {"training loss": "train_loss", "validation loss": "validation_loss", "validation accuracy (%)": "validation_accuracy"}
    for axes, (title, field) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        scale = 100 if field == "validation_accuracy" else 1
        for own, style in zip(runs.values(), styles([*runs]).values(), strict=True):
            lines = [{epoch.epoch: scale * float(getattr(epoch, field)) for epoch in run.epochs} for run in own]
            shared = [epoch for epoch in lines[0] if all(epoch in line for line in lines)]
            if len(lines) > 1:
                for line in lines:
                    axes.plot([*line], [*line.values()], color=style.color, linestyle=style.linestyle, linewidth=0.6, alpha=0.35)
            means = [mean(line[epoch] for line in lines) for epoch in shared]
            axes.plot(shared, means, color=style.color, linestyle=style.linestyle)
            best = [(epoch.epoch, line) for run, line in zip(own, lines, strict=True) if (epoch := best_epoch(run))]
            axes.plot(
                [at for at, _ in best],
                [line[at] for at, line in best],
                color=style.color,
                marker=style.marker,
                markersize=4,
                linestyle="none",
            )
        if scale == 1:
            _scale(axes)
        axes.set(title=title, xlabel="epoch")
        axes.locator_params(axis="x", integer=True)
    _legend(figure, styles([*runs]))
    return figure


def learned(run: Result, name: str) -> Figure:
    """Plot a learned value of each tensor over the epochs.

    Args:
        run: its epochs have the values.
        name: of the value, such as "radius".

    Returns:
        The figure: a line a tensor; of many tensors, a map with a row each.
    """
    epochs = [epoch for epoch in run.epochs if any(key.split("/")[0] == name for key in epoch.radii)]
    tensors = list(dict.fromkeys(key for epoch in epochs for key in epoch.radii if key.split("/")[0] == name))
    values = numpy.array([[epoch.radii.get(key, numpy.nan) for epoch in epochs] for key in tensors], dtype=float)
    labels = [_short(key.partition("/")[2] or key, 44) for key in tensors]
    numbers = [epoch.epoch for epoch in epochs]
    if len(tensors) > _MANY:
        return _map(values, labels, numbers, name)
    figure = Figure(figsize=(9, 3.4))
    axes = figure.subplots()
    for line, style in zip(values, styles(tensors).values(), strict=True):
        axes.plot(numbers, line, color=style.color, marker=style.marker, markersize=3)
    _scale(axes)
    axes.set(xlabel="epoch", ylabel=name)
    axes.locator_params(axis="x", integer=True)
    _legend(figure, dict(zip(labels, styles(tensors).values(), strict=True)), beside=True)
    return figure


def distances(ends: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """Plot the distance of each tensor to its pre-trained values.

    Args:
        ends: by label of a method, distances by tensor at the end of each run; of at least one run.

    Returns:
        The figure: bars, a row a tensor, a column a method, mean over the runs.
    """
    colors = {label: style.color for label, style in styles([*ends]).items() if ends[label]}
    tensors = list(dict.fromkeys(tensor for label in colors for end in ends[label] for tensor in end))
    values = {label: [mean(end.get(tensor, 0.0) for end in ends[label]) for tensor in tensors] for label in colors}
    most = max(max(own) for own in values.values())
    height = min(18.0, max(1.2, 0.17 * len(tensors)) + 0.9)
    figure = Figure(figsize=(min(11, 3.5 + 2 * len(colors)), height))
    axes = figure.subplots()
    places = range(len(tensors))
    for left, (label, color) in enumerate(colors.items()):
        widths = [left + 0.92 * value / (most or 1) for value in values[label]]
        axes.hlines(places, left, widths, color=color, linewidth=0.75 * 72 * (height - 0.9) / len(tensors), capstyle="butt")
        axes.axvline(left, color="#555555", linewidth=0.8)
    axes.set_xticks(range(len(colors)), [_wrapped(label) for label in colors], ha="left", fontsize=8)
    axes.set(xlim=(-0.02, len(colors)), ylim=(len(tensors) - 0.4, -0.6), xlabel=f"the longest bar is a distance of {most:.3g}")
    axes.tick_params(axis="x", top=False, labeltop=True, bottom=False, labelbottom=False)
    axes.tick_params(axis="y", length=0)
    axes.spines[:].set_visible(False)
    axes.grid(visible=False)
    _name_rows(axes, [_short(tensor, 40) for tensor in tensors], height)
    return figure


def confusion(counts: Tensor, classes: Sequence[str]) -> Figure:
    """Plot a confusion matrix.

    Args:
        counts: of true (rows) and predicted classes (columns), shape (c, c).
        classes: their names.

    Returns:
        The figure: shares of the true class.
    """
    shares = (counts.double() / counts.sum(1, keepdim=True).clamp(min=1)).numpy()
    size = len(classes)
    side = min(7.0, 2.6 + 0.28 * size) if size <= 40 else 6
    figure = Figure(figsize=(side, side * 0.9))
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    every = 1 if size <= 40 else -(-size // 30)
    places = range(0, size, every)
    names = [_short(classes[place], 16) for place in places]
    axes.set_xticks(places, names, rotation=90, fontsize=8 if size <= 20 else 6)
    axes.set_yticks(places, names, fontsize=8 if size <= 20 else 6)
    axes.set(xlabel="predicted", ylabel="true")
    if size <= 12:
        for row, column in numpy.ndindex(size, size):
            if counts[row, column]:
                axes.text(
                    column,
                    row,
                    f"{100 * shares[row, column]:.0f}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if shares[row, column] > 0.4 else "black",
                )
    bar = figure.colorbar(image, ax=axes, shrink=0.7, ticks=[0, 0.1, 0.25, 0.5, 1])
    bar.ax.set_yticklabels(["0 %", "10 %", "25 %", "50 %", "100 %"], fontsize=7)
    return figure


def _line(axes: Axes, values: Mapping[int, Estimate], style: Style) -> None:
    axes.errorbar(
        [*values],
        [100 * value.value for value in values.values()],
        yerr=[100 * value.error for value in values.values()],
        color=style.color,
        marker=style.marker,
        linestyle=style.linestyle,
        markersize=3,
        linewidth=1,
        elinewidth=0.6,
    )


def _scale(axes: Axes) -> None:
    """Make the ordinate logarithmic where values are far apart."""
    ends = _decades(numpy.concatenate([numpy.asarray(line.get_ydata(), float) for line in axes.lines]))
    if ends:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(ends[0] / 1.3, ends[1] * 1.3)


def _decades(values: Any) -> tuple[float, float] | None:
    """Ends of a logarithmic scale, at most four decades; None where a linear one shows more."""
    values = values[numpy.isfinite(values)]
    if (values < 0).any() or not (values > 0).any():
        return None
    low, high = values[values > 0].min(), values.max()
    return (max(low, high / 1e4), high) if high > 20 * low else None


def _map(values: Any, labels: Sequence[str], epochs: Sequence[int], name: str) -> Figure:
    height = min(18.0, 0.16 * len(labels) + 1)
    figure = Figure(figsize=(min(10, 4.5 + 0.25 * len(epochs)), height))
    axes = figure.subplots()
    ends = _decades(values)
    norm = LogNorm(*ends) if ends else Normalize()
    colors = matplotlib.colormaps["viridis"].with_extremes(bad="#eeeeee")
    image = axes.imshow(numpy.ma.masked_invalid(values), cmap=colors, norm=norm, aspect="auto", interpolation="nearest")
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    every = -(-len(epochs) // 15)
    axes.set_xticks(range(0, len(epochs), every), [str(epoch) for epoch in epochs[::every]])
    axes.set_xlabel("epoch")
    _name_rows(axes, labels, height)
    label = f"{name}; gray: 0" if ends and (values == 0).any() else name
    under = "min" if ends and (values < ends[0]).any() else "neither"
    shape: dict[str, Any] = {"shrink": min(1, 5 / height), "anchor": (0, 1), "aspect": 25}
    bar = figure.colorbar(image, ax=axes, label=label, extend=under, format=StrMethodFormatter("{x:g}"), **shape)
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    return figure


def _name_rows(axes: Axes, names: Sequence[str], height: float) -> None:
    """Name as many rows as fit."""
    every = max(1, -(-len(names) // int(height / 0.12)))
    axes.set_yticks(range(0, len(names), every), names[::every], fontsize=7)


def _legend(figure: Figure, shown: Mapping[str, Style], beside: bool = False) -> None:
    if len(shown) > 1 or beside:
        labels = [_short(label, 48) for label in shown]
        handles = [Line2D([], [], color=color, marker=marker, linestyle=line, markersize=4) for color, marker, line in shown.values()]
        columns = 1 if beside else max(1, min(len(shown), 170 // (max(map(len, labels)) + 6)))
        place: Any = "outside right upper" if beside else "outside upper center"
        figure.legend(handles, labels, loc=place, ncols=columns, fontsize=8)


def _short(name: str, most: int = 24) -> str:
    """A name in printable characters, with its middle left out if it is long; a legend hides names that start with an underscore."""
    name = "".join(character if character.isprintable() else "\ufffd" for character in name)
    short = name if len(name) <= most else f"{name[: most // 2]}…{name[len(name) - most // 2 + 1 :]}"
    return f"\u200b{short}" if short.startswith("_") else short


def _wrapped(label: str) -> str:
    method, _, settings = label.partition(" (")
    return f"{_short(method, 20)}\n({_short(settings, 20)}" if settings else _short(method, 20)
