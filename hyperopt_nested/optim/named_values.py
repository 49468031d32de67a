"""Values of hypers by one name each, for logs and for users who set them: `lr`, `lr/group 1`, `weight_decay/0.weight`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import reduce
from operator import getitem
from typing import Any, cast

import torch
from torch import Tensor

from hyperopt_nested.domains import Hyper
from hyperopt_nested.engine.learned import MODEL, LearnedHyper, Learner
from hyperopt_nested.engine.nested import Nested
from hyperopt_nested.rule import Optimizer
from hyperopt_nested.trees import State

Path = tuple[str, ...]
Numbers = Mapping[str, Mapping[str, Any]]
"""By tensor: what schedules have made of the declared value of each hyper."""

_SHOWN = 8
"""Values that a list in text shows at most."""


@dataclass(frozen=True)
class LearnedValue:
    """A learned value.

    Attributes:
        learned: what it is a value of.
        path: where its coordinates are in the engine's state.
        number: what schedules have made of the declared value; None for hypers of learners.
    """

    learned: LearnedHyper
    path: Path
    number: float | None = None

    @property
    def scale(self) -> float:
        """The effective value over the learned one."""
        declared = self.learned.declared
        return 1.0 if self.number is None or declared == 0 else self.number / declared

    def mean(self, st: State) -> Tensor:
        """The effective value, the mean of rows or elements: shape (), whole where tensors are sharded."""
        mean = self.learned.value(_leaf(st, self.path), self.number).mean()
        return mean.full_tensor() if hasattr(mean, "full_tensor") else mean

    def unscaled(self, name: str, value: float) -> float:
        """The learned value whose effective value is this one.

        Raises:
            TypeError: `value` is no number.
            ValueError: it is outside the domain or the bounds, or the parameter group scales all values to zero.
        """
        hyper, scale = self.learned.hyper, self.scale
        hyper.check(name, value)
        if scale == 0:
            raise ValueError(
                f"{name}={value!r}: its parameter group holds 0 for it, which scales every learned value to 0: change that first"
            )
        learned = value if scale == 1 else value / scale
        hyper.check(name, learned, self.learned.via)
        low, high = (none if callable(end) else end for end, none in zip(self.learned.learn.bounds, (-math.inf, math.inf), strict=True))
        if not low <= learned <= high:
            raise ValueError(f"{name}={value!r} is outside bounds=({low:g}, {high:g}) of its learn(...): choose a value inside them")
        return learned


def learned_values(nested: Nested, st: State, group_of: Mapping[str, int], numbers: Numbers) -> dict[str, LearnedValue]:
    """All learned values, by name.

    Args:
        nested: the engine.
        st: its state.
        group_of: the parameter group of each tensor.
        numbers: what schedules have made of declared values.
    """
    values: dict[str, LearnedValue] = {}
    shared: dict[str, dict[tuple[str, int], LearnedValue]] = {}
    for name in st["rule"]:
        for hyper, learned in nested.bindings[name].learned.items():
            group, key = group_of[name], learned.key_of(name)
            value = LearnedValue(learned, ("hypers", learned.key, key), float(numbers[name][hyper]))
            if key == MODEL:
                shared.setdefault(hyper, {})[learned.key, group] = value
            else:
                values[f"{hyper}/{name}"] = value
    for hyper, uses in shared.items():
        one_a_group = len({group for _, group in uses}) == len(uses)
        for (key, group), value in uses.items():
            base = hyper if one_a_group else key
            others = [other for (each, _), other in uses.items() if one_a_group or each == key]
            values[base if all(other == value for other in others) else f"{base}/group {group}"] = value
    order = [key.partition("#")[0] for key in nested.learned]
    values = dict(sorted(values.items(), key=lambda item: order.index(item[1].learned.key.partition("#")[0])))
    return {**values, **_of_learners(nested, st, "", ())}


def _of_learners(learner: Learner, st: State, prefix: str, path: Path) -> dict[str, LearnedValue]:
    values: dict[str, LearnedValue] = {}
    for key, above in learner.learned.items():
        inner, at, start = st["learners"][key], (*path, "learners", key), f"{prefix}{key}."
        for hyper, learned in above.learner.learned.items():
            for name in inner["hypers"][hyper]:
                label = f"{start}{hyper}" if name == MODEL else f"{start}{hyper}/{name}"
                values[label] = LearnedValue(learned, (*at, "hypers", hyper, name))
        values |= _of_learners(above.learner, inner, start, at)
    return values


def as_floats(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Tensors of shape () as floats, by one transfer for each device."""
    forms: dict[Any, list[str]] = {}
    for key, value in values.items():
        forms.setdefault((value.device, value.dtype), []).append(key)
    lists = [(keys, torch.stack([values[key] for key in keys]).tolist()) for keys in forms.values()]
    numbers = {key: number for keys, read in lists for key, number in zip(keys, read, strict=True)}
    return {key: numbers[key] for key in values}


