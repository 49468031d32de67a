"""Calls of a user's losses: what they return is checked, and split into the loss and what comes with it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from hyperopt_nested.hypergradients.carried import CARRIED, Carried

Tensors = dict[str, Tensor]
Hypers = Mapping[str, Mapping[str, Tensor]]
"""Values of learned hypers, by hyper and by key ("model", or the tensor's name)."""
Loss = Tensor | tuple[Tensor, Any]
"""What a loss returns: a tensor of shape (), or, with `has_aux`, a pair of that and anything else."""
TrainLoss = Callable[[Tensors, Any], Loss]
OuterLoss = Callable[[Tensors, Any, Hypers], Loss]


def evaluate(name: str, function: Callable[..., Loss], carried: Carried, *rest: Any, has_aux: bool) -> tuple[Tensor, Any]:
    """Call a loss.

    Args:
        name: how messages call it: "train_loss" or "outer_loss".
        function: the loss.
        carried: what it is called with; buffers that it changes are left there.
        rest: its arguments after the tensors.
        has_aux: whether it may return a pair of the loss and anything else.

    Returns:
        The loss, of shape (), and what else was returned, or None.

    Raises:
        TypeError: something else than a loss, or a pair that begins with one, was returned.
        ValueError: the loss is no real floating-point tensor of shape ().
    """
    token = CARRIED.set(carried)
    try:
        returned = function(dict(carried.params), *rest)
    finally:
        CARRIED.reset(token)
    pair = has_aux and isinstance(returned, tuple) and len(returned) == 2
    loss, aux = returned if pair else (returned, None)
    if isinstance(loss, Tensor) and not loss.ndim and loss.is_floating_point():
        return loss, aux
    wanted = "it must return the loss, a floating-point tensor of shape ()" + (", or a pair (loss, anything else)" if has_aux else "")
    if isinstance(loss, Tensor):
        hint = "compute it in real numbers" if not loss.ndim else "take its mean() or sum()" if loss.numel() > 1 else "take its squeeze()"
        raise ValueError(f"{name} returned {_described(returned)}; {wanted}: {hint}")
    raise TypeError(f"{name} returned {_described(returned)}; {wanted}{_remedy(returned)}")


def _remedy(returned: Any) -> str:
    if returned is None:
        return ": is a return missing?"
    if isinstance(returned, (bool, int, float)):
        return ": leave out .item() or float()"
    if isinstance(returned, Mapping):
        return ": return the entry that is the loss"
    return ": with has_aux=True it may return (loss, anything else)" if isinstance(returned, tuple) else ""


def _described(returned: Any) -> str:
    if isinstance(returned, Tensor):
        return f"a tensor of shape {tuple(returned.shape)} and dtype {returned.dtype}"
    if isinstance(returned, (tuple, list)):
        return f"a {type(returned).__name__} of {len(returned)}: ({', '.join(map(_described, returned[:4]))})"
    if isinstance(returned, Mapping):
        return f"a {type(returned).__name__} with {', '.join(map(repr, list(returned)[:6]))}"
    if isinstance(returned, (bool, int, float, str)):
        return f"{returned!r:.60} ({type(returned).__name__})"
    return "None" if returned is None else f"a {type(returned).__name__}"


def refuse_constant(name: str, what: str) -> ValueError:
    """The error for a loss that nothing which is differentiated enters."""
    return ValueError(
        f"{name} returned a tensor that does not depend on {what}: compute it from these arguments, without detach(), .item() or no_grad()"
    )


def gradients(loss: Tensor, params: Mapping[str, Tensor], *, graph: bool) -> Tensors:
    """Gradients of a training loss; tensors that do not enter it have none, as after `backward()`.

    Raises:
        ValueError: no tensor enters it.
        RuntimeError: a gradient is sparse.
    """
    found = torch.autograd.grad(loss, list(params.values()), create_graph=graph, allow_unused=True) if loss.requires_grad else ()
    grads = {name: grad for name, grad in zip(params, found, strict=False) if grad is not None}
    if not grads:
        raise refuse_constant("train_loss", "params")
    for name, grad in grads.items():
        if grad.layout != torch.strided:
            raise RuntimeError(f"the gradient of {name!r} is {grad.layout}; only dense gradients are supported: set sparse=False")
    return grads


def detached(tree: Any) -> Any:
    """A tree, of dicts, lists and the like, without the graphs of its tensors."""
    return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, tree)


def parted(tree: Any, chosen: Callable[[Any], bool]) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """The leaves of a tree that are chosen, and what puts others in their place."""
    leaves, structure = tree_flatten(tree)
    places = [i for i, leaf in enumerate(leaves) if chosen(leaf)]

    def rebuilt(replaced: list[Any]) -> Any:
        given = dict(zip(places, replaced, strict=True))
        return tree_unflatten([given.get(i, leaf) for i, leaf in enumerate(leaves)], structure)

    return [leaves[i] for i in places], rebuilt


def is_tensor(leaf: Any) -> bool:
    """Whether a leaf is a tensor."""
    return isinstance(leaf, Tensor)


def is_real(leaf: Any) -> bool:
    """Whether a leaf is a tensor that can be differentiated."""
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def followed(function: Callable[..., Any], *at: Any) -> Any:
    """What a function returns, a tree that begins with a tensor, if autograd follows its arguments, one level of torch.func deeper.

    The function may take gradients with respect to its arguments, by autograd, which says which of them have none. The result can be
    differentiated from outside as if that were a function of tensors.
    """
    kept: list[Callable[[list[Any]], Any]] = []

    def inside(*at: Any) -> tuple[Tensor, list[Tensor]]:
        tensors, rebuilt = parted(function(*at), is_tensor)
        kept.append(rebuilt)
        return tensors[0], tensors

    through: Any = torch.func.vjp(inside, *at, has_aux=True)
    return kept[0](through[2])
