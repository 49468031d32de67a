"""What programs are: made of functions that are done to one tensor, they do that to many."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

Function = Callable[..., Sequence[Tensor | None]]
"""Of as many tensors as it is given, to what is to be written to each of them; None, or the tensor itself, where nothing is. It does not
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


Program = Callable[[Batch], None]
"""Does what a function does, in place, to each row of a batch."""


def write_over(arguments: Sequence[Tensor], new: Sequence[Tensor | None]) -> None:
    """Write what a function of arguments has returned to them."""
    for old, value in zip(arguments, new, strict=True):
        if value is not None and value is not old:
            old.copy_(value)


class UnsupportedError(Exception):
    """A function can not be made into a program of some sort; the message says why."""
