"""Checkpoints of `ftp.finetune`: a run that was stopped goes on as if it had not been, and nothing else goes on in its place."""

import csv
import dataclasses
import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ftp
from ftp.finetuning import METHODS, Progress, Result, files

X = torch.randn(60, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
Y = (X[:, :2].sum(1) > 0).long() + (X[:, 2] > 1).long()
TRAIN, VALIDATION, TEST = (X[:30], Y[:30]), (X[30:45], Y[30:45]), (X[45:], Y[45:])


class StoppedError(Exception):
    """A run is stopped."""


@pytest.fixture(autouse=True)
def _float32(_float64_and_seed: None) -> None:
    torch.set_default_dtype(torch.float32)


def network(width: int = 8) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Dropout(0.3), nn.Linear(width, 3))


def tune(model: nn.Module, out: Path | None, train: Any = TRAIN, stop: int = 0, **settings: Any) -> Result:
    def progress(now: Progress) -> None:
        if now.step == stop:
            raise StoppedError

    how = {"head": "4.*", "lr": 1e-2, "epochs": 4, "batch_size": 5, "save_every": 2, "tests": {"test": TEST}, **settings}
    return ftp.finetune(model, train, VALIDATION, out=out, progress=progress, **how)


def without_seconds(result: Result) -> str:
    return repr(dataclasses.replace(result, epochs=[dataclasses.replace(entry, seconds=0.0) for entry in result.epochs]))


@pytest.mark.parametrize(
    ("method", "settings"),
    [(method, {}) for method in METHODS]
    + [
        ("ftp", {"optimizer": "sgd", "freeze_norm": False}),
        ("ftp", {"precision": "float16"}),
        ("full", {"patience": 1, "epochs": 9}),
        ("ftp", {"train": DataLoader(TensorDataset(*TRAIN), batch_size=5, shuffle=True)}),
    ],
)
def test_a_stopped_run_goes_on_bitwise(method: str, settings: dict[str, Any], tmp_path: Path) -> None:
    whole = network()
    expected = tune(whole, None, method=method, **settings)
    for stop in (1, 9, 17):  # before the first checkpoint, in the first phase, and after kernels took over
        with pytest.raises(StoppedError):
            tune(network(), tmp_path, method=method, stop=min(stop, expected.epochs[-1].step), **settings)
    model = network()
    result = tune(model, tmp_path, method=method, **settings)
    torch.testing.assert_close(model.state_dict(), whole.state_dict(), rtol=0, atol=0)
    assert without_seconds(result) == without_seconds(expected)


def test_a_finished_run_is_read_and_not_repeated(tmp_path: Path) -> None:
    model, again = network(), network()
    result = tune(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epochs.csv", "model.safetensors", "predictions.pt", "result.json"]
    read = tune(again, tmp_path, stop=1)
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert repr(read) == repr(result) == repr(Result.load(tmp_path))
    lines = list(csv.DictReader((tmp_path / "epochs.csv").read_text().splitlines()))
    assert [float(line["validation_accuracy"]) for line in lines] == [entry.validation_accuracy for entry in result.epochs]
    assert lines[-1]["step"] == "24"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 2e-2}, "holds a run with lr=0.01, and not 0.02"),
        ({"method": "spd"}, "holds a run with method='ftp', and not 'spd'"),
        ({"train": (X[:29], Y[:29])}, "holds a run with train='30 examples', and not '29 examples'"),
        ({"tests": {}}, r"holds a run with tests=\['test'\], and not \[\]"),
    ],
)
@pytest.mark.parametrize("stop", [0, 5])
def test_a_run_with_other_arguments_is_refused(settings: dict[str, Any], message: str, stop: int, tmp_path: Path) -> None:
    try:
        tune(network(), tmp_path, stop=stop)
    except StoppedError:
        assert stop
    content = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=message):
        tune(network(), tmp_path, **settings)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == content


def test_a_run_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoppedError):
        tune(network(), tmp_path, stop=5)
    with pytest.raises(ValueError, match=r"model='Sequential of 6 tensors with 99 numbers', and not 'Sequential of 6 tensors with 123 n"):
        tune(network(10), tmp_path)
    other = network()
    with torch.no_grad():
        other[0].bias.add_(1)
    with pytest.raises(ValueError, match=r"holds a run with weights='\w+'"):
        tune(other, tmp_path)


def test_a_folder_that_cannot_be_written_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"out='.*file/run' cannot be written to: Not a directory. Give another folder"):
        tune(network(), tmp_path / "file" / "run", stop=1)


def test_a_full_disk_breaks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = network()
    tune(expected, None)
    with pytest.raises(StoppedError):
        tune(network(), tmp_path, stop=7)
    with monkeypatch.context() as full:
        full.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
        with pytest.raises(OSError, match=r"cannot be written: No space left on device. What was there before is whole"):
            tune(network(), tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".part")]
    model = network()
    tune(model, tmp_path)
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=0)


def test_a_write_that_fails_inside_of_torch_is_named_too(tmp_path: Path) -> None:
    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, _: bytes) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "a").write_text("before")
    with pytest.raises(OSError, match="No space left on device"):
        files.write(tmp_path / "a", lambda file: torch.save({"a": torch.ones(3)}, Full(file)))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "before"


def test_tensors_that_share_memory_are_saved_once(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
            self.second.weight = self.first.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.head(self.second(self.first(x)))
            return logits

    models = [Tied(), Tied()]
    models[1].load_state_dict(models[0].state_dict())
    tune(models[0], tmp_path, head="head.*")
    tune(models[1], tmp_path, head="head.*")
    torch.testing.assert_close(models[1].state_dict(), models[0].state_dict(), rtol=0, atol=0)
