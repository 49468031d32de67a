"""What programs are: made of functions that are done to one tensor, they do that to many."""

from collections.abc import Callable, Sequence

from torch import Tensor

Function = Callable[..., Sequence[Tensor | None]]
"""Of as many tensors as it is given, to what is to be written to each of them; None, or the tensor itself, where nothing is. It does not
depend on values of tensors."""

Program = Callable[[Sequence[Sequence[Tensor]]], None]
"""Does what a function does, in place, to each of some sequences of tensors."""


def write_over(arguments: Sequence[Tensor], new: Sequence[Tensor | None]) -> None:
    """Write what a function of arguments has returned to them."""
    for old, value in zip(arguments, new, strict=True):
        if value is not None and value is not old:
            old.copy_(value)


class UnsupportedError(Exception):
    """A function can not be made into a program of some sort; the message says why."""
