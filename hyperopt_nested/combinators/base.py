"""Combinators: an optimizer in, an optimizer that does more, with more hypers, out.

A combinator is written like a rule, as one function; it is given the step of the optimizer that it is put around.
"""

import functools
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from torch import Tensor

from hyperopt_nested import registry
from hyperopt_nested.checks import check_options, kinds_of, not_an_optimizer
from hyperopt_nested.domains import Hyper
from hyperopt_nested.rule import Coupling, Learn, Optimizer, Rule
from hyperopt_nested.signatures import assigned, check_definition, checked_pair, chosen, declared_options
from hyperopt_nested.trees import State

Step = Callable[[Tensor, Tensor], Tensor]
"""One step of the optimizer inside: from a parameter and a gradient to the new parameter. Its state is kept for it."""


@dataclass(eq=False, repr=False)
class Combinator:
    """A combinator made from a function by `combinator`. Call it with an optimizer, and hypers and options, to get an `Optimizer`."""

    name: str
    function: Callable[..., tuple[Tensor, State]]
    initial: Callable[..., State] | None
    hypers: Mapping[str, Hyper]
    coupling: Coupling | Callable[..., Coupling]
    options: Mapping[str, Any] = field(default_factory=dict)
    borrowed: tuple[str, ...] = ()
    measure: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        self._kinds = kinds_of(self.options, self.function, self.initial)

    def __call__(self, optimizer: Optimizer, /, *given: Any, **settings: Any) -> Optimizer:
        """The optimizer with this combinator around it.

        Raises:
            TypeError: `optimizer` is no optimizer of this library, lacks a hyper that the combinator needs, or an argument is unknown.
            ValueError: it has a hyper of the same name already, or both need a total over all tensors.
        """
        if not isinstance(optimizer, Optimizer):
            raise not_an_optimizer("optimizer", optimizer)
        if given:
            first = next(iter([*self.hypers, *self.options]), "")
            raise TypeError(f"{self.name} takes an optimizer and then arguments by name, such as {self.name}(optimizer, {first}=...)")
        check_options(self.name, self._kinds, self.options, settings)
        values, options = assigned(self.name, self.hypers, self.options, settings)
        base = optimizer.rule
        for name in self.hypers:
            if name in base.hypers:
                raise ValueError(f"{base.name} has a hyper named {name!r} already; use {self.name} once")
        for name in self.borrowed:
            if name not in base.hypers:
                raise TypeError(f"{self.name} needs an optimizer with a hyper {name!r}; {base.name} has {', '.join(base.hypers) or 'none'}")
        if self.measure is not None and base.measures:
            raise ValueError(f"{base.name} needs a total over all tensors, and {self.name} too: one chain can have one")
        return Optimizer(Combined(self, options, base), {**optimizer.settings, **values}, optimizer.maximize)

    def __repr__(self) -> str:
        return f"<combinator {self.name}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return registry.get, (self.name,)


