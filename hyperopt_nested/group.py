"""The numbers that parameter groups of a torch optimizer hold, and schedulers change."""

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import register_pytree_node

from hyperopt_nested.checks import is_number
from hyperopt_nested.learned import LearnedHyper, number
from hyperopt_nested.rule import Learn, Optimizer, Rule


def pack(hypers: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers as a group holds them: beta1, beta2, ... become the tuple `betas`, which torch's schedulers know."""
    betas = sorted(name for name in hypers if name.startswith("beta") and name[4:].isdigit())
    group: dict[str, Any] = {name: value for name, value in hypers.items() if name not in betas}
    return {**group, "betas": tuple(hypers[name] for name in betas)} if betas else group


def unpack(group: Mapping[str, Any]) -> dict[str, Any]:
    """What a group holds, by the names of hypers."""
    given = group.get("betas", ())
    if not isinstance(given, (tuple, list)):
        raise TypeError(f"betas={given!r} ({type(given).__name__}) of a group must be a tuple of numbers")
    betas = {f"beta{i}": value for i, value in enumerate(given, start=1)}
    return {**{key: value for key, value in group.items() if key != "betas"}, **betas}


def check_params(params: Any) -> None:
    """Refuse what holds no tensors, as far as torch's own message would not say what to do.

    Raises:
        TypeError: it does not.
    """
    if isinstance(params, torch.nn.Module):
        raise TypeError(f"params is a module ({type(params).__name__}): give its parameters, model.named_parameters()")
    if isinstance(params, (Mapping, str)) or not isinstance(params, Iterable):
        remedy = "give a list of groups, [{'params': ...}]" if isinstance(params, Mapping) else "give model.named_parameters()"
        raise TypeError(f"params is a {type(params).__name__}: {remedy}")


def check_keys(overrides: Mapping[str, Any], optimizers: Iterable[Optimizer]) -> None:
    """Refuse values of a group that would have no effect. Keys that name a hyper with something more, such as initial_lr, are others'.

    Args:
        overrides: the group's values.
        optimizers: of its tensors.

    Raises:
        ValueError: a key is an option, no hyper, or `betas` has another length than there are betas.
    """
    found = list(optimizers)
    hypers = list(dict.fromkeys(hyper for optimizer in found for hyper in optimizer.settings))
    options = {option for optimizer in found for option in options_of(optimizer.rule)}
    for key, value in overrides.items():
        whole = key.startswith("beta") and key[4:].isdigit()
        if key in hypers or not found or (whole and "beta1" in hypers):
            continue
        if key in options or (key == "maximize" and value):
            raise ValueError(
                f"a group gives {key}={value!r}, which is an option and not a hyper; to vary it, pass a function from "
                "(name, tensor) to the optimizer as `optimizer`"
            )
        if close := get_close_matches(key, hypers, cutoff=0.8):
            raise ValueError(f"a group gives {key!r}; did you mean {close[0]!r}?")
        if whole or (
            (is_number(value) or isinstance(value, Learn)) and not any(hyper in key.split("_") or hyper in key for hyper in hypers)
        ):
            raise ValueError(
                f"a group gives {key}={value!r}, but its tensors have no hyper {key!r}; they have {', '.join(hypers) or 'none'}"
            )


def check_betas(group: Mapping[str, Any], optimizers: Iterable[Optimizer]) -> None:
    """Refuse `betas` of a group that are not as many as its tensors' optimizers have.

    Raises:
        ValueError: they are more or fewer.
    """
    for optimizer in optimizers:
        own = [hyper for hyper in optimizer.settings if hyper.startswith("beta") and hyper[4:].isdigit()]
        if own and "betas" in group and len(group["betas"]) != len(own):
            raise ValueError(f"a group gives betas={group['betas']!r}, which must be {len(own)} numbers: {', '.join(own)}")


def check_numbers(index: int, group: Mapping[str, Any], optimizer: Optimizer) -> None:
    """Refuse numbers of a group that are outside their domains, as a schedule may have made them.

    Args:
        index: of the group.
        group: the group.
        optimizer: of one of its tensors.

    Raises:
        TypeError: a value is no number.
        ValueError: a number is missing, not finite, or outside its domain.
    """
    numbers = unpack(group)
    for hyper in optimizer.settings:
        label = f"group {index}: {hyper}"
        if hyper not in numbers:
            needs = (
                f"betas={group['betas']!r} is too short for {hyper}"
                if "betas" in group and hyper.startswith("beta")
                else f"it has no {hyper!r}"
            )
            raise ValueError(f"group {index}: {needs}; {optimizer.rule.name} needs {', '.join(optimizer.settings)}")
        value = numbers[hyper]
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(f"{label} is a tensor of shape {tuple(value.shape)}; it must be one number")
            if value.device.type != "cpu":
                continue  # looking would wait for the device
            value = value.item()
        optimizer.rule.hypers[hyper].check_scheduled(label, value)


def options_of(rule: Rule) -> set[str]:
    """Names of the options of a rule, and of those inside."""
    own = set(getattr(rule, "options", {}))
    return own | options_of(rule.base) if hasattr(rule, "base") else own


class ByName(dict[str, Any]):
    """A dict whose error for a missing key says which there are, and where shared values are."""

    def __init__(self, what: str, values: Mapping[str, Any] | None = None) -> None:
        super().__init__(values or {})
        self._what = what

    def __missing__(self, key: object) -> Any:
        shared = "; a value that tensors share goes by their group" if any(str(each).startswith("group ") for each in self) else ""
        raise KeyError(f"{self._what} has no {key!r}; it has {', '.join(map(repr, self)) or 'nothing'}{shared}")

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, (list(self.items()),)


def _named(values: Iterable[Any], context: Any) -> ByName:
    what, keys = context
    return ByName(what, dict(zip(keys, values, strict=True)))


register_pytree_node(ByName, lambda found: (list(found.values()), (found._what, list(found))), _named)


def with_overrides(optimizer: Optimizer, overrides: Mapping[str, Any]) -> Optimizer:
    """Values of a group: a number replaces a number or a `learn`, but scales what is learned."""
    found: dict[str, Any] = {}
    for name, value in overrides.items():
        if name not in optimizer.settings:
            continue
        if isinstance(optimizer.settings[name], Learn) and not isinstance(value, Learn):
            optimizer.rule.hypers[name].check(f"{optimizer.rule.name}: {name}", value)
        else:
            found[name] = value
    return optimizer.replace(**found) if found else optimizer


class Numbers:
    """Numbers that schedules change, as tensors: written to where they have changed, so that no step waits for a device."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, tuple[list[Any], list[Tensor]]] = {}

    def of(
        self, key: Hashable, values: Mapping[str, float | Tensor], device: torch.device, learned: Mapping[str, LearnedHyper]
    ) -> list[Tensor]:
        """Tensors of shape () with these values, those of the last call with this key."""
        given = list(values.values())
        if key not in self._kept:
            self._kept[key] = [None] * len(given), [number(0.0, device) for _ in given]
        last, tensors = self._kept[key]
        for i, (name, value) in enumerate(values.items()):
            if isinstance(value, Tensor) or value != last[i]:
                if name in learned and not isinstance(value, Tensor):
                    learned[name].check_scheduled(value)
                tensors[i].copy_(value) if isinstance(value, Tensor) else tensors[i].fill_(value)
                last[i] = value
        return tensors
