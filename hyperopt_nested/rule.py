"""Rules: what one update does to one tensor; optimizers: a rule with values for its hyper-parameters, some of them learned.

A rule is pure mathematics: `init(param) -> state` and `update(param, grad, state, hypers) -> (param, state)`. Its hyper-parameters
are declared with their domains, never guessed from the types of values. An `Optimizer` is data: it says which rule, with which
values; `Nested` runs it.
"""

import functools
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast, overload

from torch import Tensor

from hyperopt_nested import registry
from hyperopt_nested.checks import check_flag, check_number, checked_bounds, not_an_optimizer
from hyperopt_nested.domains import Bijection, Hyper, bijection
from hyperopt_nested.recipes import EPS, recipe
from hyperopt_nested.signatures import (
    Definition,
    Function,
    Init,
    Separable,
    check_init,
    check_reduced,
    check_separable,
    is_update,
    keywords_of,
)
from hyperopt_nested.trees import State

Per = Literal["model", "tensor", "row", "element"]
"""How many values a learned hyper has: one for all tensors, one a tensor, one a row (a tensor with fewer than two dimensions is
one row), or one an element."""

Bound = float | Callable[[State], Tensor]
"""A bound of a learned value: a number, or a function from the rule's new state to a tensor that broadcasts against the value."""


