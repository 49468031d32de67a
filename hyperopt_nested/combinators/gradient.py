"""Transforms of the gradient: clipping and centralisation."""

import torch
from torch import Tensor

from hyperopt_nested.combinators.base import Step, combinator
from hyperopt_nested.domains import Positive
from hyperopt_nested.ops import kink, safe_sqrt
from hyperopt_nested.trees import State

_EPS = 1e-6  # as torch.nn.utils.clip_grad_norm_


def _scaled_to(grad: Tensor, norm: Tensor, max_norm: Tensor) -> Tensor:
    scale = max_norm / (norm + _EPS)
    return grad * torch.where(kink(scale, 1) < 1, scale, 1)


@combinator(separable="element")
def clip_by_value(param: Tensor, grad: Tensor, state: State, step: Step, *, max_value: Tensor = Positive(1.0)) -> tuple[Tensor, State]:
    """The optimizer, on gradients clipped entry by entry, as `torch.nn.utils.clip_grad_value_`.

    Args:
        max_value: largest absolute value of an entry, > 0. Where no entry is clipped, its hypergradient is zero.

    Example:
        >>> import hyperopt_nested as hn
        >>> hn.clip_by_value(hn.sgd(lr=0.1)).rule.name
        'clip_by_value(sgd)'
    """
    clipped = torch.where(kink(grad.abs(), max_value) > max_value, max_value * grad.sign(), grad)
    return step(param, clipped), state


@combinator
def clip_by_norm(param: Tensor, grad: Tensor, state: State, step: Step, *, max_norm: Tensor = Positive(1.0)) -> tuple[Tensor, State]:
    """The optimizer, on gradients that are scaled down, each tensor on its own, to a Euclidean norm of at most `max_norm`.

    As `torch.nn.utils.clip_grad_norm_` on one tensor, 1e-6 is added to the norm.

    Args:
        max_norm: largest Euclidean norm of a tensor's gradient, > 0. Where nothing is clipped, its hypergradient is zero.

    Example:
        >>> import hyperopt_nested as hn
        >>> hn.clip_by_norm(hn.sgd(lr=0.1)).rule.name
        'clip_by_norm(sgd)'
    """
    return step(param, _scaled_to(grad, safe_sqrt(grad.square().sum()), max_norm)), state


@combinator(separable="element", global_reduce=lambda grad: grad.square().sum())
def clip_by_global_norm(
    param: Tensor, grad: Tensor, state: State, step: Step, *, max_norm: Tensor = Positive(1.0), reduced: Tensor
) -> tuple[Tensor, State]:
    """The optimizer, on gradients scaled down together to a Euclidean norm of at most `max_norm`, as `torch.nn.utils.clip_grad_norm_`.

    The norm is that of the gradients of all tensors that one `Nested` or `HyperOptimizer` steps with a clipping rule. Put it outermost
    to clip the raw gradients; inside other combinators it sees what they make of the gradient.

    Args:
        max_norm: largest Euclidean norm of all gradients together, > 0. Where nothing is clipped, its hypergradient is zero.

    Example:
        >>> import hyperopt_nested as hn
        >>> hn.clip_by_global_norm(hn.sgd(lr=0.1)).rule.name
        'clip_by_global_norm(sgd)'
    """
    return step(param, _scaled_to(grad, safe_sqrt(reduced), max_norm)), state


@combinator(separable="row")
def centralize(param: Tensor, grad: Tensor, state: State, step: Step) -> tuple[Tensor, State]:
    """The optimizer, on gradients without their mean over each row (Yong et al. 2020, arXiv 2004.01461, equation 1).

    Tensors with fewer than two dimensions are left as they are.

    Example:
        >>> import hyperopt_nested as hn
        >>> hn.centralize(hn.sgd(lr=0.1)).rule.name
        'centralize(sgd)'
    """
    if grad.ndim < 2 or grad.numel() == 0:
        return step(param, grad), state
    return step(param, grad - grad.mean(tuple(range(1, grad.ndim)), keepdim=True)), state