class Combined(Rule):
    """A rule with a combinator around it. Its state is the combinator's own, and the rule's (`base`)."""

    def __init__(self, combinator: Combinator, options: Mapping[str, Any], base: Rule) -> None:
        self.combinator, self.options, self.base = combinator, options, base
        self.name = f"{combinator.name}({base.name})"
        self.hypers = {**base.hypers, **combinator.hypers}
        self.flat = base.flat
        self.measures = combinator.name if combinator.measure is not None else base.measures
        self._hypers_taken = [*combinator.hypers, *combinator.borrowed]
        self._options_taken = chosen(options, combinator.function)
        own = combinator.coupling
        found = own(**chosen(options, own)) if callable(own) else own
        if found not in get_args(Coupling):
            raise ValueError(f"{combinator.name}: coupling={found!r} must be one of {', '.join(map(repr, get_args(Coupling)))}")
        self.coupling = max(base.coupling, found, key=get_args(Coupling).index)

    @property
    def signature(self) -> Hashable:
        return self.combinator, self.base.signature, *self._options_taken.items()

    def init(self, param: Tensor, settings: Mapping[str, float | Learn]) -> State:
        initial = self.combinator.initial
        own = initial(param, **chosen({**settings, **self.options}, initial)) if initial else {}
        return {"base": self.base.init(param, settings), **own}

    def measure(self, param: Tensor, grad: Tensor, state: State, hypers: Mapping[str, Tensor]) -> Tensor:
        if self.combinator.measure is not None:
            return self.combinator.measure(grad)
        found: list[Tensor] = []

        def look(param: Tensor, grad: Tensor) -> Tensor:
            found.append(self.base.measure(param, grad, state["base"], self._base_hypers(hypers)))
            return param

        self._run(look, param, grad, state, hypers, None)
        return found[0]

    def update(
        self, param: Tensor, grad: Tensor, state: State, hypers: Mapping[str, Tensor], total: Tensor | None = None
    ) -> tuple[Tensor, State]:
        stepped: list[State] = []

        def step(param: Tensor, grad: Tensor) -> Tensor:
            new, base_state = self.base.update(param, grad, state["base"], self._base_hypers(hypers), total)
            stepped.append(base_state)
            return new

        new, own = self._run(step, param, grad, state, hypers, total)
        if len(stepped) != 1:
            raise RuntimeError(f"{self.combinator.name} called its step {len(stepped)} times; it must call it once")
        return new, {"base": stepped[0], **own}

    def _base_hypers(self, hypers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: hypers[name] for name in self.base.hypers}

    def _run(
        self, step: Step, param: Tensor, grad: Tensor, state: State, hypers: Mapping[str, Tensor], total: Tensor | None
    ) -> tuple[Tensor, State]:
        given: dict[str, Any] = {name: hypers[name] for name in self._hypers_taken}
        if self.combinator.measure is not None:
            given["total"] = total
        own = {key: leaf for key, leaf in state.items() if key != "base"}
        found = self.combinator.function(param, grad, own, step, **given, **self._options_taken)
        return checked_pair(self.combinator.name, found)


def combinator(
    init: Callable[..., State] | None = None,
    /,
    *,
    coupling: Coupling | Callable[..., Coupling] = "tensor",
    measure: Callable[[Tensor], Tensor] | None = None,
    check_with: Mapping[str, Any] | None = None,
    **hypers: Hyper,
) -> Callable[[Callable[..., tuple[Tensor, State]]], Combinator]:
    """Make a combinator of a function, and register it under the function's name.

    The function is `update(param, grad, state, step, *, <hypers>, <options>) -> (param, state)`, where `step(param, grad)` is the step
    of the optimizer inside, to be called once. What it does to the gradient before, or to the new parameter after, is the combinator.
    As in `rule`, keyword-only parameters are the declared hypers, which arrive as tensors, and options, which have defaults. One that is
    neither is a hyper of the optimizer inside, such as its `lr`.

    Args:
        init: `init(param, *, ...) -> state`, as in `rule`.
        coupling: the finest part of a tensor that the function treats on its own, or a function from options to it.
        measure: from a tensor's gradient to what it adds to a total over all tensors, shape (). The function gets the sum as `total`.
        check_with: as in `register`.
        **hypers: the hyper-parameters, by name.

    Raises:
        TypeError: declared hypers and the function's parameters do not match, or a hyper has no domain.
        ValueError: another definition has that name, or `coupling` is unknown.

    Example:
        >>> import hyperopt_nested as hn
        >>> @hn.combinator(coupling="element", damping=hn.Positive(1.0))
        ... def damped(param, grad, state, step, *, damping):
        ...     return param + (step(param, grad) - param) / (1 + damping), state
        >>> damped(hn.sgd(lr=0.1), damping=0.5).declared["damping"]
        0.5
    """
    check_definition("combinator", init, coupling, get_args(Coupling), hypers)

    def decorate(function: Callable[..., tuple[Tensor, State]]) -> Combinator:
        options, undeclared = declared_options(function, init, hypers)
        if ("total" in undeclared) != (measure is not None):
            raise TypeError(f"{function.__name__}: `measure=` and the parameter `total` need each other; give both or neither")
        borrowed = tuple(name for name in undeclared if name != "total")
        made = Combinator(function.__name__, function, init, dict(hypers), coupling, options, borrowed, measure)
        functools.update_wrapper(made, function)
        return registry.register(function.__name__, made, check_with)

    return decorate
