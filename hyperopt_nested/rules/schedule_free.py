"""Schedule-free SGD and AdamW."""

import torch
from torch import Tensor

from hyperopt_nested.domains import NonNegative, Positive, UnitInterval
from hyperopt_nested.ops import counter, kink, safe_sqrt, zeros_like
from hyperopt_nested.rule import Learn, rule
from hyperopt_nested.rules._blocks import accumulator, copy_of
from hyperopt_nested.trees import State


def _init(param: Tensor, *, lr: float | Learn, r: float | Learn, weight_lr_power: float | Learn, warmup_steps: int) -> State:
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps={warmup_steps!r} must be an integer >= 0")
    zero = accumulator(param, lr, r, weight_lr_power)
    return {"step": counter(param), "z": copy_of(param), "eval_params": copy_of(param), "lr_max": zero, "weight_sum": zero.clone()}


def _init_adamw(param: Tensor, *, lr: float | Learn, r: float | Learn, weight_lr_power: float | Learn, warmup_steps: int) -> State:
    start = _init(param, lr=lr, r=r, weight_lr_power=weight_lr_power, warmup_steps=warmup_steps)
    return {**start, "exp_avg_sq": zeros_like(param)}


def _step(
    param: Tensor, direction: Tensor, state: State, lr: Tensor, momentum: Tensor, r: Tensor, weight_lr_power: Tensor, warmup_steps: int
) -> tuple[Tensor, State]:
    """Step z along a direction, average it into x, and return the point between them. All three start at the parameter."""
    step, before = state["step"] + 1, state["lr_max"]
    lr = torch.where(step < warmup_steps, lr * step / max(warmup_steps, 1), lr)
    lr_max = torch.where(kink(lr.to(before.dtype), before) >= before, lr, before)
    positive = kink(lr_max) > 0
    power = torch.where(positive, torch.where(positive, lr_max, 1) ** weight_lr_power, torch.where(weight_lr_power == 0, 1, 0))
    weight = step**r * power
    weight_sum = state["weight_sum"] + weight
    share = torch.where(weight_sum > 0, weight / torch.where(weight_sum > 0, weight_sum, 1), 0)
    z, x = (torch.where(state["step"] == 0, param, state[key]) for key in ("z", "eval_params"))
    z = z - lr * direction
    x = x + share * (z - x)
    sums = {"lr_max": lr_max.to(before.dtype), "weight_sum": weight_sum.to(before.dtype)}
    return z + momentum * (x - z), {"step": step, "z": z, "eval_params": x, **sums}


@rule(_init, separable="element")
def schedule_free_sgd(
    param: Tensor,
    grad: Tensor,
    state: State,
    *,
    lr: Tensor = NonNegative(1.0),
    momentum: Tensor = UnitInterval(0.9),
    weight_decay: Tensor = NonNegative(0.0),
    r: Tensor = NonNegative(0.0),
    weight_lr_power: Tensor = NonNegative(2.0),
    warmup_steps: int = 0,
) -> tuple[Tensor, State]:
    r"""Schedule-free SGD (Defazio et al. 2024, arXiv 2405.15682).

    The parameters are the points \(y\) where gradients are taken, between \(z\), which is stepped, and \(x\), the average of all
    \(z\), which is what `eval_params` returns. Step \(t\) has the weight \(t^r\eta_{max}^p\) in that average, with the largest learning
    rate so far.

    Args:
        lr: learning rate \(\eta \ge 0\).
        momentum: share of \(x\) in \(y\), in [0, 1).
        weight_decay: that times \(y\) is added to the gradient, >= 0.
        r: exponent of the step number in a step's weight, >= 0.
        weight_lr_power: exponent \(p\) of the learning rate in a step's weight, >= 0.
        warmup_steps: steps in which the learning rate grows linearly to `lr`.

    Example:
        >>> import hyperopt_nested as hn
        >>> hn.schedule_free_sgd(lr=hn.learn(1.0)).learned
        {'lr': learn(1.0)}
    """
    return _step(param, grad + weight_decay * param, state, lr, momentum, r, weight_lr_power, warmup_steps)


@rule(_init_adamw, separable="element")
def schedule_free_adamw(
    param: Tensor,
    grad: Tensor,
    state: State,
    *,
    lr: Tensor = NonNegative(2.5e-3),
    beta1: Tensor = UnitInterval(0.9),
    beta2: Tensor = UnitInterval(0.999),
    eps: Tensor = Positive(1e-8),
    weight_decay: Tensor = NonNegative(0.0),
    r: Tensor = NonNegative(0.0),
    weight_lr_power: Tensor = NonNegative(2.0),
    warmup_steps: int = 0,
) -> tuple[Tensor, State]:
    r"""Schedule-free AdamW (Defazio et al. 2024, arXiv 2405.15682, algorithm 1); see `schedule_free_sgd`.

    As in the published program, it is the second moment that is corrected for its bias, not the learning rate.

    Args:
        lr: learning rate \(\eta \ge 0\).
        beta1: share of \(x\) in \(y\), in [0, 1).
        beta2: decay rate of the second moment, in [0, 1).
        eps: added to the root of the second moment, > 0.
        weight_decay: decoupled: \(z\) moves by `lr * weight_decay` of \(y\), >= 0.
        r: exponent of the step number in a step's weight, >= 0.
        weight_lr_power: exponent \(p\) of the learning rate in a step's weight, >= 0.
        warmup_steps: steps in which the learning rate grows linearly to `lr`.

    Example:
        >>> import hyperopt_nested as hn
        >>> hn.schedule_free_adamw(lr=hn.learn(2.5e-3)).learned
        {'lr': learn(0.0025)}
    """
    exp_avg_sq = beta2 * state["exp_avg_sq"] + (1 - beta2) * grad * grad
    direction = grad / (safe_sqrt(exp_avg_sq / (1 - beta2 ** (state["step"] + 1))) + eps) + weight_decay * param
    new, average = _step(param, direction, state, lr, beta1, r, weight_lr_power, warmup_steps)
    return new, {**average, "exp_avg_sq": exp_avg_sq}
