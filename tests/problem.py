"""What tests of backends step: tensors that descend a smooth function, on any device, and optimizers with learned hypers."""

from typing import Any

import torch
from cases import Tensors

import hyperopt_nested as hn
from hyperopt_nested.testing.subject import subject


def learned(value: float, per: Any = "tensor", by: float = 1e-4) -> hn.Learn:
    return hn.learn(value, by=hn.sgd(lr=by), per=per)


def all_learned(name: str) -> hn.Optimizer:
    """The entry of the registry with every hyper learned per tensor that can be."""
    checked = subject(name)
    found = checked.template
    chosen = {"lr": 0.05, "eps": 0.1, "eps1": 0.1, "eps2": 0.1, "d": 1.1}
    for hyper in checked.own:
        if hyper in found.rule.nondifferentiable or hyper in found.learned:
            continue
        value = chosen.get(hyper, found.declared[hyper] or 0.1)
        trial = found.replace(**{hyper: learned(value, "model" if found.rule.reduction else "tensor")})
        try:
            hn.Nested(trial).init({"w": torch.ones(4, 3)})
        except ValueError:  # not used with these options
            continue
        found = trial
    return found


def tower(per: Any) -> hn.Optimizer:
    top = hn.learn(1e-4, by=hn.sgd(lr=1e-6), per=per)
    return hn.adamw(
        lr=hn.learn(0.01, by=hn.adam(lr=top), per=per, via="log"), beta1=learned(0.8, "model"), weight_decay=learned(0.1, "row")
    )


class Problem:
    """Tensors, of one shape, that descend a smooth function under an optimizer with a schedule."""

    def __init__(
        self,
        optimizer: Any,
        backend: str,
        shape: tuple[int, ...] = (4, 3),
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float64,
        **how: Any,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        params, offsets = ({name: torch.randn(shape, generator=generator).to(device, dtype) for name in ("a", "b")} for _ in range(2))
        self.params = {name: torch.nn.Parameter(param) for name, param in params.items()}
        self.offsets = offsets
        self.reads_loss = bool(optimizer.rule.loss_names)
        self.opt = hn.HyperOptimizer(list(self.params.items()), optimizer, backend=backend, **how)  # type: ignore[arg-type]
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.opt, 20) if "lr" in self.opt.defaults else None

    def gradients(self) -> None:
        for name, p in self.params.items():
            p.grad = torch.cos(p.detach() + self.offsets[name])

    def loss(self) -> torch.Tensor:
        return torch.stack([torch.sin(p.detach() + self.offsets[name]).sum() for name, p in self.params.items()]).sum() + 30

    def run(self, steps: int) -> "Problem":
        for _ in range(steps):
            self.gradients()
            self.opt.step(**({"loss": self.loss()} if self.reads_loss else {}))
            if self.schedule is not None:
                self.schedule.step()
        return self

    def values(self) -> Tensors:
        hypers = {f"{hyper}/{key}": value for hyper, found in self.opt.hypers().items() for key, value in found.items()}
        return {**{name: p.detach() for name, p in self.params.items()}, **hypers}
