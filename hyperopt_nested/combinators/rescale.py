"""One scale of all the updates that an optimizer has made."""

import torch
from torch import Tensor

from hyperopt_nested.combinators.base import Step, combinator
from hyperopt_nested.domains import NonNegative
from hyperopt_nested.ops import zeros_like
from hyperopt_nested.rules._anchor import keep_anchor
from hyperopt_nested.trees import State


def _init(param: Tensor) -> State:
    return {**keep_anchor(param, "start"), "displacement": zeros_like(param)}


@combinator(_init, separable="element")
def rescale(param: Tensor, grad: Tensor, state: State, step: Step, *, scale: Tensor = NonNegative(1.0)) -> tuple[Tensor, State]:
    r"""The optimizer, with one scale of the sum of all its updates (Cutkosky et al. 2023, arXiv 2306.00144, section 2).

    With the updates \(u_t\) of the optimizer inside and the weights \(\theta_0\) before the first step, the weights are

    \[\theta_{t+1} = \theta_0 + s \Delta_{t+1}, \qquad \Delta_{t+1} = \Delta_t + u_t.\]

    The hypergradient of the scale is \(h_t = \langle g_t, \Delta_t\rangle\), the signal of the tuners of Mechanic and TRAC: learned by
    [`coin_betting`][hyperopt_nested.rules.betting.coin_betting] this is Mechanic.

    Its state holds \(\theta_0\) (`anchor`) and \(\Delta_t\) (`displacement`). Weights that are changed between steps come back to
    \(\theta_0 + s \Delta\) in the next step.

    Args:
        scale: \(s \ge 0\), of all updates so far and not only of the next one.

    Example:
        >>> import hyperopt_nested as hn
        >>> scale = hn.learn(1e-8, by=hn.coin_betting())
        >>> mechanic = hn.rescale(hn.adamw(lr=1.0), scale=scale)
        >>> mechanic.rule.name
        'rescale(adamw)'
    """
    displacement = state["displacement"] + (step(param, grad) - param)
    return torch.add(state["anchor"], scale * displacement), {**state, "displacement": displacement}
