"""Numbers of a report: accuracies with standard errors, differences between methods, and McNemar's test."""

import json
from collections.abc import Mapping, Sequence
from math import hypot, isfinite
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ftp.finetuning.result import Epoch, Evaluation, Result

Runs = Mapping[str, Sequence[Result]]
"""By label of a method: its runs, one a seed."""

_OWN = ("method", "seed", "out")  # settings that tell runs apart, and not what they compare


class Estimate(NamedTuple):
    """A number and its standard error."""

    value: float
    error: float


class CorruptionSet(NamedTuple):
    """A corrupted test set, from a name such as "test/fog/3"."""

    of: str
    name: str
    severity: int


class Agreement(NamedTuple):
    """Images that both of two methods classify correctly, only one does, or neither; and the p-value of McNemar's exact test."""

    both: int
    first: int
    second: int
    neither: int
    p: float


class Column(NamedTuple):
    """Test sets whose mean accuracy is one number of a table."""

    heading: str
    sets: tuple[str, ...]


def corruption_set(name: str) -> CorruptionSet | None:
    """Read the name of a test set.

    Args:
        name: a key of `Result.evaluations`.

    Returns:
        None if that is no corruption.

    Example:
        >>> corruption_set("test/fog/3")
        CorruptionSet(of='test', name='fog', severity=3)
    """
    of, *rest = name.rsplit("/", 2)
    return CorruptionSet(of, rest[0], int(rest[1])) if len(rest) == 2 and rest[1].isdecimal() else None


