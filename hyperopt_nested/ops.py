"""Building blocks for authors of rules: initial states, and functions that stay differentiable where the textbook ones do not."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from operator import mul

import torch
from torch import Tensor

from hyperopt_nested.trees import State


def state_dtype(param: Tensor) -> torch.dtype:
    """The dtype updates are computed in: the parameter's own, or float32 if that is narrower.

    Returns:
        The dtype.

    Example:
        >>> import torch, hyperopt_nested as hn
        >>> hn.rules.state_dtype(torch.ones(2, dtype=torch.bfloat16))
        torch.float32
    """
    return torch.promote_types(param.dtype, torch.float32)


def row_shape(param: Tensor) -> tuple[int, ...]:
    """The shape of what a tensor has one of for each row, index of dim 0; a tensor with fewer than two dimensions is one row."""
    return (*param.shape[:1], *(1 for _ in param.shape[1:])) if param.ndim > 1 else (1,) * param.ndim


def zeros_like(param: Tensor) -> Tensor:
    """Zeros of the parameter's shape, in `state_dtype(param)`.

    Returns:
        The zeros.

    Example:
        >>> import torch, hyperopt_nested as hn
        >>> hn.rules.zeros_like(torch.ones(2))
        tensor([0., 0.])
    """
    return torch.zeros_like(param, dtype=state_dtype(param))


def number_dtype(device: torch.device) -> torch.dtype:
    """The dtype of single numbers: float64, or float32 on a device that has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def counter(param: Tensor) -> Tensor:
    """A step counter at zero: a tensor of shape (), on the parameter's device, in float64 where the device has it.

    In float32 a counter stands still at 2^24.

    Returns:
        The zero.

    Example:
        >>> import torch, hyperopt_nested as hn
        >>> hn.rules.counter(torch.ones(2))
        tensor(0., dtype=torch.float64)
    """
    return torch.zeros((), dtype=number_dtype(param.device), device=param.device)


def zeros(*names: str) -> Callable[[Tensor], State]:
    """Initialiser of a rule's state with one zero tensor of the parameter's shape a name.

    Returns:
        A function from a parameter to its state.

    Example:
        >>> import hyperopt_nested as hn
        >>> hn.rules.zeros("momentum")(torch.ones(2))
        {'momentum': tensor([0., 0.])}
    """

    def init(param: Tensor) -> State:
        return {name: zeros_like(param) for name in names}

    return init


def finite(x: Tensor, other: float = 0.0) -> Tensor:
    """The entries of a tensor that are finite, and a number in the place of the others."""
    return torch.nan_to_num(x, other, other, other)


def safe_sqrt(x: Tensor) -> Tensor:
    """Square root with derivative zero, instead of infinite, at zero (any shape; x >= 0).

    An infinite derivative times a zero one is how a coordinate without gradient turns a hypergradient into NaN.

    Returns:
        The roots.

    Example:
        >>> import torch, hyperopt_nested as hn
        >>> x = torch.tensor([0.0, 4.0], requires_grad=True)
        >>> hn.rules.safe_sqrt(x).sum().backward()
        >>> x.grad
        tensor([0.0000, 0.2500])
    """
    positive = kink(x) > 0
    return torch.where(positive, torch.sqrt(torch.where(positive, x, 1)), 0)


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor fills a piece of memory without gaps, in some order of its dimensions."""
    steps = sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size != 1)
    counts = accumulate((size for _, size in steps), mul, initial=1)
    return all(stride == count for (stride, _), count in zip(steps, counts, strict=False))


def positions(param: Tensor) -> Tensor:
    """Where each element lies in memory, if the tensor is dense, or else in its order; int32, of the tensor's shape."""
    found = torch.arange(param.numel(), dtype=torch.int32, device=param.device)
    if param.is_contiguous() or not is_dense(param):
        return found.view(param.shape)
    return found.as_strided(param.shape, param.stride())


def is_stored(tensor: Tensor) -> bool:
    """Whether the storage of a dense tensor holds all of it."""
    return tensor.untyped_storage().nbytes() >= (tensor.storage_offset() + tensor.numel()) * tensor.itemsize


_watchers: list[list[Tensor]] = []


def kink(x: Tensor, other: Tensor | float | None = None) -> Tensor:
    """Declare that an update is not differentiable where `x` is zero, or where `x` equals `other`; returns `x` itself.

    Write it where an update branches: `torch.where(kink(norm, radius) > radius, ...)`, `kink(x).sign()`. It costs nothing but in
    `watch_kinks`, by which the test kit stays clear of these points.

    Args:
        x: any shape.
        other: broadcastable against `x`.

    Returns:
        `x`.

    Example:
        >>> import torch, hyperopt_nested as hn
        >>> x = torch.tensor([-2.0, 3.0])
        >>> hn.rules.kink(x).sign()
        tensor([-1.,  1.])
    """
    if _watchers:
        _watchers[-1].append(x if other is None else x - other)
    return x


@contextmanager
def watch_kinks() -> Iterator[list[Tensor]]:
    """Collect what `kink` declares inside the context: an update is smooth on a path on which no entry changes its sign.

    Returns:
        A context manager whose value is a list of the tensors so far.

    Example:
        >>> import torch, hyperopt_nested as hn
        >>> with hn.rules.watch_kinks() as kinks:
        ...     _ = hn.rules.kink(torch.tensor(2.0), 0.5)
        >>> kinks
        [tensor(1.5000)]
    """
    _watchers.append([])
    try:
        yield _watchers[-1]
    finally:
        _watchers.pop()