class Rule(ABC):
    """One update of one tensor. Users make rules with `rule`; combinators derive from this class.

    Attributes:
        name: the rule's name.
        hypers: its hyper-parameters, by name.
        separable: the finest part of a tensor that the update treats on its own.
        nondifferentiable: hypers that cannot be learned: the new parameter's derivative with respect to them is zero wherever it exists.
        reduction: name of the sum over all tensors of what `global_reduce` returns for each, if `update` needs one.
        maxima: where the state has single numbers that are maxima over the tensor: of parts that are stepped apart, as shards are, the
            largest counts. None: the tensor cannot be stepped in parts, not even such as `separable` allows.
        has_sums: whether all that `update` needs of a whole tensor, or of whole rows, is what `sums` adds up.
    """

    name: str
    hypers: Mapping[str, Hyper]
    separable: Separable
    nondifferentiable: frozenset[str] = frozenset()
    reduction: str = ""
    maxima: tuple[tuple[str, ...], ...] | None = ()
    has_sums: bool = False

    @property
    def late(self) -> frozenset[str]:
        """Hypers that act in `finish` alone; none where there is no such split."""
        return frozenset()

    @property
    def signature(self) -> Hashable:
        """What is equal for rules whose updates are the same functions."""
        return self

    @functools.cached_property
    def loss_names(self) -> tuple[str, ...]:
        """The names under which the update reads the loss of the step."""
        return tuple(name for name, hyper in self.hypers.items() if hyper.is_loss)

    @abstractmethod
    def init(self, param: Tensor, settings: "Mapping[str, float | Learn]") -> State:
        """State before the first update of `param`; `settings` are the declared values of the hypers."""

    def global_reduce(self, param: Tensor, grad: Tensor, state: State, hypers: Mapping[str, Tensor]) -> Tensor:
        """What this tensor adds to the sum that `update` needs: only where `reduction` names it. Arguments as of `update`.

        Returns:
            Numbers, each of which is summed: shape (), or (n,), the same for every tensor.
        """
        raise NotImplementedError(f"{self.name} reduces nothing")

    def sums(self, param: Tensor, grad: Tensor, state: State, hypers: Mapping[str, Tensor], reduced: Tensor | None = None) -> Tensor:
        """What a part of a tensor adds to the sums over the tensor, or its rows, that `update` needs: where `has_sums`."""
        raise NotImplementedError(f"{self.name} sums nothing up")

    def finish(self, param: Tensor, state: State, hypers: Mapping[str, Tensor]) -> Tensor:
        """New parameter, of the old one and the *new* state: only where `late` names hypers. Arguments as of `update`."""
        raise NotImplementedError(f"{self.name} has no finish")

    @abstractmethod
    def update(
        self,
        param: Tensor,
        grad: Tensor,
        state: State,
        hypers: Mapping[str, Tensor],
        reduced: Tensor | None = None,
        sums: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """New parameter and state. Pure: inputs stay untouched, and the state keeps its structure.

        Args:
            param: any shape, in `state_dtype(param)`.
            grad: as `param`.
            state: as `init` or the last update made it.
            hypers: the value of each hyper, a tensor that broadcasts against `param`.
            reduced: the sum of `global_reduce` over all tensors that are stepped together and whose rules have the same `reduction`.
            sums: of a part of a tensor, those of `sums` over all parts; None: this is the whole tensor.
        """


@dataclass(frozen=True, eq=False)
class Learn:
    """A hyper-parameter that is learned; made by `learn`, which documents the fields.

    Until an `Optimizer` has it, `value` and `by` are None where `learn` was not given them; the optimizer holds a completed one.

    Attributes:
        origin: the one that was completed to this; None if nothing was missing.
    """

    value: float
    by: "Optimizer"
    per: Per = "model"
    grad: Callable[[Tensor], Tensor] | None = None
    bounds: tuple[Bound, Bound] = (-math.inf, math.inf)
    via: Bijection | Literal["projection"] | None = None
    scheduled_by: str | None = None
    delayed: bool | None = None
    origin: "Learn | None" = None
    _variants: dict[Hashable, "Learn"] = field(default_factory=dict, init=False)

    def __repr__(self) -> str:
        given = [repr(self.value)] if self.has_value else []
        given += [] if self.by_default else [f"by={self.by!r}"]
        given += [] if self.per == "model" else [f"per={self.per!r}"]
        declared = (self.origin or self).delayed
        return f"learn({', '.join([*given, *([] if declared is None else [f'delayed={declared}'])])})"

    @property
    def key(self) -> int:
        """What is equal for all that one `learn(...)` object was completed to: one hyper is learned."""
        return id(self.origin or self)

    @property
    def has_value(self) -> bool:
        """Whether the start is known."""
        return cast(float | None, self.value) is not None

    @property
    def by_default(self) -> bool:
        """Whether the learner is the default one."""
        return cast(Optimizer | None, (self.origin or self).by) is None

    @property
    def bounds_by_default(self) -> bool:
        """Whether the bounds are those of the default recipe."""
        return self.origin is not None and self.bounds != self.origin.bounds

    def starting(self, value: float | Tensor) -> "Learn":
        """The same with this start, unless it has one."""
        start = float(value) if isinstance(value, Tensor) else value
        return self if self.has_value else self._variant(start, value=start, bounds=checked_bounds(start, self.bounds))

    def completed(self, hyper: Hyper) -> "Learn":
        """The same with what is missing: the start is the hyper's default; the learner, its coordinates and bounds are the recipe's."""
        if not self.has_value:
            return self.starting(hyper.default).completed(hyper)
        if cast(Optimizer | None, self.by) is not None:
            return self
        how, delayed = recipe(hyper, self.value, self.via), self.delayed is not False
        bounds = self.bounds if self.bounds != (-math.inf, math.inf) else how.bounds
        by: Optimizer = registry.get("coherent_adam")(lr=how.rate, eps=EPS)
        return self._variant(hyper, by=by, via=how.via, bounds=bounds, delayed=delayed)

    def learned_by(self, made_of: Hashable, make: "Callable[[Optimizer], Optimizer]") -> "Learn":
        """The same with another learner, made of this one's; `made_of` is equal where that does the same."""
        return self._variant(made_of, by=make(self.by))

    def _variant(self, which: Hashable, **changes: Any) -> "Learn":
        """The same with changes: always the same object for one `which`."""
        if which not in self._variants:
            self._variants[which] = replace(self, **changes, origin=self.origin or self)
        return self._variants[which]


@dataclass(frozen=True, eq=False)
class Optimizer:
    """A rule with a value, or a `Learn`, for each of its hyper-parameters. Made by calling a rule.

    Attributes:
        rule: the rule.
        settings: the value or `Learn` of each hyper, by name.
        maximize: whether gradients are ascended.

    Raises:
        TypeError: a setting is no number and no `Learn`, or the rule has no hyper of that name.
        ValueError: a value is outside its domain, or the loss is to be learned.
    """

    rule: Rule
    settings: "Mapping[str, float | Learn]"
    maximize: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.rule, Rule):
            raise TypeError(f"rule={self.rule!r} ({type(self.rule).__name__}) must be a rule, such as hn.get('sgd')")
        check_flag(f"{self.rule.name}: maximize", self.maximize)
        for name in self.rule.hypers:
            if name not in self.settings:
                raise TypeError(f"{self.rule.name}: settings have no value for the hyper {name!r}")
        for name in self.settings:
            if name not in self.rule.hypers:
                raise TypeError(f"{self.rule.name} has no hyper {name!r}; it has {', '.join(self.rule.hypers) or 'none'}")
        settings = {
            name: setting.completed(self.rule.hypers[name]) if isinstance(setting, Learn) else setting
            for name, setting in self.settings.items()
        }
        object.__setattr__(self, "settings", settings)
        owner: dict[int, str] = {}
        for name, setting in settings.items():
            if not isinstance(setting, Learn):
                self.rule.hypers[name].check(f"{self.rule.name}: {name}", setting)
                continue
            if self.rule.hypers[name].is_loss:
                raise ValueError(f"{self.rule.name}: {name} is the loss of each step, which cannot be learned")
            if setting.scheduled_by not in (None, *self.rule.hypers):
                raise ValueError(
                    f"{self.rule.name}: {name} is learned with scheduled_by={setting.scheduled_by!r}, which is no hyper; hypers are: "
                    f"{', '.join(self.rule.hypers)}"
                )
            self.rule.hypers[name].check(f"{self.rule.name}: {name}", setting.value, self.via(name))
            other = owner.setdefault(setting.key, name)
            if other != name:
                raise ValueError(f"{self.rule.name}: {other} and {name} are one learn(...) object: give each a learn(...) of its own")

    def __repr__(self) -> str:
        return f"{self.rule.name}({', '.join(f'{name}={setting!r}' for name, setting in self.settings.items())})"

    @functools.cached_property
    def learned(self) -> dict[str, Learn]:
        """The learned hypers, by name."""
        return {name: setting for name, setting in self.settings.items() if isinstance(setting, Learn)}

    @functools.cached_property
    def declared(self) -> dict[str, float]:
        """The declared value of each hyper: of a learned one, its start."""
        return {name: setting.value if isinstance(setting, Learn) else setting for name, setting in self.settings.items()}

    @property
    def signature(self) -> Hashable:
        """What is equal for optimizers that do the same to tensors and states of the same form, and share all learned hypers."""
        return self.rule.signature, self.maximize, *self.settings.items()

    def via(self, name: str) -> Bijection | None:
        """The bijection in whose coordinates the hyper `name` is learned; None if it is kept in its domain by projection."""
        setting = self.settings[name]
        via = setting.via if isinstance(setting, Learn) and setting.via is not None else self.rule.hypers[name].via
        return via if isinstance(setting, Learn) and isinstance(via, Bijection) else None

    def replace(self, **settings: "float | Tensor | Learn") -> "Optimizer":
        """The same optimizer with other settings; a `learn` without a start starts at the value in whose place it stands."""
        new = {
            key: each.starting(self.declared[key]) if isinstance(each, Learn) and key in self.settings else each
            for key, each in settings.items()
        }
        return Optimizer(self.rule, {**self.settings, **cast(dict[str, Any], new)}, self.maximize)


