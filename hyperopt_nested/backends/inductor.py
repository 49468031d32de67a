"""Programs compiled by inductor, without guards: for arguments of fixed shapes, strides and dtypes. It caches them on disk."""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from hyperopt_nested.backends import compiler
from hyperopt_nested.backends.program import Batch, Function, write_over
from hyperopt_nested.ops import is_dense

TOGETHER = frozenset(["cuda", "xpu"])  # where one program steps all tensors, so that launches do not grow with them; elsewhere each has one


class Inductor:
    """What a function does to each row of a batch, as compiled programs; arguments other than the gradient are dense."""

    backend = "compile"

    def __init__(self, function: Function) -> None:
        self._function = function
        self._made: dict[Any, Callable[..., Any]] = {}

    def __call__(self, batch: Batch) -> None:
        if batch.prepared is None:
            parts: dict[Any, list[list[Tensor]]] = {}
            for i, row in enumerate(batch.rows):
                parts.setdefault(row[0].device if row[0].device.type in TOGETHER else i, []).append(row)
            batch.prepared = [(rows, *self._program(rows)) for rows in parts.values()]
        for rows, strides, program in batch.prepared:
            given = ([_lying(row, stride), *row[1:]] for row, stride in zip(rows, strides, strict=True))
            program(*chain.from_iterable(given))

    def _program(self, rows: Sequence[list[Tensor]]) -> tuple[list[tuple[int, ...]], Callable[..., Any]]:
        """Strides of gradients, and the program that takes all arguments of all rows, one after the other."""
        import torch._inductor  # takes a second or two
        from torch.fx.experimental.proxy_tensor import make_fx

        grads = [row[0] if is_dense(row[0]) else row[0].contiguous() for row in rows]
        strides = [grad.stride() for grad in grads]
        given = [*chain.from_iterable([grad, *row[1:]] for grad, row in zip(grads, rows, strict=True))]
        of = tuple((each.shape, each.stride(), each.dtype, each.device) for each in given)
        if of not in self._made:
            width = len(rows[0])

            def in_place(*arguments: Tensor) -> list[Tensor]:
                for begin in range(0, len(arguments), width):
                    row = arguments[begin : begin + width]
                    write_over(row, self._function(*row))
                return []

            with torch.no_grad(), torch._inductor.config.patch(combo_kernels=len(rows) > 1):
                # on fake tensors, which is faster; constants of rules are real ones
                traced = make_fx(in_place, tracing_mode="fake", _allow_non_fake_inputs=True)(*map(torch.Tensor.detach, given))
                self._made[of] = torch._inductor.compile(traced, list[Any](given))
        return strides, self._made[of]


def compiler_for(device: str) -> bool:
    """Whether there is what inductor needs to compile for a type of device: a C++ compiler, or Triton."""
    if device != "cpu":
        from torch.utils._triton import has_triton

        return has_triton()
    return compiler.compiler() is not None


def _lying(row: list[Tensor], stride: tuple[int, ...]) -> Tensor:
    """The gradient of a row; a copy if it lies otherwise, or shares memory with what is written."""
    grad, storage = row[0], row[0].untyped_storage().data_ptr()
    if grad.stride() == stride and all(other.untyped_storage().data_ptr() != storage for other in row[1:]):
        return grad
    return torch.empty_strided(grad.shape, stride, dtype=grad.dtype, device=grad.device).copy_(grad)
