"""The tensors of a model that train, and the optimizers that train them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import hyperopt_nested as hn
from ftp.anchored import Anchors, Exclude, resolve
from ftp.finetuning import methods
from ftp.finetuning.batches import Batches, seed_all
from ftp.finetuning.evaluation import Loss, casting, device_of
from ftp.finetuning.phases import Phase, schedule
from ftp.finetuning.settings import Settings
from ftp.validated import ValidatedOptimizer


class Trainer:
    """A model with a method's optimizers.

    Args:
        model: as `finetune`; so are `head`, `exclude`, `anchor` and `loss`.
        settings: resolved.

    Attributes:
        head: names of the head's tensors.
        excluded: names of other tensors without an anchor.
        free: names of both.
        start: anchors of all others.
        phase: of the last step; None before the first.
    """

    def __init__(self, model: nn.Module, settings: Settings, *, head: Exclude, exclude: Exclude, anchor: Anchors, loss: Loss) -> None:
        self.model, self.settings, self.anchor, self.loss = model, settings, anchor, loss
        self.method, self.device = methods.METHODS[settings.method], device_of(model)
        self.named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.named:
            raise ValueError("no tensor of the model trains: requires_grad is False for all")
        self.head = sorted(resolve(head, list(self.named.items()), "head")[0])
        if not self.head and "head" in self.method.phases:
            raise ValueError(f"the method {self.method.name!r} trains the head alone, and there is none: give head=...")
        self.excluded = sorted(resolve(exclude, list(self.named.items()))[0] - {*self.head})
        self.free = {*self.head, *self.excluded}
        self.start = {name: self._anchor_of(name) for name in self.named if name not in self.free}
        self._statistics = {name: each.clone() for name, each in _statistics(model).items()}
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.precision == "float16")
        self.phase: Phase | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        self.beside: ValidatedOptimizer | None = None
        self._rates: list[float] = []

    def _anchor_of(self, name: str) -> Tensor:
        p = self.named[name].detach()
        if isinstance(self.anchor, Mapping):
            return self.anchor[name].detach().to(p, copy=True) if name in self.anchor else p.clone()
        return torch.zeros_like(p) if self.anchor == "zero" else p.clone()

    @property
    def lr(self) -> float:
        """The learning rate of the last step: of the backbone, where it trains."""
        return float(self.optimizer.param_groups[0]["lr"]) if self.optimizer else 0.0

    def enter(self, phase: Phase) -> None:
        """Begin a phase, if it is not that of the last step, with optimizers of its own."""
        if phase == self.phase:
            return
        self.phase, settings = phase, self.settings
        for name, p in self.named.items():
            p.requires_grad_(phase.trains == "all" or name in self.head)
            p.grad = None
        backbone = [(name, p) for name, p in self.named.items() if name not in self.head and p.requires_grad]
        head = [(name, self.named[name]) for name in self.head]
        groups = [{"params": backbone, "lr": settings.lr}, {"params": head, "lr": settings.head_lr}]
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
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        if self.method.beside is not None:
            self.beside = self.method.beside(settings.strength, list(self.named.items()), exclude=self.free, anchor=self.anchor)
        self.set_modes()

    def set_modes(self) -> None:
        """Set all modules to training, but for batch normalization that is frozen, or in a backbone that does not train."""
        self.model.train()
        frozen = self.settings.freeze_norm or (self.phase is not None and self.phase.trains == "head")
        for module in self.model.modules() if frozen else ():
            if isinstance(module, _BatchNorm):
                module.eval()

    def step(self, number: int, inputs: Any, labels: Tensor) -> Tensor:
        """Take a step of the present phase, and return the loss before it."""
        assert self.phase is not None
        assert self.optimizer is not None
        factor = schedule(number - self.phase.first, self.phase.end - self.phase.first, self.settings.warmup)
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        seed_all("step", self.settings.seed, number)
        self.optimizer.zero_grad()
        loss = self._loss(inputs, labels, self.settings.precision)
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()

    def _loss(self, inputs: Any, labels: Tensor, precision: str) -> Tensor:
        with casting(self.device, precision):
            return self.loss(self.model(inputs.to(self.device, non_blocking=True)), labels.to(self.device, non_blocking=True))

    def learn_beside(self, number: int, held_out: Batches | None) -> None:
        """Let what stands beside the optimizer, if anything does, learn from held-out data; the model is in evaluation mode then."""
        if self.beside is None or held_out is None:
            return
        self.model.eval()
        stream = held_out.endless(self.settings.seed, number)
        precision = "float32" if self.settings.precision == "float16" else self.settings.precision  # its gradients are not scaled

        def validate() -> Tensor:
            loss = self._loss(*next(stream), precision)
            torch.autograd.backward(loss)
            return loss

        self.beside.step(validate)

    @torch.no_grad()
    def shrink(self) -> None:
        """Leave the share of each displacement that the method leaves at the end; of running statistics, too."""
        if self.method.share is not None and self.settings.strength is not None:
            tensors = {**self.named, **_statistics(self.model)}
            for name, start in (*self.start.items(), *self._statistics.items()):
                tensors[name].lerp_(start, 1 - self.method.share(self.settings.strength))

    def learned(self) -> dict[str, float]:
        """What the optimizers have learned, such as `radius/layer1.weight`."""
        learners = [each for each in (self.optimizer, self.beside) if isinstance(each, hn.HyperOptimizer)]
        return {name: value for each in learners for name, value in each.learned().items()}

    def distances(self) -> dict[str, float]:
        """Frobenius norms of displacements from the anchors."""
        if not self.start:
            return {}
        moved = torch._foreach_sub([self.named[name].detach() for name in self.start], list(self.start.values()))
        return dict(zip(self.start, torch.stack(torch._foreach_norm(moved)).tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """The state of model and optimizers."""
        return {
            "scaler": self.scaler.state_dict(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict() if self.optimizer else None,
            "beside": self.beside.state_dict() if self.beside else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned in the same phase."""
        self.scaler.load_state_dict(state["scaler"])
        self.model.load_state_dict(state["model"])
        for each, entries in ((self.optimizer, state["optimizer"]), (self.beside, state["beside"])):
            if each is not None:
                each.load_state_dict(entries)


def _statistics(model: nn.Module) -> dict[str, Tensor]:
    """Buffers of real numbers, such as running statistics."""
    return {name: each for name, each in model.named_buffers() if each.is_floating_point()}
