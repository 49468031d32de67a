"""Pure functions of tensors as compiled programs, without guards: for arguments of fixed shapes, strides and dtypes."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx

from hyperopt_nested.backends.program import Function, write_over


def as_traced(function: Function, arguments: Sequence[Tensor]) -> fx.GraphModule:
    """What a function does to its arguments, in place, for arguments of these shapes: operators of torch.func in it resolved."""

    def in_place(*given: Tensor) -> list[Tensor]:
        write_over(given, function(*given))
        return []

    from torch.fx.experimental.proxy_tensor import make_fx

    with torch.no_grad():
        return make_fx(in_place)(*(argument.detach().clone() for argument in arguments))


def compiled(function: Function, arguments: Sequence[Tensor]) -> Callable[..., Any]:
    """What a function does to its arguments, in place, compiled by inductor, which caches on disk.

    It is for arguments of fixed shapes, strides, dtypes and devices, without guards.

    Args:
        function: what it does.
        arguments: examples; they are not changed.
    """
    import torch._inductor  # a second or two, and of no use without this

    _declare_realize()
    graph = as_traced(function, arguments)
    _realize_numbers(graph)
    with torch.no_grad():
        program: Callable[..., Any] = torch._inductor.compile(graph, list[Any](arguments))
    return program


def compiler_for(device: torch.device) -> bool:
    """Whether there is what inductor needs to compile for a device: a C++ compiler, or Triton."""
    if device.type != "cpu":
        from torch.utils._triton import has_triton

        return has_triton()
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return bool(get_cpp_compiler())
    except InvalidCxxCompiler:
        return False


def _realize_numbers(graph: fx.GraphModule) -> None:
    """Have single numbers computed once, where inductor would compute them again for every vector of elements that they are used with."""
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or not _is_number(node):
            continue
        users = [user for user in node.users if not _is_number(user) and user.op == "call_function"]
        if users:
            with graph.graph.inserting_after(node):
                realized = graph.graph.call_function(torch.ops.hyperopt_nested.realize.default, (node,))
            for user in users:
                user.replace_input_with(node, realized)
    graph.recompile()


def _is_number(node: fx.Node) -> bool:
    value: Any = node.meta.get("val")
    return isinstance(value, Tensor) and value.ndim == 0


@cache
def _declare_realize() -> None:
    """An operator that returns its argument, and that inductor computes nothing through."""
    from torch._inductor.lowering import register_lowering

    @torch.library.custom_op("hyperopt_nested::realize", mutates_args=())
    def realize(number: Tensor) -> Tensor:
        return number.clone()

    @realize.register_fake
    def _(number: Tensor) -> Tensor:
        return torch.empty_like(number)

    @register_lowering(torch.ops.hyperopt_nested.realize.default, type_promotion_kind=None)
    def _(box: Any) -> Any:
        box.realize()
        return box
