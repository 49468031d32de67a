"""Rules: what one update does to one tensor; optimizers: a rule with values for its hyper-parameters, some of them learned.

A rule is pure mathematics: `init(param) -> state` and `update(param, grad, state, hypers) -> (param, state)`. Its hyper-parameters
are declared with their domains, never guessed from the types of values. An `Optimizer` is data: it says which rule, with which
values; `Nested` runs it.
"""

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast, get_args

from torch import Tensor

from hyperopt_nested import registry
from hyperopt_nested.checks import (
    check_flag,
    check_number,
    check_options,
    checked_bounds,
    is_number,
    kinds_of,
    not_an_optimizer,
    with_betas,
)
from hyperopt_nested.domains import Bijection, Hyper, check_bijection
from hyperopt_nested.ops import number_dtype, zeros_like
from hyperopt_nested.signatures import assigned, check_definition, checked_pair, chosen, declared_options, keywords_of
from hyperopt_nested.trees import State

Coupling = Literal["element", "row", "tensor"]
"""The finest part of a tensor that an update treats on its own: each element, each row (index of dim 0), or the whole tensor."""

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
        coupling: the finest part of a tensor that the update treats on its own.
        flat: hypers that can not be learned: the new parameter's derivative with respect to them is zero wherever it exists.
        measures: name of the total over all tensors of what `measure` returns for each, if `update` needs one.
        late: hypers that act in `finish` alone; none where there is no such split.
    """

    name: str
    hypers: Mapping[str, Hyper]
    coupling: Coupling
    flat: frozenset[str] = frozenset()
    measures: str = ""
    late: frozenset[str] = frozenset()

    @property
    def signature(self) -> Hashable:
        """What is equal for rules whose updates are the same functions."""
        return self

    @abstractmethod
    def init(self, param: Tensor, settings: "Mapping[str, float | Learn]") -> State:
        """State before the first update of `param`; `settings` are the declared values of the hypers."""

    def measure(self, param: Tensor, grad: Tensor, state: State, hypers: Mapping[str, Tensor]) -> Tensor:
        """What this tensor adds to the total that `update` needs, shape (): only where `measures` names it. Arguments as of `update`."""
        raise NotImplementedError(f"{self.name} measures nothing")

    def finish(self, param: Tensor, state: State, hypers: Mapping[str, Tensor]) -> Tensor:
        """New parameter, of the old one and the *new* state: only where `late` names hypers. Arguments as of `update`."""
        raise NotImplementedError(f"{self.name} has no finish")

    @abstractmethod
    def update(
        self, param: Tensor, grad: Tensor, state: State, hypers: Mapping[str, Tensor], total: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """New parameter and state. Pure: inputs stay untouched, and the state keeps its structure.

        Args:
            param: any shape, in `state_dtype(param)`.
            grad: as `param`.
            state: as `init` or the last update made it.
            hypers: the value of each hyper, a tensor that broadcasts against `param`.
            total: the sum of `measure` over all tensors that are stepped together and whose rules have the same `measures`, shape ().
        """


@dataclass(frozen=True, eq=False)
class Learn:
    """A hyper-parameter that is learned; made by `learn`, which documents the fields."""

    value: float
    by: "Optimizer"
    per: Per = "model"
    grad: Callable[[Tensor], Tensor] | None = None
    bounds: tuple[Bound, Bound] = (-math.inf, math.inf)
    via: Bijection | Literal["projection"] | None = None

    def __repr__(self) -> str:
        per = "" if self.per == "model" else f", per={self.per!r}"
        return f"learn({self.value!r}, by={self.by!r}{per})"


@dataclass(frozen=True, eq=False)
class Optimizer:
    """A rule with a value, or a `Learn`, for each of its hyper-parameters. Made by calling a rule.

    Attributes:
        rule: the rule.
        settings: the value or `Learn` of each hyper, by name.
        maximize: whether gradients are ascended.

    Raises:
        TypeError: a setting is no number and no `Learn`, or the rule has no hyper of that name.
        ValueError: a value is outside its domain.
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
        owner: dict[int, str] = {}
        for name, setting in self.settings.items():
            if name not in self.rule.hypers:
                raise TypeError(f"{self.rule.name} has no hyper {name!r}; it has {', '.join(self.rule.hypers) or 'none'}")
            value = setting.value if isinstance(setting, Learn) else setting
            self.rule.hypers[name].check(f"{self.rule.name}: {name}", value, self.via(name))
            other = owner.setdefault(id(setting), name) if isinstance(setting, Learn) else name
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
        if not isinstance(setting, Learn) or via == "projection":
            return None
        return via

    def replace(self, **settings: "float | Learn") -> "Optimizer":
        """The same optimizer with other settings."""
        return Optimizer(self.rule, {**self.settings, **settings}, self.maximize)


