"""Derivatives of gradients: a loss that has none is refused, by the name of the operation that lacks them."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from hyperopt_nested.engine.binding import Hessian

_MISSING = (
    re.compile(r"derivative for '?(?:aten::)?(?P<operation>\w+)'? is not implemented"),
    re.compile(r"forward AD with (?P<operation>\w+) that does not support it"),
    re.compile(r"do not yet support (?:aten::)?(?P<operation>\w+)"),
    re.compile(r"Batching rule not implemented for (?:aten::)?(?P<operation>[\w.]+)"),
    re.compile(r"Double backwards is not supported for (?P<operation>.+?) due to"),
    re.compile(r"In order to use an (?P<operation>autograd\.Function) with functorch"),
)

_WRONG = {  # operations whose derivatives of this order torch gets wrong without a word, as finite differences show
    "WeightNormInterfaceBackward": (2, "make the module a function by hn.functional, or write v * (g / norm)"),
    "NativeBatchNormBackward": (3, "use GroupNorm, or write it in basic operations"),
    "CudnnBatchNormBackward": (3, "use GroupNorm, or write it in basic operations"),
    "MiopenBatchNormBackward": (3, "use GroupNorm, or write it in basic operations"),
    "NativeLayerNormBackward": (3, "use GroupNorm(1, ...), or write it in basic operations"),
}


@contextmanager
def named(needed: str, remedy: str) -> Iterator[None]:
    """Where torch says that an operation lacks a derivative, say which one, what it is needed for, and what to do.

    Raises:
        NotImplementedError: an operation lacks it.
    """
    try:
        yield
    except RuntimeError as error:
        found = next((match for match in (pattern.search(str(error)) for pattern in _MISSING) if match), None)
        if found is None:
            raise
        raise _refusal(found["operation"], needed, remedy) from error


def check_twice(loss: Tensor, grads: Mapping[str, Tensor], params: Mapping[str, Tensor], order: int = 2, *, trial: bool = True) -> None:
    """Look whether gradients can be differentiated in reverse.

    Args:
        loss: of shape ().
        grads: its gradients, made with their graph, by name.
        params: the tensors, by name.
        order: how many derivatives of the loss will be taken.
        trial: whether to try it too, which finds what the graphs do not show.

    Raises:
        NotImplementedError: an operation has no double backward, or a wrong one; the message names it.
    """
    curved = [grad for grad in grads.values() if grad.requires_grad]
    refuse_wrong(loss, curved, order)
    if curved and trial:
        with twice():
            torch.autograd.grad([grad.sum() for grad in curved], list(params.values()), retain_graph=True, allow_unused=True)


def twice() -> AbstractContextManager[None]:
    """`named`, where gradients are differentiated in reverse."""
    return named("double backward", "try method='forward'")


def refuse_wrong(loss: Tensor, grads: Iterable[Tensor], order: int) -> None:
    """Refuse a loss with operations whose derivatives torch gets wrong, or would leave out without a word, where they are marked so.

    Args:
        loss: of shape ().
        grads: its gradients, made with their graph.
        order: how many derivatives of the loss will be taken.

    Raises:
        NotImplementedError: there is one; the message names it.
    """
    names = {node.name() for node in _nodes([loss, *grads])}
    for operation, (at, remedy) in _WRONG.items():
        if order >= at and any(name.rstrip("0123456789") == operation for name in names):
            raise NotImplementedError(f"the loss uses {operation}, whose derivative of order {at} is wrong in torch: {remedy}")
    if "torch::autograd::Error" in names:
        once = {type(node).__name__ for node in _nodes([loss]) if isinstance(node, torch.autograd.function.BackwardCFunction)}
        raise _refusal(" or ".join(sorted(once)) or "an autograd.Function", "double backward", "try method='forward'")


def loss_with_hessian(closure: Callable[[], Any], params: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor], Hessian]:
    """A loss, its gradients, and products with its Hessian.

    Args:
        closure: evaluates the loss at the parameters, and does not call backward.
        params: the parameters, by name.

    Raises:
        ValueError: `closure` returns no loss that can be differentiated.
        NotImplementedError: an operation has no double backward; the message names it.
    """
    with torch.enable_grad(), twice():
        loss = closure()
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            raise ValueError(f"closure returned {loss!r}: with curvature='exact' it must return a tensor, without backward()")
        if loss.ndim:
            raise ValueError(
                f"closure returned a tensor of shape {tuple(loss.shape)}; the loss must have shape (): take its mean() or sum()"
            )
        made = torch.autograd.grad(loss, list(params.values()), create_graph=True, allow_unused=True)
    grads = {name: grad for name, grad in zip(params, made, strict=True) if grad is not None}
    curved = {name: grad for name, grad in grads.items() if grad.requires_grad}
    refuse_wrong(loss, curved.values(), 2)

    def hessian(tangents: dict[str, Tensor]) -> dict[str, Tensor]:
        if not curved:
            return {name: torch.zeros_like(tangent) for name, tangent in tangents.items()}
        inputs, along = [params[name] for name in tangents], [tangents[name] for name in curved]
        with twice():
            how: dict[str, bool] = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
            return dict(zip(tangents, torch.autograd.grad(list(curved.values()), inputs, along, **how), strict=True))

    return loss.detach(), {name: grad.detach() for name, grad in grads.items()}, hessian


def _refusal(operation: str, needed: str, remedy: str) -> NotImplementedError:
    return NotImplementedError(
        f"the loss uses {operation}, which has no {needed}. Attention has it under torch.nn.attention.sdpa_kernel(SDPBackend.MATH), an RNN "
        "under torch.backends.mkldnn.flags(enabled=False) and torch.backends.cudnn.flags(enabled=False); for others, "
        f"{remedy}, or learn without the model's curvature (curvature='none')"
    )


def _nodes(outputs: Iterable[Tensor]) -> Iterator[Any]:
    """Nodes of the graph that made the outputs."""
    waiting: list[Any] = [each.grad_fn for each in outputs]
    seen: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            waiting += [each for each, _ in node.next_functions]
