"""Conventions of PyTorch, one function each, for all kinds of optimizers and backends: the table of docs/reference/conventions.md."""

import collections
import copy
import functools
import io
import json
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import conventions
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn
from torch.testing._internal.common_optimizers import optim_db
from torch.utils.checkpoint import checkpoint

import hyperopt_nested as hn
from ftp import FLOOR, FTP, SGDP, AdamP
from ftp.rule import projection
from hyperopt_nested.backends.choice import Programs

Weights = list[Tensor]
Settings = dict[str, Any]

RATE = 0.05
LEARNED, OFF = (hn.learn(RATE, by=hn.sgd(lr=lr)) for lr in (1e-4, 0.0))
EVERYTHING = ["*"]

OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "nothing learned": lambda params, lr=RATE, **how: hn.optim.AdamW(params, lr=lr, **how),
    "learned": lambda params, lr=LEARNED, **how: hn.optim.AdamW(params, lr=lr, **how),
    "AdamP": lambda params, lr=RATE, **how: AdamP(params, lr=lr, **how),
    "SGDP": lambda params, lr=RATE, **how: SGDP(params, lr=lr, **{"momentum": 0.9, **how}),
    "FTP": lambda params, lr=RATE, backend="auto", **how: FTP(torch.optim.AdamW(params, lr=lr, **how), backend=backend),
}
"""By the heading of a column: what makes the optimizer."""

LEARNING_OFF = "learning off"
"""What has to give, bit by bit, what nothing learned gives."""

COLUMNS = [*OPTIMIZERS, LEARNING_OFF]
BACKENDS = ("reference", "foreach", "fused")


@dataclass(frozen=True)
class Make:
    """Makes optimizers of one kind, which one backend steps."""

    kind: str
    backend: str

    def __call__(self, params: Any, **settings: Any) -> Any:
        make = functools.partial(OPTIMIZERS["learned"], lr=OFF) if self.kind == LEARNING_OFF else OPTIMIZERS[self.kind]
        return make(params, backend=self.backend, **settings)

    def torch(self, params: Any, **settings: Any) -> torch.optim.Optimizer:
        """The class of torch.optim with the same arguments."""
        sgd = {"lr": RATE, "momentum": 0.9, **settings}
        return torch.optim.SGD(params, **sgd) if self.kind == "SGDP" else torch.optim.AdamW(params, **{"lr": RATE, **settings})

    @property
    def is_torchs(self) -> bool:
        """Whether it steps as torch's class does: nothing is projected, and no value moves."""
        return self.kind in ("nothing learned", LEARNING_OFF)


@dataclass(frozen=True)
class Convention:
    """A row of the table.

    Attributes:
        section: the heading it stands under.
        run: checks it, and returns the weights at the end of a training, or nothing. The docstring is the row's text.
        refused: by kind of optimizer: the error, words of its message, and why it is raised.
        without: by kind of optimizer: why the convention does not apply.
        backends: that it is checked on.
        note: on the row.
    """

    section: str
    run: Callable[[Make], Weights | None]
    refused: Mapping[str, tuple[Any, str, str]] = field(default_factory=dict)
    without: Mapping[str, str] = field(default_factory=dict)
    backends: tuple[str, ...] = BACKENDS
    note: str = ""

    @property
    def text(self) -> str:
        return " ".join((self.run.__doc__ or "").split())


TABLE: list[Convention] = []


def convention(section: str, **how: Any) -> Callable[[Callable[[Make], Weights | None]], Any]:
    """Add a function to the table."""

    def add(run: Callable[[Make], Weights | None]) -> Any:
        TABLE.append(Convention(section, run, **how))
        return run

    return add


def all_kinds(error: Any, words: str, why: str) -> dict[str, tuple[Any, str, str]]:
    return dict.fromkeys(COLUMNS, (error, words, why))


# What conventions train


def network(seed: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))


def loss(model: nn.Module, step: int = 0) -> Tensor:
    dtype = next(model.parameters()).dtype
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(step), dtype=torch.float64).to(dtype)
    result: Tensor = (model(x) - 1).square().mean()
    return result


def train(model: nn.Module, opt: Any, steps: int = 3, first: int = 0) -> None:
    for step in range(first, first + steps):
        opt.zero_grad()
        loss(model, step).backward()
        opt.step()


def weights(*modules: nn.Module) -> Weights:
    return [p.detach().clone() for module in modules for p in module.parameters()]


def same(one: Weights, other: Weights) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def close(one: Weights, other: Weights) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@functools.cache
def straight(make: Make) -> Weights:
    """The weights after a training of three steps with nothing special."""
    model = network()
    train(model, make(model.named_parameters()))
    return weights(model)


def step(opt: Any, *tensors: Tensor, grad: float = 1.0) -> None:
    for tensor in tensors:
        tensor.grad = torch.full_like(tensor, grad)
    opt.step()


def learned(opt: Any) -> str:
    """All learned values."""
    return repr(opt.learned() if hasattr(opt, "learned") else {})


def state(opt: Any) -> str:
    return repr(opt.state_dict())


