"""Learn any hyper-parameter of any optimizer while the model trains, by differentiating the optimizer itself."""

from typing import TYPE_CHECKING, Any

from hyperopt_nested import optim as optim
from hyperopt_nested.backends.choice import Backend
from hyperopt_nested.combinators import (
    Anchor,
    centralize,
    clip_by_global_norm,
    clip_by_norm,
    clip_by_value,
    coupled_decay,
    decoupled_decay,
    ema,
    l2_sp,
    lookahead,
    project,
    spd,
)
from hyperopt_nested.combinators.base import Combinator, Step, combinator
from hyperopt_nested.domains import Bijection, Hyper, Interval, NonNegative, Positive, Real, UnitInterval
from hyperopt_nested.engine.horizon import Curvature
from hyperopt_nested.engine.learnable import Memory
from hyperopt_nested.engine.nested import Nested
from hyperopt_nested.hypergradients.audit import Audit, Bias, audit
from hyperopt_nested.hypergradients.functional import Functional, functional
from hyperopt_nested.hypergradients.implicit import Solver
from hyperopt_nested.hypergradients.sweep import Sweep, sweep
from hyperopt_nested.hypergradients.unrolled import Hypergradients, Method, hypergradient
from hyperopt_nested.ops import counter, kink, safe_sqrt, state_dtype, watch_kinks, zeros, zeros_like
from hyperopt_nested.optim.optimizer import HyperOptimizer
from hyperopt_nested.projections import Ball, Saturation, frobenius, linf, mars, row_l2
from hyperopt_nested.registry import get, names, register
from hyperopt_nested.rule import Bound, Coupling, FunctionRule, Learn, Optimizer, Per, Rule, accumulator, is_on, learn, rule
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
    lamb,
    lars,
    lion,
    muon,
    nadam,
    radam,
    rmsprop,
    rprop,
    schedule_free_adamw,
    schedule_free_sgd,
    sgd,
    sgd_hd,
)
from hyperopt_nested.trees import State

if TYPE_CHECKING:
    from hyperopt_nested import testing as testing

__all__ = [
    "Anchor",
    "Audit",
    "Backend",
    "Ball",
    "Bias",
    "Bijection",
    "Bound",
    "Combinator",
    "Coupling",
    "Curvature",
    "FunctionRule",
    "Functional",
    "Hyper",
    "HyperOptimizer",
    "Hypergradients",
    "Interval",
    "Learn",
    "Memory",
    "Method",
    "Nested",
    "NonNegative",
    "Optimizer",
    "Per",
    "Positive",
    "Real",
    "Rule",
    "Saturation",
    "Solver",
    "State",
    "Step",
    "Sweep",
    "UnitInterval",
    "accumulator",
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
    "combinator",
    "counter",
    "coupled_decay",
    "decoupled_decay",
    "ema",
    "frobenius",
    "functional",
    "get",
    "hypergradient",
    "is_on",
    "kink",
    "l2_sp",
    "lamb",
    "lars",
    "learn",
    "linf",
    "lion",
    "lookahead",
    "mars",
    "muon",
    "nadam",
    "names",
    "project",
    "radam",
    "register",
    "rmsprop",
    "row_l2",
    "rprop",
    "rule",
    "safe_sqrt",
    "schedule_free_adamw",
    "schedule_free_sgd",
    "sgd",
    "sgd_hd",
    "spd",
    "state_dtype",
    "sweep",
    "watch_kinks",
    "zeros",
    "zeros_like",
]


def __getattr__(name: str) -> Any:
    """`hn.testing`, imported when it is first used, since it needs hypothesis."""
    if name == "testing":
        import hyperopt_nested.testing

        return hyperopt_nested.testing
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