def by_method(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Group runs that differ in their seeds only.

    Args:
        results: finished runs.

    Returns:
        By label, in order of appearance: the runs, by seed. A label is the method's name; where a method ran with several settings, those
        that differ follow in parentheses.

    Raises:
        ValueError: a run is there twice.

    Example:
        >>> run = Result("ftp", 0, {"lr": 0.1}, ["cat", "dog"], [], {})
        >>> other = Result("ftp", 0, {"lr": 0.2}, ["cat", "dog"], [], {})
        >>> list(by_method([run, other]))
        ['ftp (lr=0.1)', 'ftp (lr=0.2)']
    """
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.method, _json(compared(result))), []).append(result)
    labels: dict[str, list[Result]] = {}
    for (method, _), runs in groups.items():
        rivals = [compared(others[0]) for (other, _), others in groups.items() if other == method]
        own = compared(runs[0])
        differing = [key for key in own if any(_json(rival.get(key)) != _json(own[key]) for rival in rivals)]
        label = f"{method} ({', '.join(f'{key}={own[key]}' for key in differing)})" if differing else method
        seeds = [run.seed for run in runs]
        if len(set(seeds)) < len(seeds) or label in labels:
            raise ValueError(f"two results of {label} with equal settings and seeds {sorted(seeds)}: pass each run once")
        labels[label] = sorted(runs, key=lambda run: run.seed)
    return labels


def compared(result: Result) -> dict[str, Any]:
    """All settings but those that are a run's own: method, seed and folder."""
    return {key: value for key, value in result.settings.items() if key not in _OWN}


def columns(results: Sequence[Result]) -> list[Column]:
    """Make the columns of a table of accuracies.

    Args:
        results: finished runs.

    Returns:
        Validation, test, each shift, the mean of the shifts (if there are several) and the mean of the corruptions, as far as there are.
    """
    names = list(dict.fromkeys(name for result in results for name in result.evaluations))
    corrupted = tuple(name for name in names if corruption_set(name))
    shifts = tuple(name for name in names if name not in ("validation", "test", *corrupted))
    found = [Column(heading, (name,)) for heading, name in (("validation", "validation"), ("test (ID)", "test")) if name in names]
    found += [Column(name, (name,)) for name in shifts]
    if len(shifts) > 1:
        found.append(Column("mean of shifts", shifts))
    return [*found, Column("mean of corruptions", corrupted)] if corrupted else found


def best_epoch(result: Result) -> Epoch | None:
    """Find the epoch whose weights a run ends with: the highest validation accuracy, of equals the lowest validation loss.

    Args:
        result: a finished run.

    Returns:
        None without a history.
    """
    finite = [epoch for epoch in result.epochs if isfinite(epoch.validation_loss)]
    return max(finite, key=lambda epoch: (epoch.validation_accuracy, -epoch.validation_loss), default=None)


def accuracy(runs: Sequence[Result], sets: Sequence[str]) -> Estimate | None:
    """Average the accuracy on test sets.

    Args:
        runs: of one method, one a seed.
        sets: keys of their evaluations; each counts alike.

    Returns:
        Of one run: the standard error is that of its images. Sets with equal labels are taken for the same images, whose results go
        together. Of several: mean and standard error over the seeds. None if a run lacks a set.
    """
    if any(name not in run.evaluations for run in runs for name in sets):
        return None
    return _over_seeds([_mean([(run.evaluations[name].labels, _correct(run.evaluations[name])) for name in sets]) for run in runs])


def difference(runs: Sequence[Result], reference: Sequence[Result], sets: Sequence[str]) -> Estimate | None:
    """Subtract accuracies of a reference, paired by seed and by image.

    Args:
        runs: of one method, one a seed.
        reference: the same, of another.
        sets: keys of their evaluations; each counts alike.

    Returns:
        Of one common seed: the standard error is that of the differences of each image (of independent accuracies, where the images
        differ). Of several: mean and standard error over them. None without one, or if a run lacks a set.
    """
    others = {run.seed: run for run in reference}
    pairs = [(run.evaluations, others[run.seed].evaluations) for run in runs if run.seed in others]
    if not pairs or any(name not in side for pair in pairs for side in pair for name in sets):
        return None
    return _over_seeds([_difference([own[name] for name in sets], [other[name] for name in sets]) for own, other in pairs])


def agreement(first: Evaluation, second: Evaluation) -> Agreement:
    """Compare two methods on the same images.

    Args:
        first: predictions of one.
        second: predictions of the other.

    Returns:
        Counts, and the two-sided p-value of McNemar's exact test: that a fair coin distributes the images that only one classifies
        correctly at least as unevenly.

    Raises:
        ValueError: labels differ, or an image has more than one.

    Example:
        >>> labels = torch.tensor([0, 0, 0, 0, 1])
        >>> predictions = torch.tensor([1, 1, 1, 0, 1])
        >>> agreement(Evaluation(labels, labels), Evaluation(labels, predictions))
        Agreement(both=2, first=3, second=0, neither=0, p=0.25)
    """
    if not torch.equal(first.labels, second.labels) or first.labels.ndim != 1:
        raise ValueError("labels differ, or are not of shape (n,): both evaluations must be of the same images in the same order")
    counts = (2 * _correct(first) + _correct(second)).long().bincount(minlength=4).tolist()
    neither, only_second, only_first, both = counts
    return Agreement(both, only_first, only_second, neither, _mcnemar(only_first, only_second))


def confusion(evaluations: Sequence[Evaluation], classes: int) -> Tensor:
    """Count predictions of each class.

    Args:
        evaluations: of the same classes, one or more; their counts are added.
        classes: number of classes.

    Returns:
        Counts, shape (classes, classes), int64: a row a true class, a column a predicted one.
    """
    pairs = torch.cat([(evaluation.labels * classes + evaluation.predictions).flatten() for evaluation in evaluations])
    return pairs.bincount(minlength=classes**2).reshape(classes, classes)


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _correct(evaluation: Evaluation) -> Tensor:
    """Share of correct predictions of each image: 0 or 1, or a share of its pixels."""
    return (evaluation.labels == evaluation.predictions).double().reshape(len(evaluation.labels), -1).mean(1)


def _mean(scores: Sequence[tuple[Tensor, Tensor]]) -> Estimate:
    """Mean over sets of (labels, score of each image)."""
    clusters: list[tuple[Tensor, Tensor]] = []
    for labels, score in scores:
        at = next((i for i, (known, _) in enumerate(clusters) if torch.equal(known, labels)), None)
        if at is None:
            clusters.append((labels, score))
        else:
            clusters[at] = labels, clusters[at][1] + score
    totals = [total for _, total in clusters]
    variance = sum(float(total.var(correction=0)) / len(total) for total in totals)
    return Estimate(sum(float(total.mean()) for total in totals) / len(scores), variance**0.5 / len(scores))


def _difference(own: Sequence[Evaluation], other: Sequence[Evaluation]) -> Estimate:
    pairs = list(zip(own, other, strict=True))
    if all(torch.equal(a.labels, b.labels) for a, b in pairs):
        return _mean([(a.labels, _correct(a) - _correct(b)) for a, b in pairs])
    first, second = (_mean([(each.labels, _correct(each)) for each in side]) for side in (own, other))
    return Estimate(first.value - second.value, hypot(first.error, second.error))


def _over_seeds(estimates: Sequence[Estimate]) -> Estimate:
    if len(estimates) == 1:
        return estimates[0]
    values = [estimate.value for estimate in estimates]
    return Estimate(mean(values), stdev(values) / len(values) ** 0.5)


def _mcnemar(first: int, second: int) -> float:
    total, ways, tail = first + second, 1, 0
    for count in range(min(first, second) + 1):
        tail += ways
        ways = ways * (total - count) // (count + 1)
    return float(min(1.0, 2 * tail / 2**total))


def merged(values: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Merge mappings; different values of a key are joined by commas."""
    keys = dict.fromkeys(key for each in values for key in each)
    return {key: ", ".join(dict.fromkeys(each[key] for each in values if key in each)) for key in keys}
