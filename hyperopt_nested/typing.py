"""Names for the types of arguments, to annotate programs with."""

from hyperopt_nested.backends.choice import Backend
from hyperopt_nested.combinators import Anchor
from hyperopt_nested.combinators.base import Step
from hyperopt_nested.engine.horizon import Curvature
from hyperopt_nested.engine.learnable import Memory
from hyperopt_nested.hypergradients.implicit import Solver
from hyperopt_nested.hypergradients.unrolled import Method
from hyperopt_nested.projections import Saturation
from hyperopt_nested.rule import Bound, Per
from hyperopt_nested.signatures import Separable
from hyperopt_nested.trees import State

__all__ = ["Anchor", "Backend", "Bound", "Curvature", "Memory", "Method", "Per", "Saturation", "Separable", "Solver", "State", "Step"]
