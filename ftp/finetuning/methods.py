"""Methods of robust fine-tuning, one row of a table each, and the optimizers that they are put around."""

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

import hyperopt_nested as hn
from ftp.anchored import AnchoredOptimizer, Anchors
from ftp.directional import digrap
from ftp.rule import Radius, ftp_rule
from ftp.selective import learned_spd
from ftp.tpgm import TPGM
from ftp.validated import ValidatedOptimizer
from ftp.wise_ft import WiSEFT

Part = Literal["head", "all"]
"""What a phase of training trains."""


@dataclass(frozen=True)
class Base:
    """An optimizer by name.

    Attributes:
        lr: learning rate of the backbone where none is given.
        plain: torch's own, of parameter groups: `plain(groups, weight_decay=..., momentum=...)`.
        rule: the engine's, which methods go around: `rule(weight_decay=..., momentum=...)`.
    """

    lr: float
    plain: Callable[..., torch.optim.Optimizer]
    rule: Callable[..., hn.Optimizer]


OPTIMIZERS: Mapping[str, Base] = {
    "adamw": Base(
        1e-4,
        lambda groups, weight_decay, momentum: torch.optim.AdamW(groups, weight_decay=weight_decay, betas=(momentum, 0.999), fused=True),
        lambda weight_decay, momentum: hn.adamw(weight_decay=weight_decay, betas=(momentum, 0.999)),
    ),
    "sgd": Base(
        1e-2,
        lambda groups, weight_decay, momentum: torch.optim.SGD(
            groups, weight_decay=weight_decay, momentum=momentum, nesterov=momentum > 0, fused=True
        ),
        lambda weight_decay, momentum: hn.sgd(weight_decay=weight_decay, momentum=momentum, nesterov=momentum > 0),
    ),
}
"""By name; SGD's momentum is Nesterov's, and AdamW's is the decay rate of the first moment."""


@dataclass(frozen=True)
class Strength:
    """The one number of a method.

    Attributes:
        meaning: what it is.
        default: its value where none is given.
        grid: values to search, from the one that changes plain fine-tuning least on.
        high: the largest that makes sense; the smallest is 0.
    """

    meaning: str
    default: float
    grid: tuple[float, ...]
    high: float = math.inf


@dataclass(frozen=True)
class Method:
    """A way of fine-tuning.

    Attributes:
        name: as it is chosen by.
        title: as reports show it.
        summary: what it does, in one line.
        strength: its number; None if it has none.
        phases: what is trained, in turn, each for the same share of the steps.
        around: makes a combinator of the strength, which goes around the optimizer of every tensor but the head's.
        beside: makes, of the strength, what learns from training data that are held out, beside the optimizer.
        beside_each: when that takes a step: after each "epoch", or at the "end", when the best weights are chosen.
        share: makes, of the strength, the share of their displacement that weights keep at the end.
    """

    name: str
    title: str
    summary: str
    strength: Strength | None = None
    phases: tuple[Part, ...] = ("all",)
    around: Callable[[float], Callable[..., hn.Optimizer]] | None = None
    beside: Callable[..., ValidatedOptimizer] | None = None
    beside_each: Literal["epoch", "end"] = "epoch"
    share: Callable[[float], float] | None = None


def _tpgm(strength: float, params: Any, **how: Any) -> ValidatedOptimizer:
    return TPGM(params, lr=strength, updates=10, **how)


def _learned_wise_ft(strength: float, params: Any, **how: Any) -> ValidatedOptimizer:
    return WiSEFT(params, lr=strength, updates=100, **how)


_K = Strength("annealing k of positive radius gradients", 1.0, (0.0, 0.5, 1.0), high=1.0)


def _variant(name: str, summary: str, **how: Any) -> Method:
    """A variant of FTP, with the same strength."""
    around = functools.partial(functools.partial, ftp_rule, **how)
    return Method(f"ftp-{name}", f"FTP, {name}", f"FTP, but {summary}", _K, around=lambda strength: around(k=strength))


