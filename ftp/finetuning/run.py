"""A run of fine-tuning: phases, steps, epochs, and the best weights."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from time import perf_counter
from typing import Any
from warnings import warn

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

import hyperopt_nested as hn
from ftp.anchored import Anchors, Exclude, resolve
from ftp.finetuning import methods
from ftp.finetuning.batches import Batches, Data, seed_all, split
from ftp.finetuning.evaluation import Loss, casting, device_of, evaluate
from ftp.finetuning.result import Epoch, Evaluation
from ftp.finetuning.settings import Settings
from ftp.validated import ValidatedOptimizer


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


@dataclass(frozen=True)
class Phase:
    """Steps that train the same tensors: from `first` to before `end`."""

    trains: methods.Part
    first: int
    end: int


def phases(parts: Sequence[methods.Part], steps: int) -> list[Phase]:
    """Phases of equal length that make up all steps."""
    ends = [steps * i // len(parts) for i in range(len(parts) + 1)]
    return [Phase(part, first, end) for part, (first, end) in zip(parts, pairwise(ends), strict=True)]


def schedule(step: int, steps: int, warmup: float) -> float:
    """Learning rate of a step, as a share of the highest: a linear rise over the first `warmup` of the steps, then a cosine towards 0.

    Args:
        step: from 0.
        steps: all.
        warmup: share of the steps, in [0, 1].

    Example:
        >>> [round(schedule(step, 5, 0.4), 2) for step in range(5)]
        [0.5, 1.0, 1.0, 0.75, 0.25]
    """
    rising = round(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    return (1 + math.cos(math.pi * (step - rising) / (steps - rising))) / 2


@contextmanager
def borrowed(model: nn.Module) -> Iterator[None]:
    """Leave torch's random numbers, and modes and flags of the model, as they were; its gradients are cleared."""
    device = device_of(model)
    modes = [(module, module.training) for module in model.modules()]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type="cuda" if device.type == "cpu" else device.type):
            yield
    finally:
        for module, training in modes:
            module.training = training
        for p, requires_grad in flags:
            p.requires_grad_(requires_grad)
            p.grad = None