def learn(
    value: float,
    *,
    by: Optimizer,
    per: Per = "model",
    grad: Callable[[Tensor], Tensor] | None = None,
    bounds: tuple[Bound | None, Bound | None] = (None, None),
    via: Bijection | Literal["projection"] | None = None,
) -> Learn:
    """Mark a hyper-parameter as learned, in the place of its value.

    Wherever one and the same `learn(...)` object is used (several tensors, several parameter groups), one hyper is learned; these must
    be hypers of one name and domain.

    Args:
        value: the start value, in the hyper's domain.
        by: the optimizer that learns it; its own hypers may be learned too (a tower).
        per: one value per "model", "tensor", "row" (index of dim 0) or "element".
        grad: a transform of the hypergradient before the learner sees it, tensor to tensor of the same shape.
        bounds: further bounds of the value, `(low, high)`; None is no bound. Numbers apply whenever it was learned; a function from the
            rule's new state to a bound applies after every update, where it is finite.
        via: the bijection in whose coordinates it is learned, "projection" for none; by default what the rule declares.

    Raises:
        TypeError: `value` is no number, `by` is not an optimizer of this library, `grad` is no function, or `bounds` are no pair.
        ValueError: `value` is not finite or outside fixed `bounds`, these are out of order, or `per` or `via` is unknown.

    Example:
        >>> import hyperopt_nested as hn
        >>> hn.sgd(lr=hn.learn(0.1, by=hn.sgd(lr=1e-3)))
        sgd(lr=learn(0.1, by=sgd(lr=0.001, momentum=0.0, dampening=0.0, weight_decay=0.0)), momentum=0.0, dampening=0.0, weight_decay=0.0)
    """
    if not isinstance(by, Optimizer):
        raise not_an_optimizer("by", by)
    check_number("learn: value", value)
    if per not in ("model", "tensor", "row", "element"):
        raise ValueError(f"per={per!r} must be 'model', 'tensor', 'row' or 'element'")
    if grad is not None and not callable(grad):
        raise TypeError(f"grad={grad!r} ({type(grad).__name__}) must be a function from a hypergradient to one of the same shape, or None")
    if via is not None and via != "projection":
        check_bijection("learn", via)
    return Learn(value, by, per, grad, checked_bounds(value, bounds), via)


@dataclass(eq=False, repr=False)
class FunctionRule(Rule):
    """A rule made from a function by `rule`. Call it with hypers and options to get an `Optimizer`."""

    name: str
    function: Callable[..., tuple[Tensor, State]]
    initial: Callable[..., State] | None
    hypers: Mapping[str, Hyper]
    coupling: Coupling
    options: Mapping[str, Any] = field(default_factory=dict)
    flat: frozenset[str] = frozenset()
    finishing: Callable[..., Tensor] | None = None
    late: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        self._update_options = chosen(self.options, self.function)
        self._finish_takes = frozenset(keywords_of(self.finishing))
        self._kinds = kinds_of(self.options, self.function, self.initial)

    def init(self, param: Tensor, settings: Mapping[str, float | Learn]) -> State:
        return self.initial(param, **chosen({**settings, **self.options}, self.initial)) if self.initial else {}

    def update(
        self,
        param: Tensor,
        grad: Tensor,
        state: State,
        hypers: Mapping[str, Tensor],
        total: Tensor | None = None,  # noqa: ARG002
    ) -> tuple[Tensor, State]:
        return checked_pair(self.name, self.function(param, grad, state, **hypers, **self._update_options))

    def finish(self, param: Tensor, state: State, hypers: Mapping[str, Tensor]) -> Tensor:
        if self.finishing is None:
            return super().finish(param, state, hypers)
        return self.finishing(param, state, **{name: value for name, value in hypers.items() if name in self._finish_takes})

    @property
    def signature(self) -> Hashable:
        return self.function, *self._update_options.items()

    def __call__(self, *given: Any, maximize: bool = False, **settings: Any) -> Optimizer:
        """An optimizer with these hypers (a number or `learn(...)` each) and options; the others keep their defaults.

        Where there are beta1, beta2 and so on, `betas=(...)` gives them all, as in torch.optim.
        """
        if given:
            first = next(iter([*self.hypers, *self.options]), "")
            by_name = (
                f"{self.name}({first}={given[0]!r})" if is_number(given[0]) or isinstance(given[0], Learn) else f"{self.name}({first}=...)"
            )
            raise TypeError(
                f"{self.name} takes its arguments by name, such as {by_name}; parameters go to HyperOptimizer(params, {self.name}(...))"
            )
        settings = with_betas(self.name, self.hypers, settings)
        values, options = assigned(self.name, self.hypers, self.options, settings, also=("maximize",))
        check_options(self.name, self._kinds, self.options, settings)
        return Optimizer(replace(self, options=options), values, maximize)

    def __repr__(self) -> str:
        return f"<rule {self.name}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self.name, dict(self.options))


