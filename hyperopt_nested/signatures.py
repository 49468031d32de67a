"""Definitions of rules and combinators, read from the signatures of functions; and checks of what these functions return."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, Self, cast, get_args

import torch
from torch import Tensor

from hyperopt_nested.checks import check_options, is_number, kinds_of, with_betas
from hyperopt_nested.domains import Hyper
from hyperopt_nested.trees import State

Separable = Literal["element", "row", "tensor"]
"""The finest part of a tensor that an update treats on its own: each element, each row (index of dim 0), or the whole tensor."""

Function = Callable[..., tuple[Tensor, State]]
Init = Callable[..., State]


class Definition:
    """A rule or a combinator, as its function's signature declares it: keyword-only parameters are hypers, or options.

    Attributes:
        name: the function's name.
        function: the update.
        initial: the initializer of the state, or None.
        hypers: parameters whose default is a domain, by name.
        options: parameters with another default, of the function or else of the initializer, with their values.
        free: names of the function's parameters without a default.
    """

    before: tuple[inspect.Parameter, ...] = ()  # parameters of a call
    after: tuple[inspect.Parameter, ...] = ()
    types: tuple[Any, Any] = (float, Any)  # of a hyper's value, and of what a call returns

    def __init__(self, function: Function, initial: Init | None) -> None:
        self.name, self.function, self.initial = function.__name__, function, initial
        own = _parameters(function)
        for each in own:
            if isinstance(each.default, Hyper) and each.kind is not each.KEYWORD_ONLY:
                raise TypeError(f"{self.name}: the hyper {each.name!r} must be keyword-only: put a `*` before it")
        keywords = {each.name: each for each in own if each.kind is each.KEYWORD_ONLY}
        self.hypers: Mapping[str, Hyper] = {key: each.default for key, each in keywords.items() if isinstance(each.default, Hyper)}
        self.free = tuple(key for key, each in keywords.items() if each.default is each.empty)
        more = {each.name: each for each in _parameters(initial) if each.kind is each.KEYWORD_ONLY and each.name not in keywords}
        annotated = {key: each for key, each in {**keywords, **more}.items() if key not in self.hypers and each.default is not each.empty}
        self.options: Mapping[str, Any] = {key: each.default for key, each in annotated.items()}
        if missing := [key for key, each in more.items() if each.default is each.empty]:
            raise TypeError(f"{self.name}: init takes {missing[0]!r}, which the update does not: add it there, or give it a default")
        self._kinds = kinds_of(self.options, function, initial)
        self._taken, self._started = set(keywords), set(keywords_of(initial))
        functools.update_wrapper(cast(Any, self), function)
        self.__signature__ = self._signature(annotated)

    def _signature(self, options: Mapping[str, inspect.Parameter]) -> inspect.Signature:
        """The signature of a call: each hyper with its number, the first one also by position; then options."""
        kinds = [inspect.Parameter.POSITIONAL_OR_KEYWORD, *[inspect.Parameter.KEYWORD_ONLY] * len(self.hypers)]
        value, result = self.types
        made = [
            inspect.Parameter(name, kind, default=hyper.default, annotation=value)
            for (name, hyper), kind in zip(self.hypers.items(), kinds, strict=False)
        ]
        made += [each.replace(kind=each.KEYWORD_ONLY) for each in options.values()]
        return inspect.Signature([*self.before, *made, *self.after], return_annotation=result)

    if torch.__version__ >= "2.12":  # older compilers take an attribute that has this for a property of its object's class

        def __get__(self, instance: object, owner: type | None = None) -> Self:
            """Itself: as an attribute of a class it is no method. `help` shows the signatures of what has this."""
            return self

    def assigned(self, positional: tuple[Any, ...], settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a call gives to each hyper and each option; the others have their defaults.

        Raises:
            TypeError: the call gives what is neither, or by position what has to be given by name.
        """
        first = next(iter(self.hypers), None)
        if positional:
            value = positional[0]
            if first is None or len(positional) > 1 or first in settings or not (is_number(value) or type(value).__name__ == "Learn"):
                raise self._misplaced(positional, first)
            settings = {first: value, **settings}
        settings = with_betas(self.name, self.hypers, settings)
        names = [*self.hypers, *self.options]
        if unknown := [key for key in settings if key not in names]:
            names += [each.name for each in self.after]
            raise TypeError(f"{self.name} has no argument {unknown[0]!r}; it has {', '.join(names) or 'none'}")
        check_options(self.name, self._kinds, self.options, settings)
        values = {key: settings.get(key, hyper.default) for key, hyper in self.hypers.items()}
        return values, {key: settings.get(key, default) for key, default in self.options.items()}

    def _misplaced(self, positional: tuple[Any, ...], first: str | None) -> TypeError:
        by_name = zip([*self.hypers, *self.options], positional, strict=False)
        call = [
            *(each.name for each in self.before),
            *(f"{name}={value!r}" if is_number(value) else f"{name}=..." for name, value in by_name),
        ]
        allowed = f"only {first} may be given by position" if first else "nothing may be given by position"
        params = "" if self.before else f"; parameters go to HyperOptimizer(params, {self.name}(...))"
        return TypeError(f"{self.name}: {allowed}: write {self.name}({', '.join(call)}){params}")

    def start(self, param: Tensor, values: Mapping[str, Any]) -> State:
        """The initial state, of the values of hypers and options."""
        return self.initial(param, **{key: value for key, value in values.items() if key in self._started}) if self.initial else {}

    def call(self, *args: Any, options: Mapping[str, Any], **hypers: Any) -> tuple[Tensor, State]:
        """The function's new parameter and new state.

        Raises:
            TypeError: it returned something else.
        """
        found: Any = self.function(*args, **hypers, **self.taken(options))
        if not isinstance(found, tuple) or len(found) != 2 or not isinstance(found[0], Tensor) or not isinstance(found[1], dict):
            shown = f"({', '.join(type(each).__name__ for each in found)})" if isinstance(found, tuple) else f"a {type(found).__name__}"
            raise TypeError(f"{self.name} returned {shown}; an update must return (param, state), a tensor and a dict of tensors")
        return found

    def taken(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the options that the function takes; the others are for the initializer alone."""
        return {key: value for key, value in options.items() if key in self._taken}


def check_init(init: Any) -> None:
    """Refuse an initializer that cannot be one.

    Raises:
        TypeError: it is no function.
    """
    if init is not None and not callable(init):
        remedy = f"such as hn.rules.zeros({init!r})" if isinstance(init, str) else "such as hn.rules.zeros('momentum'), or None"
        raise TypeError(f"init={init!r} ({type(init).__name__}) must be a function from a parameter to a state, {remedy}")


def check_reduced(definition: Definition, global_reduce: Callable[..., Tensor] | None) -> None:
    """Refuse a function that takes no sum over all tensors though there is one, or the reverse.

    Raises:
        TypeError: it is so.
    """
    if ("reduced" in definition.free) != (global_reduce is not None):
        raise TypeError(f"{definition.name}: `global_reduce=` and the parameter `reduced` need each other; give both or neither")


def check_separable(name: str, separable: Any) -> None:
    """Refuse an unknown part of a tensor.

    Raises:
        ValueError: it is none.
    """
    if separable not in get_args(Separable):
        raise ValueError(f"{name}: separable={separable!r} must be one of {', '.join(map(repr, get_args(Separable)))}")


def is_update(function: Any, positional: int) -> bool:
    """Whether a function is an update, with so many positional parameters, and not an initializer."""
    return callable(function) and sum(each.kind is each.POSITIONAL_OR_KEYWORD for each in _parameters(function)) >= positional


def keywords_of(function: Callable[..., Any] | None) -> dict[str, Any]:
    """Keyword-only parameters of a function, with their defaults."""
    return {each.name: each.default for each in _parameters(function) if each.kind is each.KEYWORD_ONLY}


def _parameters(function: Callable[..., Any] | None) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values()) if function else []


def check_state(rule: str, state: Any, at: str = "") -> None:
    """Refuse an initial state that is no tree of tensors.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(state, dict):
        where = f"has {at!r} of type" if at else "is a"
        raise TypeError(
            f"the initial state of {rule} {where} {type(state).__name__}: init must return a dict of tensors (or dicts of them)"
        )
    for key, leaf in state.items():
        if not isinstance(leaf, Tensor):
            check_state(rule, leaf, f"{at}{key}")


def check_form(name: str, param: Tensor, state: State, old_param: Tensor, old: State, at: str = "") -> None:
    """Refuse a new tensor, or a state, of another form than the old one.

    Raises:
        ValueError: a shape differs, or the state has other keys.
    """
    if param.shape != old_param.shape:
        raise ValueError(
            f"the update of {name!r} made shape {tuple(param.shape)} of {tuple(old_param.shape)}: it must keep the tensor's shape"
        )
    if state.keys() != old.keys():
        key = next(iter(sorted(state.keys() ^ old.keys())))
        odd = "has the new key" if key in state else "lacks the key"
        raise ValueError(f"the update of {name!r} returned a state that {odd} {at + key!r}: init and update must agree on the state's keys")
    for key, leaf in state.items():
        before = old[key]
        if isinstance(before, dict) != isinstance(leaf, dict) or not isinstance(leaf, (dict, Tensor)):
            kind = type(leaf).__name__
            raise ValueError(
                f"the update of {name!r} returned a {kind} as its state {at + key!r}, which init made a {type(before).__name__}"
            )
        if isinstance(leaf, dict):
            check_form(name, param, leaf, old_param, before, f"{at}{key}.")
        elif leaf.shape != before.shape:
            raise ValueError(
                f"the update of {name!r} made shape {tuple(leaf.shape)} of its state {at + key!r}, which has {tuple(before.shape)}: it "
                "must keep the shape that init gave it"
            )