class Run:
    """A run of fine-tuning: what trains, and how far it is.

    Args:
        model: as `finetune`; so are the other arguments.
        settings: resolved.

    Attributes:
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
        self.model, self.settings, self.loss, self.anchor, self.workers = model, settings, loss, anchor, workers
        self.method, self.device = methods.METHODS[settings.method], device_of(model)
        self.named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.named:
            raise ValueError("no tensor of the model trains: requires_grad is False for all")
        self.head = sorted(resolve(head, list(self.named.items()), "head")[0])
        if not self.head and "head" in self.method.phases:
            raise ValueError(f"the method {self.method.name!r} trains the head alone, and there is none: give head=...")
        self.free = {*self.head, *resolve(exclude, list(self.named.items()))[0]}
        self.start = {name: self._anchor_of(name) for name in self.named if name not in self.free}
        self.train_data = batches = self._batches(train)
        self.held_out: Batches | None = None
        self.steps_per_epoch = settings.steps_per_epoch or batches.full
        if self.method.beside is not None:
            kept, out = split(train, settings.held_out, settings.seed)
            batches, self.held_out = self._batches(kept), self._batches(out)
        self.batches, self.validation = batches, self._batches(validation)
        self.steps = settings.epochs * self.steps_per_epoch
        self.phases = phases(self.method.phases, self.steps)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.precision == "float16")
        self.step, self.history, self.stopped = 0, list[Epoch](), ""
        self.total_loss, self.seconds = torch.zeros((), device=self.device), 0.0
        self.best: dict[str, Tensor] = {}
        self.best_epoch = 0
        self.phase: Phase | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        self.beside: ValidatedOptimizer | None = None

    def _batches(self, data: Data) -> Batches:
        return Batches(data, self.settings.batch_size, self.workers)

    def _anchor_of(self, name: str) -> Tensor:
        p = self.named[name].detach()
        if isinstance(self.anchor, Mapping):
            return self.anchor[name].detach().to(p, copy=True) if name in self.anchor else p.clone()
        return torch.zeros_like(p) if self.anchor == "zero" else p.clone()

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
            self._enter(next(phase for phase in self.phases if self.step < phase.end))
            self._take_step(*next(stream))
            ended = self.step % self.steps_per_epoch == 0
            if ended and self.method.beside_each == "epoch":
                self._learn_beside()
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
        if self.method.share is not None and self.settings.strength is not None:
            share = self.method.share(self.settings.strength)
            with torch.no_grad():
                for name, start in self.start.items():
                    self.named[name].lerp_(start, 1 - share)
        if self.method.beside_each == "end":
            self._learn_beside()
            self.history[-1] = replace(self.history[-1], radii=self._learned())
        evaluations = {}
        for name, data in {"validation": self.validation.data, **tests}.items():
            if progress is not None:
                progress(Progress(self.step, self.steps, self.history[-1], name))
            _, evaluations[name] = evaluate(self.model, self._batches(data), self.loss, self.settings.precision)
        return evaluations

    def state_dict(self) -> dict[str, Any]:
        """All that the run goes on from but the best weights, as tensors and plain values; random numbers follow from the seed."""
        return {
            "step": self.step,
            "phase": self.phases.index(self.phase) if self.phase else None,
            "history": [asdict(entry) for entry in self.history],
            "best_epoch": self.best_epoch,
            "stopped": self.stopped,
            "total_loss": self.total_loss,
            "seconds": self.seconds,
            "scaler": self.scaler.state_dict(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict() if self.optimizer else None,
            "beside": self.beside.state_dict() if self.beside else None,
        }

    def load_state_dict(self, state: Mapping[str, Any], best: dict[str, Tensor]) -> None:
        """Go on from what `state_dict` returned, with the best weights until then."""
        self.step, self.best_epoch, self.stopped, self.seconds = (state[key] for key in ("step", "best_epoch", "stopped", "seconds"))
        self.history, self.best = [Epoch(**entry) for entry in state["history"]], best
        self.total_loss = state["total_loss"].to(self.device)
        self.scaler.load_state_dict(state["scaler"])
        if state["phase"] is not None:
            self._enter(self.phases[state["phase"]])
        self.model.load_state_dict(state["model"])
        for each, entries in ((self.optimizer, state["optimizer"]), (self.beside, state["beside"])):
            if each is not None:
                each.load_state_dict(entries)

    def _enter(self, phase: Phase) -> None:
        """Begin a phase, if it is another one than the last step's, with optimizers of its own."""
        if phase == self.phase:
            return
        self.phase, settings = phase, self.settings
        for name, p in self.named.items():
            p.requires_grad_(phase.trains == "all" or name in self.head)
            p.grad = None
        backbone = [(name, p) for name, p in self.named.items() if name not in self.head and p.requires_grad]
        groups = [
            {"params": backbone, "lr": settings.lr},
            {"params": [(name, self.named[name]) for name in self.head], "lr": settings.head_lr},
        ]
        self.optimizer = methods.optimizer(
            self.method,
            methods.OPTIMIZERS[settings.optimizer],
            [group for group in groups if group["params"]],
            strength=settings.strength,
            exclude=self.free,
            anchor=self.anchor,
            weight_decay=settings.weight_decay,
            momentum=settings.momentum,
        )
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        if self.method.beside is not None:
            self.beside = self.method.beside(settings.strength, list(self.named.items()), exclude=self.free, anchor=self.anchor)
        self._set_modes()

    def _set_modes(self) -> None:
        self.model.train()
        for module in self.model.modules():
            if self.settings.freeze_norm and isinstance(module, _BatchNorm):
                module.eval()

    def _take_step(self, inputs: Any, labels: Tensor) -> None:
        assert self.phase is not None
        assert self.optimizer is not None
        factor = schedule(self.step - self.phase.first, self.phase.end - self.phase.first, self.settings.warmup)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        seed_all("step", self.settings.seed, self.step)
        self.optimizer.zero_grad()
        loss = self._loss(inputs, labels, self.settings.precision)
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.total_loss += loss.detach()
        self.step += 1

    def _loss(self, inputs: Any, labels: Tensor, precision: str) -> Tensor:
        with casting(self.device, precision):
            return self.loss(self.model(inputs.to(self.device, non_blocking=True)), labels.to(self.device, non_blocking=True))

    def _learn_beside(self) -> None:
        """Let what stands beside the optimizer learn from data that are held out."""
        if self.beside is None or self.held_out is None:
            return
        self.model.eval()
        stream = self.held_out.endless(self.settings.seed, self.step)
        precision = "float32" if self.settings.precision == "float16" else self.settings.precision  # its gradients are not scaled

        def validate() -> Tensor:
            loss = self._loss(*next(stream), precision)
            torch.autograd.backward(loss)
            return loss

        self.beside.step(validate)

    def _learned(self) -> dict[str, float]:
        learners = [each for each in (self.optimizer, self.beside) if isinstance(each, hn.HyperOptimizer)]
        return {name: value for each in learners for name, value in each.learned().items()}

    def _distances(self) -> dict[str, float]:
        if not self.start:
            return {}
        moved = torch._foreach_sub([self.named[name].detach() for name in self.start], list(self.start.values()))
        return dict(zip(self.start, torch.stack(torch._foreach_norm(moved)).tolist(), strict=True))

    def _end_epoch(self) -> None:
        """Look at validation data, note what happened, and keep the weights if they are the best."""
        first = not self.history
        validation_loss, evaluation = evaluate(self.model, self.validation, self.loss, self.settings.precision)
        self._set_modes()
        entry = Epoch(
            epoch=len(self.history),
            step=self.step,
            lr=self.optimizer.param_groups[0]["lr"] if self.optimizer else 0.0,
            train_loss=math.nan if first else float(self.total_loss) / self.steps_per_epoch,
            validation_loss=validation_loss,
            validation_accuracy=evaluation.accuracy,
            seconds=self.seconds,
            radii=self._learned(),
            distances=self._distances(),
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
