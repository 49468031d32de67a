"""What programs are: made of functions that are done to one tensor, they do that to many."""

from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

Function = Callable[..., Sequence[Tensor | None]]
"""From as many tensors as it is given to what is written to each of them; None, or the tensor itself, where nothing is. It does not
depend on values of tensors."""


@dataclass(eq=False)
class Batch:
    """Arguments of a program.

    Attributes:
        rows: what the function takes, row by row: the gradient comes first, and may be another tensor in each call; the others stay.
        prepared: what the program has made of those that stay.
    """

    rows: list[list[Tensor]] = field(default_factory=list)
    prepared: Any = None


class Program(Protocol):
    """Does what a function does, in place, to each row of a batch.

    Attributes:
        backend: which sort of program it is.
    """

    backend: str

    def __call__(self, batch: Batch) -> None:
        """Do it."""


@dataclass(frozen=True, eq=False)
class Request:
    """What programs are needed for.

    Attributes:
        of: what they depend on beside the arguments.
        rule: the rule's name, for messages.
        functions: what each program does; they run one after the other, on the same arguments.
        arguments: of all functions, the gradient first; they are not changed.
        param: the tensor.
        changing: indices of arguments that are written to between the programs.
        examples: makes examples of the arguments: small ones, or, with `whole=True`, ones of the same sizes and strides.
    """

    of: Hashable
    rule: str
    functions: Sequence[Function]
    arguments: Sequence[Tensor]
    param: Tensor
    changing: Collection[int]
    examples: Callable[..., Iterable[list[Tensor]]]


@dataclass(eq=False)
class PerRow:
    """A program that does each row on its own, by a function that works in place."""

    function: Callable[..., Any]
    backend: str

    def __call__(self, batch: Batch) -> None:
        for row in batch.rows:
            self.function(*row)


def engine(function: Function) -> PerRow:
    """The function itself as a program: what every other program has to reproduce."""

    def in_place(*arguments: Tensor) -> None:
        write_over(arguments, function(*arguments))

    return PerRow(in_place, "reference")


def write_over(arguments: Sequence[Tensor], new: Sequence[Tensor | None]) -> None:
    """Write what a function of arguments has returned to them."""
    for old, value in zip(arguments, new, strict=True):
        if value is not None and value is not old:
            old.copy_(value)


class UnsupportedError(Exception):
    """A function can not be made into a program of some sort; the message says why."""


class LayoutError(UnsupportedError):
    """A program of some sort can not take these tensors, as they lie in memory; the message says why."""
