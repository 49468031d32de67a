"""A window of steps in which an optimizer acts."""

from torch import Tensor

from hyperopt_nested.combinators.base import Step, combinator
from hyperopt_nested.ops import counter
from hyperopt_nested.trees import State


def _init(param: Tensor, *, steps: int) -> State:
    if not steps >= 1:
        raise ValueError(f"steps={steps!r} must be an integer >= 1")
    return {"step": counter(param)}


@combinator(_init, separable="element", check_with={"steps": 3})
def window(param: Tensor, grad: Tensor, state: State, step: Step, *, steps: int = 1000) -> tuple[Tensor, State]:
    r"""The optimizer in its first steps alone: what a step does falls linearly to zero, and then the parameter stays.

    With the optimizer's \(\theta_t + d_t\), step \(t = 0, 1, \dots\) of \(n\) gives \(\theta_t + \max(0, 1 - t/n)\, d_t\). It is made for
    what learns a hyper: the value is learned early and then stays.

    Args:
        steps: \(n \ge 1\).

    Example:
        >>> import hyperopt_nested as hn
        >>> learner = hn.window(hn.adam(lr=0.1), steps=150)
        >>> optimizer = hn.adamw(lr=hn.learn(1e-3, by=learner, via="log"))
    """
    share = (1 - state["step"] / steps).clamp(min=0)
    return param + share * (step(param, grad) - param), {"step": state["step"] + 1}