_ROWS = (
    Method("full", "Full fine-tuning", "the optimizer alone, on all weights"),
    Method("linear-probe", "Linear probe", "the optimizer on the head; the backbone stays", phases=("head",)),
    Method("lp-ft", "LP-FT", "a linear probe for half of the steps, then full fine-tuning (2202.10054)", phases=("head", "all")),
    Method(
        "l2-sp",
        "L2-SP",
        "a penalty on the squared distance from the pre-trained weights (1802.01483)",
        Strength("weight of the penalty", 1e-2, (1e-3, 1e-2, 1e-1, 1.0)),
        around=lambda strength: functools.partial(hn.l2_sp, decay=strength),
    ),
    Method(
        "wise-ft",
        "WiSE-FT",
        "at the end, weights between the pre-trained and the fine-tuned ones (2109.01903)",
        Strength("share of the displacement that is kept", 0.5, (0.75, 0.5, 0.25), high=1.0),
        share=lambda strength: strength,
    ),
    Method(
        "learned-wise-ft",
        "WiSE-FT, learned",
        "WiSE-FT with a share that is learned from data held out of training",
        Strength("learning rate of the share", 1e-2, (1e-2, 3e-2)),
        beside=_learned_wise_ft,
        beside_each="end",
    ),
    Method(
        "tpgm",
        "TPGM",
        "after each epoch, projection with radii that are learned from data held out of training (2303.10720)",
        Strength("learning rate of the radii", 1e-2, (1e-1, 1e-2, 1e-3)),
        beside=_tpgm,
    ),
    Method(
        "spd",
        "SPD",
        "decay towards the pre-trained weights where the gradient agrees with it (2411.01713)",
        Strength("share of the distance's growth that is undone", 1.0, (0.3, 1.0, 3.0)),
        around=lambda strength: functools.partial(hn.spd, decay=strength),
    ),
    Method(
        "learned-spd",
        "SPD, learned",
        "SPD with a strength that each tensor learns",
        Strength("strength at the start", 1.0, (0.3, 1.0, 3.0)),
        around=lambda strength: functools.partial(learned_spd, strength=strength),
    ),
    Method(
        "digrap",
        "DiGraP",
        "gradients without a learned share of what leads away from the pre-trained weights (2502.15895)",
        Strength("learning rate of the shares", 0.1, (0.01, 0.1, 1.0)),
        around=lambda strength: functools.partial(digrap, lr=strength),
    ),
    Method(
        "ftp",
        "FTP",
        "projection after each step, with radii that are learned from its gradient (2310.19182)",
        _K,
        around=lambda strength: functools.partial(ftp_rule, k=strength),
    ),
    _variant("log", "radii are learned in log space, from the first displacement on", radius=Radius(via="log", start="displacement")),
    _variant("relative", "radii are relative to the norm of each pre-trained row", radius=Radius(relative="row")),
    _variant("row", "each row of a tensor has a radius", radius=Radius(per="row")),
    _variant("scheduled", "radii follow the schedule of the learning rate", radius=Radius(scheduled=True)),
    _variant("displaced", "radii start at the first displacement", radius=Radius(start="displacement")),
    _variant("exact", "radii learn from the exact derivative of the projection", saturation="exact"),
    Method(
        "moving-ftp",
        "FTP, moving anchor",
        "FTP around a moving average of the weights",
        Strength("decay of the average; 1 is a fixed anchor", 0.999, (0.9, 0.99, 0.999), high=1.0),
        around=lambda strength: functools.partial(ftp_rule, anchor_decay=strength),
    ),
)

METHODS: Mapping[str, Method] = {method.name: method for method in _ROWS}
"""By name, in the order of tables."""


class _Anchored(AnchoredOptimizer):
    pinned_at_ends = frozenset({"radius", "strength", "decay"})  # no news: where a tensor need not be held, or not be let go


def optimizer(
    method: Method,
    base: Base,
    groups: Iterable[Mapping[str, Any]],
    *,
    strength: float | None,
    exclude: Iterable[str],
    anchor: Anchors = None,
    weight_decay: float = 0.0,
    momentum: float = 0.9,
) -> torch.optim.Optimizer:
    """Make the optimizer of a method.

    Args:
        method: a row of `METHODS`.
        base: a row of `OPTIMIZERS`.
        groups: parameter groups of named tensors, with learning rates.
        strength: of the method.
        exclude: names of tensors that have no anchor.
        anchor: as `ftp.FTP`.
        weight_decay: of the base.
        momentum: of the base.
    """
    how = {"weight_decay": weight_decay, "momentum": momentum}
    listed = [dict(group) for group in groups]
    if method.around is None or strength is None:
        return base.plain(listed, **how)
    return _Anchored(listed, base.rule(**how), method.around(strength), exclude=list(exclude), anchor=anchor)
