"""Averages over time of the weights."""

import torch
from torch import Tensor

from hyperopt_nested.combinators.base import Step, combinator
from hyperopt_nested.domains import Interval
from hyperopt_nested.ops import counter
from hyperopt_nested.rules import copy_of
from hyperopt_nested.trees import State


def _init_lookahead(param: Tensor, *, k: int) -> State:
    if not k >= 1:
        raise ValueError(f"k={k!r} must be an integer >= 1")
    return {"step": counter(param), "eval_params": copy_of(param)}


@combinator(_init_lookahead, separable="element", check_with={"k": 2})
def lookahead(
    param: Tensor, grad: Tensor, state: State, step: Step, *, alpha: Tensor = Interval(0.5, 0.0, 1.0), k: int = 5
) -> tuple[Tensor, State]:
    r"""Lookahead (Zhang et al. 2019, arXiv 1907.08610, algorithm 1): every `k` steps the slow weights go a part of the way to the fast.

    The parameters are the fast weights; the slow ones are what `eval_params` returns.

    Args:
        alpha: that part, in [0, 1]. Its hypergradient is zero on the other steps.
        k: steps from one synchronisation to the next, >= 1.

    Example:
        >>> import hyperopt_nested as hn
        >>> hn.lookahead(hn.adamw(lr=1e-3)).rule.name
        'lookahead(adamw)'
    """
    fast, slow, count = step(param, grad), state["eval_params"], state["step"] + 1
    syncs = count % k == 0
    together = slow + alpha * (fast - slow)
    return torch.where(syncs, together, fast), {"step": count, "eval_params": torch.where(syncs, together, slow)}


def _init_ema(param: Tensor, *, decay: float) -> State:
    if not 0 <= decay <= 1:
        raise ValueError(f"decay={decay!r} must be in [0, 1]")
    return {"eval_params": copy_of(param)}


@combinator(_init_ema, separable="element")
def ema(param: Tensor, grad: Tensor, state: State, step: Step, *, decay: float = 0.999) -> tuple[Tensor, State]:
    """The optimizer, with an exponential moving average of its weights, which is what `eval_params` returns.

    Args:
        decay: decay rate of the average, in [0, 1]; an option, since no training gradient depends on it.

    Example:
        >>> import hyperopt_nested as hn
        >>> hn.ema(hn.sgd(lr=0.1), decay=0.99).rule.name
        'ema(sgd)'
    """
    new = step(param, grad)
    return new, {"eval_params": decay * state["eval_params"] + (1 - decay) * new}
