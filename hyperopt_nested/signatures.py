"""Definitions of rules and combinators: what the parameters of their functions are, and what calls give to each."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from hyperopt_nested.domains import Hyper
from hyperopt_nested.trees import State


def check_definition(kind: str, init: Any, coupling: Any, couplings: tuple[str, ...], hypers: Mapping[str, Any]) -> None:
    """Refuse a definition of a rule or a combinator that can not be one.

    Raises:
        TypeError: `init` is no function that makes a state, or a hyper has no domain.
        ValueError: `coupling` is unknown.
    """
    if init is not None and not callable(init):
        remedy = f"such as hn.zeros({init!r})" if isinstance(init, str) else "such as hn.zeros('momentum'), or None"
        raise TypeError(f"init={init!r} ({type(init).__name__}) must be a function from a parameter to a state, {remedy}")
    if init is not None and len([p for p in inspect.signature(init).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]) >= 3:
        raise TypeError(
            f"@hn.{kind} was given the function {getattr(init, '__name__', init)!r} itself: call it with the hypers and their "
            f"domains, such as @hn.{kind}(lr=hn.Positive(1e-3))"
        )
    if coupling not in couplings and not (kind == "combinator" and callable(coupling)):
        raise ValueError(f"coupling={coupling!r} must be one of {', '.join(map(repr, couplings))}")
    for name, hyper in hypers.items():
        if not isinstance(hyper, Hyper):
            raise TypeError(
                f"{name}={hyper!r} ({type(hyper).__name__}) must be a default with its domain, such as {name}=hn.Positive(1e-3)"
            )


def checked_pair(name: str, found: Any) -> tuple[Tensor, State]:
    """What an update returned: the new parameter and the new state.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(found, tuple) or len(found) != 2 or not isinstance(found[0], Tensor) or not isinstance(found[1], dict):
        shown = f"({', '.join(type(each).__name__ for each in found)})" if isinstance(found, tuple) else f"a {type(found).__name__}"
        raise TypeError(f"{name} returned {shown}; an update must return (param, state), a tensor and a dict of tensors")
    return found


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


def declared_options(
    function: Callable[..., Any], init: Callable[..., State] | None, hypers: Mapping[str, Hyper]
) -> tuple[dict[str, Any], list[str]]:
    """Options of a definition (keyword-only parameters that are no hypers) with their defaults, and the names of those without one.

    Raises:
        TypeError: a declared hyper is no parameter of the function.
    """
    keywords = keywords_of(function)
    missing = [h for h in hypers if h not in keywords]
    if missing:
        raise TypeError(
            f"{function.__name__}: hyper {missing[0]!r} is declared but is no keyword-only parameter of the function; add it after `*`"
        )
    options = {**keywords, **keywords_of(init), **keywords}  # the function's first, and its defaults count
    options = {key: default for key, default in options.items() if key not in hypers}
    undeclared = [key for key, default in options.items() if default is inspect.Parameter.empty]
    return {key: default for key, default in options.items() if key not in undeclared}, undeclared


def assigned(
    name: str, hypers: Mapping[str, Hyper], options: Mapping[str, Any], given: Mapping[str, Any], also: tuple[str, ...] = ()
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a call gives to each hyper and each option; the others have their defaults. `also` names further arguments, for messages.

    Raises:
        TypeError: the call gives what is neither.
    """
    unknown = [key for key in given if key not in hypers and key not in options]
    if unknown:
        raise TypeError(f"{name} has no argument {unknown[0]!r}; it has {', '.join([*hypers, *options, *also]) or 'none'}")
    values = {key: given.get(key, hyper.default) for key, hyper in hypers.items()}
    return values, {key: given.get(key, default) for key, default in options.items()}


def chosen(values: Mapping[str, Any], function: Callable[..., Any]) -> dict[str, Any]:
    """Those of the values that the function has a keyword-only parameter for."""
    keywords = keywords_of(function)
    return {name: value for name, value in values.items() if name in keywords}


@functools.cache
def keywords_of(function: Callable[..., Any] | None) -> dict[str, Any]:
    """Keyword-only parameters of a function, with their defaults."""
    parameters = inspect.signature(function).parameters.values() if function else ()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
