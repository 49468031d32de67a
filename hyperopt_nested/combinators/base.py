"""Combinators: an optimizer in, an optimizer that does more, with more hypers, out.

A combinator is written like a rule, as one function; it is given the step of the optimizer that it is put around.
"""

import functools
import inspect
from collections.abc import Callable, Hashable, Mapping
from typing import Any, get_args, overload

import torch
from torch import Tensor

from hyperopt_nested import registry
from hyperopt_nested.checks import not_an_optimizer
from hyperopt_nested.rule import Learn, Optimizer, Rule
from hyperopt_nested.signatures import Definition, Function, Init, Separable, check_init, check_reduced, check_separable, is_update
from hyperopt_nested.trees import State

Step = Callable[[Tensor, Tensor], Tensor]
"""One step of the optimizer inside: from a parameter and a gradient to the new parameter. Its state is kept for it."""

Reduce = Callable[[Tensor], Tensor]
Maxima = Callable[[Mapping[str, Any]], tuple[str, ...] | None]
Sums = Callable[..., Tensor]


class Combinator(Definition):
    """A combinator made from a function by `combinator`. Call it with an optimizer, and hypers and options, to get an `Optimizer`."""

    before = (inspect.Parameter("optimizer", inspect.Parameter.POSITIONAL_ONLY, annotation=Optimizer),)
    types = float | Tensor | Learn, Optimizer

    def __init__(
        self,
        function: Function,
        initial: Init | None,
        separable: Separable | Callable[[Mapping[str, Any]], Separable],
        global_reduce: Reduce | None = None,
        maxima: Maxima | None = None,
        sums: Sums | None = None,
    ) -> None:
        super().__init__(function, initial)
        self.separable, self.global_reduce, self.maxima, self.sums = separable, global_reduce, maxima, sums
        check_reduced(self, global_reduce)
        self.borrowed = tuple(name for name in self.free if name not in ("reduced", "sums"))

    def __call__(self, optimizer: Optimizer, /, *args: Any, **settings: Any) -> Optimizer:
        """Put the combinator around an optimizer. Its first hyper may be given by position.

        Raises:
            TypeError: `optimizer` is no optimizer of this library, lacks a hyper that the combinator needs, or an argument is unknown.
            ValueError: it has a hyper of the same name already, or both need a sum over all tensors.
        """
        if not isinstance(optimizer, Optimizer):
            raise not_an_optimizer("optimizer", optimizer)
        values, options = self.assigned(args, settings)
        base = optimizer.rule
        for name in self.hypers:
            if name in base.hypers:
                raise ValueError(f"{base.name} has a hyper named {name!r} already; use {self.name} once")
        for name in self.borrowed:
            if name not in base.hypers:
                raise TypeError(f"{self.name} needs an optimizer with a hyper {name!r}; {base.name} has {', '.join(base.hypers) or 'none'}")
        if self.global_reduce is not None and base.reduction:
            raise ValueError(f"{base.name} needs a sum over all tensors, and {self.name} too: one chain can have one")
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
        self.nondifferentiable = base.nondifferentiable
        self.reduction = combinator.name if combinator.global_reduce is not None else base.reduction
        own = combinator.separable(options) if callable(combinator.separable) else combinator.separable
        check_separable(combinator.name, own)
        self.separable = max(base.separable, own, key=get_args(Separable).index)
        maxima = () if combinator.maxima is None else combinator.maxima(options)
        if maxima is None or base.maxima is None:
            self.maxima = None
        else:
            self.maxima = (*((key,) for key in maxima), *(("base", *path) for path in base.maxima))
        if combinator.sums is None:
            self.has_sums = base.has_sums and own == "element"
        else:
            self.has_sums = base.separable == "element"

    @property
    def signature(self) -> Hashable:
        return self.combinator, self.base.signature, *self.combinator.taken(self.options).items()

    @functools.cached_property
    def late(self) -> frozenset[str]:
        """Those of the rule inside, if the combinator changes gradients alone: the parameter passes it as it is, tried on a small one."""
        param, new = torch.ones(2, 2), torch.ones(2, 2)
        before: list[Tensor] = []

        def step(param: Tensor, grad: Tensor) -> Tensor:  # noqa: ARG001
            before.append(param)
            return new

        hypers = {name: param.new_tensor(hyper.default) for name, hyper in self.hypers.items()}
        try:
            own = self.combinator.start(param, {**{name: hyper.default for name, hyper in self.hypers.items()}, **self.options})
            after, _ = self._run(step, param, torch.ones(2, 2), own, hypers, param.sum())
        except ValueError:  # an option that `init` refuses, or that does not fit this shape
            return frozenset()
        passes = after is new and [each is param for each in before] == [True]
        return self.base.late.difference(self.combinator.borrowed) if passes else frozenset()

    def finish(self, param: Tensor, state: State, hypers: Mapping[str, Tensor]) -> Tensor:
        return self.base.finish(param, state["base"], self._base_hypers(hypers))

    def init(self, param: Tensor, settings: Mapping[str, float | Learn]) -> State:
        return {"base": self.base.init(param, settings), **self.combinator.start(param, {**settings, **self.options})}

    def global_reduce(self, param: Tensor, grad: Tensor, state: State, hypers: Mapping[str, Tensor]) -> Tensor:
        if self.combinator.global_reduce is not None:
            return self.combinator.global_reduce(grad)
        parts: list[Tensor] = []

        def look(param: Tensor, grad: Tensor) -> Tensor:
            parts.append(self.base.global_reduce(param, grad, state["base"], self._base_hypers(hypers)))
            return param

        self._run(look, param, grad, state, hypers, None)
        return parts[0]

    def sums(self, param: Tensor, grad: Tensor, state: State, hypers: Mapping[str, Tensor], reduced: Tensor | None = None) -> Tensor:
        found: list[Tensor] = []

        def look(param: Tensor, grad: Tensor) -> Tensor:
            inside = param, grad, state["base"], self._base_hypers(hypers), reduced
            if self.combinator.sums is None:
                found.append(self.base.sums(*inside))
                return param
            new, _ = self.base.update(*inside)
            found.append(self.combinator.sums(new, state, self.options))
            return new

        self._run(look, param, grad, state, hypers, reduced)
        return found[0]

    def update(
        self,
        param: Tensor,
        grad: Tensor,
        state: State,
        hypers: Mapping[str, Tensor],
        reduced: Tensor | None = None,
        sums: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        states: list[State] = []
        own_sums, base_sums = (sums, None) if self.combinator.sums is not None else (None, sums)

        def step(param: Tensor, grad: Tensor) -> Tensor:
            new, base_state = self.base.update(param, grad, state["base"], self._base_hypers(hypers), reduced, base_sums)
            states.append(base_state)
            return new

        new, own = self._run(step, param, grad, state, hypers, reduced, own_sums)
        if len(states) != 1:
            raise RuntimeError(f"{self.combinator.name} called its step {len(states)} times; it must call it once")
        return new, {"base": states[0], **own}

    def _base_hypers(self, hypers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: hypers[name] for name in self.base.hypers}

    def _run(
        self,
        step: Step,
        param: Tensor,
        grad: Tensor,
        state: State,
        hypers: Mapping[str, Tensor],
        reduced: Tensor | None,
        sums: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        own = {key: leaf for key, leaf in state.items() if key != "base"}
        values: dict[str, Any] = {name: hypers[name] for name in [*self.combinator.hypers, *self.combinator.borrowed]}
        if self.combinator.global_reduce is not None:
            values["reduced"] = reduced
        if self.combinator.sums is not None:
            values["sums"] = sums
        return self.combinator.call(param, grad, own, step, options=self.options, **values)


@overload
def combinator(update: Function, /) -> Combinator: ...


@overload
def combinator(
    init: Init | None = None,
    /,
    *,
    separable: Separable | Callable[[Mapping[str, Any]], Separable] = "tensor",
    global_reduce: Reduce | None = None,
    maxima: Maxima | None = None,
    sums: Sums | None = None,
    check_with: Mapping[str, Any] | None = None,
) -> Callable[[Function], Combinator]: ...


def combinator(
    init: Any = None,
    /,
    *,
    separable: Separable | Callable[[Mapping[str, Any]], Separable] = "tensor",
    global_reduce: Reduce | None = None,
    maxima: Maxima | None = None,
    sums: Sums | None = None,
    check_with: Mapping[str, Any] | None = None,
) -> Any:
    """Make a combinator of a function, and register it under the function's name.

    The function is `update(param, grad, state, step, *, <hypers>, <options>) -> (param, state)`, where `step(param, grad)` is the step
    of the optimizer inside, to be called once. What it does to the gradient before, or to the new parameter after, is the combinator.
    Keyword-only parameters are hypers and options, as in `rule`. One without a default is a hyper of the optimizer inside, such as `lr`.

    Args:
        init: `init(param, *, ...) -> state`, as in `rule`.
        separable: the finest part of a tensor that the function treats on its own, or a function from the options to it.
        global_reduce: from a tensor's gradient to what it adds to a sum over all tensors, shape (). The function gets the sum as
            `reduced`.
        maxima: from the options to the names of single numbers in the state that are maxima over the tensor: of shards that are stepped
            apart, the largest counts. Or to None, where the function, or `init`, needs more of a tensor than `separable` says.
        sums: `sums(param, state, options)`, from what the optimizer inside has made of a tensor to all that the function needs of the whole
            tensor, or of whole rows, as sums: of shards, these add up. The function gets the sums as `sums`; None: it has the whole tensor.
        check_with: as in `register`.

    Returns:
        The combinator, or a decorator that makes it.

    Raises:
        TypeError: a hyper is not keyword-only, `init` is no function, or `global_reduce` and `reduced` are not given together.
        ValueError: another definition has that name, or `separable` is unknown.

    Example:
        >>> import hyperopt_nested as hn
        >>> @hn.combinator(separable="element")
        ... def damped(param, grad, state, step, *, damping=hn.Positive(1.0)):
        ...     return param + (step(param, grad) - param) / (1 + damping), state
        >>> damped(hn.sgd(0.1), 0.5).declared["damping"]
        0.5
    """
    if is_update(init, 4):
        return combinator()(init)
    check_init(init)
    if not callable(separable):
        check_separable("combinator", separable)

    def decorate(function: Function) -> Combinator:
        return registry.register(function.__name__, Combinator(function, init, separable, global_reduce, maxima, sums), check_with)

    return decorate
