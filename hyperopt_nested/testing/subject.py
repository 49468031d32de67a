"""What is checked: an optimizer as a template, filled in with the values of a case, and stepped without the engine."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hyperopt_nested import registry
from hyperopt_nested.combinators.base import Combinator
from hyperopt_nested.rule import FunctionRule, Learn, Optimizer, Per, Rule, learn
from hyperopt_nested.rules.sgd import sgd
from hyperopt_nested.testing.strategies import SHAPES, Case
from hyperopt_nested.trees import State, flatten

Tree = dict[str, Tensor]
Checkable = FunctionRule | Combinator | Optimizer | str
"""A rule, a combinator (checked around `sgd`), an optimizer (whose options are kept), or a name in the registry."""


class Inapplicable(Exception):
    """The rule cannot be used like this: a choice of options, or of granularity, that it refuses."""


@dataclass(frozen=True)
class Step:
    """The update that is checked: an optimizer with nothing learned, and its inputs by tensor."""

    optimizer: Optimizer
    params: Tree
    grads: Tree
    states: dict[str, State]
    hypers: dict[str, Tree]

    def __call__(self) -> tuple[Tree, dict[str, State]]:
        return direct(self.optimizer, self.params, self.grads, self.states, self.hypers)


@dataclass(frozen=True)
class Subject:
    """A template.

    Attributes:
        name: how messages call it.
        make: from options to an optimizer.
        own: the hypers that are checked: of a combinator its own, and not those of the optimizer that it is put around.
        code: how messages write it: an expression that makes it, with {} for options.
        choices: what its options are drawn from, the default first.
    """

    name: str
    make: Callable[..., Optimizer]
    own: tuple[str, ...]
    code: str = "optimizer"
    choices: Mapping[str, tuple[Any, ...]] | None = None

    @property
    def template(self) -> Optimizer:
        return self.make()

    @property
    def flips(self) -> list[dict[str, Any]]:
        """Each option alone at its other choice."""
        return [{name: choices[1]} for name, choices in (self.choices or {}).items()]

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

    def step(self, case: Case) -> Step:
        """The last update of a case.

        Raises:
            Inapplicable: the rule refuses its options.
        """
        optimizer = self.fixed(case)
        params, states, hypers = dict(case.params), start(optimizer, case.params), numbers(case, optimizer)
        try:
            for grads in case.grads[:-1]:
                params, states = direct(optimizer, params, grads, states, hypers)
        except ValueError as error:
            raise Inapplicable(str(error)) from error
        return Step(optimizer, params, case.grads[-1], states, hypers)

    def learning(self, case: Case, hypers: Mapping[str, Per]) -> Optimizer:
        """The optimizer of a case, with hypers learned at some granularity by a learner that does not move them."""
        still: dict[str, float | Learn] = {
            name: learn(case.hypers[name], by=sgd(lr=0.0), per=per, via="projection") for name, per in hypers.items()
        }
        return self.fixed(case).replace(**still)


def subject(rule: Checkable) -> Subject:
    """The template of what is to be checked.

    Raises:
        TypeError: it is none of the things that can be checked.
    """

    def inner() -> Optimizer:
        return sgd(lr=0.1, momentum=0.9)

    if isinstance(rule, str):
        entry, example = registry.get(rule), registry.example(rule, inner)
        if isinstance(entry, FunctionRule) and not registry.check_with(rule):
            return subject(entry)
        own = entry.hypers if isinstance(entry, Combinator) else example.learned or example.settings
        return Subject(rule, lambda: example, settable(own, example.rule))
    if isinstance(rule, Optimizer):
        return Subject(rule.rule.name, lambda: rule, settable(rule.settings, rule.rule))
    if isinstance(rule, Combinator):
        outer = rule(inner())
        return Subject(rule.name, lambda: outer, settable(rule.hypers, outer.rule), f"{rule.name}(hn.sgd(lr=0.1, momentum=0.9))")
    if isinstance(rule, FunctionRule):
        choices = {name: (default, not default) for name, default in rule.options.items() if isinstance(default, bool)}
        return Subject(rule.name, rule, settable(rule.hypers, rule), f"{rule.name}({{}})", choices)
    raise TypeError(f"rule={rule!r} ({type(rule).__name__}) must be a rule, a combinator, an optimizer, or a registered name")


def settable(names: Iterable[str], rule: Rule) -> tuple[str, ...]:
    """Those of the hypers that can be set and learned: all but the loss."""
    return tuple(name for name in names if name not in rule.loss_names)


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


def losses(optimizer: Optimizer, names: Iterable[str]) -> dict[str, dict[str, float]]:
    """Values of the loss in one step, by tensor, for rules that read it."""
    return {name: {loss: optimizer.declared[loss] for loss in optimizer.rule.loss_names} for name in names}


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
    total = torch.stack([rule.global_reduce(*each) for each in inputs.values()]).sum(0) if rule.reduction else None
    updated = {name: rule.update(*each, total) for name, each in inputs.items()}
    return {name: pair[0] for name, pair in updated.items()}, {name: pair[1] for name, pair in updated.items()}


def by_path(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves of a tree by dotted path."""
    return {".".join(path): leaf for path, leaf in flatten(dict(tree)).items()}
