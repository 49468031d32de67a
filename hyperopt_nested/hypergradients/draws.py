"""Random numbers that are drawn again: the states of the global generators of torch, Python and NumPy."""

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Draws:
    """States of the global generators at one time.

    A generator of the user's own, such as a `torch.Generator`, is not among them.
    """

    cpu: Tensor
    devices: dict[torch.device, Tensor]
    python: Any
    numpy: Any

    @classmethod
    def now(cls, devices: Iterable[torch.device]) -> "Draws":
        """The states that the generators have now: of torch on the CPU and on these devices, of Python and of NumPy."""
        states = {device: torch.get_device_module(device).get_rng_state(*_index(device)) for device in devices if _draws(device)}
        numpy = sys.modules.get("numpy")
        return cls(torch.get_rng_state(), states, random.getstate(), numpy.random.get_state() if numpy else None)

    def restore(self) -> None:
        """Put the generators into these states."""
        torch.set_rng_state(self.cpu)
        for device, state in self.devices.items():
            torch.get_device_module(device).set_rng_state(state, *_index(device))
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)


@contextmanager
def drawn_again(draws: Draws) -> Iterator[None]:
    """Draw the random numbers that follow on these states; the generators are left as they were before."""
    before = Draws.now(draws.devices)
    draws.restore()
    try:
        yield
    finally:
        before.restore()


def devices_of(tensors: Iterable[Tensor]) -> set[torch.device]:
    """The devices that tensors are on."""
    return {tensor.device for tensor in tensors}


def _draws(device: torch.device) -> bool:
    """Whether a device has a generator of its own."""
    return device.type not in ("cpu", "meta")


def _index(device: torch.device) -> tuple[torch.device, ...]:
    """What the functions of the device's module take: that of mps has one device."""
    return () if device.type == "mps" else (device,)
