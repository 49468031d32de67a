"""What is checked: an optimizer as a template, filled in with the values of a case, and stepped without the engine."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hyperopt_nested import registry
from hyperopt_nested.combinators.base import Combinator
from hyperopt_nested.rule import FunctionRule, Learn, Optimizer, Per, learn
from hyperopt_nested.rules.sgd import sgd
from hyperopt_nested.testing.strategies import SHAPES, Case
from hyperopt_nested.trees import State

Tree = dict[str, Tensor]
Checkable = FunctionRule | Combinator | Optimizer | str
"""A rule, a combinator (checked around `sgd`), an optimizer (whose options are kept), or a name in the registry."""


class RuleError(AssertionError):
    """A rule breaks a law; the message says which, with which numbers, and on which example.

    Attributes:
        case: the example, if it is not the one that was drawn.
    """

    def __init__(self, message: str, case: Case | None = None) -> None:
        super().__init__(message)
        self.case = case


class Inapplicable(Exception):
    """The rule can not be used like this: a choice of options, or of granularity, that it refuses."""


@dataclass(frozen=True)
class Subject:
    """A template.

    Attributes:
        name: how messages call it.
        make: from options to an optimizer.
        choices: what its options are drawn from.
        own: the hypers that are checked: of a combinator its own, and not those of the optimizer that it is put around.
        code: how messages write it: an expression that makes it, to be called with hypers and options if it ends in a name.
    """

    name: str
    make: Callable[..., Optimizer]
    choices: Mapping[str, tuple[Any, ...]]
    own: tuple[str, ...]
    code: str

    @property
    def template(self) -> Optimizer:
        return self.make()

    def written(self, options: Mapping[str, str], settings: Mapping[str, str]) -> str:
        """An expression that makes it with other options and settings."""
        made = self.code if self.code.endswith((")", "optimizer")) else f"{self.code}({_keywords(options)})"
        return f"{made}.replace({_keywords(settings)})" if settings else made

    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes that it accepts."""
        return [shape for shape in SHAPES if self.accepts(shape)]

    def accepts(self, shape: tuple[int, ...]) -> bool:
        """Whether it steps a tensor of this shape."""
        try:
            start(self.template, {"a": torch.zeros(shape)})
        except Inapplicable:
            return False
        return True

    def fixed(self, case: Case) -> Optimizer:
        """The optimizer of a case, nothing learned."""
        optimizer = self.make(**case.options)
        return Optimizer(optimizer.rule, {**optimizer.declared, **case.hypers})

    def learning(self, case: Case, hypers: Mapping[str, Per]) -> Optimizer:
        """The optimizer of a case, with hypers learned at some granularity by a learner that does not move them."""
        still: dict[str, float | Learn] = {
            name: learn(case.hypers[name], by=sgd(lr=0.0), per=per, via="projection") for name, per in hypers.items()
        }
        return self.fixed(case).replace(**still)


def _keywords(values: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


def _around() -> Optimizer:
    return sgd(lr=0.1, momentum=0.9)


def subject(rule: Checkable) -> Subject:
    """The template of what is to be checked.

    Raises:
        TypeError: it is none of the things that can be checked.
    """
    if isinstance(rule, str):
        optimizer = registry.example(rule, _around)
        found = registry.get(rule)
        if isinstance(found, FunctionRule) and not registry.check_with(rule):
            return subject(found)
        own = tuple(found.hypers) if isinstance(found, Combinator) else tuple(optimizer.learned) or tuple(optimizer.settings)
        return Subject(rule, lambda: optimizer, {}, own, "optimizer")
    if isinstance(rule, Optimizer):
        return Subject(rule.rule.name, lambda: rule, {}, tuple(rule.settings), "optimizer")
    if isinstance(rule, Combinator):
        around = rule(_around())
        return Subject(rule.name, lambda: around, {}, tuple(rule.hypers), f"{rule.name}(hn.sgd(lr=0.1, momentum=0.9))")
    if isinstance(rule, FunctionRule):
        choices = {name: (default, not default) for name, default in rule.options.items() if isinstance(default, bool)}
        return Subject(rule.name, rule, choices, tuple(rule.hypers), rule.name)
    raise TypeError(f"rule={rule!r} ({type(rule).__name__}) must be a rule, a combinator, an optimizer, or a registered name")


def start(optimizer: Optimizer, params: Mapping[str, Tensor]) -> dict[str, State]:
    """The rule's states before the first update, by tensor.

    Raises:
        Inapplicable: the rule refuses its options.
    """
    try:
        return {name: optimizer.rule.init(param, optimizer.settings) for name, param in params.items()}
    except ValueError as error:
        raise Inapplicable(str(error)) from error


def numbers(case: Case, optimizer: Optimizer) -> dict[str, Tree]:
    """Values of the hypers as single numbers, by tensor."""
    values = {name: torch.tensor(value, dtype=torch.float64) for name, value in optimizer.declared.items()}
    return dict.fromkeys(case.params, values)


def direct(
    optimizer: Optimizer,
    params: Mapping[str, Tensor],
    grads: Mapping[str, Tensor],
    states: Mapping[str, State],
    hypers: Mapping[str, Mapping[str, Tensor]],
) -> tuple[Tree, dict[str, State]]:
    """One step by the rule's own functions; `hypers` by tensor and name."""
    rule = optimizer.rule
    inputs = {name: (param, grads[name], states[name], hypers[name]) for name, param in params.items()}
    total = torch.stack([rule.global_reduce(*each) for each in inputs.values()]).sum() if rule.reduction else None
    updated = {name: rule.update(*each, total) for name, each in inputs.items()}
    return {name: pair[0] for name, pair in updated.items()}, {name: pair[1] for name, pair in updated.items()}


def history(optimizer: Optimizer, case: Case) -> tuple[Tree, dict[str, State]]:
    """Tensors and states before the step that is checked.

    Raises:
        Inapplicable: the rule refuses its options.
    """
    params, states, hypers = dict(case.params), start(optimizer, case.params), numbers(case, optimizer)
    try:
        for grads in case.grads[:-1]:
            params, states = direct(optimizer, params, grads, states, hypers)
    except ValueError as error:
        raise Inapplicable(str(error)) from error
    return params, states


def leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves of a tree by dotted path."""
    found: dict[str, Any] = {}
    for key, leaf in tree.items():
        found |= leaves(leaf, f"{prefix}{key}.") if isinstance(leaf, dict) else {f"{prefix}{key}": leaf}
    return found
