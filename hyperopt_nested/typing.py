"""Names for the types of arguments and results, to annotate programs with."""

from hyperopt_nested.backends.choice import Backend
from hyperopt_nested.combinators import Anchor
from hyperopt_nested.combinators.base import Combinator, Step
from hyperopt_nested.combinators.project import Relative
from hyperopt_nested.domains import Hyper
from hyperopt_nested.engine.checks import Horizon
from hyperopt_nested.engine.discounted import Curvature
from hyperopt_nested.engine.one_step import Memory
from hyperopt_nested.engine.rounding import Rounding
from hyperopt_nested.hypergradients.audit import Audit, Bias
from hyperopt_nested.hypergradients.functional import Functional
from hyperopt_nested.hypergradients.implicit import Solver
from hyperopt_nested.hypergradients.sweep import Sweep
from hyperopt_nested.hypergradients.unrolled import Hypergradients, Method
from hyperopt_nested.projections import Ball, Saturation
from hyperopt_nested.rule import Bound, FunctionRule, Per, Rule
from hyperopt_nested.signatures import Separable
from hyperopt_nested.trees import State

__all__ = [
    "Anchor",
    "Audit",
    "Backend",
    "Ball",
    "Bias",
    "Bound",
    "Combinator",
    "Curvature",
    "FunctionRule",
    "Functional",
    "Horizon",
    "Hyper",
    "Hypergradients",
    "Memory",
    "Method",
    "Per",
    "Relative",
    "Rounding",
    "Rule",
    "Saturation",
    "Separable",
    "Solver",
    "State",
    "Step",
    "Sweep",
]
