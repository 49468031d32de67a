"""`TensorBoardWriter`: what is learned, in TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hyperopt_nested.integrations.base import AfterSteps, framework


class TensorBoardWriter(AfterSteps):
    """Write the learned values of an optimizer to TensorBoard, after every `every` steps, by a hook of the optimizer.

    Args:
        optimizer: a `HyperOptimizer`, such as `hn.optim.AdamW`, or `ftp.FTP`.
        writer: a `SummaryWriter`, or anything else with `add_scalar(tag, value, step)`; or the folder for a new one.
        every: steps from one reading to the next, >= 1. Each waits for the device.
        prefix: what tags begin with.

    Attributes:
        writer: the writer.
        step: how many steps were taken. Set it where a run is resumed.

    Raises:
        TypeError: `optimizer` learns no hypers, or `every` is no integer.
        ValueError: `every` is less than 1.
        ModuleNotFoundError: a folder is given, and tensorboard is not installed.

    Example:
        >>> import torch, hyperopt_nested as hn
        >>> class Printer:
        ...     def add_scalar(self, tag, value, step):
        ...         print(tag, value, step)
        >>> model = torch.nn.Linear(3, 1)
        >>> opt = hn.optim.SGD(model.parameters(), lr=hn.learn(0.1, by=hn.sgd(lr=0.0)))
        >>> writer = hn.integrations.TensorBoardWriter(opt, Printer(), every=2)
        >>> for _ in range(4):
        ...     opt.zero_grad()
        ...     model(torch.ones(4, 3)).square().mean().backward()
        ...     opt.step()
        learned/lr 0.1 2
        learned/lr 0.1 4
    """

    def __init__(self, optimizer: Any, writer: Any, *, every: int = 10, prefix: str = "learned/") -> None:
        if isinstance(writer, (str, Path)):
            writer = framework("torch.utils.tensorboard", package="tensorboard").SummaryWriter(str(writer))
        super().__init__(optimizer, every)
        self.writer, self._prefix = writer, prefix

    def read(self) -> None:
        """Write the values."""
        for name, value in self.optimizer.learned().items():
            self.writer.add_scalar(f"{self._prefix}{name}", value, self.step)
