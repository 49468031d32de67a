"""Building blocks for authors of rules: initial states, and functions that stay differentiable where the textbook ones do not."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

State = dict[str, Any]
"""A tree: nested dicts whose leaves are tensors."""


def state_dtype(param: Tensor) -> torch.dtype:
    """The dtype updates are computed in: the parameter's own, or float32 if that is narrower."""
    return torch.promote_types(param.dtype, torch.float32)


def zeros_like(param: Tensor) -> Tensor:
    """Zeros of the parameter's shape, in `state_dtype(param)`."""
    return torch.zeros_like(param, dtype=state_dtype(param))


def counter(param: Tensor) -> Tensor:
    """A step counter at zero: a tensor of shape (), on the parameter's device."""
    return torch.zeros((), dtype=torch.float32, device=param.device)


def zeros(*names: str) -> Callable[[Tensor], State]:
    """Initialiser of a rule's state with one zero tensor of the parameter's shape a name.

    Example:
        >>> import hyperopt_nested as hn
        >>> hn.zeros("momentum")(torch.ones(2))
        {'momentum': tensor([0., 0.])}
    """

    def init(param: Tensor) -> State:
        return {name: zeros_like(param) for name in names}

    return init


def safe_sqrt(x: Tensor) -> Tensor:
    """Square root with derivative zero, instead of infinite, at zero (any shape; x >= 0).

    An infinite derivative times a zero one is how a coordinate without gradient turns a hypergradient into NaN.
    """
    positive = x > 0
    return torch.where(positive, torch.sqrt(torch.where(positive, x, 1)), 0)


def map_tree(function: Callable[..., Any], tree: State, *others: State) -> State:
    """Apply `function` leaf by leaf to trees of one structure."""
    return {
        key: map_tree(function, leaf, *(other[key] for other in others))
        if isinstance(leaf, dict)
        else function(leaf, *(other[key] for other in others))
        for key, leaf in tree.items()
    }
