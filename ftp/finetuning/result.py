"""Records of a fine-tuning run: what its report, its files and comparisons are made of."""

import json
import math
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ftp.finetuning.files import write


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

    @staticmethod
    def path(folder: Path) -> Path:
        """The file that says that the run in a folder is finished."""
        return folder / "result.json"

    def save(self, folder: Path, arguments: Mapping[str, Any] | None = None) -> None:
        """Write `predictions.pt`, and then `result.json`, which also has the accuracies.

        Args:
            folder: where; it exists.
            arguments: what the run follows from, besides its settings, as JSON has it.

        Raises:
            OSError: a file cannot be written.
        """
        predictions = {name: torch.stack([each.labels, each.predictions]).to(torch.int16) for name, each in self.evaluations.items()}
        accuracies = {
            name: {"accuracy": each.accuracy, "standard_error": each.standard_error, "examples": len(each.labels)}
            for name, each in self.evaluations.items()
        }
        own = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in ("epochs", "evaluations")}
        text = {**own, "accuracies": accuracies, "epochs": [asdict(each) for each in self.epochs], "arguments": arguments or {}}
        write(folder / "predictions.pt", lambda file: torch.save(predictions, file))
        write(self.path(folder), json.dumps(_without_nan(text), indent=1).encode())

    @classmethod
    def load(cls, folder: Path) -> "Result":
        """Read what `save` wrote.

        Raises:
            OSError: there is no finished run in the folder.
        """
        text = json.loads(cls.path(folder).read_text(encoding="utf-8"))
        predictions = torch.load(folder / "predictions.pt", map_location="cpu", weights_only=True)
        own = {field.name: text[field.name] for field in fields(cls) if field.name not in ("epochs", "evaluations")}
        evaluations = {name: Evaluation(*predictions[name].long()) for name in text["accuracies"]}
        return cls(**own, epochs=list(map(_epoch, text["epochs"])), evaluations=evaluations)


def versions(packages: Sequence[str] = ("torch", "hyperopt-nested", "timm", "torchvision", "pillow")) -> dict[str, str]:
    """Versions of Python, and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _epoch(entries: Mapping[str, Any]) -> Epoch:
    read: dict[str, Any] = {name: math.nan if value is None else value for name, value in entries.items()}
    return Epoch(**read)


def _without_nan(value: Any) -> Any:
    """The same with None for numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {name: _without_nan(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
