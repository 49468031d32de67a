"""Pictures of what was learned: trajectories, heat maps of layers, towers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyperopt_nested.checks import extra
from hyperopt_nested.integrations import Record, Recorder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["heatmap", "tower", "trajectories"]

_LEGEND = 12
"""Lines that a legend names at most."""


def trajectories(record: Record | Recorder | str | Path, names: Iterable[str] | str | None = None) -> Figure:
    """Draw learned values over the steps, a panel a hyper.

    Args:
        record: a record, what records, or a file that it was saved to.
        names: hypers ("lr") or values ("weight_decay/0.weight") to draw; None draws all.

    Returns:
        The figure, which belongs to no window: `figure.savefig("run.png")`.

    Raises:
        ValueError: there is no such value, or the record is empty.
        ModuleNotFoundError: matplotlib is not installed.

    Example:
        >>> import hyperopt_nested as hn
        >>> values = {"lr": [0.1, 0.2, 0.3], "momentum/w": [0.9, 0.8, 0.8]}
        >>> record = hn.integrations.Record([1, 2, 3], values)
        >>> [axes.get_title() for axes in hn.plot.trajectories(record).axes]
        ['lr', 'momentum']
    """
    found = _record(record)
    wanted = [names] if isinstance(names, str) else None if names is None else [*names]
    values = {name: each for name, each in found.values.items() if wanted is None or name in wanted or _hyper(name) in wanted}
    for name in wanted or ():
        _check(name, any(name in (each, _hyper(each)) for each in values), found)
    hypers = list(dict.fromkeys(map(_hyper, values)))
    return _panels(hypers, found.steps, {hyper: {name: each for name, each in values.items() if _hyper(name) == hyper} for hyper in hypers})


def tower(record: Record | Recorder | str | Path, name: str = "lr") -> Figure:
    """Draw a hyper, its learner's, and so on: one panel a height, the hyper at the bottom.

    Args:
        record: as of `trajectories`.
        name: the hyper.

    Returns:
        The figure.

    Raises:
        ValueError: there is no such hyper, or the record is empty.
        ModuleNotFoundError: matplotlib is not installed.

    Example:
        >>> import hyperopt_nested as hn
        >>> values = {"lr": [0.1, 0.2], "lr.lr": [1e-3, 2e-3], "momentum": [0.0, 0.0]}
        >>> record = hn.integrations.Record([1, 2], values)
        >>> [axes.get_title() for axes in hn.plot.tower(record).axes]
        ['lr.lr', 'lr']
    """
    found = _record(record)
    heights = [hyper for hyper in dict.fromkeys(map(_hyper, found.values)) if hyper == name or hyper.startswith(f"{name}.")]
    _check(name, name in heights, found)
    heights.sort(key=lambda hyper: -hyper.count("."))
    return _panels(heights, found.steps, {h: {each: value for each, value in found.values.items() if _hyper(each) == h} for h in heights})


def heatmap(record: Record | Recorder | str | Path, name: str) -> Figure:
    """Draw a hyper that is learned per tensor: tensors from top to bottom, steps from left to right.

    Args:
        record: as of `trajectories`.
        name: the hyper.

    Returns:
        The figure. Colors are logarithmic where all values are positive.

    Raises:
        ValueError: there is no such hyper, all tensors share its value, or the record is empty.
        ModuleNotFoundError: matplotlib is not installed.

    Example:
        >>> import hyperopt_nested as hn
        >>> values = {"lr/0.weight": [0.1, 0.2], "lr/2.weight": [0.1, 0.05]}
        >>> record = hn.integrations.Record([1, 2], values)
        >>> hn.plot.heatmap(record, "lr").axes[0].get_title()
        'lr'
    """
    found = _record(record)
    values = {each.partition("/")[2]: value for each, value in found.values.items() if each.startswith(f"{name}/")}
    _check(name, bool(values), found)
    with extra("plot"):
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
    figure = Figure(figsize=(7, 1.2 + 0.22 * len(values)), layout="constrained")
    axes: Any = figure.subplots()
    positive = all(value > 0 or math.isnan(value) for row in values.values() for value in row)
    image = axes.pcolormesh(
        found.steps, range(len(values)), [*values.values()], shading="nearest", norm=LogNorm() if positive else None, rasterized=True
    )
    axes.set_yticks(range(len(values)), [*values], fontsize="small")
    axes.invert_yaxis()
    axes.set(title=name, xlabel="step")
    figure.colorbar(image, ax=axes)
    return figure


def _panels(titles: list[str], steps: list[int], values: dict[str, dict[str, list[float]]]) -> Figure:
    with extra("plot"):
        from matplotlib.figure import Figure
    figure = Figure(figsize=(7, 0.6 + 2 * len(titles)), layout="constrained")
    panels: Any = figure.subplots(len(titles), sharex=True, squeeze=False)
    for axes, title in zip(panels.flat, titles, strict=True):
        several = len(values[title]) > 1
        for name, each in values[title].items():
            axes.plot(steps, each, label=name.partition("/")[2] if several else None, linewidth=1.2)
        if all(value > 0 or math.isnan(value) for each in values[title].values() for value in each):
            axes.set_yscale("log")
        axes.set_title(title)
        axes.grid(alpha=0.3)
        if several and len(values[title]) <= _LEGEND:
            axes.legend(fontsize="small")
    panels[-1, 0].set_xlabel("step")
    return figure


def _record(record: Record | Recorder | str | Path) -> Record:
    found = Record.load(record) if isinstance(record, (str, Path)) else record.record() if isinstance(record, Recorder) else record
    if not found.steps:
        raise ValueError("the record is empty: nothing was learned, or no step was taken")
    return found


def _hyper(name: str) -> str:
    return name.partition("/")[0]


def _check(name: str, known: bool, record: Record) -> None:
    if not known:
        raise ValueError(f"the record has no values {name!r} of this kind; it has {', '.join(list(record.values)[:8])}")
