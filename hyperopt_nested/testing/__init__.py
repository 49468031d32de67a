"""The test kit: are the hypergradients of a new optimizer right?"""

from hyperopt_nested.checks import extra

with extra("testing"):
    from hyperopt_nested.testing.check import Report, check_case, check_rule
    from hyperopt_nested.testing.comparison import RuleError
    from hyperopt_nested.testing.differences import Difference, central_difference, finite_difference
    from hyperopt_nested.testing.laws import Reference
    from hyperopt_nested.testing.programs import Comparison, check_backend
    from hyperopt_nested.testing.registered import every_rule
    from hyperopt_nested.testing.strategies import Case, cases, hyper_values, normal_case, shape_trees, tensors, trees
    from hyperopt_nested.testing.subject import Checkable

__all__ = [
    "Case",
    "Checkable",
    "Comparison",
    "Difference",
    "Reference",
    "Report",
    "RuleError",
    "cases",
    "central_difference",
    "check_backend",
    "check_case",
    "check_rule",
    "every_rule",
    "finite_difference",
    "hyper_values",
    "normal_case",
    "shape_trees",
    "tensors",
    "trees",
]