def learn(
    value: float | None = None,
    by: Optimizer | None = None,
    *,
    per: Per = "model",
    grad: Callable[[Tensor], Tensor] | None = None,
    bounds: tuple[Bound | None, Bound | None] = (None, None),
    via: str | Bijection | None = None,
    scheduled_by: str | None = None,
    delayed: bool | None = None,
) -> Learn:
    """Mark a hyper-parameter as learned, in the place of its value.

    With a start alone, `learn(1e-3)`, or with nothing, `learn()`, the default recipe of the hyper's domain learns it: `coherent_adam`, in
    the logarithm of a rate and the logit of a decay rate. It has one constant for all rules, and no unit. An `lr` whose start is above the
    rule's default begins at a tenth of it, but not below that default: it rises fast, and one that is too high would damage the model.

    Wherever one and the same `learn(...)` object is used (several tensors, several parameter groups), one hyper is learned; these must
    be hypers of one name and domain.

    Args:
        value: the start value, in the hyper's domain; by default the default of the rule, or of the class in `hn.optim`.
        by: the optimizer that learns it; its own hypers may be learned too (a tower). By default `coherent_adam`, at the
            recipe's rate.
        per: one value per "model", "tensor", "row" (index of dim 0) or "element".
        grad: a transform of the hypergradient before the learner sees it, tensor to tensor of the same shape.
        bounds: further bounds of the value, `(low, high)`; None is no bound. Numbers apply whenever it was learned; a function from the
            rule's new state to a bound applies after every update, where it is finite. Without `by`, and without bounds, those of the
            recipe: a factor of 10,000 below and above the start.
        via: the bijection in whose coordinates it is learned: "log", "softplus", "logit" or a `Bijection`; "projection" for none; by
            default what the rule declares or, without `by`, the recipe.
        scheduled_by: a hyper of the same optimizer, such as "lr": the learner's rate, its `lr`, is multiplied by what a schedule has made
            of the declared value of that hyper, over this. Not with `per="model"`, since tensors may have several schedules.
        delayed: whether a step moves the tensors first, with the value as it was, and what the new gradient says of it counts from
            the next step on. A step whose shared values are all delayed passes over memory once, not twice. None: with `by`, not
            delayed; without, delayed, as the recipe is.

    Returns:
        A mark that stands in the place of the value.

    Raises:
        TypeError: `value` is no number, `by` is not an optimizer of this library, `grad` is no function, or `bounds` are no pair.
        ValueError: `value` is not finite or outside fixed `bounds`, these are out of order, `per` or `via` is unknown, or `scheduled_by`
            is given for a value that all tensors share, or where the learner has no `lr`.

    Example:
        >>> import hyperopt_nested as hn
        >>> hn.sgd(lr=hn.learn(0.1), momentum=hn.learn()).declared["momentum"]
        0.0
        >>> hn.adagrad(lr=hn.learn(0.1, by=hn.coin_betting())).learned["lr"]
        learn(0.1, by=coin_betting(eps=1e-08))
    """
    if by is not None and not isinstance(by, Optimizer):
        raise not_an_optimizer("by", by)
    if value is not None:
        check_number("learn: value", value)
    if per not in ("model", "tensor", "row", "element"):
        raise ValueError(f"per={per!r} must be 'model', 'tensor', 'row' or 'element'")
    if grad is not None and not callable(grad):
        raise TypeError(f"grad={grad!r} ({type(grad).__name__}) must be a function from a hypergradient to one of the same shape, or None")
    coordinates: Any = via if via == "projection" else bijection("learn", via)
    if delayed is not None:
        check_flag("learn: delayed", delayed)
    if scheduled_by is not None and (per == "model" or (by is not None and "lr" not in by.settings)):
        why = "all tensors share the value, and may have several schedules" if per == "model" else f"{by!r} has no lr to multiply"
        raise ValueError(f"scheduled_by={scheduled_by!r} cannot be used: {why}")
    return Learn(cast(float, value), cast(Optimizer, by), per, grad, checked_bounds(value, bounds), coordinates, scheduled_by, delayed)


