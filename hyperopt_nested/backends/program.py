"""What programs are: made of functions that are done to one tensor, they do that to many."""

from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from hyperopt_nested.backends.graph import Kind, kind_of

Function = Callable[..., Sequence[Tensor | None]]
"""From as many tensors as it is given to what is written to each of them; None, or the tensor itself, where nothing is. It does not
depend on values of tensors."""


@dataclass(eq=False)
class Batch:
    """Arguments of a program."""

    rows: list[list[Tensor]] = field(default_factory=list)  # of the function: first the gradient, any in each call; the others stay
    prepared: Any = None  # what the program has made of those that stay


class Program(Protocol):
    """Does what a function does, in place, to each row of a batch."""

    backend: str  # which sort of program it is

    def __call__(self, batch: Batch) -> None: ...


@dataclass(frozen=True, eq=False)
class Request:
    """What programs are needed for."""

    of: Hashable  # what they depend on beside the arguments
    rule: str  # its name, for messages
    functions: Sequence[Function]  # what each program does; they run one after the other, on the same arguments
    arguments: Sequence[Tensor]  # of all functions, the gradient first; they are not changed
    param: Tensor
    changing: Collection[int]  # indices of arguments that are written to between the programs
    examples: Callable[..., Iterable[list[Tensor]]]
    """Makes small arguments, or, with `whole=True`, ones of the same sizes and strides; each go on from what is written to the last."""

    @cached_property
    def kinds(self) -> tuple[Kind, ...]:
        """What each argument has one value of; raises UnsupportedError if that is not known."""
        return tuple(kind_of(argument.shape, self.param.shape) for argument in self.arguments)

    @property
    def singletons(self) -> tuple[bool, ...]:
        return tuple(size == 1 for size in self.param.shape)


@dataclass(eq=False)
class Engine:
    """A function itself as a program: what every other program has to reproduce."""

    function: Function
    backend: str = "reference"

    def __call__(self, batch: Batch) -> None:
        for row in batch.rows:
            write_over(row, self.function(*row))


def write_over(arguments: Sequence[Tensor], new: Sequence[Tensor | None]) -> None:
    """Write what a function of arguments has returned to them."""
    for old, value in zip(arguments, new, strict=True):
        if value is not None and value is not old:
            old.copy_(value)


def capturing() -> bool:
    """Whether a CUDA graph records what is done now, so that nothing may wait for the device."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
