"""DiGraP (arXiv 2502.15895): directional gradient projection, with a strength that is learned for each tensor."""

from typing import Literal

import torch
from torch import Tensor

import hyperopt_nested as hn

Derivative = Literal["straight-through", "exact"]


def _init(param: Tensor, *, anchor: hn.typing.Anchor = "start", anchor_decay: float, derivative: Derivative) -> hn.typing.State:
    if derivative not in ("straight-through", "exact"):
        raise ValueError(f"derivative={derivative!r} must be 'straight-through' or 'exact'")
    return hn.rules.keep_anchor(param, anchor, decay=anchor_decay)


@hn.combinator(_init, check_with={"derivative": "exact"})
def directional_projection(
    param: Tensor,
    grad: Tensor,
    state: hn.typing.State,
    step: hn.typing.Step,
    *,
    strength: Tensor = hn.Interval(0.0, 0.0, 1.0),
    derivative: Derivative = "straight-through",
    anchor_decay: float = 1.0,
) -> tuple[Tensor, hn.typing.State]:
    r"""The optimizer, on gradients from which a share of their projection onto the displacement is taken.

    With the displacement \(d = \theta - \theta_0\) from the anchor, and \(p = \langle g, d\rangle d / \lVert d\rVert^2\), the optimizer
    steps with \(g - \omega p\) where \(\langle g, d\rangle \ge 0\), else with \(g\) (Huang et al. 2025, arXiv 2502.15895, equations 3,
    4, 6 and 7).

    Args:
        strength: \(\omega\) in [0, 1].
        anchor: \(\theta_0\): "start", the values before the first step, "zero", or a tensor.
        anchor_decay: as `hyperopt_nested.spd`.
        derivative: of the new values with respect to the strength. "straight-through" is \(p\), as published: whatever the optimizer
            is, and also where \(g\) was left as it is, \(\omega\) learns from the next gradient's product with it (equation 8).
            "exact" goes through the optimizer.

    Example:
        >>> import hyperopt_nested as hn
        >>> import ftp
        >>> ftp.directional_projection(hn.sgd(lr=0.1)).rule.name
        'directional_projection(sgd)'
    """
    moved = hn.rules.displacement(param, state)
    along, norm = (grad * moved).sum(), moved.square().sum()
    part = torch.where(norm > 0, along / torch.where(norm > 0, norm, 1), 0) * moved
    share = torch.where(hn.rules.kink(along) >= 0, strength, 0)
    if derivative == "exact":
        new = step(param, grad - share * part)
    else:
        new = step(param, grad - share.detach() * part) + (strength - strength.detach()) * part
    return new, hn.rules.moved_anchor(new, state, anchor_decay)


def digrap(
    base: hn.Optimizer,
    lr: float | hn.Learn = 0.1,
    *,
    anchor: hn.typing.Anchor = "start",
    anchor_decay: float = 1.0,
    derivative: Derivative = "straight-through",
) -> hn.Optimizer:
    r"""DiGraP around any optimizer of the engine (Huang et al. 2025, arXiv 2502.15895, algorithm 1): registered as "digrap".

    Each tensor has a strength \(\omega\) in [0, 1] that starts at 0 and is learned by Adam from \(\langle g_t, p_{t-1}\rangle\). Adam's
    step is the same for gradients of any scale, so the paper's normalization of these makes no difference but for Adam's eps.

    Args:
        base: the optimizer; the paper's is Adam.
        lr: learning rate of the strengths, \(\mu\) in the paper.
        anchor: "start", the values before the first step, "zero", or a tensor.
        anchor_decay: as `hyperopt_nested.spd`.
        derivative: as `directional_projection`.

    Returns:
        The `Optimizer`.

    Raises:
        TypeError: `base` is no optimizer of the engine.
        ValueError: an argument is outside its domain.

    Example:
        >>> import torch, hyperopt_nested as hn, ftp
        >>> model = torch.nn.Linear(2, 1)
        >>> digrap = ftp.digrap(hn.adam(lr=1e-3))
        >>> opt = hn.HyperOptimizer(model.named_parameters(), digrap)
        >>> opt.learned()
        {'strength/weight': 0.0, 'strength/bias': 0.0}
    """
    strength = hn.learn(0.0, by=hn.adam(lr=0.1).replace(lr=lr), per="tensor")
    return directional_projection(base, strength=strength, anchor=anchor, anchor_decay=anchor_decay, derivative=derivative)


hn.rules.register("digrap", digrap, check_with={"derivative": "exact"})