class FunctionRule(Definition, Rule):
    """A rule made from a function by `rule`. Call it with hypers and options to get an `Optimizer`."""

    after = (inspect.Parameter("maximize", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=bool),)
    types = float | Tensor | Learn, Optimizer

    def __init__(
        self,
        function: Function,
        initial: Init | None,
        separable: Separable,
        nondifferentiable: tuple[str, ...] = (),
        global_reduce: Callable[..., Tensor] | None = None,
    ) -> None:
        super().__init__(function, initial)
        check_reduced(self, global_reduce)
        if free := [name for name in self.free if name != "reduced"]:
            raise TypeError(
                f"{self.name}: parameter {free[0]!r} has no default: declare its domain, such as {free[0]}=hn.Positive(1e-3), or "
                "give an option its value"
            )
        self._global_reduce, self._reduced_from = global_reduce, keywords_of(global_reduce)
        if odd := [name for name in self._reduced_from if name not in (*self.hypers, *self.options)]:
            raise TypeError(f"{self.name}: global_reduce takes {odd[0]!r}, which the update does not: add it there")
        self.reduction = self.name if global_reduce else ""
        if odd := [name for name in nondifferentiable if name not in self.hypers]:
            raise TypeError(f"nondifferentiable names {odd[0]!r}, which is no hyper; hypers are: {', '.join(self.hypers) or 'none'}")
        self.separable, self.nondifferentiable = separable, frozenset(nondifferentiable)
        self._late: frozenset[str] = frozenset()

    def init(self, param: Tensor, settings: Mapping[str, float | Learn]) -> State:
        return self.start(param, {**settings, **self.options})

    def update(
        self,
        param: Tensor,
        grad: Tensor,
        state: State,
        hypers: Mapping[str, Tensor],
        reduced: Tensor | None = None,
        sums: Tensor | None = None,  # noqa: ARG002
    ) -> tuple[Tensor, State]:
        total = {"reduced": reduced} if self.reduction else {}
        return self.call(param, grad, state, options=self.options, **hypers, **total)

    def global_reduce(self, param: Tensor, grad: Tensor, state: State, hypers: Mapping[str, Tensor]) -> Tensor:
        if self._global_reduce is None:
            return super().global_reduce(param, grad, state, hypers)
        values: dict[str, Any] = {**hypers, **self.options}
        return self._global_reduce(param, grad, state, **{name: values[name] for name in self._reduced_from})

    def finishes(self, finish: Callable[..., Tensor], late: tuple[str, ...]) -> None:
        """Declare the last part of the update, and the hypers that act in it alone. Internal."""
        self._finish, self._late = finish, frozenset(late)

    @property
    def late(self) -> frozenset[str]:
        return self._late

    def finish(self, param: Tensor, state: State, hypers: Mapping[str, Tensor]) -> Tensor:
        return self._finish(param, state, **hypers)

    @property
    def signature(self) -> Hashable:
        return self.function, *self.taken(self.options).items()

    def __call__(self, *args: Any, **settings: Any) -> Optimizer:
        """Make an optimizer with these hypers and options; the others keep their defaults.

        A hyper is a number, a tensor of one number, which may be changed in place, or `learn(...)`.
        The first hyper may be given by position. Where there are beta1, beta2 and so on, `betas=(...)` gives them all, as in torch.optim.
        """
        maximize = settings.pop("maximize", False)
        values, options = self.assigned(args, settings)
        rule = object.__new__(type(self))  # a copy would be made by the registry
        vars(rule).update({**vars(self), "options": options})
        return Optimizer(rule, values, maximize)

    def __repr__(self) -> str:
        return f"<rule {self.name}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self.name, dict(self.options))