def declared_hypers(optimizers: Mapping[str, Optimizer], group_of: Mapping[str, int]) -> dict[str, tuple[int, str, list[Hyper]]]:
    """Hypers that are numbers of parameter groups and are not learned there: group, hyper and domains, by names such as `lr/group 0`."""
    hypers: dict[str, tuple[int, str, list[Hyper]]] = {}
    learned = {(group, hyper) for name, group in group_of.items() for hyper in optimizers[name].learned}
    for name, group in group_of.items():
        for hyper, domain in optimizers[name].rule.hypers.items():
            if (group, hyper) not in learned:
                hypers.setdefault(f"{hyper}/group {group}", (group, hyper, []))[2].append(domain)
    return hypers


def with_value(
    name: str, value: float, st: State, learned: Mapping[str, LearnedValue], declared: Mapping[str, tuple[int, str, list[Hyper]]]
) -> tuple[State, dict[int, str]]:
    """The engine's state with a value set, and the parameter groups whose number for a hyper must become the value.

    Args:
        name: a name of a value, or a hyper's for all of its values.
        value: the value.
        st: the engine's state.
        learned: as of `learned_values`.
        declared: as of `declared_hypers`.

    Raises:
        TypeError: `value` is no number.
        ValueError: there is no such name, the value is outside its domain, or groups with different numbers share it.
    """
    values = {label: each for label, each in learned.items() if _is_meant(name, label)}
    numbers = {label: each for label, each in declared.items() if _is_meant(name, label)}
    if not values and not numbers:
        known = [*learned, *dict.fromkeys(label.partition("/")[0] for label in declared)]
        close = get_close_matches(str(name), [*known, *declared], n=3) or known
        raise ValueError(f"there is no hyper {name!r} to set; did you mean {listed(close)}?")
    for label, (_, _, domains) in numbers.items():
        for domain in domains:
            domain.check(label, value)
    wanted: dict[Path, tuple[LearnedHyper, float]] = {}
    for label, each in values.items():
        unscaled = each.unscaled(label, value)
        if wanted.setdefault(each.path, (each.learned, unscaled))[1] != unscaled:
            raise ValueError(
                f"{name}={value!r}: parameter groups with different numbers share this learned value: set one of {listed(values)}; the "
                "others keep their ratio to it"
            )
    for path, (hyper, unscaled) in wanted.items():
        st = _replaced(st, path, hyper.start(_leaf(st, path), unscaled))
    return st, {group: hyper for group, hyper, _ in numbers.values()}


def listed(names: Iterable[str]) -> str:
    """Names, or texts, in one line: the first ones, and how many more there are."""
    texts = list(names)
    more = f", and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return ", ".join(texts[:_SHOWN]) + more


def _is_meant(name: object, label: str) -> bool:
    return name == label or label.partition("/")[0] == name


def _leaf(tree: State, path: Path) -> Tensor:
    leaf: Any = reduce(getitem, path, tree)
    return cast(Tensor, leaf)


def _replaced(tree: State, path: Path, leaf: Tensor) -> State:
    key, *rest = path
    return {**tree, key: _replaced(tree[key], tuple(rest), leaf) if rest else leaf}
