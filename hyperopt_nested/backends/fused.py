"""Programs as native kernels: one call steps many tensors, and passes over their memory as seldom as can be."""

from __future__ import annotations  # array has no parameters when it runs

import ctypes
import os
from array import array
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from hyperopt_nested.backends import compiler
from hyperopt_nested.backends.cpp import code
from hyperopt_nested.backends.graph import Kind, UnsupportedError, UpdateGraph
from hyperopt_nested.backends.program import Batch
from hyperopt_nested.ops import is_dense, is_stored

_started = os.getpid()
PLAIN = frozenset([Tensor, torch.nn.Parameter])
"""Classes whose data lie where `data_ptr` says; subclasses, such as DTensor, may have none."""


class LayoutError(UnsupportedError):
    """A program of some sort cannot take these tensors, as they lie in memory; the message says why."""


class Kernel:
    """A graph in machine code, for tensors of all sizes that pass `check_layout`."""

    backend = "fused"

    def __init__(self, graph: UpdateGraph) -> None:
        self._run = compiler.load([code(graph)])[0].run
        self._run.restype = None
        self._kinds, self._dtypes = [kind for kind, _ in graph.inputs], [dtype for _, dtype in graph.inputs]
        elements = [i for i, kind in enumerate(self._kinds) if kind == Kind.ELEMENT]
        self._like = elements[-1] if elements else 0  # an argument that lies as the parameter does
        self._by_element = bool(elements) and elements[0] == 0

    def __call__(self, batch: Batch) -> None:
        if batch.prepared is None:
            batch.prepared = self._prepared(batch.rows)
        tables, pointers, storages = batch.prepared
        grads = [self._readable(row[0], row[self._like], storages) for row in batch.rows]
        tables[0][:: len(self._dtypes)] = array("q", map(Tensor.data_ptr, grads))
        self._run(ctypes.c_int64(len(grads)), *pointers, _threads())

    def run(self, shapes: Sequence[tuple[int, int]], rows: Sequence[Sequence[Tensor | None]]) -> None:
        """What a call does, to arguments that lie as they have to, given rows and columns; None for arguments that are not touched."""
        addresses = [0 if tensor is None else tensor.data_ptr() for row in rows for tensor in row]
        tables = [array("q", table) for table in (addresses, *zip(*shapes, strict=True))]
        self._run(ctypes.c_int64(len(rows)), *(ctypes.c_void_p(table.buffer_info()[0]) for table in tables), _threads())

    def _prepared(self, rows: Sequence[Sequence[Tensor]]) -> tuple[list[array[int]], list[ctypes.c_void_p], set[int]]:
        """Addresses of all arguments, rows and columns of each tensor, where these tables are, and the storages that are written to."""
        for row in rows:
            if [tensor.dtype for tensor in row] != self._dtypes:
                raise LayoutError(f"a kernel for {self._dtypes} is given {[tensor.dtype for tensor in row]}")
            check_layout(row, self._kinds, row[self._like])
        shapes = zip(*(sizes(row[self._like]) for row in rows), strict=True)
        tables = [array("q", table) for table in ([tensor.data_ptr() for row in rows for tensor in row], *shapes)]
        storages = {tensor.untyped_storage().data_ptr() for row in rows for tensor in row[1:]}
        return tables, [ctypes.c_void_p(table.buffer_info()[0]) for table in tables], storages

    def _readable(self, grad: Tensor, like: Tensor, storages: set[int]) -> Tensor:
        """The gradient, or a copy if it does not lie as its tensor does, or lies where a kernel writes."""
        storage = grad.untyped_storage()
        if self._by_element and (grad.stride() != like.stride() or grad.shape != like.shape):
            return torch.empty_like(like, dtype=grad.dtype).copy_(grad.view(like.shape) if grad.shape != like.shape else grad)
        if storage.data_ptr() in storages or grad.is_neg() or not is_stored(grad):
            return grad.clone(memory_format=torch.preserve_format).resolve_neg()
        return grad


def _threads() -> int:
    return torch.get_num_threads() if os.getpid() == _started else 1  # a forked child has no threads but its own


def sizes(param: Tensor) -> tuple[int, int]:
    """Rows and columns: dimension 0 and all others; a tensor with fewer than two dimensions is one row."""
    rows = param.shape[0] if param.ndim > 1 else 1
    return rows, param.numel() // max(rows, 1)


def check_layout(arguments: Sequence[Tensor], kinds: Sequence[Kind], param: Tensor) -> None:
    """Raise LayoutError unless a kernel can work on the memory of the gradient, which may lie in any way, and of all else."""
    rows, columns = sizes(param)
    for i, (argument, kind) in enumerate(zip(arguments, kinds, strict=True)):
        count = {Kind.NUMBER: 1, Kind.ROW: rows, Kind.ELEMENT: rows * columns}[kind]
        plain = type(argument) in PLAIN and argument.layout == torch.strided and argument.device.type == "cpu" and not argument.is_neg()
        if not plain or argument.numel() != count or count == 0:
            raise LayoutError(f"a {type(argument).__name__} of shape {tuple(argument.shape)} on {argument.device} has not {count} numbers")
        if i == 0:
            continue
        if kind == Kind.ELEMENT and argument.shape == param.shape:
            strides = zip(argument.stride(), param.stride(), param.shape, strict=True)
            fits = all(own == wanted or size == 1 for own, wanted, size in strides)
        else:
            fits = argument.is_contiguous() and (kind != Kind.ELEMENT or param.is_contiguous())
        if not (fits and is_dense(argument) and is_stored(argument)):
            raise LayoutError(f"a tensor of shape {tuple(argument.shape)} has strides {argument.stride()}, its parameter {param.stride()}")
    if rows > 1 and param.stride(0) != columns:
        raise LayoutError(f"a tensor with strides {param.stride()} does not lie row after row")
    spans = sorted((t.data_ptr(), t.data_ptr() + t.numel() * t.itemsize) for t in arguments[1:])
    if any(end > begin for (_, end), (begin, _) in pairwise(spans)):
        raise LayoutError("tensors of one update share memory")
