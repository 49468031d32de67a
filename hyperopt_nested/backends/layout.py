"""Tensors as rows of columns, as programs that go row by row see them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hyperopt_nested.backends.graph import Kind, kind_of
from hyperopt_nested.backends.program import UnsupportedError


def sizes(param: Tensor) -> tuple[int, int]:
    """Rows and columns: dimension 0 and all others; a tensor with fewer than two dimensions is one row."""
    rows = param.shape[0] if param.ndim > 1 else 1
    return rows, param.numel() // max(rows, 1)


def check_layout(arguments: Sequence[Tensor], param: Tensor) -> None:
    """Whether a tensor and its state lie alike, row after row.

    Args:
        arguments: the gradient, which may lie in any way, and the state.
        param: the tensor.

    Raises:
        UnsupportedError: they do not, or there are no elements.
    """
    if param.numel() == 0:
        raise UnsupportedError("a tensor is empty")
    rows, columns = sizes(param)
    if torch.empty_like(param, device="meta").stride() != param.stride() or (rows > 1 and param.stride(0) != columns):
        raise UnsupportedError(f"a tensor of shape {tuple(param.shape)} has strides {param.stride()}: it does not lie row after row")
    for argument in arguments[1:]:
        if kind_of(argument.shape, param.shape) == Kind.ELEMENT and argument.stride() != param.stride():
            raise UnsupportedError(f"a tensor has strides {param.stride()}, and its state {argument.stride()}")


def lying_as(grad: Tensor, param: Tensor) -> Tensor:
    """A gradient, copied if it does not lie as its tensor does."""
    return grad if grad.stride() == param.stride() else torch.empty_like(param, dtype=grad.dtype).copy_(grad)
