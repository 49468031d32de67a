"""What rules share: initial states, moments and their bias correction."""

from collections.abc import Callable

import torch
from torch import Tensor

from hyperopt_nested.ops import counter, kink, number_dtype, safe_sqrt, state_dtype, zeros_like
from hyperopt_nested.rule import Learn
from hyperopt_nested.trees import State


def is_on(setting: float | Learn) -> bool:
    """Whether a hyper that switches a part of a rule on takes effect: it is learned, or not zero.

    Returns:
        True if it does.

    Example:
        >>> import hyperopt_nested as hn
        >>> hn.rules.is_on(0.0), hn.rules.is_on(hn.learn(0.0))
        (False, True)
    """
    return isinstance(setting, Learn) or setting != 0


def accumulator(param: Tensor, *settings: float | Learn) -> Tensor:
    """Zeros for a part of the state that depends on these hypers alone: one number, unless one of them is learned per row or element.

    Args:
        param: the parameter.
        settings: what `init` is given for the hypers.

    Returns:
        A tensor of shape (), in float64 where the device has it; or of the parameter's shape, in `state_dtype(param)`.

    Example:
        >>> import torch, hyperopt_nested as hn
        >>> hn.rules.accumulator(torch.ones(3), 0.9).shape
        torch.Size([])
    """
    many = any(isinstance(setting, Learn) and setting.per in ("row", "element") for setting in settings)
    return zeros_like(param) if many else param.new_zeros((), dtype=number_dtype(param.device))


def counted(*names: str) -> Callable[[Tensor], State]:
    """Make the initializer of a state with a step counter, `step`, and a zero tensor of the parameter's shape for each name.

    Returns:
        A function from a parameter to its state.

    Example:
        >>> import hyperopt_nested as hn
        >>> hn.rules.counted("momentum")(torch.ones(2))
        {'step': tensor(0., dtype=torch.float64), 'momentum': tensor([0., 0.])}
    """

    def init(param: Tensor) -> State:
        return {"step": counter(param), **{name: zeros_like(param) for name in names}}

    return init


def copy_of(param: Tensor) -> Tensor:
    """A copy of the parameter, in `state_dtype(param)`: where an average of the weights starts.

    Returns:
        A tensor of the parameter's shape.

    Example:
        >>> import torch, hyperopt_nested as hn
        >>> hn.rules.copy_of(torch.ones(2, dtype=torch.bfloat16))
        tensor([1., 1.])
    """
    return param.detach().to(state_dtype(param), copy=True)


def average(old: Tensor, new: Tensor, beta: Tensor) -> Tensor:
    """The exponential moving average after one more tensor, with decay rate `beta`.

    Returns:
        A tensor of the shape of `old`.

    Example:
        >>> import torch, hyperopt_nested as hn
        >>> hn.rules.average(torch.zeros(2), torch.ones(2), torch.tensor(0.75))
        tensor([0.2500, 0.2500])
    """
    return beta * old + (1 - beta) * new


def larger(x: Tensor, other: Tensor) -> Tensor:
    """The larger of two tensors, entry by entry, with a kink where they are equal.

    Returns:
        A tensor of their shape.

    Example:
        >>> import torch, hyperopt_nested as hn
        >>> hn.rules.larger(torch.tensor([1.0, 2.0]), torch.tensor(1.5))
        tensor([1.5000, 2.0000])
    """
    return torch.maximum(kink(x, other), other)


def smaller(x: Tensor, other: Tensor) -> Tensor:
    """The smaller of two tensors, entry by entry, with a kink where they are equal.

    Returns:
        A tensor of their shape.

    Example:
        >>> import torch, hyperopt_nested as hn
        >>> hn.rules.smaller(torch.tensor([1.0, 2.0]), torch.tensor(1.5))
        tensor([1.0000, 1.5000])
    """
    return torch.minimum(kink(x, other), other)


def moments(grad: Tensor, state: State, beta1: Tensor, beta2: Tensor) -> State:
    """Adam's step counter, and both moments after one more gradient, not corrected for their bias.

    Args:
        grad: any shape.
        state: with `step`, `exp_avg` and `exp_avg_sq`, as `counted("exp_avg", "exp_avg_sq")` starts it.
        beta1: decay rate of the first moment.
        beta2: decay rate of the second moment.

    Returns:
        The new state, with the same keys.

    Example:
        >>> import torch, hyperopt_nested as hn
        >>> state = hn.rules.counted("exp_avg", "exp_avg_sq")(torch.ones(2))
        >>> beta1, beta2 = torch.tensor(0.5), torch.tensor(0.75)
        >>> new = hn.rules.moments(torch.ones(2), state, beta1, beta2)
        >>> new["exp_avg"], new["exp_avg_sq"]
        (tensor([0.5000, 0.5000]), tensor([0.2500, 0.2500]))
    """
    second = beta2 * state["exp_avg_sq"] + (1 - beta2) * grad * grad
    return {"step": state["step"] + 1, "exp_avg": average(state["exp_avg"], grad, beta1), "exp_avg_sq": second}


def direction(step: Tensor, first: Tensor, second: Tensor, beta1: Tensor, beta2: Tensor, eps: Tensor) -> Tensor:
    """Bias-corrected first moment over the root of the bias-corrected second plus `eps` (Kingma and Ba 2015, algorithm 1).

    Returns:
        A tensor of the shape of `first`.

    Example:
        >>> import torch, hyperopt_nested as hn
        >>> step, beta, eps = torch.tensor([1.0, 0.5, 0.0])
        >>> first, second = torch.tensor([[1.0], [2.0]])
        >>> hn.rules.direction(step, first, second, beta, beta, eps)
        tensor([1.])
    """
    return first / (1 - beta1**step) / (safe_sqrt(second / (1 - beta2**step)) + eps)


def decayed(param: Tensor, grad: Tensor, lr: Tensor, weight_decay: Tensor, decoupled: bool) -> tuple[Tensor, Tensor]:
    """Parameter and gradient after weight decay: of the parameter if it is decoupled, else added to the gradient.

    Returns:
        Both.

    Example:
        >>> import torch, hyperopt_nested as hn
        >>> one, lr = torch.ones(1), torch.tensor(0.5)
        >>> hn.rules.decayed(one, one, lr, torch.tensor(0.5), decoupled=True)
        (tensor([0.7500]), tensor([1.]))
    """
    return (param - lr * weight_decay * param, grad) if decoupled else (param, grad + weight_decay * param)


def trust_ratio(weight_norm: Tensor, update_norm: Tensor, coefficient: Tensor | float = 1.0, eps: Tensor | float = 0.0) -> Tensor:
    """Coefficient times weight norm over update norm plus `eps`; 1 where either norm is zero (LARS, LAMB).

    Returns:
        A tensor of the shape of the norms.

    Example:
        >>> import torch, hyperopt_nested as hn
        >>> hn.rules.trust_ratio(torch.tensor(2.0), torch.tensor(4.0))
        tensor(0.5000)
    """
    defined = (kink(weight_norm) > 0) & (kink(update_norm) > 0)
    return torch.where(defined, coefficient * weight_norm / (torch.where(defined, update_norm, 1) + eps), 1)
