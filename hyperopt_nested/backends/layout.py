"""Tensors as rows of columns, as native kernels see them; and what a kernel has to know of a tensor before it gets its address."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from hyperopt_nested.backends.graph import Kind
from hyperopt_nested.backends.program import LayoutError

PLAIN = frozenset([Tensor, torch.nn.Parameter])
"""Classes whose data lie where `data_ptr` says; subclasses, such as DTensor, may have none."""


def sizes(param: Tensor) -> tuple[int, int]:
    """Rows and columns: dimension 0 and all others; a tensor with fewer than two dimensions is one row."""
    rows = param.shape[0] if param.ndim > 1 else 1
    return rows, param.numel() // max(rows, 1)


def check_layout(arguments: Sequence[Tensor], kinds: Sequence[Kind], param: Tensor) -> None:
    """Check that a kernel can work on the memory of these tensors.

    Args:
        arguments: the gradient, which may lie in any way, and all else that a kernel reads or writes.
        kinds: what each has one value of.
        param: the tensor that is stepped.

    Raises:
        LayoutError: a tensor is empty, of a subclass, elsewhere than on the CPU, not dense row after row, or beyond its storage; or two
            that are written overlap.
    """
    rows, columns = sizes(param)
    strides = _strides(param)
    for i, (argument, kind) in enumerate(zip(arguments, kinds, strict=True)):
        if type(argument) not in PLAIN or argument.layout != torch.strided:
            raise LayoutError(f"a tensor is a {type(argument).__name__} of layout {argument.layout}")
        if argument.device.type != "cpu":
            raise LayoutError(f"a tensor is on {argument.device}")
        if argument.numel() == 0:
            raise LayoutError("a tensor is empty")
        count = {Kind.NUMBER: 1, Kind.ROW: rows, Kind.ELEMENT: rows * columns}[kind]
        if argument.numel() != count or argument.is_neg():
            raise LayoutError(f"a tensor of shape {tuple(argument.shape)} does not have {count} values")
        if i == 0:
            continue
        if kind == Kind.ELEMENT and argument.shape == param.shape:
            fits = _strides(argument) == strides
        else:
            fits = argument.is_contiguous() and (kind != Kind.ELEMENT or param.is_contiguous())
        if not fits or not is_dense(argument):
            raise LayoutError(f"a tensor of shape {tuple(argument.shape)} has strides {argument.stride()}, its parameter {param.stride()}")
        if not is_stored(argument):
            raise LayoutError("a tensor lies beyond its storage")
    if rows > 1 and param.stride(0) != columns:
        raise LayoutError(f"a tensor of shape {tuple(param.shape)} has strides {param.stride()}: it does not lie row after row")
    spans = sorted((t.data_ptr(), t.data_ptr() + t.numel() * t.itemsize) for t in arguments[1:])
    if any(end > begin for (_, end), (begin, _) in pairwise(spans)):
        raise LayoutError("tensors of one update share memory")


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor fills a piece of memory without gaps, in some order of its dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def is_stored(tensor: Tensor) -> bool:
    """Whether the storage of a dense tensor holds all of it."""
    return tensor.untyped_storage().nbytes() >= (tensor.storage_offset() + tensor.numel()) * tensor.itemsize


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides, as far as they matter."""
    return tuple(stride if size != 1 else 0 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