# Groups and schedules

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step)),
    "warm-up": lambda opt: lr_scheduler.LambdaLR(opt, lambda step: min(1, step / 3)),
    "MultiplicativeLR": lambda opt: lr_scheduler.MultiplicativeLR(opt, lambda step: 0.9),
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, 2, 0.5),
    "MultiStepLR": lambda opt: lr_scheduler.MultiStepLR(opt, [1, 3], 0.5),
    "ConstantLR": lambda opt: lr_scheduler.ConstantLR(opt, 0.5, 2),
    "LinearLR": lambda opt: lr_scheduler.LinearLR(opt, 0.3, total_iters=3),
    "ExponentialLR": lambda opt: lr_scheduler.ExponentialLR(opt, 0.9),
    "PolynomialLR": lambda opt: lr_scheduler.PolynomialLR(opt, 4, 2.0),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 4),
    "CosineAnnealingWarmRestarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 2),
    "ReduceLROnPlateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, factor=0.3, patience=0),
    "SWALR": lambda opt: SWALR(opt, swa_lr=0.01, anneal_epochs=3),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.LinearLR(opt, 0.3, total_iters=2), lr_scheduler.ExponentialLR(opt, 0.9)], [2]
    ),
    "ChainedScheduler": lambda opt: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(opt, 0.3, total_iters=2), lr_scheduler.ExponentialLR(opt, 0.9)]
    ),
    "CyclicLR": lambda opt: lr_scheduler.CyclicLR(opt, 0.01, 0.1, step_size_up=2, cycle_momentum=False),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, 0.1, total_steps=6, cycle_momentum=False),
}
CYCLES: dict[str, Callable[[Any], Any]] = {
    "CyclicLR": lambda opt: lr_scheduler.CyclicLR(opt, 0.01, 0.1, step_size_up=2),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, 0.1, total_steps=6),
}


def scheduled(make: Make, schedulers: Mapping[str, Callable[[Any], Any]]) -> Weights:
    """Weights under each scheduler; all numbers of groups are those of torch's class at each step."""
    ends = []
    for name, schedule in schedulers.items():
        ws = [nn.Parameter(torch.full((2, 3), 1.0)) for _ in range(2)]
        opts = make([ws[0]]), make.torch([ws[1]])
        schedules = [schedule(opt) for opt in opts]
        for count in range(4):
            ours, theirs = (opt.param_groups[0] for opt in opts)
            for key in theirs.keys() & {"lr", "betas", "momentum"}:
                assert ours[key] == theirs[key], (name, key, count)
            if make.kind == "learned":
                assert ours["effective_lr"] == pytest.approx(float(opts[0].hypers()["lr"]["group 0"]))
            else:
                assert ours.get("effective_lr", ours["lr"]) == ours["lr"]
            for w, opt, each in zip(ws, opts, schedules, strict=True):
                w.grad = torch.cos(w.detach() * count) if make.is_torchs or w is ws[0] else None
                opt.step()
                each.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        if make.is_torchs:
            close(*([w.detach()] for w in ws))
        ends.append(ws[0].detach())
    return ends


@convention("Groups and schedules", backends=("reference", "fused"), note="on reference and fused")
def schedulers(make: Make) -> Weights:
    """Schedulers, all of `torch.optim.lr_scheduler` and `SWALR`: `lr` of each step is that of torch's class"""
    known = {name for name, each in vars(lr_scheduler).items() if isinstance(each, type) and issubclass(each, lr_scheduler.LRScheduler)}
    assert known - {"LRScheduler", "_LRScheduler", *SCHEDULERS} == set()
    return scheduled(make, SCHEDULERS)


@convention("Groups and schedules")
def momentum_cycles(make: Make) -> Weights:
    """`OneCycleLR` and `CyclicLR` cycle `betas` or `momentum` as those of torch's class"""
    return scheduled(make, CYCLES)


@convention("Groups and schedules")
def group_values(make: Make) -> Weights:
    """Groups with values of their own, and values changed by hand between steps"""
    model, reference = network(), network()

    def groups(net: nn.Sequential) -> Any:
        return [{"params": [net[0].weight], "lr": 0.02, "weight_decay": 0.3}, {"params": [net[2].weight]}]

    opt, other = make(groups(model)), make.torch(groups(reference))
    for each, net in ((opt, model), (other, reference)):
        train(net, each, 2)
        each.param_groups[0]["lr"] = 0.01
        each.param_groups[1]["weight_decay"] = 0.0
        train(net, each, 2, 2)
    assert [group["lr"] for group in opt.param_groups] == [0.01, RATE]
    if make.is_torchs:
        close(weights(model), weights(reference))
    return weights(model)


@convention("Groups and schedules")
def empty_groups(make: Make) -> Weights:
    """Groups without tensors change nothing, also in a saved state"""

    def made(model: nn.Module, named: bool) -> Any:
        return make([{"params": []}, {"params": [*(model.named_parameters() if named else model.parameters())]}, {"params": []}])

    named = make.kind != "FTP"  # torch wants names in all groups, or in none
    model, again = network(), network(2)
    opt = made(model, named)
    assert [group["lr"] for group in opt.param_groups] == [RATE] * 3
    train(model, opt)
    assert same(weights(model), straight(make))
    other = made(again, named)
    again.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    train(model, opt, 1, 3)
    train(again, other, 1, 3)
    assert same(weights(model), weights(again))
    return weights(model)


@convention("Groups and schedules")
def late_groups(make: Make) -> Weights:
    """`add_param_group` during training"""
    model = network()
    opt = make(model[0].parameters())
    before = weights(model[2])
    train(model, opt, 2)
    assert same(weights(model[2]), before)
    opt.add_param_group({"params": [model[2].weight], "lr": 0.02, "weight_decay": 0.3})
    train(model, opt, 2, 2)
    assert [group["lr"] for group in opt.param_groups] == [RATE, 0.02]
    assert not torch.equal(weights(model[2])[0], before[0])
    return weights(model)


