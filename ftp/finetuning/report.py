"""One HTML file about finished runs: tables and figures, for readers without Python or a network."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from html import escape
from itertools import chain, combinations, repeat
from pathlib import Path
from statistics import mean
from typing import Any

from ftp.finetuning.comparison import (
    Column,
    Estimate,
    Runs,
    accuracy,
    agreement,
    best_epoch,
    by_method,
    columns,
    compared,
    confusion,
    corruption_set,
    difference,
    merged,
)
from ftp.finetuning.files import extra, write
from ftp.finetuning.result import Result

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_STYLE = """
:root { color-scheme: light; --line: #ddd; --dim: #666; }
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 1080px; margin: 0 auto; padding: 1rem 1.25rem 4rem; }
h1 { margin: 0.5rem 0 0; }
h2 { margin: 2.5rem 0 0.25rem; border-top: 1px solid var(--line); padding-top: 1rem; }
h3 { margin: 1.25rem 0 0; }
p { max-width: 46rem; margin: 0.35rem 0 0.75rem; } .note, caption { color: var(--dim); font-size: 0.87rem; }
nav { font-size: 0.9rem; margin: 0.75rem 0; } nav a { margin-right: 1rem; white-space: nowrap; }
a { color: #0059a0; }
.scroll { overflow: auto; max-height: 40rem; margin: 0.5rem 0 1rem; }
table { border-collapse: collapse; font-size: 0.87rem; font-variant-numeric: tabular-nums; }
caption { caption-side: bottom; text-align: left; padding-top: 0.35rem; }
th, td { padding: 0.25rem 0.7rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: baseline; white-space: nowrap; }
th.text, td.text { text-align: left; white-space: pre-wrap; overflow-wrap: break-word; max-width: 26rem; } tbody th { font-weight: normal; }
thead th { position: sticky; top: 0; background: #fff; vertical-align: bottom; border-bottom: 1.5px solid #999; }
thead th { white-space: normal; overflow-wrap: break-word; min-width: 3.5rem; max-width: 11rem; }
.error { color: var(--dim); font-size: 0.92em; } .clear { font-weight: 600; }
figure { margin: 0.75rem 0; overflow-x: auto; } svg { max-width: 100%; height: auto; font-family: system-ui, sans-serif; }
.side { display: flex; flex-wrap: wrap; gap: 0 2rem; align-items: flex-start; }
pre { background: #f6f6f6; padding: 0.6rem 0.8rem; white-space: pre-wrap; overflow-wrap: anywhere; }
summary { cursor: pointer; margin: 0.5rem 0; }
@media print { nav { display: none; } .scroll { max-height: none; } h2 { break-after: avoid; } figure, tr { break-inside: avoid; } }
"""


class _Html(str):
    """Markup; every other string is text."""

    __slots__ = ()


def write_report(results: Sequence[Result], path: str | os.PathLike[str]) -> None:
    """Write a report of finished runs: one HTML file with tables and figures, without scripts or links to other files.

    Runs that differ in their seeds only are one method. The first method is the one that the others are compared with.

    Args:
        results: one or more runs, of equal classes; the last of the classes may be missing in some.
        path: of the file, such as "report.html". An older file is replaced when the new one is complete.

    Raises:
        OSError: the file cannot be written.
        ValueError: there are no results, their classes differ, or one is there twice.
        ModuleNotFoundError: matplotlib is not installed.

    Example:
        >>> import torch
        >>> from tempfile import mkdtemp
        >>> from ftp.finetuning import Epoch, Evaluation, Result
        >>> labels = torch.tensor([0, 1, 1])
        >>> evaluation = Evaluation(labels, torch.tensor([0, 1, 0]))
        >>> epoch = Epoch(1, 10, 1e-3, 0.5, 0.6, validation_accuracy=0.7, seconds=1.0)
        >>> sets = {"test": evaluation}
        >>> result = Result("ftp", 0, {"lr": 1e-3}, ["cat", "dog"], [epoch], sets)
        >>> path = Path(mkdtemp()) / "report.html"
        >>> write_report([result], path)
        >>> "66.7" in path.read_text()
        True
    """
    if not results:
        raise ValueError("results is empty: a report needs at least one finished run")
    classes = max((list(result.classes) for result in results), key=len)
    for result in results:
        if list(result.classes) != classes[: len(result.classes)]:
            raise ValueError(f"classes differ: {list(result.classes)!r:.200} of {result.method}, and {classes!r:.200}")
    with extra():
        page = _page(by_method(results), classes)
    write(Path(path), page.encode(errors="replace"))


def _page(runs: Runs, classes: Sequence[str]) -> str:
    sections = {
        "Accuracy": _accuracy(runs),
        "Difference to the first method": _differences(runs),
        "In and out of distribution": _scatter(runs),
        "Corruptions": _corruptions(runs),
        "Training": _training(runs),
        "Distance to the pre-trained model": _distances(runs),
        "Learned values": _learned(runs),
        "Agreement of methods": _agreement(runs),
        "Classes": _classes(runs, classes),
        "Settings": _settings(runs),
    }
    shown = {title: content for title, content in sections.items() if content}
    anchors = {title: title.lower().replace(" ", "-") for title in shown}
    links = " ".join(f'<a href="#{anchors[title]}">{title}</a>' for title in shown)
    body = "".join(f'<section id="{anchors[title]}"><h2>{title}</h2>{content}</section>' for title, content in shown.items())
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Fine-tuning report</title><style>{_STYLE}</style></head>\n"
        f"<body><h1>Fine-tuning report</h1>{_lead(runs, classes)}<nav>{links}</nav>{body}</body></html>\n"
    )


def _lead(runs: Runs, classes: Sequence[str]) -> str:
    results = [run for own in runs.values() for run in own]
    seeds = sorted({run.seed for run in results})
    sets = {name: len(each.labels) for run in results for name, each in run.evaluations.items() if not corruption_set(name)}
    counts = ", ".join(f"{name} {count:,}" for name, count in sets.items())
    return _paragraph(
        f"{_count(len(runs), 'method')}, {_count(len(seeds), 'seed')} ({', '.join(map(str, seeds))}), "
        f"{_count(len(classes), 'class', 'classes')}. Images: {counts or 'none'}."
    )


def _accuracy(runs: Runs) -> str:
    found = _columns(runs)
    rows = [[label, *(_percent(accuracy(own, column.sets)) for column in found)] for label, own in runs.items()]
    return _table(["accuracy in %", *(column.heading for column in found)], rows, _error_note(runs)) if found else ""


def _differences(runs: Runs) -> str:
    first, *others = runs
    found = _columns(runs)
    if not others or not found:
        return ""
    rows = [[label, *(_percent(difference(runs[label], runs[first], column.sets), signed=True) for column in found)] for label in others]
    text = f"Accuracy minus that of {first}, in points, paired by seed and by image. Bold: more than two standard errors from 0."
    return _paragraph(text) + _table(["points", *(column.heading for column in found)], rows)


def _scatter(runs: Runs) -> str:
    from ftp.finetuning import figures

    found = {column.heading: column.sets for column in _columns(runs)}
    inside = next((name for name in ("test", "validation") if (name,) in found.values()), None)
    shifts = [heading for heading, sets in found.items() if sets not in (("test",), ("validation",)) and heading != "mean of corruptions"]
    panels = {heading: found[heading] for heading in [*shifts[-1:], "mean of corruptions"] if heading in found}
    if inside is None or not panels:
        return ""
    text = f"Up: robust. Right: accurate on {inside}, the distribution of the training images. Bars are standard errors."
    return _paragraph(text) + _figure(
        figures.svg(partial(figures.scatter, runs, panels, inside), "accuracy out of distribution over in it")
    )


def _corruptions(runs: Runs) -> str:
    from ftp.finetuning import figures

    if not any(corruption_set(name) for own in runs.values() for run in own for name in run.evaluations):
        return ""
    text = "Accuracy against severity; 0 is the test set without corruption. Bars are standard errors."
    return _paragraph(text) + _figure(figures.svg(partial(figures.severity, runs), "accuracy over the severity of each corruption"))


def _training(runs: Runs) -> str:
    from ftp.finetuning import figures

    trained = {label: own for label, own in runs.items() if all(run.epochs for run in own)}
    if not trained:
        return ""
    rows = []
    for label, own in trained.items():
        ends = [epoch for run in own if (epoch := best_epoch(run))]
        rows.append(
            [
                label,
                ", ".join(str(epoch.epoch) for epoch in ends),
                ", ".join(str(run.epochs[-1].epoch) for run in own),
                f"{mean(run.epochs[-1].step for run in own):,.0f}",
                f"{100 * mean(epoch.validation_accuracy for epoch in ends):.1f}",
                _seconds(mean(sum(epoch.seconds for epoch in run.epochs) for run in own)),
                "; ".join(dict.fromkeys(run.stopped for run in own if run.stopped)),
            ]
        )
    text = "Markers are the epochs with the best validation accuracy, whose weights are kept."
    text += " Thick lines are means over the seeds, thin lines are seeds." if any(len(own) > 1 for own in runs.values()) else ""
    head = ["method", "best epoch", "epochs", "steps", "best validation accuracy in %", "training time", "stopped"]
    if not any(row[-1] for row in rows):
        head, rows = head[:-1], [row[:-1] for row in rows]
    drawing = figures.svg(partial(figures.history, trained), "losses and accuracy over the epochs")
    return _paragraph(text) + _figure(drawing) + _table(head, rows)


def _distances(runs: Runs) -> str:
    from ftp.finetuning import figures

    ends = {label: [epoch.distances for run in own if (epoch := best_epoch(run)) and epoch.distances] for label, own in runs.items()}
    if not any(ends.values()):
        return ""
    text = "Frobenius norm of each tensor's displacement, at the epoch with the best validation accuracy"
    text += "; mean over the seeds." if any(len(own) > 1 for own in runs.values()) else "."
    return _paragraph(text) + _figure(figures.svg(partial(figures.distances, ends), "distance of each tensor to its pre-trained values"))


def _learned(runs: Runs) -> str:
    from ftp.finetuning import figures

    parts: list[str] = []
    for label, own in runs.items():
        for name in dict.fromkeys(key.split("/")[0] for epoch in own[0].epochs for key in epoch.radii):
            title = f"{name} of {label}, seed {own[0].seed}"
            drawing = figures.svg(partial(figures.learned, own[0], name), title)
            parts.append(f"<details{'' if parts else ' open'}><summary>{escape(title)}</summary>{_figure(drawing)}</details>")
    text = "What a method learned for each tensor while it trained, such as the radius that bounds its distance to the pre-trained values."
    text += " Logarithmic scales end four decades below the largest value."
    return _paragraph(text) + "".join(parts) if parts else ""


def _agreement(runs: Runs) -> str:
    name = _inside(runs)
    rows: list[list[object]] = []
    for (first, own), (second, others) in combinations(runs.items(), 2):
        by_seed = {run.seed: run for run in others}
        pair = next(((run, by_seed[run.seed]) for run in own if run.seed in by_seed), None)
        if pair is None or name is None or any(name not in run.evaluations for run in pair):
            continue
        sides = [run.evaluations[name] for run in pair]
        if sides[0].labels.equal(sides[1].labels) and sides[0].labels.ndim == 1:
            found = agreement(*sides)
            rows.append([f"{first} / {second}", *(f"{count:,}" for count in found[:4]), f"{found.p:.2g}"])
    if not rows:
        return ""
    text = (
        f"Images of {name} that both methods classify correctly, only one does, or neither; one seed. "
        "p: McNemar's exact test, not corrected for the number of pairs. A small p: chance alone rarely makes such a difference."
    )
    return _paragraph(text) + _table(["first / second", "both correct", "only first", "only second", "both wrong", "p"], rows)


def _classes(runs: Runs, classes: Sequence[str]) -> str:
    from ftp.finetuning import figures

    name = _inside(runs)
    shown = {label: own for label, own in runs.items() if all(name in run.evaluations for run in own)} if name else {}
    if not shown:
        return ""
    evaluations = {label: [run.evaluations[str(name)] for run in own] for label, own in shown.items()}
    largest = max(int(each.predictions.max()) for own in evaluations.values() for each in own)
    classes = [*classes, *map(str, range(len(classes), largest + 1))]
    counts = {label: confusion(own, len(classes)) for label, own in evaluations.items()}
    totals = {label: count.sum(1).tolist() for label, count in counts.items()}
    rows = [
        [names, totals[next(iter(counts))][i], *(_share(int(count[i, i]), totals[label][i]) for label, count in counts.items())]
        for i, names in enumerate(classes)
    ]
    several = any(len(own) > 1 for own in shown.values())
    text = f"On {name}{', all seeds together' if several else ''}: accuracy of each class, then the confusion matrix of each method."
    parts = [_paragraph(text), _table(["accuracy in %", "images", *counts], rows)]
    for label, count in counts.items():
        wrong = count.clone().fill_diagonal_(0)
        most = [divmod(place, len(classes)) for place in wrong.flatten().argsort(descending=True, stable=True)[:10].tolist()]
        table = _table(
            ["true", "predicted", "images", "share in %"],
            [
                [classes[true], classes[guess], int(wrong[true, guess]), _share(int(wrong[true, guess]), totals[label][true])]
                for true, guess in most
                if wrong[true, guess]
            ],
            "The most frequent confusions; share: of the true class.",
            texts=2,
        )
        drawing = figures.svg(partial(figures.confusion, count, classes), f"confusion matrix of {label}")
        parts.append(
            f"<details{' open' if len(parts) == 2 else ''}><summary>{escape(label)}</summary>"
            f'<div class="side">{_figure(drawing)}{table}</div></details>'
        )
    return "".join(parts)


def _settings(runs: Runs) -> str:
    settings = {label: compared(own[0]) for label, own in runs.items()}
    keys = dict.fromkeys(key for own in settings.values() for key in own)
    values = {key: [_value(own, key) for own in settings.values()] for key in keys}
    parts: list[str] = []
    if differing := [[key, *own] for key, own in values.items() if len({*own}) > 1]:
        parts.append("<h3>By method</h3>" + _table(["setting", *settings], differing, texts=len(settings) + 1))
    if shared := [[key, own[0]] for key, own in values.items() if len({*own}) == 1]:
        parts.append(("<h3>All methods</h3>" if differing else "") + _table(["setting", "value"], shared, texts=2))
    results = [run for own in runs.values() for run in own]
    if commands := [*dict.fromkeys(run.command for run in results if run.command)]:
        parts.append("<h3>Command</h3>" + "".join(f"<pre>{escape(command)}</pre>" for command in commands))
    if versions := merged([run.versions for run in results]):
        parts.append("<h3>Versions</h3>" + _table(["package", "version"], [*versions.items()], texts=2))
    return "".join(parts)


def _value(settings: Mapping[str, Any], key: str) -> str:
    if key not in settings:
        return "n/a"
    value = settings[key]
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value, default=str)


def _columns(runs: Runs) -> list[Column]:
    return columns([run for own in runs.values() for run in own])


def _inside(runs: Runs) -> str | None:
    """The test set of the distribution of the training images."""
    names = {name for own in runs.values() for run in own for name in run.evaluations}
    return next((name for name in ("test", "validation") if name in names), None)


def _error_note(runs: Runs) -> str:
    counts = {len(own) for own in runs.values()}
    if counts == {1}:
        return "± standard error over the images: how much another sample of images may differ. Another seed may differ by more."
    rough = " From fewer than five seeds it is itself rough." if min(counts - {1}) < 5 else ""
    return f"Mean ± standard error over the seeds{'; over the images where a method has one seed' if 1 in counts else ''}.{rough}"


def _percent(estimate: Estimate | None, signed: bool = False) -> str:
    if estimate is None:
        return "n/a"
    value = f"{round(100 * estimate.value, 1) + 0.0:{'+' if signed else ''}.1f}"  # no -0.0
    if signed and abs(estimate.value) > 2 * estimate.error:
        value = f'<span class="clear">{value}</span>'
    return _Html(f'{value} <span class="error">± {100 * estimate.error:.1f}</span>')


def _share(count: int, total: int) -> str:
    return f"{100 * count / total:.1f}" if total else "n/a"


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _count(number: int, noun: str, nouns: str = "") -> str:
    return f"{number:,} {noun if number == 1 else nouns or noun + 's'}"


def _paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def _figure(drawing: str) -> str:
    return f"<figure>{drawing}</figure>"


def _table(head: Sequence[str], rows: Iterable[Sequence[object]], caption: str = "", texts: int = 1) -> str:
    """A table whose first column names the rows; the first columns are text, the others numbers. `_Html` is left as it is."""

    def line(cells: Sequence[object], tags: Iterable[str]) -> str:
        shown = [cell if isinstance(cell, _Html) else escape(str(cell)) for cell in cells]
        kinds = [' class="text"' if i < texts else "" for i in range(len(cells))]
        return f"<tr>{''.join(f'<{tag}{kind}>{text}</{tag}>' for tag, kind, text in zip(tags, kinds, shown, strict=False))}</tr>"

    body = "".join(line(row, chain(["th"], repeat("td"))) for row in rows)
    note = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f'<div class="scroll"><table>{note}<thead>{line(head, repeat("th"))}</thead><tbody>{body}</tbody></table></div>'
