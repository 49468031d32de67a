"""Adafactor."""

import math

import torch
from torch import Tensor

from hyperopt_nested.domains import Hyper, NonNegative, Positive
from hyperopt_nested.ops import counter, kink, safe_sqrt, state_dtype, zeros_like
from hyperopt_nested.rule import rule
from hyperopt_nested.trees import State


def _init(param: Tensor) -> State:
    if param.ndim < 2:
        return {"step": counter(param), "variance": zeros_like(param)}
    *batch, rows, columns = param.shape
    row_var, col_var = (param.new_zeros(*batch, *shape, dtype=state_dtype(param)) for shape in ((rows, 1), (1, columns)))
    return {"step": counter(param), "row_var": row_var, "col_var": col_var}


def _mean(x: Tensor, dim: int) -> Tensor:
    """Mean over a dimension that is kept; zero if it is empty."""
    return x.sum(dim, keepdim=True) / max(x.shape[dim], 1)


def _rms(x: Tensor) -> Tensor:
    return safe_sqrt(x.square().sum() / max(x.numel(), 1))


@rule(
    _init,
    coupling="tensor",
    lr=NonNegative(1e-2),
    beta2_decay=Hyper(-0.8, "NonPositive", lower=-math.inf, upper=0.0),
    eps1=Positive(2**-23),
    eps2=NonNegative(1e-3),
    d=Hyper(1.0, "AtLeastOne", lower=1.0),
    weight_decay=NonNegative(0.0),
)
def adafactor(
    param: Tensor,
    grad: Tensor,
    state: State,
    *,
    lr: Tensor,
    beta2_decay: Tensor,
    eps1: Tensor,
    eps2: Tensor,
    d: Tensor,
    weight_decay: Tensor,
) -> tuple[Tensor, State]:
    """Adafactor (Shazeer and Stern 2018, arXiv 1804.04235, algorithms 4 and 5), as `torch.optim.Adafactor`.

    The second moment of a tensor with two dimensions or more is kept as means over each of the last two. The step is relative to the
    root mean square of the parameter, and never larger than `1 / sqrt(t)` of it in step t.

    Args:
        lr: largest relative step size, >= 0.
        beta2_decay: the second moment takes `t**beta2_decay` of the new squares in step t, <= 0.
        eps1: smallest root of the second moment, > 0. `torch.optim` has eps1=None for the machine epsilon of the parameter's dtype;
            the default is that of float32, whatever the dtype.
        eps2: smallest root mean square of the parameter to be relative to, >= 0.
        d: largest root mean square of the update before the learning rate, >= 1.
        weight_decay: decoupled: the parameter shrinks by `lr * weight_decay` of itself, >= 0.
    """
    step = state["step"] + 1
    weight, square = step**beta2_decay, grad * grad
    new = {"step": step}
    if "variance" in state:
        variance = new["variance"] = (1 - weight) * state["variance"] + weight * square
    else:  # mean last, so that these keep their shape when each element has its own beta2_decay
        row, col = ((1 - weight) * state[key] + weight * square for key in ("row_var", "col_var"))
        new["row_var"], new["col_var"] = _mean(row, -1), _mean(col, -2)
        mean = _mean(new["row_var"], -2)
        variance = new["row_var"] * new["col_var"] / torch.maximum(kink(mean, eps1), eps1)
    root = safe_sqrt(variance)
    update = grad / torch.maximum(kink(root, eps1), eps1)
    clip, size, bound = _rms(update) / d, _rms(param), 1 / torch.sqrt(step)
    rate = torch.maximum(kink(size, eps2), eps2) * torch.minimum(kink(lr, bound), bound)
    return param - lr * weight_decay * param - rate / kink(clip, 1.0).clamp(min=1) * update, new