@convention("Groups and schedules", without={"learned": "a learned value starts at a number"})
def tensor_rates(make: Make) -> Weights:
    """`lr` and other numbers as tensors at construction, which may be changed in place"""
    ends = []
    momentum = {"momentum": 0.8} if make.kind == "SGDP" else {"betas": (0.8, 0.9)}
    for is_tensor in (True, False):
        settings: Settings = {"lr": RATE, **(momentum if make.backend == "reference" else {})}
        if make.kind == LEARNING_OFF:
            settings.pop("lr")
        elif is_tensor:
            settings = {key: (*map(torch.tensor, value),) if key == "betas" else torch.tensor(value) for key, value in settings.items()}
        model = network()
        opt = make(model.named_parameters(), **settings)
        for count in range(3):
            train(model, opt, 1, count)
            if isinstance(rate := settings.get("lr"), Tensor):
                assert opt.param_groups[0]["lr"] is rate
                rate.mul_(0.5)
            else:
                opt.param_groups[0]["lr"] *= 0.5
        ends.append(weights(model))
    assert same(*ends)
    if make.kind == "nothing learned":  # of a group that learns its own, the number is the start
        other = make([{"params": network().parameters(), "lr": hn.learn()}], lr=torch.tensor(RATE))
        assert other.param_groups[0]["lr"] == RATE
    return ends[0]


@convention("Groups and schedules")
def tensor_rates_of_groups(make: Make) -> Weights:
    """`lr` of a group as a tensor, also as schedulers change it in place"""
    ends = []
    for rate in (torch.tensor(RATE), RATE):
        model = network()
        opt = make(model.named_parameters())
        opt.param_groups[0]["lr"] = rate
        scheduler = lr_scheduler.ExponentialLR(opt, 0.5)
        for count in range(3):
            train(model, opt, 1, count)
            scheduler.step()
        ends.append(weights(model))
    assert same(*ends)
    return ends[0]


@convention("Groups and schedules")
def maximized(make: Make) -> Weights:
    """`maximize=True` ascends"""
    ends = []
    for sign in (1, -1):
        w = nn.Parameter(torch.ones(2, 3))
        opt = make([w], maximize=sign < 0)
        for count in range(3):
            w.grad = sign * torch.cos(w.detach() + count)
            opt.step()
        ends.append([w.detach()])
    assert same(*ends)
    return ends[0]


# Learning switched off


@convention(
    "Learning switched off",
    backends=("reference", "fused"),
    note="on reference and fused",
    without={"nothing learned": "nothing is learned", "FTP": "step and projection are two rules"},
)
def switched_off(make: Make) -> Weights | None:
    """`lr=hn.learn(0.05, by=hn.sgd(lr=0.0))` and `radius_lr=0.0`: bit by bit the same rule with numbers in their place"""
    rules = {"AdamP": hn.adamw(lr=RATE, weight_decay=0.0), "SGDP": hn.sgd(lr=RATE, momentum=0.9)}
    rule = hn.project(rules[make.kind], onto=hn.mars, radius=FLOOR) if make.kind in rules else hn.adamw(lr=RATE)
    settings: Settings = {"radius_lr": 0.0} if make.kind in rules else {}
    ends = []
    for opt_of in (
        lambda params: make(params, lr=OFF, **settings),
        lambda params: hn.HyperOptimizer(params, rule, backend=make.backend),  # type: ignore[arg-type]
    ):
        model = network()
        opt = opt_of(model.named_parameters())
        scheduler = lr_scheduler.CosineAnnealingLR(opt, 5)
        for count in range(4):
            train(model, opt, 1, count)
            scheduler.step()
        ends.append(weights(model))
    assert same(*ends)
    return None


# The training loop


@convention("Training loops")
def closures(make: Make) -> Weights:
    """`step(closure)` evaluates the closure once, with gradients, and returns its loss"""
    model = network()
    opt, values = make(model.named_parameters()), []

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        opt.zero_grad()
        value = loss(model, len(values))
        value.backward()
        values.append(value)
        return value

    for _ in range(3):
        assert opt.step(closure) is values[-1]
    assert len(values) == 3
    assert same(weights(model), straight(make))
    return weights(model)


@convention("Training loops")
def gradients_stay(make: Make) -> Weights:
    """`step` leaves gradients as they are; `zero_grad(set_to_none=False)` zeroes them in place"""
    model = network()
    opt = make(model.named_parameters())
    for count in range(3):
        opt.zero_grad(set_to_none=False)
        loss(model, count).backward()
        grads = [p.grad for p in model.parameters()]
        before = [grad.clone() for grad in grads if grad is not None]
        opt.step()
        assert all(p.grad is grad and torch.equal(grad, old) for p, grad, old in zip(model.parameters(), grads, before, strict=True))
    assert same(weights(model), straight(make))
    return weights(model)


@convention("Training loops")
def grad_modes(make: Make) -> Weights:
    """`step` under `no_grad`, `enable_grad` and `autocast` is the same step"""
    for context in (torch.no_grad, torch.enable_grad, lambda: torch.autocast("cpu", torch.bfloat16)):
        model = network()
        opt = make(model.named_parameters())
        for count in range(3):
            opt.zero_grad()
            loss(model, count).backward()
            with context():
                opt.step()
        assert same(weights(model), straight(make))
    return weights(model)


