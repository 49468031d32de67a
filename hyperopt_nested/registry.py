"""The registry: optimizers by name.

An entry is anything that makes an `Optimizer` when called: a rule made by `@rule`, or a function that builds one from others.
"""

from collections.abc import Callable
from difflib import get_close_matches
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from hyperopt_nested.rule import Optimizer

_FACTORIES: dict[str, "Callable[..., Optimizer]"] = {}

F = TypeVar("F", bound="Callable[..., Optimizer]")


def register(name: str, factory: F) -> F:
    """Enter `factory` under `name`, and return it.

    Running the same definition again (a notebook cell, a reloaded module) replaces the entry.

    Args:
        name: the entry's name.
        factory: called with hyper-parameters, returns an `Optimizer`.

    Raises:
        ValueError: another definition has that name.
    """
    taken = _FACTORIES.get(name)
    if taken is not None and _origin(taken) != _origin(factory):
        raise ValueError(f"name={name!r} is registered already, by {'.'.join(_origin(taken))}; choose another name")
    _FACTORIES[name] = factory
    return factory


def get(name: str) -> "Callable[..., Optimizer]":
    """The entry called `name`.

    Raises:
        KeyError: there is none; the message names close ones.
    """
    if name not in _FACTORIES:
        close = get_close_matches(name, _FACTORIES) or names()
        raise KeyError(f"no rule is registered as {name!r}; did you mean {', '.join(close)}? Import the module that defines it first")
    return _FACTORIES[name]


def names() -> list[str]:
    """Names of all entries, sorted."""
    return sorted(_FACTORIES)


def _origin(factory: object) -> tuple[str, str]:
    return str(getattr(factory, "__module__", "")), str(getattr(factory, "__qualname__", ""))
