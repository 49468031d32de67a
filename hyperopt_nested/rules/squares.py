"""Steps divided by the root of an average of squares: Adagrad, Adadelta, RMSprop and Adafactor."""

import torch
from torch import Tensor

from hyperopt_nested.domains import Interval, NonNegative, Positive, UnitInterval
from hyperopt_nested.ops import counter, kink, safe_sqrt, state_dtype, zeros, zeros_like
from hyperopt_nested.rule import Learn, rule
from hyperopt_nested.rules._blocks import counted, is_on, larger, smaller
from hyperopt_nested.trees import State


@rule(counted("sum"), separable="element")
def adagrad(
    param: Tensor,
    grad: Tensor,
    state: State,
    *,
    lr: Tensor = NonNegative(1e-2),
    lr_decay: Tensor = NonNegative(0.0),
    weight_decay: Tensor = NonNegative(0.0),
    initial_accumulator_value: Tensor = NonNegative(0.0),
    eps: Tensor = Positive(1e-10),
) -> tuple[Tensor, State]:
    """Adagrad (Duchi, Hazan and Singer 2011), as `torch.optim.Adagrad`.

    Args:
        lr: learning rate of the first step, >= 0.
        lr_decay: the learning rate of step t is `lr / (1 + (t - 1) * lr_decay)`, >= 0.
        weight_decay: added to the gradient times the parameter, >= 0.
        initial_accumulator_value: where the sum of squares starts, >= 0. The first update reads it: later ones have no derivative
            with respect to it.
        eps: added to the root of the sum, > 0.

    Example:
        >>> import hyperopt_nested as hn
        >>> hn.adagrad(lr=hn.learn(1e-2)).learned
        {'lr': learn(0.01)}
    """
    grad = grad + weight_decay * param
    total = torch.where(state["step"] == 0, initial_accumulator_value, state["sum"]) + grad * grad
    rate = lr / (1 + state["step"] * lr_decay)
    return param - rate * grad / (safe_sqrt(total) + eps), {"step": state["step"] + 1, "sum": total}


@rule(zeros("square_avg", "acc_delta"), separable="element")
def adadelta(
    param: Tensor,
    grad: Tensor,
    state: State,
    *,
    lr: Tensor = NonNegative(1.0),
    rho: Tensor = Interval(0.9, 0.0, 1.0),
    eps: Tensor = Positive(1e-6),
    weight_decay: Tensor = NonNegative(0.0),
) -> tuple[Tensor, State]:
    """Adadelta (Zeiler 2012, arXiv 1212.5701, algorithm 1), as `torch.optim.Adadelta`.

    Args:
        lr: a factor of the update, >= 0.
        rho: decay rate of the averages of squared gradients and of squared updates, in [0, 1].
        eps: added to both averages before their roots, > 0.
        weight_decay: added to the gradient times the parameter, >= 0.

    Example:
        >>> import hyperopt_nested as hn
        >>> hn.adadelta(rho=hn.learn(0.9)).learned
        {'rho': learn(0.9)}
    """
    grad = grad + weight_decay * param
    square_avg = rho * state["square_avg"] + (1 - rho) * grad * grad
    delta = torch.sqrt(state["acc_delta"] + eps) / torch.sqrt(square_avg + eps) * grad
    acc_delta = rho * state["acc_delta"] + (1 - rho) * delta * delta
    return param - lr * delta, {"square_avg": square_avg, "acc_delta": acc_delta}


def _init_rmsprop(param: Tensor, *, momentum: float | Learn, centered: bool) -> State:
    return zeros("square_avg", *["grad_avg"] * centered, *["momentum_buffer"] * is_on(momentum))(param)


@rule(_init_rmsprop, separable="element")
def rmsprop(
    param: Tensor,
    grad: Tensor,
    state: State,
    *,
    lr: Tensor = NonNegative(1e-2),
    alpha: Tensor = UnitInterval(0.99),
    eps: Tensor = Positive(1e-8),
    weight_decay: Tensor = NonNegative(0.0),
    momentum: Tensor = NonNegative(0.0),
    centered: bool = False,
) -> tuple[Tensor, State]:
    """RMSprop (Tieleman and Hinton 2012, lecture 6.5; centered: Graves 2013, arXiv 1308.0850), as `torch.optim.RMSprop`.

    A variance that rounding makes negative is taken as zero, where `torch.optim` returns NaN.

    Args:
        lr: learning rate, >= 0.
        alpha: decay rate of the averages, in [0, 1).
        eps: added to the root, > 0.
        weight_decay: added to the gradient times the parameter, >= 0.
        momentum: >= 0; at 0 and not learned, there is no buffer.
        centered: divide by the root of the gradient's variance, and not of its second moment.

    Example:
        >>> import hyperopt_nested as hn
        >>> hn.rmsprop(alpha=hn.learn(0.99)).learned
        {'alpha': learn(0.99)}
    """
    grad = grad + weight_decay * param
    new = {"square_avg": alpha * state["square_avg"] + (1 - alpha) * grad * grad}
    square = new["square_avg"]
    if centered:
        mean = new["grad_avg"] = state["grad_avg"] + (1 - alpha) * (grad - state["grad_avg"])
        square = square - mean * mean
    direction = grad / (safe_sqrt(square) + eps)
    if "momentum_buffer" in state:
        direction = new["momentum_buffer"] = momentum * state["momentum_buffer"] + direction
    return param - lr * direction, new


def _init_adafactor(param: Tensor) -> State:
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


@rule(_init_adafactor, separable="tensor")
def adafactor(
    param: Tensor,
    grad: Tensor,
    state: State,
    *,
    lr: Tensor = NonNegative(1e-2),
    beta2_decay: Tensor = Interval(-0.8, -float("inf"), 0.0),
    eps1: Tensor = Positive(2**-23),
    eps2: Tensor = NonNegative(1e-3),
    d: Tensor = Interval(1.0, 1.0, float("inf")),
    weight_decay: Tensor = NonNegative(0.0),
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

    Example:
        >>> import hyperopt_nested as hn
        >>> hn.adafactor(lr=hn.learn(1e-2)).learned
        {'lr': learn(0.01)}
    """
    step = state["step"] + 1
    weight, square = step**beta2_decay, grad * grad
    new = {"step": step}
    if "variance" in state:
        variance = new["variance"] = (1 - weight) * state["variance"] + weight * square
    else:  # mean last, so that these keep their shape when each element has its own beta2_decay
        row, col = ((1 - weight) * state[key] + weight * square for key in ("row_var", "col_var"))
        new["row_var"], new["col_var"] = _mean(row, -1), _mean(col, -2)
        variance = new["row_var"] * new["col_var"] / larger(_mean(new["row_var"], -2), eps1)
    update = grad / larger(safe_sqrt(variance), eps1)
    clip = _rms(update) / d
    rate = larger(_rms(param), eps2) * smaller(lr, 1 / torch.sqrt(step))
    return param - lr * weight_decay * param - rate / kink(clip, 1.0).clamp(min=1) * update, new