@convention("Training loops")
def accumulation(make: Make) -> Weights:
    """Gradient accumulation: several `backward`, one step"""
    model, whole = network(), network()
    opt, other = make(model.named_parameters()), make(whole.named_parameters())
    for count in range(3):
        opt.zero_grad()
        other.zero_grad()
        for part in (0, 1):
            loss(model, 2 * count + part).mul(0.5).backward()
        ((loss(whole, 2 * count) + loss(whole, 2 * count + 1)) / 2).backward()
        opt.step()
        other.step()
    for a, b in zip(weights(model), weights(whole), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    return weights(model)


@convention("Training loops")
def clipping(make: Make) -> Weights:
    """`clip_grad_norm_` and `clip_grad_value_`: the step uses clipped gradients"""
    model, reference = network(), network()
    for net, opt in ((model, make(model.named_parameters())), (reference, make.torch(reference.named_parameters()))):
        for count in range(4):
            opt.zero_grad()
            loss(net, count).backward()
            if count % 2:
                nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            else:
                nn.utils.clip_grad_value_(net.parameters(), 0.01)
            opt.step()
    if make.is_torchs:
        close(weights(model), weights(reference))
    return weights(model)


@convention("Training loops")
def scalers(make: Make) -> Weights:
    """`GradScaler`: scaled steps are the unscaled ones; a step with infinite gradients changes nothing"""
    model = network()
    opt = make(model.named_parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for count in range(4):
        opt.zero_grad()
        scaler.scale(loss(model, min(count, 2)) * (torch.inf if count == 2 else 1.0)).backward()
        before = state(opt), learned(opt), weights(model)
        scaler.step(opt)
        scaler.update()
        if count == 2:
            assert before[:2] == (state(opt), learned(opt))
            assert same(before[2], weights(model))
    assert same(weights(model), straight(make))
    return weights(model)


@convention("Training loops")
def averages(make: Make) -> Weights:
    """`swa_utils.AveragedModel`, with plain and exponential averages"""
    for how in ({}, {"multi_avg_fn": get_ema_multi_avg_fn(0.5)}):
        model = network()
        opt, averaged = make(model.named_parameters()), AveragedModel(model, **how)
        seen = []
        for count in range(3):
            train(model, opt, 1, count)
            averaged.update_parameters(model)
            seen.append(weights(model)[0])
        expected = (seen[0] / 2 + seen[1] / 2) / 2 + seen[2] / 2 if how else (seen[0] + seen[1] + seen[2]) / 3
        torch.testing.assert_close(weights(averaged.module)[0], expected)
    assert same(weights(model), straight(make))
    return weights(model)


@convention("Training loops")
def checkpointing(make: Make) -> Weights:
    """Activation checkpointing"""
    model = network()
    opt = make(model.named_parameters())

    class Checkpointed(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return checkpoint(model, x, use_reentrant=False)

        def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
            return model.parameters(recurse)

    train(Checkpointed(), opt)
    assert same(weights(model), straight(make))
    return weights(model)


@convention("Training loops", backends=("reference",), note="on the reference backend; parametrized tensors are tensors as others")
def parametrized(make: Make) -> Weights:
    """`weight_norm`, and tied weights"""
    torch.manual_seed(1)
    first, last = parametrizations.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 3)
    last.bias = first.bias
    model = nn.Sequential(first, nn.Tanh(), last)
    before = weights(model)
    opt = make(model.parameters())
    train(model, opt)
    assert len(before) == len(opt.param_groups[0]["params"]) == 4
    assert not any(torch.equal(*pair) for pair in zip(before, weights(model), strict=True))
    return weights(model)


@convention("Training loops")
def steps_in_backward(make: Make) -> Weights:
    """An optimizer for each tensor, stepped in `register_post_accumulate_grad_hook`; each learns its own values"""
    model = network()
    opts = {p: make([(name, p)]) for name, p in model.named_parameters()}

    def hook(p: Tensor) -> None:
        opts[p].step()
        opts[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(hook)
    for count in range(3):
        loss(model, count).backward()
    assert all(p.grad is None for p in model.parameters())
    assert make.kind == "learned" or same(weights(model), straight(make))
    return weights(model)


@convention("Training loops", backends=("foreach",), note="on foreach; the compiler does not trace the step of any backend")
def compiled_steps(make: Make) -> Weights:
    """`torch.compile(lambda: opt.step())` takes the same steps"""
    model = network()
    opt = make(model.named_parameters())
    compiled = torch.compile(lambda: opt.step(), backend="eager")
    for count in range(3):
        opt.zero_grad()
        loss(model, count).backward()
        compiled()
    assert same(weights(model), straight(make))
    return weights(model)


@convention(
    "Training loops",
    backends=("reference", "foreach"),
    note="on the meta device, whose tensors have no values; `fused` is for the CPU",
)
def no_waits(make: Make) -> None:
    """No step waits for the device, also where `lr` of the group is a tensor there"""
    model = network().to("meta")
    opt = make(model.named_parameters())
    if make.kind != "FTP":  # torch's own class waits for it
        opt.param_groups[0]["lr"] = torch.tensor(RATE, device="meta")
    for _ in range(3):
        step(opt, *model.parameters())


@convention("Training loops")
def stale_graphs(make: Make) -> Weights:
    """A step raises the version of the weights: `backward` through an older graph is an error"""
    model = network()
    opt = make(model.named_parameters())
    for count in range(3):
        versions = [p._version for p in model.parameters()]
        value = loss(model, count)
        value.backward(retain_graph=True)
        opt.step()
        assert all(p._version > version for p, version in zip(model.parameters(), versions, strict=True))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            value.backward()
        opt.zero_grad()
    assert not getattr(opt, "changed", {})  # the optimizer's own writes are no changes
    assert same(weights(model), straight(make))
    return weights(model)


@convention("Training loops")
def hooks(make: Make) -> Weights:
    """Pre- and post-hooks of `step`, `state_dict` and `load_state_dict`, and global hooks"""
    model = network()
    opt, calls = make(model.named_parameters()), []

    def note(name: str) -> Callable[..., None]:
        return lambda *_: calls.append(name)

    opt.register_step_pre_hook(note("step"))
    opt.register_step_post_hook(note("stepped"))
    opt.register_state_dict_pre_hook(note("save"))
    opt.register_state_dict_post_hook(note("saved"))
    opt.register_load_state_dict_pre_hook(note("load"))
    opt.register_load_state_dict_post_hook(note("loaded"))
    everywhere = register_optimizer_step_post_hook(lambda each, *_: calls.append("any") if each is opt else None)
    try:
        train(model, opt, 1)
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        train(model, opt, 2, 1)
    finally:
        everywhere.remove()
    one = ["step", "stepped", "any"]
    assert calls == [*one, "save", "saved", "load", "loaded", *one, *one]
    assert same(weights(model), straight(make))
    return weights(model)


# Tensors and gradients


@convention("Tensors and gradients")
def no_gradients(make: Make) -> Weights:
    """Tensors without a gradient, frozen and zero-size tensors are left alone; a gradient may come later"""
    model, empty = network(), nn.Parameter(torch.zeros(0, 3))
    model[0].requires_grad_(False)
    opt, before = make([*model.named_parameters(), ("empty", empty)]), weights(model[0])
    opt.step()
    train(model, opt, 1)
    assert same(weights(model[0]), before)
    model[0].requires_grad_(True)
    empty.grad = torch.zeros(0, 3)
    loss(model).backward()
    opt.step()
    assert not any(torch.equal(*pair) for pair in zip(weights(model[0]), before, strict=True))
    return weights(model)


@convention("Tensors and gradients")
def shapes_and_layouts(make: Make) -> Weights:
    """Scalars, vectors and convolutions; transposed and channels-last weights; expanded and transposed gradients"""
    torch.manual_seed(0)
    strided = [torch.randn(3, 4).t(), torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last), torch.randn(()), torch.randn(3)]
    ends = []
    for each, dense in ((make, False), (Make(make.kind, "reference"), True)):
        ps = [nn.Parameter(p.clone(memory_format=torch.contiguous_format if dense else torch.preserve_format)) for p in strided]
        opt = each(ps)
        for count in range(3):
            for p in ps:
                grad = torch.cos(p.detach().contiguous() + count)
                p.grad = grad if dense or p.ndim != 2 else grad.t().contiguous().t()
            if not dense:
                ps[3].grad = torch.full((), float(count)).expand(3)
            else:
                ps[3].grad = torch.full((3,), float(count))
            opt.step()
        ends.append([p.detach() for p in ps])
    close(*ends)
    return ends[0]


@convention("Tensors and gradients")
def mixed_dtypes(make: Make) -> Weights:
    """float64, float32 and bfloat16 tensors in one optimizer"""
    return of_dtypes(make, torch.float64, torch.float32, torch.bfloat16)


@convention(
    "Tensors and gradients",
    backends=("reference", "foreach"),
    note='on reference and foreach; `backend="fused"` refuses float16, `"auto"` steps it by foreach',
)
def half_precision(make: Make) -> Weights:
    """float16 tensors"""
    return of_dtypes(make, torch.float16)


def of_dtypes(make: Make, *dtypes: torch.dtype) -> Weights:
    ps = [nn.Parameter(torch.linspace(0.5, 1, 6, dtype=dtype).reshape(2, 3)) for dtype in dtypes]
    opt = make(ps, eps=1e-3) if make.kind != "SGDP" else make(ps)
    start = [p.detach().clone() for p in ps]
    for count in range(4):
        for p in ps:
            p.grad = torch.sin(p.detach() * (count + 1))
        opt.step()
    for p, dtype, before in zip(ps, dtypes, start, strict=True):
        assert p.dtype == dtype
        assert bool(p.isfinite().all())
        assert not torch.equal(p.detach(), before)
    return [p.detach() for p in ps]


TORCH_REFUSES = "torch's AdamW raises"


@convention("Tensors and gradients", refused={"FTP": (RuntimeError, "dtype", TORCH_REFUSES)})
def narrow_gradients(make: Make) -> Weights:
    """bfloat16 gradients of float32 tensors (`grad_dtype=None`)"""
    ends = []
    for dtype in (torch.bfloat16, torch.float32):
        w = nn.Parameter(torch.ones(2, 3, dtype=torch.float32))
        w.grad_dtype = None
        opt = make([w])
        for count in range(3):
            w.grad = torch.cos(w.detach() + count).bfloat16().to(dtype)
            opt.step()
        ends.append([w.detach()])
    assert same(*ends)
    return ends[0]


@convention("Tensors and gradients")
def converted(make: Make) -> Weights:
    """`model.double()` after construction"""
    model, wide = network().float(), network().float().double()
    opt, other = make(model.named_parameters()), make(wide.named_parameters())
    model.double()
    train(model, opt)
    train(wide, other)
    assert same(weights(model), weights(wide))
    return weights(model)


@convention(
    "Tensors and gradients",
    refused={"FTP": (RuntimeError, "dtype", TORCH_REFUSES)},
    backends=("reference",),
    note="on the reference backend; other dtypes have other kernels",
)
def converted_midway(make: Make) -> Weights:
    """`model.double()` between steps"""
    model = network().float()
    opt = make(model.named_parameters())
    train(model, opt, 2)
    model.double()
    before = learned(opt)
    train(model, opt, 2, 2)
    assert make.kind in ("nothing learned", LEARNING_OFF) or learned(opt) != before
    return weights(model)


@convention("Tensors and gradients")
def replaced_data(make: Make) -> Weights:
    """`p.data = ...` and `load_state_dict` of the model between construction and the first step"""
    model, other = network(), network(2)
    opt = make(model.named_parameters())
    model.load_state_dict(other.state_dict())
    model[0].weight.data = other[0].weight.detach().clone()
    train(model, opt)
    train(other, make(other.named_parameters()))
    assert same(weights(model), weights(other))
    return weights(model)


@convention("Tensors and gradients")
def lazy_modules(make: Make) -> Weights:
    """Lazy modules, whose tensors have no shape at construction"""
    layer = nn.LazyLinear(2)
    opt = make(layer.parameters())
    torch.manual_seed(0)
    layer(torch.ones(3, 4)).sum().backward()
    before = layer.weight.detach().clone()
    opt.step()
    after = layer.weight.detach()
    assert not torch.equal(after, before)
    if make.is_torchs:
        torch.testing.assert_close(after, before * (1 - RATE * 0.01) - RATE, rtol=1e-6, atol=0)
    return weights(layer)


@convention(
    "Tensors and gradients",
    refused=all_kinds(TypeError, "complex", "learned values are real: use `torch.view_as_real`, as torch does inside"),
)
def complex_tensors(make: Make) -> None:
    """Complex tensors"""
    make([nn.Parameter(torch.ones(2, dtype=torch.complex128))])


@convention(
    "Tensors and gradients",
    refused=all_kinds(RuntimeError, "sparse", "use `sparse=False`, or `torch.optim.SparseAdam` for those tensors"),
)
def sparse_gradients(make: Make) -> None:
    """Sparse gradients"""
    table = nn.Embedding(4, 2, sparse=True)
    opt = make(table.parameters())
    table(torch.tensor([1])).sum().backward()
    opt.step()


@convention("Tensors and gradients", refused=all_kinds(TypeError, "params", "as in torch: give a list"))
def bare_tensors(make: Make) -> None:
    """A single tensor as `params`"""
    make(nn.Parameter(torch.ones(2)))


@convention("Tensors and gradients", without={"FTP": "torch's AdamW steps it twice"})
def given_twice(make: Make) -> Weights:
    """A tensor given twice: a warning, and one step; in two groups, an error"""
    w = nn.Parameter(torch.ones(2, 3))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        opt = make([w, w])
    alone = nn.Parameter(torch.ones(2, 3))
    other = make([alone])
    for _ in range(2):
        step(opt, w)
        step(other, alone)
    with pytest.raises(ValueError, match="more than one parameter group"):
        opt.add_param_group({"params": [w]})
    saved = copy.deepcopy(opt.state_dict())
    opt.load_state_dict(saved)
    assert state(opt) == repr(saved)
    assert len(opt.param_groups) == 1
    assert torch.equal(w, alone)
    return [w.detach()]


# Groups and state that others change


@convention("What others change")
def group_deleted(make: Make) -> Weights:
    """`del opt.param_groups[0]`: the other groups go on"""
    model = network()
    opt = make([{"params": [*model[0].parameters()]}, {"params": [*model[2].parameters()]}])
    train(model, opt, 2)
    kept, rate = weights(model[0]), opt.param_groups[1]["lr"]
    del opt.param_groups[0]
    before = weights(model[2])
    train(model, opt, 2, 2)
    if make.kind != "FTP":  # torch's own state_dict raises KeyError
        opt.state_dict()
    assert rate == opt.param_groups[0]["lr"]
    assert same(weights(model[0]), kept)
    assert not any(torch.equal(*pair) for pair in zip(weights(model[2]), before, strict=True))
    return weights(model)


@convention("What others change")
def tensors_changed(make: Make) -> Weights:
    """Tensors appended to a group, or replaced in it: the new ones begin anew"""
    tensors = [nn.Parameter(torch.full((2, 3), float(i + 1))) for i in range(4)]
    reference = [nn.Parameter(p.detach().clone()) for p in tensors]
    opts = make([tensors[0], tensors[1]]), make.torch([reference[0], reference[1]])
    for ps, opt in zip((tensors, reference), opts, strict=True):
        step(opt, *ps)
        opt.param_groups[0]["params"].append(ps[2])
        step(opt, *ps)
        opt.param_groups[0]["params"][0] = ps[3]
        step(opt, *ps)
    assert not any(bool((p == i + 1).any()) for i, p in enumerate(tensors))
    if make.is_torchs:
        close([p.detach() for p in tensors], [p.detach() for p in reference])
    return [p.detach() for p in tensors]


@convention(
    "What others change",
    refused=all_kinds((ValueError, RuntimeError), "shape|size", "put a new parameter in its place, or remove its entry of `state`"),
)
def resized(make: Make) -> None:
    """`p.data` of another shape"""
    w = nn.Parameter(torch.ones(2, 3))
    opt = make([w])
    step(opt, w)
    w.data = torch.ones(4, 3)
    w.grad = torch.ones(4, 3)
    opt.step()


@convention("What others change")
def emptied_state(make: Make) -> Weights:
    """`state` cleared or replaced: it begins anew; learned values stay"""
    for reset in (lambda opt: opt.state.clear(), lambda opt: setattr(opt, "state", collections.defaultdict(dict))):
        model, reference = network(), network()
        opt, other = make(model.named_parameters()), make.torch(reference.named_parameters())
        for net, each in ((model, opt), (reference, other)):
            train(net, each, 2)
            values = learned(each)
            reset(each)
            assert values == learned(each)
            train(net, each, 2, 2)
        if make.is_torchs:
            close(weights(model), weights(reference))
    return weights(model)


# Saving and loading


def resumed(make: Make, transport: Callable[[Any, Any], tuple[Any, Any]]) -> Weights:
    """Weights of a run whose model, optimizer and scheduler are transported after two steps: bitwise those of one that is not."""
    ends = []
    for stops in (True, False):
        model: Any = network()
        opt = make(model.named_parameters())
        scheduler = lr_scheduler.CosineAnnealingLR(opt, 6)
        for count in range(4):
            if count == 2 and stops:
                counted = scheduler.state_dict()
                model, opt = transport(model, opt)
                scheduler = lr_scheduler.CosineAnnealingLR(opt, 6)
                group = [dict(each) for each in opt.param_groups]
                scheduler.load_state_dict(counted)
                assert group[0]["lr"] == opt.param_groups[0]["lr"]
            train(model, opt, 1, count)
            scheduler.step()
        ends.append((weights(model), learned(opt)))
    assert same(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]
    return ends[0][0]


def fresh(make: Make, model: nn.Module, saved: Any) -> tuple[nn.Module, Any]:
    """A new model and optimizer, with a saved state."""
    other = network(2)
    opt = make(other.named_parameters())
    other.load_state_dict(model.state_dict())
    opt.load_state_dict(saved)
    return other, opt


@convention("Saving and loading")
def resumes(make: Make) -> Weights:
    """`torch.save` of `state_dict`, `torch.load(weights_only=True)`, `load_state_dict`: the run goes on bitwise, with its scheduler"""

    def transport(model: Any, opt: Any) -> tuple[Any, Any]:
        file = io.BytesIO()
        torch.save(opt.state_dict(), file)
        file.seek(0)
        return fresh(make, model, torch.load(file, weights_only=True))

    return resumed(make, transport)


@convention("Saving and loading", backends=("reference", "fused"), note="on reference and fused; kernels are not part of a copy")
def copies(make: Make) -> Weights:
    """`copy.deepcopy` and `pickle` of model and optimizer together: both go on bitwise"""
    if make.backend == "reference":  # programs of an optimizer that is copied are made again
        resumed(make, lambda model, opt: pickle.loads(pickle.dumps((model, opt))))
    return resumed(make, lambda model, opt: copy.deepcopy((model, opt)))


@convention("Saving and loading")
def flat_states(make: Make) -> Weights:
    """State as a flat dict of tensors, for safetensors, and groups as JSON: the run goes on bitwise"""

    def transport(model: Any, opt: Any) -> tuple[Any, Any]:
        saved = opt.state_dict()
        flat = {f"{index}/{key}": leaf for index, entries in saved["state"].items() for key, leaf in entries.items()}
        assert all(isinstance(leaf, Tensor) and leaf.is_contiguous() for leaf in flat.values())
        groups = json.loads(json.dumps(saved["param_groups"]))
        entries: dict[int, dict[str, Tensor]] = {}
        for key, leaf in flat.items():
            index, _, name = key.partition("/")
            entries.setdefault(int(index), {})[name] = leaf.clone()
        return fresh(make, model, {"state": entries, "param_groups": groups})

    return resumed(make, transport)


@convention("Saving and loading")
def old_files(make: Make) -> Weights:
    """Step counts as numbers, from old files"""

    def transport(model: Any, opt: Any) -> tuple[Any, Any]:
        saved = copy.deepcopy(opt.state_dict())
        for entries in saved["state"].values():
            entries |= {key: float(leaf) for key, leaf in entries.items() if key.split(".")[-1] == "step"}
        return fresh(make, model, saved)

    return resumed(make, transport)


@convention(
    "Saving and loading",
    refused={
        kind: (ValueError, "'weight_decay' is only in this optimizer", "the message names the difference")
        for kind in COLUMNS
        if kind != "FTP"
    },
    without={"FTP": "torch's AdamW loads what is there"},
)
def missing_keys(make: Make) -> None:
    """A saved group that lacks a number"""
    opt = make(network().parameters())
    saved = opt.state_dict()
    saved["param_groups"][0].pop("weight_decay")
    opt.load_state_dict(saved)


@convention(
    "Saving and loading",
    refused=all_kinds(ValueError, "state_dict has other tensors", "the message names the difference"),
    without={"FTP": "torch's AdamW loads by position"},
)
def other_names(make: Make) -> None:
    """A state of tensors with other names"""
    opt = make(network().named_parameters())
    saved = opt.state_dict()
    saved["param_groups"][0]["param_names"] = ["a", "b", "c", "d"]
    opt.load_state_dict(saved)


NO_STATE = "torch's state has no anchors and radii: `FTP(optimizer)` takes an optimizer that has loaded it"


@convention(
    "Saving and loading",
    refused=dict.fromkeys(("AdamP", "SGDP"), (ValueError, "is only in this optimizer", NO_STATE)),
)
def states_of_torch(make: Make) -> Weights:
    """The state of torch's class: `load_state_dict` takes it, `torch_state_dict` returns one"""
    model, reference = network(), network()
    other = make.torch(reference.parameters())
    train(reference, other)
    model.load_state_dict(reference.state_dict())
    opt = make(model.parameters())
    (opt.optimizer if make.kind == "FTP" else opt).load_state_dict(copy.deepcopy(other.state_dict()))
    train(reference, other, 2, 3)
    train(model, opt, 2, 3)
    if make.is_torchs:
        close(weights(model), weights(reference))
    back = make.torch(network().parameters())
    back.load_state_dict(opt.optimizer.state_dict() if make.kind == "FTP" else opt.torch_state_dict())
    assert len(back.state) == 4
    return weights(model)


# torch's own tests

INFOS = {info.optim_cls.__name__: info for info in optim_db}


def configurations(make: Make) -> Iterator[Settings]:
    info = INFOS["SGD" if make.kind == "SGDP" else "AdamW"]
    for each in info.optim_inputs_func(device="cpu"):
        own = {"AdamP": {"weight_decay": 0.01}, "SGDP": {"momentum": 0.0}}.get(make.kind, {})
        yield {**own, **each.kwargs}


@convention(
    "torch's own tests",
    backends=("reference",),
    note="on the reference backend: `tests/test_backends.py` compares the others with it for every rule",
)
def configurations_of_torch(make: Make) -> Weights:
    """Configurations of `optim_db`, of AdamW, and of SGD for SGDP: equal to torch's class to 1e-12 where nothing is learned or projected"""
    ends = []
    for settings in configurations(make):
        if make.kind in ("learned", LEARNING_OFF) and "lr" in settings:
            settings["lr"] = hn.learn(settings["lr"], by=hn.sgd(lr=0.0 if make.kind == LEARNING_OFF else 1e-6))
        model, reference = network(), network()
        free = {"exclude": EVERYTHING} if make.kind in ("AdamP", "SGDP") else {}
        opt = make(model.named_parameters(), **settings, **free)
        rate = settings.get("lr", 1e-3)
        plain = {**settings, "lr": getattr(rate, "value", rate)}
        other = make.torch(reference.parameters(), **plain)
        for group in () if "lr" in settings else opt.param_groups:
            group["lr"] = 1e-3  # as torch's default
        train(model, opt)
        train(reference, other)
        if make.kind not in ("learned", "FTP"):
            close(weights(model), weights(reference))
        ends += weights(model)
    return ends


@convention(
    "torch's own tests",
    backends=("reference",),
    note="at construction, before a backend runs; mixtures of numbers and tensors in `betas` are accepted, but by FTP",
)
def error_inputs(make: Make) -> None:
    """Error inputs of `optim_db`, of AdamW, and of SGD for SGDP, are errors"""
    info = INFOS["SGD" if make.kind == "SGDP" else "AdamW"]
    for each in info.optim_error_inputs_func(device="cpu", dtype=torch.float64):
        params, settings = each.optimizer_error_input.params, each.optimizer_error_input.kwargs
        if "betas must be either" in each.error_regex and make.kind != "FTP":
            continue
        params = [nn.Parameter(torch.ones(2))] if params is None else params
        with pytest.raises((TypeError, ValueError, UserWarning)):  # warnings are errors here
            make(params, **settings)


# The checks


@pytest.fixture(scope="module")
def _shared() -> Iterator[None]:
    """Programs are made once for all optimizers whose steps are the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hyperopt_nested.optim.optimizer.Programs", functools.cache(Programs))
        patch.setattr("ftp.optimizers.projection", functools.cache(projection))
        yield


def cells() -> Iterator[Any]:
    for row in TABLE:
        for backend in row.backends:
            yield pytest.param(row, backend, id=f"{row.run.__name__}-{backend}")


@pytest.mark.usefixtures("quick_programs", "_shared")
@pytest.mark.parametrize(("row", "backend"), list(cells()))
def test_conventions_hold(row: Convention, backend: str) -> None:
    """Learning that is switched off gives bitwise what nothing learned gives."""
    ends: dict[str, Weights | None] = {}
    for kind in COLUMNS:
        if kind in row.without:
            continue
        try:
            if kind in row.refused:
                error, words, _ = row.refused[kind]
                with pytest.raises(error, match=words):
                    row.run(Make(kind, backend))
            else:
                ends[kind] = row.run(Make(kind, backend))
        except BaseException as error:
            error.add_note(f"convention {row.run.__name__}, {kind}, backend {backend}")
            raise
    off, plain = ends.get(LEARNING_OFF), ends.get("nothing learned")
    assert (off is None) == (plain is None)
    assert off is None or plain is None or same(off, plain)


def test_the_page_is_what_the_table_says() -> None:
    text = conventions.PAGE.read_text(encoding="utf-8")
    assert text == conventions.page(text, TABLE, COLUMNS), "run `make conventions`"
