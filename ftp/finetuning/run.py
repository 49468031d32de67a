"""A run of fine-tuning: phases, steps, epochs, and the best weights."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from time import perf_counter
from typing import Any
from warnings import warn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ftp.anchored import Anchors, Exclude
from ftp.finetuning.batches import Batches, Data, split
from ftp.finetuning.evaluation import Loss, device_of, evaluate
from ftp.finetuning.phases import phases
from ftp.finetuning.result import Epoch, Evaluation
from ftp.finetuning.settings import Settings
from ftp.finetuning.trainer import Trainer


@dataclass(frozen=True)
class Progress:
    """Where a run is.

    Attributes:
        step: steps taken.
        steps: all steps.
        epoch: the record of the last epoch.
        evaluating: the data on which the trained model is evaluated now; "" during training.
    """

    step: int
    steps: int
    epoch: Epoch
    evaluating: str = ""


Report = Callable[[Progress], None]

_STATE = ("step", "best_epoch", "stopped", "total_loss", "seconds")
"""Attributes of a run that its state has as they are."""


@contextmanager
def borrowed(model: nn.Module) -> Iterator[None]:
    """Leave torch's random numbers, and modes and flags of the model, as they were; its gradients are cleared."""
    device = device_of(model)
    modes = [(module, module.training) for module in model.modules()]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        for module, training in modes:
            module.training = training
        for p, requires_grad in flags:
            p.requires_grad_(requires_grad)
            p.grad = None


class Run:
    """A run of fine-tuning: its data, how far it is, and the best weights until then.

    Args:
        model: as `finetune`; so are the other arguments.
        settings: resolved.

    Attributes:
        trainer: what trains.
        step: steps taken.
        history: records of epochs; the first is of before training.
        stopped: why training ended early; "" if it did not.

    Raises:
        ValueError: no tensor trains, or `head` names none.
    """

    def __init__(
        self,
        model: nn.Module,
        train: Data,
        validation: Data,
        settings: Settings,
        *,
        head: Exclude,
        exclude: Exclude = (),
        anchor: Anchors = None,
        loss: Loss = F.cross_entropy,
        workers: int = 0,
    ) -> None:
        self.trainer = Trainer(model, settings, head=head, exclude=exclude, anchor=anchor, loss=loss)
        self.model, self.settings, self.loss, self.workers = model, settings, loss, workers
        self.train_data = batches = self._batches(train)
        self.held_out: Batches | None = None
        self.steps_per_epoch = settings.steps_per_epoch or batches.full
        if (method := self.trainer.method).beside is not None:
            kept, out = split(train, settings.held_out, settings.seed)
            batches, self.held_out = self._batches(kept), self._batches(out)
        self.batches, self.validation = batches, self._batches(validation)
        self.steps = settings.epochs * self.steps_per_epoch
        self.phases = phases(method.phases, self.steps)
        self.step, self.history, self.stopped = 0, list[Epoch](), ""
        self.total_loss, self.seconds = torch.zeros((), device=device_of(model)), 0.0
        self.best_epoch, self.best = 0, dict[str, Tensor]()

    def _batches(self, data: Data) -> Batches:
        return Batches(data, self.settings.batch_size, self.workers)

    def train(self, progress: Report | None = None, save: Callable[["Run"], None] | None = None, every: int = 200) -> None:
        """Train to the end, or until it stops early.

        Args:
            progress: called after each step.
            save: called after each epoch, and after every so many steps.
            every: steps from one to the next.
        """
        if not self.history:
            self._end_epoch()
        stream = self.batches.endless(self.settings.seed, self.step)
        while self.step < self.steps and not self.stopped:
            began = perf_counter()
            self.trainer.enter(next(phase for phase in self.phases if self.step < phase.end))
            self.total_loss += self.trainer.step(self.step, *next(stream))
            self.step += 1
            ended = self.step % self.steps_per_epoch == 0
            if ended and self.trainer.method.beside_each == "epoch":
                self.trainer.learn_beside(self.step, self.held_out)
            self.seconds += perf_counter() - began
            if ended:
                self._end_epoch()
            if save is not None and (ended or self.step % every == 0):
                save(self)
            if progress is not None:
                progress(Progress(self.step, self.steps, self.history[-1]))

    def finish(self, tests: Mapping[str, Data], progress: Report | None = None) -> dict[str, Evaluation]:
        """Take the best weights, finish them as the method does, and evaluate them on validation data and on tests."""
        self.model.load_state_dict(self.best)
        self.trainer.shrink()
        if self.trainer.method.beside_each == "end":
            self.trainer.learn_beside(self.step, self.held_out)
            self.history[-1] = replace(self.history[-1], radii=self.trainer.learned())
        evaluations = {}
        for name, data in {"validation": self.validation.data, **tests}.items():
            if progress is not None:
                progress(Progress(self.step, self.steps, self.history[-1], name))
            _, evaluations[name] = evaluate(self.model, self._batches(data), self.loss, self.settings.precision)
        return evaluations

    def state_dict(self) -> dict[str, Any]:
        """All that the run goes on from but the best weights, as tensors and plain values; random numbers follow from the seed."""
        return {
            **{name: getattr(self, name) for name in _STATE},
            "history": [asdict(entry) for entry in self.history],
            "phase": self.phases.index(self.trainer.phase) if self.trainer.phase else None,
            "trainer": self.trainer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], best: dict[str, Tensor]) -> None:
        """Go on from what `state_dict` returned, with the best weights until then."""
        for name in _STATE:
            setattr(self, name, state[name])
        self.total_loss = self.total_loss.to(device_of(self.model))
        self.history, self.best = [Epoch(**entry) for entry in state["history"]], best
        if state["phase"] is not None:
            self.trainer.enter(self.phases[state["phase"]])
        self.trainer.load_state_dict(state["trainer"])

    def _end_epoch(self) -> None:
        """Look at validation data, note what happened, and keep the weights if they are the best."""
        first = not self.history
        validation_loss, evaluation = evaluate(self.model, self.validation, self.loss, self.settings.precision)
        self.trainer.set_modes()
        entry = Epoch(
            epoch=len(self.history),
            step=self.step,
            lr=self.trainer.lr,
            train_loss=math.nan if first else float(self.total_loss) / self.steps_per_epoch,
            validation_loss=validation_loss,
            validation_accuracy=evaluation.accuracy,
            seconds=self.seconds,
            radii=self.trainer.learned(),
            distances=self.trainer.distances(),
        )
        self.history.append(entry)
        self.total_loss, self.seconds = torch.zeros_like(self.total_loss), 0.0
        if first and not math.isfinite(validation_loss):
            raise ValueError(f"the loss on validation data is {validation_loss} before training: look at the weights, and at the inputs")
        if not first and not math.isfinite(validation_loss + entry.train_loss):
            self.stopped = f"the loss is not finite in epoch {entry.epoch}"
            warn(f"{self.stopped}: training stops, and the weights are those of epoch {self.best_epoch}; use a smaller lr", stacklevel=4)
            return
        if first or _rank(entry) > _rank(self.history[self.best_epoch]):
            self.best_epoch = entry.epoch
            self.best = {name: value.clone() for name, value in self.model.state_dict().items()}
        patience = self.settings.patience
        since = max(self.best_epoch, self.phases[-1].first // self.steps_per_epoch)
        if patience is not None and entry.epoch - since >= patience and self.step < self.steps:
            self.stopped = f"no better epoch than {self.best_epoch} in the last {patience}"


def _rank(entry: Epoch) -> tuple[float, float]:
    return entry.validation_accuracy, -entry.validation_loss
