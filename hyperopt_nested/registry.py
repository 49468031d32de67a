"""The registry: optimizers by name.

An entry is anything that makes an `Optimizer` when called: a rule made by `@rule`, or a function that builds one, from another
`Optimizer` if its first parameter has no default.
"""

import inspect
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any, TypeVar

_FACTORIES: dict[str, Callable[..., Any]] = {}
_CHECK_WITH: dict[str, Mapping[str, Any]] = {}

F = TypeVar("F", bound=Callable[..., Any])


def register(name: str, factory: F, check_with: Mapping[str, Any] | None = None) -> F:
    """Enter `factory` under `name`, and return it.

    Running the same definition again (a notebook cell, a reloaded module) replaces the entry.

    Args:
        name: the entry's name.
        factory: called with hyper-parameters, returns an `Optimizer`.
        check_with: arguments with which `hyperopt_nested.testing` calls it, where its defaults cannot be checked.

    Returns:
        `factory`.

    Raises:
        TypeError: `name` is no string, or `factory` cannot be called.
        ValueError: another definition has that name.

    Example:
        >>> import hyperopt_nested as hn
        >>> hn.rules.register("lion", hn.lion) is hn.get("lion")
        True
    """
    if not isinstance(name, str) or not callable(factory):
        raise TypeError(f"name={name!r}, factory={factory!r}: give a name, and a function that makes an optimizer")
    taken = _FACTORIES.get(name)
    if taken is not None and _origin(taken) != _origin(factory):
        raise ValueError(f"name={name!r} is registered already, by {'.'.join(_origin(taken))}; choose another name")
    _FACTORIES[name], _CHECK_WITH[name] = factory, dict(check_with or {})
    return factory


def get(name: str) -> Callable[..., Any]:
    """The entry called `name`.

    Returns:
        What makes an `Optimizer`.

    Raises:
        KeyError: there is none; the message names close ones.

    Example:
        >>> import hyperopt_nested as hn
        >>> hn.get("sgd")(lr=0.1).declared["lr"]
        0.1
    """
    if name not in _FACTORIES:
        close = get_close_matches(name, _FACTORIES) or names()
        raise KeyError(f"no rule is registered as {name!r}; did you mean {', '.join(close)}? Import the module that defines it first")
    return _FACTORIES[name]


def check_with(name: str) -> Mapping[str, Any]:
    """The arguments with which the entry called `name` is checked."""
    return _CHECK_WITH[name]


def example(name: str, around: Callable[[], Any]) -> Any:
    """An optimizer of the entry called `name`, as it is checked; made around another one if it needs one."""
    factory, settings = get(name), _CHECK_WITH[name]
    first = next(iter(inspect.signature(factory, follow_wrapped=False).parameters.values()), None)
    inside = first is not None and first.kind in (first.POSITIONAL_ONLY, first.POSITIONAL_OR_KEYWORD) and first.default is first.empty
    return factory(around(), **settings) if inside else factory(**settings)


def origin(name: str) -> str:
    """The module that defines the entry called `name`."""
    return _origin(get(name))[0]


def names() -> list[str]:
    """Names of all entries, sorted.

    Returns:
        The names.

    Example:
        >>> import hyperopt_nested as hn
        >>> "adamw" in hn.names()
        True
    """
    return sorted(_FACTORIES)


def _origin(factory: object) -> tuple[str, str]:
    return str(getattr(factory, "__module__", "")), str(getattr(factory, "__qualname__", ""))
