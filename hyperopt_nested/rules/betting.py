"""Learners without a rate: tuners of a scale by betting on its hypergradients."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from hyperopt_nested.domains import Positive
from hyperopt_nested.ops import kink, safe_sqrt, zeros_like
from hyperopt_nested.rule import rule
from hyperopt_nested.rules._blocks import copy_of, larger
from hyperopt_nested.trees import State


def _init(*parts: str) -> Callable[..., State]:
    """The initializer of a state with the parameter's start, and with zeros of its shape for each part and each discount."""

    def init(param: Tensor, *, num_betas: int) -> State:
        if not num_betas >= 1:
            raise ValueError(f"num_betas={num_betas!r} must be an integer >= 1")
        return {"start": copy_of(param), **{part: {str(k): zeros_like(param) for k in range(1, num_betas + 1)} for part in parts}}

    return init


@rule(_init("reward", "squares", "largest"), separable="element")
def coin_betting(
    param: Tensor,  # noqa: ARG001
    grad: Tensor,
    state: State,
    *,
    eps: Tensor = Positive(1e-8),
    num_betas: int = 6,
    clip: bool = True,
) -> tuple[Tensor, State]:
    r"""Coin betting, the tuner of Mechanic (Cutkosky, Defazio and Mehta 2023, arXiv 2306.00144, algorithm 1): a learner without a rate.

    With the gradient \(h_t\), the start \(s_1\), and \(n\) discounts \(\beta_i = 1 - 10^{-i}\), the new value is \(\sum_i s_{t+1,i}\):

    \[m_{t,i} = \max(\beta_i m_{t-1,i}, |h_t|), \quad v_{t,i} = \beta_i^2 v_{t-1,i} + h_t^2, \quad
    r_{t,i} = \max(0, \beta_i r_{t-1,i} - h_t s_{t,i}), \quad
    s_{t+1,i} = \frac{s_1 m_{t,i} / n + r_{t,i}}{\sqrt{v_{t,i}} + \epsilon}\]

    It learns the `scale` of [`rescale`][hyperopt_nested.combinators.rescale.rescale], from a small start such as 1e-8, so that
    this is Mechanic. The published decay adds \(\lambda \lVert g_t\rVert \langle\theta_t, \theta_t - \theta_0\rangle /
    \lVert\theta_t\rVert\) to \(h_t\), which `learn(grad=...)` can do.

    Args:
        eps: \(\epsilon > 0\), added to the root.
        num_betas: \(n \ge 1\).
        clip: the authors' later form, as `optax.contrib.mechanize`: bets are on \(h_t\) clipped to \(\pm m_{t-1,i}\), rewards are
            remembered where they are negative, and \(\epsilon\) is added to \(|h_t|\) in \(m\). False: as above.

    Example:
        >>> import hyperopt_nested as hn
        >>> scale = hn.learn(1e-8, by=hn.coin_betting())
        >>> hn.rescale(hn.sgd(lr=1.0), scale=scale).learned["scale"]
        learn(1e-08, by=coin_betting(eps=1e-08))
    """
    size = kink(grad).abs() + (eps if clip else 0)
    new: State = {"start": state["start"], "reward": {}, "squares": {}, "largest": {}}
    start, bets = state["start"] / num_betas, []
    for key in state["reward"]:
        beta = 1 - 0.1 ** int(key)
        reward, squares, largest = (state[part][key] for part in ("reward", "squares", "largest"))
        outcome = torch.clamp(kink(kink(grad, largest), -largest), -largest, largest) if clip else grad
        reward = beta * reward - outcome * _bet(start, reward, squares, largest, eps)
        reward, squares, largest = reward if clip else _gain(reward), beta**2 * squares + grad * grad, larger(beta * largest, size)
        new["reward"][key], new["squares"][key], new["largest"][key] = reward, squares, largest
        bets.append(_bet(start, reward, squares, largest, eps))
    return sum(bets[1:], bets[0]), new


def _gain(reward: Tensor) -> Tensor:
    return torch.where(kink(reward) > 0, reward, 0)


def _bet(start: Tensor, reward: Tensor, squares: Tensor, largest: Tensor, eps: Tensor) -> Tensor:
    """The share of one discount in the value: its wealth over the root of its sum of squares."""
    return (start * largest + _gain(reward)) / (safe_sqrt(squares) + eps)


_AT_ONE = 0.9534382692512609  # erfi(1 / sqrt(2))
_REACH, _SPACING = 9.0, 0.25  # of arguments, and half of that between the nodes of the series


def erfi(x: Tensor) -> Tensor:
    r"""The imaginary error function, of any shape, to rounding for \(|x| \le 9\); arguments beyond are clamped.

    Rybicki's series of Dawson's integral, without its shift: \(\frac{2}{\pi} \sum_{n\ \mathrm{odd}} e^{2nhx - n^2h^2} / n\).
    """
    last = 1 + 2 * math.ceil((_REACH + 6) / _SPACING / 2)  # what is left out is less than e^-36 of the sum
    n = torch.arange(-last, last + 1, 2, dtype=x.dtype, device=x.device)
    x = torch.clamp(kink(kink(x, _REACH), -_REACH), -_REACH, _REACH)[..., None]
    return (torch.exp(n * _SPACING * (2 * x - n * _SPACING)) / n).sum(-1) * (2 / math.pi)


@rule(_init("squares", "reward"), separable="element")
def erfi_tuner(
    param: Tensor,  # noqa: ARG001
    grad: Tensor,
    state: State,
    *,
    eps: Tensor = Positive(1e-8),
    num_betas: int = 6,  # noqa: ARG001
) -> tuple[Tensor, State]:
    r"""The tuner of TRAC (Muppidi, Zhang and Yang 2024, arXiv 2405.16642, algorithm 2): a learner without a rate.

    With the gradient \(h_t\), the start \(s_1\), and discounts \(\beta_i = 1 - 10^{-i}\), the new value is
    \(\max(0, \sum_i s_{t+1,i})\):

    \[v_{t,i} = \beta_i^2 v_{t-1,i} + h_t^2, \quad \sigma_{t,i} = \beta_i \sigma_{t-1,i} - h_t, \quad
    s_{t+1,i} = \frac{s_1}{\mathrm{erfi}(1/\sqrt 2)}\, \mathrm{erfi}\Bigl(\frac{\sigma_{t,i}}{\sqrt{2 v_{t,i}} + \epsilon}\Bigr)\]

    It learns the `scale` of [`rescale`][hyperopt_nested.combinators.rescale.rescale], which is TRAC then, from a small start such as 1e-8.
    Before the first gradient that is not zero, the value is zero. Arguments of erfi are clamped to \(\pm 9\), where the value is
    \(10^{34} s_1\).

    Args:
        eps: \(\epsilon > 0\), added to the root.
        num_betas: how many discounts, >= 1.

    Example:
        >>> import hyperopt_nested as hn
        >>> scale = hn.learn(1e-8, by=hn.erfi_tuner())
        >>> hn.rescale(hn.adam(lr=1e-3), scale=scale).learned["scale"]
        learn(1e-08, by=erfi_tuner(eps=1e-08))
    """
    new: State = {"start": state["start"], "squares": {}, "reward": {}}
    parts = []
    for key, reward in state["reward"].items():
        beta = 1 - 0.1 ** int(key)
        new["squares"][key], new["reward"][key] = beta**2 * state["squares"][key] + grad * grad, beta * reward - grad
        parts.append(erfi(new["reward"][key] / (math.sqrt(2) * safe_sqrt(new["squares"][key]) + eps)))
    return state["start"] * _gain(sum(parts[1:], parts[0])) / _AT_ONE, new