def _restore(name: str, options: dict[str, Any]) -> Rule:
    return cast(FunctionRule, registry.get(name))(**options).rule


def rule(
    init: Callable[..., State] | None = None,
    /,
    *,
    coupling: Coupling = "tensor",
    flat: tuple[str, ...] = (),
    finish: Callable[..., Tensor] | None = None,
    late: tuple[str, ...] = (),
    **hypers: Hyper,
) -> Callable[[Callable[..., tuple[Tensor, State]]], FunctionRule]:
    """Make a rule of a function, and register it under the function's name.

    The function is `update(param, grad, state, *, <hypers>, <options>) -> (param, state)`: pure, in torch operations. Its
    keyword-only parameters are the declared hypers, which arrive as tensors, and options, which have defaults, are fixed when the
    optimizer is made, and are never learned.

    Args:
        init: `init(param, *, ...) -> state`. Its keyword-only parameters are hypers (it gets the declared value, or `Learn`) and
            options, the function's or further ones. None: a rule without state. See also `zeros`.
        coupling: the finest part of a tensor that the update treats on its own. "tensor" is always right; "element" or "row",
            where true, lets hypers of that granularity be learned with less memory.
        flat: hypers that act only through functions like `sign`, whose derivative is zero wherever it exists: learning them is refused.
        finish: `finish(param, state, *, <hypers>) -> param`: the last part of the update, which makes the new parameter of the old one and
            the *new* state; affine in each element of the parameter, by a factor that is not zero.
        late: hypers that act in `finish` alone: what they have done is worked out from what the update left, so that learning them takes
            no memory.
        **hypers: the hyper-parameters, by name: `lr=Positive(1e-4)`.

    Raises:
        TypeError: declared hypers and the function's parameters do not match, a hyper has no domain, or `late` names what `finish` does not
            take.
        ValueError: another rule has that name, or `coupling` is unknown.

    Example:
        >>> import hyperopt_nested as hn
        >>> @hn.rule(hn.zeros("average"), coupling="element", lr=hn.Positive(1e-4), beta=hn.UnitInterval(0.9))
        ... def averaged(param, grad, state, *, lr, beta):
        ...     average = beta * state["average"] + (1 - beta) * grad
        ...     return param - lr * average, {"average": average}
        >>> averaged(lr=0.1)
        averaged(lr=0.1, beta=0.9)
    """
    check_definition("rule", init, coupling, get_args(Coupling), hypers)
    if odd := [name for name in flat if name not in hypers]:
        raise TypeError(f"flat names {odd[0]!r}, which is no hyper; hypers are: {', '.join(hypers) or 'none'}")

    def decorate(function: Callable[..., tuple[Tensor, State]]) -> FunctionRule:
        name = function.__name__
        options, undeclared = declared_options(function, init, hypers)
        if undeclared:
            raise TypeError(
                f"{name}: parameter {undeclared[0]!r} is neither declared as a hyper nor an option with a default; "
                f"declare its domain, e.g. {undeclared[0]}=hn.Positive(1e-3)"
            )
        for each in late:
            if each not in hypers or each not in keywords_of(finish):
                raise TypeError(f"{name}: late names {each!r}, which must be a hyper, and a keyword-only parameter of finish")
        made = FunctionRule(name, function, init, dict(hypers), coupling, options, frozenset(flat), finish, frozenset(late))
        functools.update_wrapper(made, function)
        return registry.register(name, made)

    return decorate


def is_on(setting: float | Learn) -> bool:
    """Whether a hyper that switches a part of a rule on takes effect: it is learned, or not zero."""
    return isinstance(setting, Learn) or setting != 0


def accumulator(param: Tensor, *settings: float | Learn) -> Tensor:
    """Zeros for a part of the state that depends on these hypers alone: one number, unless one of them is learned per row or element.

    Args:
        param: the parameter.
        settings: what `init` is given for the hypers.

    Returns:
        A tensor of shape (), in float64 where the device has it; or of the parameter's shape, in `state_dtype(param)`.
    """
    many = any(isinstance(setting, Learn) and setting.per in ("row", "element") for setting in settings)
    return zeros_like(param) if many else param.new_zeros((), dtype=number_dtype(param.device))
