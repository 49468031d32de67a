"""Steps that read the loss."""

import torch
from torch import Tensor

from hyperopt_nested.combinators.base import Step, combinator
from hyperopt_nested.domains import Positive, Real, StepLoss
from hyperopt_nested.ops import counter, kink, zeros_like
from hyperopt_nested.rules import copy_of
from hyperopt_nested.trees import State


def _init_null_step(param: Tensor) -> State:
    count = counter(param)
    largest = torch.full_like(count, torch.finfo(count.dtype).max)
    return {"eval_params": copy_of(param), "grad": zeros_like(param), "loss": largest}


@combinator(_init_null_step, separable="element")
def null_step(param: Tensor, grad: Tensor, state: State, step: Step, *, loss: Tensor = StepLoss()) -> tuple[Tensor, State]:
    r"""The optimizer, with each step taken back that does not lower the loss (null steps of Chu et al. 2025, arXiv 2502.11229).

    The weights \(x^+\) after a step are on trial. With the next loss \(f\) they become the best point \(x\) if \(f(x^+) \le f(x)\);
    otherwise the next step starts again from \(x\) and its gradient. Hypers learn from the gradient at \(x^+\) in both cases: a learning
    rate that was too high comes down, and training goes on from where it was. For losses without noise, as of full batches.

    The loss is that of `step(closure)`, or of `step(loss=loss)`. One that is NaN takes the step back too. `eval_params` returns \(x\),
    whose loss is known to be the lowest. The state of the optimizer inside, such as its momentum, is not taken back. It keeps two tensors
    of the parameter's shape.

    Args:
        loss: given by each step; it cannot be set or learned.

    Example:
        >>> import torch, hyperopt_nested as hn
        >>> w = torch.nn.Parameter(torch.ones(1))
        >>> lr = hn.learn(8.0, by=hn.adam(0.5), via="log")  # far too high
        >>> opt = hn.HyperOptimizer([w], hn.null_step(hn.sgd(lr)))
        >>> losses = []
        >>> for _ in range(8):
        ...     loss = w.square().sum() / 2
        ...     loss.backward()
        ...     opt.step(loss=loss)
        ...     opt.zero_grad()
        ...     losses.append(round(loss.item(), 2))
        >>> losses
        [0.5, 24.5, 10.19, 3.71, 1.26, 0.38, 0.06, 0.0]
    """
    accepted = loss <= state["loss"]
    at, slope = torch.where(accepted, param, state["eval_params"]), torch.where(accepted, grad, state["grad"])
    return step(at, slope), {"eval_params": at, "grad": slope, "loss": torch.where(accepted, loss, state["loss"])}


@combinator(separable="element", global_reduce=lambda grad: grad.square().sum())
def polyak(
    param: Tensor,
    grad: Tensor,
    state: State,
    step: Step,
    *,
    largest: Tensor = Positive(1.0),
    lower_bound: Tensor = Real(0.0),
    loss: Tensor = StepLoss(),
    reduced: Tensor,
) -> tuple[Tensor, State]:
    r"""The optimizer, with its updates scaled to Polyak's step size (\(\mathrm{SPS}_{\max}\) of Loizou et al. 2021, arXiv 2002.10542).

    With the loss \(f\), its gradient \(g\) of all tensors and the update \(u\) of the optimizer inside,

    \[x^+ = x + \min\left(\frac{f - f^*}{\|g\|^2}, \gamma\right) u.\]

    Around `sgd(lr=1 / c)` this is \(\mathrm{SPS}_{\max}\). The loss is that of `step(closure)`, or of `step(loss=loss)`.

    Args:
        largest: \(\gamma > 0\), the largest factor.
        lower_bound: \(f^*\), a lower bound of the loss. Where the loss is below it, nothing is stepped.
        loss: given by each step; it cannot be set or learned.

    Example:
        >>> import torch, hyperopt_nested as hn
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> opt = hn.HyperOptimizer([w], hn.polyak(hn.sgd(1.0)))
        >>> loss = w.norm()
        >>> loss.backward()
        >>> opt.step(loss=loss)  # 5 / 1 is more than the largest factor
        >>> w.detach()
        tensor([2.4000, 3.2000])
    """
    ratio = (loss - lower_bound) / reduced.clamp(min=torch.finfo(reduced.dtype).tiny)
    factor = torch.minimum(torch.where(kink(ratio) > 0, ratio, 0), kink(largest, ratio))
    return param + factor * (step(param, grad) - param), state
