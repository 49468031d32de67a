"""Programs as native kernels: one call steps many tensors, and passes over their memory as seldom as can be."""

from __future__ import annotations  # array has no parameters when it runs

import ctypes
from array import array
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from hyperopt_nested.backends.cpp import code
from hyperopt_nested.backends.graph import Kind, UpdateGraph
from hyperopt_nested.backends.layout import lying_as, sizes
from hyperopt_nested.backends.program import Batch, Program

FLAGS = ("-ftree-loop-vectorize", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")


def fused(graph: UpdateGraph) -> Program:
    """A kernel that does a graph, for tensors of all sizes that pass `check_layout`.

    It is generated as C++ and compiled by what inductor compiles with, which caches on disk.

    Raises:
        UnsupportedError: there is no C++ for it.
    """
    return _Kernel(graph, code(graph))


@cache
def _library(source: str) -> ctypes.CDLL:
    from torch._inductor.codecache import CppCodeCache  # takes a second or two

    library: ctypes.CDLL = CppCodeCache.load(source, extra_flags=FLAGS, needs_vec_isa=True)
    library.run.restype = None
    return library


class _Kernel:
    def __init__(self, graph: UpdateGraph, source: str) -> None:
        self._run = _library(source).run
        self._elements = [i for i, (kind, _) in enumerate(graph.inputs) if kind == Kind.ELEMENT]
        self._dtypes = [dtype for _, dtype in graph.inputs]

    def __call__(self, batch: Batch) -> None:
        if batch.prepared is None:
            batch.prepared = self._prepared(batch.rows)
        tables, pointers = batch.prepared
        like = self._elements[-1] if self._elements else 0
        grads = [lying_as(row[0], row[like]) if self._elements else row[0] for row in batch.rows]
        tables[0][:: len(self._dtypes)] = array("q", map(Tensor.data_ptr, grads))
        self._run(ctypes.c_int64(len(grads)), *pointers, torch.get_num_threads())

    def _prepared(self, rows: Sequence[Sequence[Tensor]]) -> tuple[list[array[int]], list[ctypes.c_void_p]]:
        """Addresses of all arguments, rows and columns of each tensor, and where these tables are."""
        for row in rows:
            if [tensor.dtype for tensor in row] != self._dtypes:  # of what somebody has put into an optimizer's state
                raise TypeError(f"a kernel for {self._dtypes} is given {[tensor.dtype for tensor in row]}")
        shapes = [sizes(row[self._elements[-1] if self._elements else 0]) for row in rows]
        addresses = [tensor.data_ptr() for row in rows for tensor in row]
        tables = [array("q", table) for table in (addresses, [rows for rows, _ in shapes], [columns for _, columns in shapes])]
        return tables, [ctypes.c_void_p(table.buffer_info()[0]) for table in tables]
