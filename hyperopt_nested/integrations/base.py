"""What the integrations share: which optimizers learn something, hooks after steps, and classes whose base a framework has."""

from __future__ import annotations

import importlib
import sys
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from hyperopt_nested.checks import check_count


@runtime_checkable
class Learning(Protocol):
    """An optimizer that learns hypers: `HyperOptimizer` and its subclasses, `ftp.FTP`."""

    def learned(self) -> dict[str, float]:
        """Learned values by name."""

    def learned_tensors(self) -> dict[str, Tensor]:
        """The same as tensors."""

    def register_step_post_hook(self, hook: Any) -> RemovableHandle:
        """As of `torch.optim.Optimizer`."""


def learning(optimizer: Any) -> Learning | None:
    """The optimizer that learns hypers in what frameworks put around one, as `accelerate` does; None if there is none."""
    copies = "LightningOptimizer" in [each.__name__ for each in type(optimizer).__mro__]  # the attributes, when it is made
    while (copies or not isinstance(optimizer, Learning)) and hasattr(optimizer, "optimizer"):
        optimizer, copies = optimizer.optimizer, False
    return optimizer if isinstance(optimizer, Learning) else None


class AfterSteps:
    """Does something after every `every` steps of an optimizer, by a hook of `torch.optim.Optimizer`.

    Raises:
        TypeError: the optimizer learns no hypers, or `every` is no integer.
        ValueError: `every` is less than 1.
    """

    def __init__(self, optimizer: Any, every: int) -> None:
        check_count("every", every)
        found = learning(optimizer)
        if found is None:
            raise TypeError(f"optimizer is {type(optimizer).__name__}, which learns no hypers; give an optimizer of this library")
        self.optimizer, self.every, self.step = found, every, 0
        self._handle = found.register_step_post_hook(self._stepped)

    def _stepped(self, *_: Any) -> None:
        self.step += 1
        if self.step % self.every == 0:
            with torch.no_grad():
                self.read()

    def read(self) -> None:
        """What is done."""
        raise NotImplementedError

    def close(self) -> None:
        """Take the hook away."""
        self._handle.remove()


def framework(*names: str, package: str) -> Any:
    """The first module that is imported already, or else that can be imported; modules of `package`.

    Raises:
        ModuleNotFoundError: none is installed.
    """
    for name in names:
        if name in sys.modules:
            return sys.modules[name]
    for name in names:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as missing:
            if (missing.name or "") not in {name, name.partition(".")[0], package}:
                raise
    raise ModuleNotFoundError(f"{package} is not installed: pip install {package}", name=package)


_with_bases: dict[tuple[type, type], type] = {}


def with_base(cls: type, base: type) -> type:
    """The class, with a base that its framework asks for: always the same."""
    if (cls, base) not in _with_bases:
        _with_bases[cls, base] = type(cls.__name__, (cls, base), {"__module__": cls.__module__, "__doc__": cls.__doc__, "_public": cls})
    return _with_bases[cls, base]
