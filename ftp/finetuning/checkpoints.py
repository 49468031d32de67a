"""The files of a run, from which it goes on after it was stopped at any moment as if it had not been."""

import csv
import ctypes
import io
import json
import shutil
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ftp.finetuning.files import package, writable, write
from ftp.finetuning.result import Epoch, Result
from ftp.finetuning.run import Run

COLUMNS = ("epoch", "step", "lr", "train_loss", "validation_loss", "validation_accuracy", "seconds")
"""Of `epochs.csv`."""


def arguments(run: Run, tests: Iterable[str]) -> dict[str, Any]:
    """What a run follows from, by name, as JSON has it: another run goes on in its folder only if it has the same."""
    model, trainer = run.model, run.trainer
    pretrained = {name: value for name, value in model.state_dict().items() if name not in trainer.head}
    count = sum(p.numel() for p in model.parameters())
    return {
        "model": f"{type(model).__name__} of {len(list(model.parameters()))} tensors with {count:,} numbers",
        "weights": digest(pretrained),
        "head": trainer.head,
        "exclude": trainer.excluded,
        "anchor": "the weights" if trainer.anchor is None else digest(trainer.start),
        "train": run.train_data.identity(),
        "validation": run.validation.identity(),
        "tests": sorted(tests),
        "loss": getattr(run.loss, "__name__", type(run.loss).__name__),
        **run.settings.as_dict(),
        "steps_per_epoch": run.steps_per_epoch,
    }


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A short hash of names, shapes and bits."""
    total = blake2b(digest_size=8)
    for name, tensor in tensors.items():
        whole = tensor.detach().cpu().contiguous()
        total.update(f"{name} {tuple(whole.shape)} {whole.dtype}".encode())
        total.update((ctypes.c_char * (whole.numel() * whole.element_size())).from_address(whole.data_ptr()) if whole.numel() else b"")
    return total.hexdigest()


class Checkpoints:
    """The folder of a run.

    While it trains, `checkpoint/state.pt` has all that it goes on from, `checkpoint/best.pt` the best weights, and `epochs.csv` a line
    an epoch. At the end `model.safetensors` has the weights, and `result.json` with `predictions.pt` the result; then `checkpoint/` goes.

    Args:
        folder: of the run, which is created.
        arguments: what the run follows from.

    Raises:
        OSError: the folder cannot be written to.
        ValueError: it holds a run with other arguments. The message names the first that differs.
        ModuleNotFoundError: safetensors is not installed.
    """

    def __init__(self, folder: Path, arguments: Mapping[str, Any]) -> None:
        package("safetensors.torch")
        self.folder, self.arguments = writable(folder), json.loads(json.dumps(arguments))
        self._working = folder / "checkpoint"
        self._last, self._best = self._working / "state.pt", self._working / "best.pt"
        self._saved: dict[str, Tensor] | None = None  # the best weights that are in the file
        if Result.path(folder).exists():
            self._check(json.loads(Result.path(folder).read_text(encoding="utf-8")).get("arguments", {}))
        elif self._last.exists():
            self._check(json.loads(_load(self._last)["arguments"]))

    def _check(self, there: Mapping[str, Any]) -> None:
        for name in {**self.arguments, **there}:
            own, other = self.arguments.get(name), there.get(name)
            if own != other:
                raise ValueError(
                    f"out={str(self.folder)!r} holds a run with {name}={other!r}, and not {own!r}: give another folder, "
                    "or the same arguments to go on there"
                )

    def result(self, model: nn.Module) -> Result | None:
        """The result, if the run is finished; the model takes its weights."""
        if not Result.path(self.folder).exists():
            return None
        load_model(model, self.folder / "model.safetensors")
        shutil.rmtree(self._working, ignore_errors=True)
        return Result.load(self.folder)

    def load(self, run: Run) -> None:
        """Have a run go on from where it was saved last, if it was."""
        if self._last.exists():
            run.load_state_dict(_load(self._last), _load(self._best))
            self._saved = run.best

    def save(self, run: Run) -> None:
        """Save where a run is."""
        self._working.mkdir(exist_ok=True)
        if run.best is not self._saved:  # first: the run that goes on from the state before comes to these again
            write(self._best, lambda file: torch.save(run.best, file))
            self._saved = run.best
        state = {**run.state_dict(), "arguments": json.dumps(self.arguments)}
        write(self._last, lambda file: torch.save(state, file))
        write(self.folder / "epochs.csv", _table(run.history).encode())

    def finish(self, result: Result, model: nn.Module) -> None:
        """Write the result of a run, and the weights of its model."""
        write(self.folder / "epochs.csv", _table(result.epochs).encode())
        save_model(model, self.folder / "model.safetensors")
        result.save(self.folder, self.arguments)
        shutil.rmtree(self._working, ignore_errors=True)


def save_model(model: nn.Module, path: Path) -> None:
    """Write the state dict of a model as a safetensors file; of tensors that share memory, one."""
    save = package("safetensors.torch").save
    state, seen = {}, set[tuple[int, int]]()
    for name, value in model.state_dict().items():
        key = value.data_ptr(), value.numel()
        if not value.numel() or key not in seen:
            state[name] = value.detach().cpu().contiguous()
        seen.add(key)
    write(path, save(state))


def load_model(model: nn.Module, path: Path) -> None:
    """Load what `save_model` wrote into a model of the same kind."""
    state = package("safetensors.torch").load_file(path)
    own = model.state_dict()
    shared = {value.data_ptr() for name, value in own.items() if name in state}
    if missing := [name for name, value in own.items() if name not in state and value.data_ptr() not in shared]:
        raise ValueError(f"{path} has no {missing[0]!r}: it holds the weights of another model")
    model.load_state_dict(state, strict=False)


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _table(epochs: Iterable[Epoch]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([getattr(entry, column) for column in COLUMNS] for entry in epochs)
    return text.getvalue()
