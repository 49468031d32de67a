"""Records of a fine-tuning run: what its report, its files and comparisons are made of."""

import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Epoch:
    """One line of the history of a run.

    Attributes:
        epoch: from 1; 0 is before training.
        step: optimizer steps up to here.
        lr: learning rate of the backbone at the end of the epoch.
        train_loss: mean over the epoch's batches.
        validation_loss: mean over the validation set.
        validation_accuracy: in [0, 1].
        seconds: of training in this epoch.
        radii: learned values of each tensor, such as `radius/layer1.weight`; empty for methods that learn none.
        distances: Frobenius norm of each tensor's displacement from its pre-trained values; the head is left out.
    """

    epoch: int
    step: int
    lr: float
    train_loss: float
    validation_loss: float
    validation_accuracy: float
    seconds: float
    radii: Mapping[str, float] = field(default_factory=dict)
    distances: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """Predictions on a set of images.

    Attributes:
        labels: classes, shape (n,), int64.
        predictions: classes, shape (n,), int64.
    """

    labels: Tensor
    predictions: Tensor

    @property
    def accuracy(self) -> float:
        """Share of correct predictions, in [0, 1]."""
        return float((self.labels == self.predictions).double().mean())

    @property
    def standard_error(self) -> float:
        """Binomial standard error of `accuracy`."""
        return float((self.accuracy * (1 - self.accuracy) / len(self.labels)) ** 0.5)


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        method: its name, such as "ftp".
        seed: of the run.
        settings: every argument with its value, as JSON has them.
        classes: names of the classes.
        epochs: the history.
        evaluations: by test set: "validation"; "test" is in distribution; others are shifts. A corruption is
            `<set>/<corruption>/<severity>`,
            such as "test/noise/3".
        versions: of Python and packages.
        command: what was run; "" from Python.
        stopped: why training ended before its last epoch; "" if it did not.
    """

    method: str
    seed: int
    settings: Mapping[str, Any]
    classes: Sequence[str]
    epochs: Sequence[Epoch]
    evaluations: Mapping[str, Evaluation]
    versions: Mapping[str, str] = field(default_factory=dict)
    command: str = ""
    stopped: str = ""


def versions(packages: Sequence[str] = ("torch", "hyperopt-nested", "timm", "torchvision", "pillow")) -> dict[str, str]:
    """Versions of Python, and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
