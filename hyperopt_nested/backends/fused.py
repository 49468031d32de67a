"""Programs as native kernels: one call steps many tensors, and passes over their memory as seldom as can be."""

from __future__ import annotations  # array has no parameters when it runs

import ctypes
import os
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from hyperopt_nested.backends import compiler
from hyperopt_nested.backends.cpp import code
from hyperopt_nested.backends.graph import Kind, UpdateGraph
from hyperopt_nested.backends.layout import check_layout, is_stored, sizes
from hyperopt_nested.backends.program import Batch, LayoutError

_started = os.getpid()


def fused(graph: UpdateGraph) -> Kernel:
    """Return a kernel that does a graph, for tensors of all sizes that pass `check_layout`.

    Raises:
        UnsupportedError: there is no C++ for it.
        CompileError: the C++ does not compile.
    """
    return Kernel(graph, code(graph))


class Kernel:
    """A compiled graph."""

    backend = "fused"

    def __init__(self, graph: UpdateGraph, source: str) -> None:
        (self._library,) = compiler.load([source])
        self._run = self._library.run
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
        # a forked child has no threads but its own
        threads = torch.get_num_threads() if os.getpid() == _started else 1
        self._run(ctypes.c_int64(len(grads)), *pointers, threads)

    def _prepared(self, rows: Sequence[Sequence[Tensor]]) -> tuple[list[array[int]], list[ctypes.c_void_p], set[int]]:
        """Addresses of all arguments, rows and columns of each tensor, where these tables are, and the storages that are written to."""
        for row in rows:
            if [tensor.dtype for tensor in row] != self._dtypes:
                raise LayoutError(f"a kernel for {self._dtypes} is given {[tensor.dtype for tensor in row]}")
            check_layout(row, self._kinds, row[self._like])
        shapes = [sizes(row[self._like]) for row in rows]
        addresses = [tensor.data_ptr() for row in rows for tensor in row]
        tables = [array("q", table) for table in (addresses, [rows for rows, _ in shapes], [columns for _, columns in shapes])]
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
