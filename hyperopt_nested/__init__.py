"""Learn any hyper-parameter of any optimizer while the model trains, by differentiating the optimizer itself."""

from hyperopt_nested.combinators import Anchor, project
from hyperopt_nested.hyper import Bijection, Hyper, Interval, NonNegative, Positive, Real, UnitInterval
from hyperopt_nested.nested import Memory, Nested
from hyperopt_nested.ops import State, counter, safe_sqrt, state_dtype, zeros, zeros_like
from hyperopt_nested.optimizer import HyperOptimizer
from hyperopt_nested.projections import Ball, Saturation, frobenius, linf, mars, row_l2
from hyperopt_nested.registry import get, names, register
from hyperopt_nested.rule import Bound, Coupling, FunctionRule, Learn, Optimizer, Per, Rule, is_on, learn, rule
from hyperopt_nested.rules import adam, adamw, sgd

__all__ = [
    "Anchor",
    "Ball",
    "Bijection",
    "Bound",
    "Coupling",
    "FunctionRule",
    "Hyper",
    "HyperOptimizer",
    "Interval",
    "Learn",
    "Memory",
    "Nested",
    "NonNegative",
    "Optimizer",
    "Per",
    "Positive",
    "Real",
    "Rule",
    "Saturation",
    "State",
    "UnitInterval",
    "adam",
    "adamw",
    "counter",
    "frobenius",
    "get",
    "is_on",
    "learn",
    "linf",
    "mars",
    "names",
    "project",
    "register",
    "row_l2",
    "rule",
    "safe_sqrt",
    "sgd",
    "state_dtype",
    "zeros",
    "zeros_like",
]
