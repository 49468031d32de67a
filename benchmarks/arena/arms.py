"""What is compared: tuned schedules, methods without tuning, published learners of rates, and `hn.learn`."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch

import hyperopt_nested as hn
from hyperopt_nested.engine.checks import Horizon
from hyperopt_nested.optim import level

Rule = Callable[..., hn.Optimizer]
Rate = float | hn.Learn
Make = Callable[[Rule, Rate, int], hn.Optimizer]
"""From the base's rule, a rate, and the number of steps."""
Shape = Callable[[int, int], float]


@dataclass(frozen=True)
class Base:
    """An optimizer whose rate is chosen.

    Attributes:
        rule: of the tensors.
        grid: of rates, for whatever is tuned.
        others: the rule of tensors that are no matrices, where that is another one; both have one rate.
    """

    rule: Rule
    grid: Sequence[float]
    others: Rule | None = None

    def rule_of(self, shape: Sequence[int]) -> Rule:
        """The rule of a tensor of this shape."""
        return self.rule if self.others is None or len(shape) == 2 else self.others


def _grid(low: int) -> tuple[float, ...]:
    """Seven rates, two in each decade, starting at 10 ** low."""
    return tuple(round(factor * 10.0 ** (low + decade), -(low + decade) + 1) for decade in range(4) for factor in (1, 3))[:7]


BASES = {
    "adamw": Base(hn.adamw, _grid(-4)),
    "sgd": Base(partial(hn.sgd, momentum=0.9), _grid(-3)),
    "lion": Base(hn.lion, _grid(-5)),
    "muon": Base(partial(hn.muon, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"), _grid(-4), hn.adamw),
}

STARTS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""Where learned rates start; the protocol judges by those from 1e-5 on."""

WARM_UP = 0.05


def constant(step: int, total: int) -> float:  # noqa: ARG001  all shapes are called alike
    """The shape of a rate that stays."""
    return 1.0


def linear(step: int, total: int) -> float:
    """The shape that rises linearly in the first 5 % of steps, and falls linearly."""
    return min(_rise(step, total), 1 - _fallen(step, total))


def cosine(step: int, total: int) -> float:
    """The shape that rises linearly in the first 5 % of steps, and falls as a cosine."""
    return min(_rise(step, total), (1 + math.cos(math.pi * _fallen(step, total))) / 2)


def _rising(total: int) -> int:
    return max(1, round(WARM_UP * total))


def _rise(step: int, total: int) -> float:
    return (step + 1) / _rising(total)


def _fallen(step: int, total: int) -> float:
    """The part of the fall that is over, in [0, 1]."""
    return max(0, step + 1 - _rising(total)) / (total - _rising(total))


@dataclass(frozen=True)
class Arm:
    """One way to choose a rate.

    Attributes:
        make: the optimizer, around or in the place of the base's rule.
        rates: "grid": all rates of the base's grid, and the best one counts; "starts": all starts, and each counts; or numbers.
        lr: what is put in the place of a rate: itself, or what learns it.
        shape: factor of the rate in each step.
        bases: it is run with.
        horizon: of hypergradients.
        learn_until: how many of all steps anything is learned in; None is all.
    """

    make: Make
    rates: Literal["grid", "starts"] | Sequence[float]
    lr: Callable[[float], Rate] = float
    shape: Shape = constant
    bases: Sequence[str] = ("adamw",)
    horizon: Horizon = field(default_factory=hn.OneStep)
    learn_until: Callable[[int], int] | None = None

    def rates_of(self, base: str) -> Sequence[float]:
        """The rates that it is run with."""
        if self.rates == "grid":
            return BASES[base].grid
        return STARTS if self.rates == "starts" else self.rates


def _plain(rule: Rule, lr: Rate, total: int) -> hn.Optimizer:  # noqa: ARG001  all are called alike
    return rule(lr)


def _level(rule: Rule, lr: Rate, total: int) -> hn.Optimizer:
    return level.with_level(rule(lr), total)


def _alone(rule: Rule, **settings: Any) -> Make:
    return lambda base, lr, total: rule(lr, **settings)  # noqa: ARG005


def _mechanic(rule: Rule, lr: Rate, total: int) -> hn.Optimizer:  # noqa: ARG001
    return hn.rescale(rule(lr), hn.learn(1e-8, by=hn.coin_betting()))


TANH = hn.Bijection(
    "tanh",
    lambda raw: (torch.tanh(raw) + 1) / 2,
    lambda value: torch.atanh(2 * value - 1),
    lambda info: (-0.5 * math.log(2 / info.eps), 0.5 * math.log(2 / info.eps)),
    interval=True,
)


def _gdtuo(rule: Rule, lr: Rate, total: int) -> hn.Optimizer:  # noqa: ARG001
    """The ultimate optimizer's example: its Adam, whose rate and betas SGD learns."""
    by = hn.sgd(lr=1e-5)
    return hn.adam(lr, beta1=hn.learn(0.9, by=by, via=TANH), beta2=hn.learn(0.999, by=by, via=TANH))


ALL = tuple(BASES)
ARMS: Mapping[str, Arm] = {
    "constant": Arm(_plain, "grid", bases=ALL),
    "linear": Arm(_plain, "grid", shape=linear, bases=ALL),
    "cosine": Arm(_plain, "grid", shape=cosine),
    "learn": Arm(_plain, "starts", hn.learn, bases=ALL),
    "learn, total_steps": Arm(_level, "starts", hn.learn, level.shape, ALL, learn_until=level.window_of),
    "schedule-free": Arm(_alone(hn.schedule_free_adamw, weight_decay=0.01), (*_grid(-4), 0.0025)),
    "Prodigy": Arm(_alone(hn.prodigy, weight_decay=0.01), (1.0,)),
    "Prodigy, cosine": Arm(_alone(hn.prodigy, weight_decay=0.01, safeguard_warmup=True), (1.0,), shape=cosine),
    "D-Adaptation": Arm(_alone(hn.dadapt_adam, weight_decay=0.01, decouple=True), (1.0,)),
    "D-Adaptation, linear": Arm(_alone(hn.dadapt_adam, weight_decay=0.01, decouple=True), (1.0,), shape=linear),
    "DoG": Arm(_alone(hn.dog), (1.0,)),
    "LDoG": Arm(_alone(hn.ldog), (1.0,)),
    "Mechanic": Arm(_mechanic, (1.0,)),
    "Mechanic, linear": Arm(_mechanic, (1.0,), shape=linear),
    "hypergradient descent": Arm(_plain, "starts", partial(hn.learn, by=hn.sgd(lr=1e-7))),
    "MetaOptimize": Arm(_plain, "starts", partial(hn.learn, by=hn.lion(lr=1e-3), via="log"), horizon=hn.Discounted(1.0)),
    "gdtuo": Arm(_gdtuo, "starts", partial(hn.learn, by=hn.sgd(lr=1e-5))),
}
