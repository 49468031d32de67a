"""Derivatives of an update with respect to learned hypers, as a function of their unconstrained values."""

from __future__ import annotations  # torch.compile does not evaluate annotations of inner functions

from collections.abc import Callable, Mapping
from typing import Any, get_args

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from hyperopt_nested.rule import Optimizer, Per
from hyperopt_nested.signatures import Separable
from hyperopt_nested.trees import map_tree

Named = dict[str, Tensor]
"""Tensors by name: parameters, their gradients, or unconstrained values of learned hypers."""

Update = Callable[[dict[str, Named]], tuple[Named, Any]]


def pullback(function: Callable[..., tuple[Any, Any]], *at: Any) -> tuple[Any, Any, Callable[..., Any]]:
    """A function's value and what else it returns, and its pull-back: from a cotangent of the value to those of all arguments.

    As `torch.func.vjp` with `has_aux`. Where no transform and no compiler looks on, autograd does the same with less overhead.
    """
    if not _nothing_looks_on():
        through: Any = torch.func.vjp(function, *at, has_aux=True)
        return through[0], through[2], through[1]
    flat, spec = tree_flatten(at)
    with torch.enable_grad():
        leaves = [leaf.detach().requires_grad_() for leaf in flat]
        value, aux = function(*tree_unflatten(leaves, spec))
    outputs, value_spec = tree_flatten(value)
    reached = [i for i, output in enumerate(outputs) if output.requires_grad]

    def pull(cotangent: Any) -> Any:
        cotangents, _ = tree_flatten(cotangent)
        along = [cotangents[i] for i in reached]
        if not reached:
            return tree_unflatten([torch.zeros_like(leaf) for leaf in leaves], spec)
        how: dict[str, bool] = {"allow_unused": True, "materialize_grads": True, "retain_graph": True}
        how["create_graph"] = any(each.requires_grad for each in along)
        with torch.enable_grad():
            return tree_unflatten(list(torch.autograd.grad([outputs[i] for i in reached], leaves, along, **how)), spec)

    return tree_unflatten([output.detach() for output in outputs], value_spec), _constant(aux), pull


def _constant(tree: Any) -> Any:
    """The same values, without graphs; of states, few leaves have one."""
    if isinstance(tree, dict):
        return {key: _constant(each) for key, each in tree.items()}
    if isinstance(tree, tuple):
        return tuple(map(_constant, tree))
    return tree.detach() if isinstance(tree, Tensor) and tree.requires_grad else tree


def _nothing_looks_on() -> bool:
    """Whether this runs without derivatives that are taken from outside, and without transforms; dispatch modes see what autograd calls."""
    return not torch.is_grad_enabled() and _is_eager()


def nothing_transforms() -> bool:
    """Whether this runs eagerly, without transforms, tracing or fake tensors."""
    return _is_eager() and not torch._C._len_torch_dispatch_stack()  # of this thread: torch's own flag is of all threads


def _is_eager() -> bool:
    """Whether this runs outside of compiled code and of transforms of torch.func."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is None


def pushforward(function: Callable[..., tuple[Any, Any]], *at: Any) -> tuple[Any, Any, Callable[..., Any]]:
    """A function's value and what else it returns, and its forward derivative: from tangents, one for each argument, to the value's.

    It is had as the pull-back of the pull-back: pulling v back is linear in v, so pulling tangents back through that pushes them forward.
    In eager mode that is several times faster than `torch.func.jvp`, and exactly the same.
    """
    value, aux, pull = pullback(function, *at)
    _, _, push = pullback(lambda cotangent: (pull(cotangent), ()), tree_map(torch.zeros_like, value))
    return value, aux, lambda *tangents: push(tangents)[0]


def linearize(update: Update, raws: dict[str, Named], keys: list[str]) -> tuple[Named, Any, dict[str, Named]]:
    """Do an update of many tensors, and differentiate them with respect to each learned hyper in `keys`, with a tangent of ones.

    Args:
        update: from unconstrained values, by learned hyper and key, to new tensors, by tensor, and anything else (states).
        raws: its argument.
        keys: learned hypers to differentiate with respect to.

    Returns:
        The new tensors, the rest, and for each of `keys`, by tensor, d(tensor)/d(raw), of the tensor's shape: element i holds the
        derivative with respect to the one entry of the hyper that belongs to element i.
    """
    if not keys:
        return *update(raws), {}
    params, states, push = pushforward(lambda chosen: update({**raws, **chosen}), {key: raws[key] for key in keys})
    zeros = map_tree(torch.zeros_like, {key: raws[key] for key in keys})
    sensitivities = {key: push({**zeros, key: map_tree(torch.ones_like, raws[key])}) for key in keys}
    return params, states, sensitivities


def forward_is_exact(optimizer: Optimizer, per: Per) -> bool:
    """Whether sensitivities with a tangent of ones are exact for a hyper of this granularity: each entry touches only its own part."""
    if per in ("model", "tensor"):
        return True
    order = get_args(Separable)
    return order.index(optimizer.rule.separable) <= order.index(per)


def pull_forward(grad: Tensor, sensitivity: Tensor, raw: Tensor) -> Tensor:
    """Hypergradient of a hyper's entries: the sum, over the elements that belong to each, of gradient times sensitivity."""
    product = grad * sensitivity
    dims = [dim for dim in range(raw.ndim) if raw.shape[dim] != product.shape[dim]]
    total = product.sum() if raw.ndim == 0 else product.sum(dims, keepdim=True) if dims else product
    return total.to(raw)


def pull_reverse(grads: Named, params_of: Callable[[dict[str, Named]], Named], raws: dict[str, Named]) -> dict[str, Named]:
    """Hypergradients of every hyper in `raws`, tensor by tensor, by the vector-Jacobian product of remembered updates."""
    params, _, pull = pullback(lambda raws: (params_of(raws), ()), raws)
    result: dict[str, Named] = pull({name: grads[name].to(param) for name, param in params.items()})[0]
    return result


def unused(function: Callable[[Named], Tensor], raws: Mapping[str, Tensor]) -> list[str]:
    """Names of the hypers that the function's value does not depend on at all."""
    leaves: Named = {name: torch.nn.Parameter(raw.detach().clone()) for name, raw in raws.items()}  # a leaf under functorch transforms too
    with torch.enable_grad():
        total = function(leaves).sum()
    if not total.requires_grad:
        return list(leaves)
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return [name for name, grad in zip(leaves, grads, strict=True) if grad is None]
