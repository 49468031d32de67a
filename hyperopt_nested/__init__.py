"""Learn any hyper-parameter of any optimizer while the model trains, by differentiating the optimizer itself.

Example:
    >>> import torch, hyperopt_nested as hn
    >>> model = torch.nn.Linear(3, 1)
    >>> # instead of torch.optim.AdamW(model.parameters(), lr=1e-3):
    >>> opt = hn.optim.AdamW(model.parameters(), lr=hn.learn(1e-3))
    >>> for _ in range(3):
    ...     opt.zero_grad()
    ...     model(torch.ones(4, 3)).square().mean().backward()
    ...     opt.step()
    >>> opt.learned()["lr"] > 1e-3
    True
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from hyperopt_nested import optim, rules, typing
from hyperopt_nested.combinators import (
    centralize,
    clip_by_global_norm,
    clip_by_norm,
    clip_by_value,
    coupled_decay,
    decoupled_decay,
    ema,
    l2_sp,
    lookahead,
    null_step,
    polyak,
    project,
    rescale,
    spd,
    window,
)
from hyperopt_nested.combinators.base import combinator
from hyperopt_nested.domains import Bijection, Interval, NonNegative, Positive, Real, UnitInterval
from hyperopt_nested.engine.discounted import Discounted
from hyperopt_nested.engine.nested import Nested
from hyperopt_nested.engine.one_step import OneStep
from hyperopt_nested.hypergradients.audit import audit
from hyperopt_nested.hypergradients.functional import functional
from hyperopt_nested.hypergradients.sweep import sweep
from hyperopt_nested.hypergradients.unrolled import hypergradient
from hyperopt_nested.optim.optimizer import HyperOptimizer
from hyperopt_nested.projections import frobenius, linf, mars, row_l2
from hyperopt_nested.registry import get, names
from hyperopt_nested.rule import Learn, Optimizer, learn, rule
from hyperopt_nested.rules import (
    adabelief,
    adadelta,
    adafactor,
    adagrad,
    adam,
    adam_hd,
    adamax,
    adamw,
    adan,
    asgd,
    coherent_adam,
    coin_betting,
    dadapt_adam,
    dog,
    erfi_tuner,
    lamb,
    lars,
    ldog,
    lion,
    mada,
    muon,
    nadam,
    prodigy,
    radam,
    rmsprop,
    rprop,
    schedule_free_adamw,
    schedule_free_sgd,
    sgd,
    sgd_hd,
)

if TYPE_CHECKING:
    from hyperopt_nested import integrations as integrations
    from hyperopt_nested import plot as plot
    from hyperopt_nested import testing as testing

__all__ = [
    "Bijection",
    "Discounted",
    "HyperOptimizer",
    "Interval",
    "Learn",
    "Nested",
    "NonNegative",
    "OneStep",
    "Optimizer",
    "Positive",
    "Real",
    "UnitInterval",
    "adabelief",
    "adadelta",
    "adafactor",
    "adagrad",
    "adam",
    "adam_hd",
    "adamax",
    "adamw",
    "adan",
    "asgd",
    "audit",
    "centralize",
    "clip_by_global_norm",
    "clip_by_norm",
    "clip_by_value",
    "coherent_adam",
    "coin_betting",
    "combinator",
    "coupled_decay",
    "dadapt_adam",
    "decoupled_decay",
    "dog",
    "ema",
    "erfi_tuner",
    "frobenius",
    "functional",
    "get",
    "hypergradient",
    "l2_sp",
    "lamb",
    "lars",
    "ldog",
    "learn",
    "linf",
    "lion",
    "lookahead",
    "mada",
    "mars",
    "muon",
    "nadam",
    "names",
    "null_step",
    "optim",
    "polyak",
    "prodigy",
    "project",
    "radam",
    "rescale",
    "rmsprop",
    "row_l2",
    "rprop",
    "rule",
    "rules",
    "schedule_free_adamw",
    "schedule_free_sgd",
    "sgd",
    "sgd_hd",
    "spd",
    "sweep",
    "typing",
    "window",
]


try:
    __version__ = version("hyperopt-nested")
except PackageNotFoundError:  # the source, not installed
    __version__ = "0+unknown"


def __dir__() -> list[str]:
    """The public names."""
    return list(__all__)


def __getattr__(name: str) -> Any:
    """`hn.testing`, `hn.integrations` and `hn.plot`, imported when they are first used."""
    if name in ("integrations", "plot", "testing"):
        return import_module(f"{__name__}.{name}")
    homes = [home for home, module in {"optim": optim, "rules": rules, "typing": typing}.items() if name in module.__all__]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}" + "".join(f"; it is in hn.{home}" for home in homes))