def _restore(name: str, options: dict[str, Any]) -> Rule:
    return cast(FunctionRule, registry.get(name))(**options).rule


@overload
def rule(update: Function, /) -> FunctionRule: ...


@overload
def rule(
    init: Init | None = None,
    /,
    *,
    separable: Separable = "tensor",
    nondifferentiable: tuple[str, ...] = (),
    global_reduce: Callable[..., Tensor] | None = None,
) -> Callable[[Function], FunctionRule]: ...


def rule(
    init: Any = None,
    /,
    *,
    separable: Separable = "tensor",
    nondifferentiable: tuple[str, ...] = (),
    global_reduce: Callable[..., Tensor] | None = None,
) -> Any:
    """Make a rule of a function, and register it under the function's name.

    The function is `update(param, grad, state, *, <hypers>, <options>) -> (param, state)`: pure, in torch operations. Its keyword-only
    parameters are hypers, whose defaults are domains (`lr=hn.Positive(1e-4)`) and which arrive as tensors, and options, which have other
    defaults, are fixed when the optimizer is made, and are never learned.

    Args:
        init: `init(param, *, ...) -> state`, the initial state. Its keyword-only parameters are hypers (it gets the declared value, or
            `Learn`) and options, the function's or further ones. None: a rule without state. See also `hn.rules.zeros`.
        separable: the finest part of a tensor that the update treats on its own. "tensor" is always right; "element" or "row",
            where true, lets hypers of that granularity be learned with less memory.
        nondifferentiable: hypers that act only through functions like `sign`, whose derivative is zero wherever it exists: learning them
            is refused.
        global_reduce: `global_reduce(param, grad, state, *, ...)`, from one tensor to what it adds to sums over all tensors: numbers of
            shape () or (n,), the same for every tensor. Its keyword-only parameters are hypers and options of the function, which gets
            the sums as `reduced`.

    Returns:
        The rule, or a decorator that makes it.

    Raises:
        TypeError: a parameter of the function has no default, a hyper is not keyword-only, `init` is no function, or `global_reduce` and
            `reduced` are not given together.
        ValueError: another rule has that name, or `separable` is unknown.

    Example:
        >>> import hyperopt_nested as hn
        >>> @hn.rule(hn.rules.zeros("average"), separable="element")
        ... def averaged(
        ...     param, grad, state, *, lr=hn.Positive(1e-4), beta=hn.UnitInterval(0.9)
        ... ):
        ...     average = beta * state["average"] + (1 - beta) * grad
        ...     return param - lr * average, {"average": average}
        >>> averaged(0.1)
        averaged(lr=0.1, beta=0.9)
    """
    if is_update(init, 3):
        return rule()(init)
    check_init(init)
    check_separable("rule", separable)

    def decorate(function: Function) -> FunctionRule:
        return registry.register(function.__name__, FunctionRule(function, init, separable, nondifferentiable, global_reduce))

    return decorate
