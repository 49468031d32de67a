"""Pure functions of tensors as programs compiled by inductor, without guards: for arguments of fixed shapes, strides and dtypes."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from hyperopt_nested.backends.fused import is_dense
from hyperopt_nested.backends.program import Function, PerRow, write_over


def inductor(function: Function, arguments: Sequence[Tensor]) -> PerRow:
    """Return what a function does to arguments such as these, dense but for the first, the gradient; inductor caches it on disk."""
    import torch._inductor  # takes a second or two
    from torch.fx.experimental.proxy_tensor import make_fx

    def in_place(*given: Tensor) -> list[Tensor]:
        write_over(given, function(*given))
        return []

    grad = arguments[0] if is_dense(arguments[0]) else arguments[0].contiguous()
    examples, stride = [grad, *arguments[1:]], grad.stride()
    with torch.no_grad():
        traced = make_fx(in_place)(*(example.detach().clone() for example in examples))
        run: Callable[..., Any] = torch._inductor.compile(traced, list[Any](examples))

    def program(grad: Tensor, *others: Tensor) -> None:
        storage = grad.untyped_storage().data_ptr()
        if grad.stride() != stride or any(other.untyped_storage().data_ptr() == storage for other in others):
            grad = torch.empty_strided(grad.shape, stride, dtype=grad.dtype, device=grad.device).copy_(grad)
        run(grad, *others)

    return PerRow(program, "compile")


def compiler_for(device: str) -> bool:
    """Whether there is what inductor needs to compile for a type of device: a C++ compiler, or Triton."""
    if device != "cpu":
        from torch.utils._triton import has_triton

        return has_triton()
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return bool(get_cpp_compiler())
    except InvalidCxxCompiler:
        return False
