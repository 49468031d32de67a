"""Decay of weights towards zero or towards an anchor."""

import torch
from torch import Tensor

from hyperopt_nested.combinators.base import Step, combinator
from hyperopt_nested.domains import NonNegative
from hyperopt_nested.ops import kink
from hyperopt_nested.projections import frobenius
from hyperopt_nested.rules._anchor import Anchor, displacement, keep_anchor, moved_anchor
from hyperopt_nested.trees import State


def _to_zero(param: Tensor, *, anchor: Anchor = "zero", anchor_decay: float) -> State:
    return keep_anchor(param, anchor, decay=anchor_decay)


def _to_start(param: Tensor, *, anchor: Anchor = "start", anchor_decay: float) -> State:
    return keep_anchor(param, anchor, decay=anchor_decay)


@combinator(_to_zero, separable="element")
def coupled_decay(
    param: Tensor, grad: Tensor, state: State, step: Step, *, decay: Tensor = NonNegative(1e-2), anchor_decay: float = 1.0
) -> tuple[Tensor, State]:
    r"""The optimizer, on \(g + \lambda(\theta - \theta_0)\): weight decay as a term of the loss.

    Args:
        decay: \(\lambda \ge 0\).
        anchor: \(\theta_0\): "zero", "start" or a tensor.
        anchor_decay: \(\beta\) in [0, 1]; after each step, \(\theta_0 \leftarrow \beta \theta_0 + (1 - \beta) \theta\). 1: it is fixed.

    Example:
        >>> import hyperopt_nested as hn
        >>> hn.coupled_decay(hn.sgd(lr=0.1), decay=hn.learn(1e-2)).learned
        {'decay': learn(0.01)}
    """
    new = step(param, grad + decay * displacement(param, state))
    return new, moved_anchor(new, state, anchor_decay)


@combinator(_to_start, separable="element")
def l2_sp(
    param: Tensor, grad: Tensor, state: State, step: Step, *, decay: Tensor = NonNegative(1e-2), anchor_decay: float = 1.0
) -> tuple[Tensor, State]:
    r"""L2-SP: coupled decay towards the pre-trained weights (Li et al. 2018, arXiv 1802.01483).

    Args:
        decay: strength, \(\alpha \ge 0\).
        anchor: the pre-trained weights: "start", the values before the first step, or a tensor.
        anchor_decay: as of `coupled_decay`.

    Example:
        >>> import hyperopt_nested as hn
        >>> hn.l2_sp(hn.sgd(lr=0.1)).rule.name
        'l2_sp(sgd)'
    """
    new = step(param, grad + decay * displacement(param, state))
    return new, moved_anchor(new, state, anchor_decay)


@combinator(_to_zero, separable="element")
def decoupled_decay(
    param: Tensor, grad: Tensor, state: State, step: Step, *, decay: Tensor = NonNegative(1e-2), lr: Tensor, anchor_decay: float = 1.0
) -> tuple[Tensor, State]:
    r"""The optimizer, and apart from it \(-\eta\lambda(\theta - \theta_0)\) (Loshchilov and Hutter 2019, arXiv 1711.05101).

    The optimizer inside must have a hyper `lr`, which is \(\eta\): around `adam` this is `adamw`.

    Args:
        decay: \(\lambda \ge 0\).
        anchor: \(\theta_0\): "zero", "start" or a tensor.
        anchor_decay: \(\beta\) in [0, 1]; after each step, \(\theta_0 \leftarrow \beta \theta_0 + (1 - \beta) \theta\). 1: it is fixed.

    Example:
        >>> import hyperopt_nested as hn
        >>> hn.decoupled_decay(hn.sgd(lr=0.1), decay=hn.learn(1e-2)).learned
        {'decay': learn(0.01)}
    """
    new = step(param, grad) - lr * decay * displacement(param, state)
    return new, moved_anchor(new, state, anchor_decay)


@combinator(_to_start)
def spd(
    param: Tensor, grad: Tensor, state: State, step: Step, *, decay: Tensor = NonNegative(1.0), anchor_decay: float = 1.0
) -> tuple[Tensor, State]:
    r"""Selective projection decay (Tian et al., NeurIPS 2024, arXiv 2411.01713); around `adam` it is AdamSPD.

    Where the gradient and the tensor's displacement from its anchor have a positive inner product (the descent direction agrees with
    the way back), the new values move back by the share \(\lambda r\) of their displacement; \(r = 1 - \lVert d_{old}\rVert /
    \lVert d_{new}\rVert\), clamped to [0, 1], in the Frobenius norm.

    Args:
        decay: strength, \(\lambda \ge 0\); 1 undoes the growth of the distance.
        anchor: the pre-trained weights: "start", the values before the first step, or a tensor.
        anchor_decay: as of `coupled_decay`.

    Example:
        >>> import hyperopt_nested as hn
        >>> hn.spd(hn.adam(lr=1e-3)).rule.name
        'spd(adam)'
    """
    before = displacement(param, state)
    new = step(param, grad)
    after = displacement(new, state)
    old_norm, new_norm = frobenius.norms(before), frobenius.norms(after)
    grew = (kink(new_norm, old_norm) > 0) & (new_norm > old_norm)
    ratio = torch.where(grew, 1 - old_norm / torch.where(grew, new_norm, 1), 0)
    pulls_back = kink((grad * before).sum()) > 0
    new = torch.where(pulls_back, new - decay * ratio * after, new)
    return new, moved_anchor(new, state, anchor_decay)
