"""The numbers that parameter groups of a torch optimizer hold, and schedulers change."""

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

from hyperopt_nested.learned import LearnedHyper, number
from hyperopt_nested.rule import Learn, Optimizer


def pack(hypers: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers as a group holds them: beta1, beta2, ... become the tuple `betas`, which torch's schedulers know."""
    betas = sorted(name for name in hypers if name.startswith("beta") and name[4:].isdigit())
    group: dict[str, Any] = {name: value for name, value in hypers.items() if name not in betas}
    return {**group, "betas": tuple(hypers[name] for name in betas)} if betas else group


def unpack(group: Mapping[str, Any]) -> dict[str, Any]:
    """What a group holds, by the names of hypers."""
    betas = {f"beta{i}": value for i, value in enumerate(group.get("betas", ()), start=1)}
    return {**{key: value for key, value in group.items() if key != "betas"}, **betas}


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
