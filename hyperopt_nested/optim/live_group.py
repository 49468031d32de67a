"""A parameter group with the learning rate that is in use, beside the one that schedulers own."""

from __future__ import annotations

from collections.abc import Callable, ItemsView, ValuesView
from typing import Any
from weakref import WeakMethod

from hyperopt_nested.optim.roster import Group

EFFECTIVE = "effective_lr"
"""The key of what is computed when it is read."""


class LiveGroup(dict[str, Any]):
    """A parameter group in which `effective_lr` is computed when it is read, as a float: nothing waits for a device before that.

    Whatever is written there has no effect. Copies are plain dicts with the value of that moment, so `state_dict`, pickles and copies
    hold a number.

    Args:
        group: the group.
        read: a method that takes the group and returns the value. It is held weakly.
    """

    __slots__ = ("_before", "_value_of")

    def __init__(self, group: Group, read: Callable[[Group], float]) -> None:
        super().__init__({**group, EFFECTIVE: None})
        self._value_of, self._before = WeakMethod(read), float("nan")

    def __getitem__(self, key: str) -> Any:
        if key != EFFECTIVE:
            return super().__getitem__(key)
        if (read := self._value_of()) is not None:
            self._before = read(self)
        return self._before  # of an optimizer that is gone

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key == EFFECTIVE and key in self else super().get(key, default)

    def items(self) -> ItemsView[str, Any]:  # type: ignore[override]
        return ItemsView(self)

    def values(self) -> ValuesView[Any]:  # type: ignore[override]
        return ValuesView(self)

    def __iter__(self) -> Any:  # with a method of its own, {**group} and dict(group) read as the methods above do
        return super().__iter__()

    def copy(self) -> Group:
        return dict(self)

    def __or__(self, other: Any) -> Any:
        return dict(self) | other

    def __repr__(self) -> str:
        return repr(dict(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


def numbers_of(group: Group) -> dict[str, Any]:
    """What a group holds, without what is computed."""
    return {key: value for key, value in dict.items(group) if key != EFFECTIVE}
