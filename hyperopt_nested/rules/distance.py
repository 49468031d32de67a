"""Steps as long as the distance from the start, which is estimated on the way: D-Adaptation, Prodigy and DoG."""

import torch
from torch import Tensor

from hyperopt_nested.domains import NonNegative, Positive, UnitInterval
from hyperopt_nested.ops import finite, kink, safe_sqrt
from hyperopt_nested.rule import Learn, rule
from hyperopt_nested.rules._blocks import accumulator, average, copy_of, counted, decayed, larger, smaller
from hyperopt_nested.trees import State


def _initial(param: Tensor, state: State) -> Tensor:
    """The parameter before its first step."""
    return torch.where(state["step"] == 0, param, state["initial"])


def _sums(*terms: Tensor) -> Tensor:
    """Sums of the entries that are finite: one that is not does not stop all tensors."""
    return torch.stack([finite(term).sum() for term in terms])


def _rate(state: State, lr: Tensor, beta1: Tensor, beta2: Tensor, use_bias_correction: bool) -> Tensor:
    """The learning rate of a step: the estimated distance times `lr`, and Adam's bias correction."""
    d, step = state["d"], state["step"] + 1
    rate: Tensor = d * lr * torch.sqrt(1 - beta2**step) / (1 - beta1**step) if use_bias_correction else d * lr
    return rate


def _ratio(numerator: Tensor, denominator: Tensor, moves: Tensor, d: Tensor) -> Tensor:
    """An estimate of the distance; the old one as long as all gradients are zero."""
    return torch.where(moves, numerator / torch.where(moves, denominator, 1), d)


def _init_dadapt(param: Tensor, *, beta2: float | Learn, d0: float) -> State:
    zero = accumulator(param, beta2)
    return {**counted("exp_avg", "exp_avg_sq", "s")(param), "d": zero + _checked(d0), "numerator": zero}


def _checked(d0: float) -> float:
    if not d0 > 0:
        raise ValueError(f"d0={d0!r} must be > 0")
    return d0


def _dadapt_terms(
    param: Tensor,
    grad: Tensor,
    state: State,
    *,
    lr: Tensor,
    beta1: Tensor,
    beta2: Tensor,
    eps: Tensor,
    weight_decay: Tensor,
    decouple: bool,
    use_bias_correction: bool,
) -> Tensor:
    rate = _rate(state, lr, beta1, beta2, use_bias_correction)
    _, grad = decayed(param, grad, rate, weight_decay, decouple)
    along = rate * grad * state["s"] / (safe_sqrt(state["exp_avg_sq"]) + eps)
    return _sums(along, kink(average(state["s"], rate * grad, torch.sqrt(beta2))).abs())


@rule(_init_dadapt, separable="element", global_reduce=_dadapt_terms)
def dadapt_adam(
    param: Tensor,
    grad: Tensor,
    state: State,
    *,
    lr: Tensor = NonNegative(1.0),
    beta1: Tensor = UnitInterval(0.9),
    beta2: Tensor = UnitInterval(0.999),
    eps: Tensor = Positive(1e-8),
    weight_decay: Tensor = NonNegative(0.0),
    decouple: bool = False,
    use_bias_correction: bool = False,
    d0: float = 1e-6,  # noqa: ARG001 - of the initial state
    growth_rate: float | None = None,
    reduced: Tensor,
) -> tuple[Tensor, State]:
    r"""Adam with D-Adaptation (Defazio and Mishchenko 2023, arXiv 2301.07733, algorithm 5), as `dadaptation.DAdaptAdam`.

    The learning rate is \(\gamma_k = d_k\,\eta\), with an estimate \(d\) of the distance from the start to the solution, over all tensors:

    \(s_{k+1} = \sqrt{\beta_2}\,s_k + (1 - \sqrt{\beta_2})\,\gamma_k g_k\), \(r_{k+1} = \sqrt{\beta_2}\,r_k + (1 - \sqrt{\beta_2})\,
    \gamma_k \langle g_k, s_k / (\sqrt{v_k} + \epsilon)\rangle\), \(d_{k+1} = \max(d_k, r_{k+1} / ((1 - \sqrt{\beta_2}) \|s_{k+1}\|_1))\).

    All tensors that one `Nested` or `HyperOptimizer` steps with it have one estimate; a tensor without a gradient keeps that of its last
    step. Where all gradients so far are zero, nothing moves.

    Args:
        lr: factor \(\eta\) of the learning rate, >= 0.
        beta1: decay rate of the first moment, in [0, 1).
        beta2: decay rate of the second moment, in [0, 1); its root is that of the estimate's averages.
        eps: added to the root of the second moment, > 0.
        weight_decay: added to the gradient times the parameter, >= 0.
        decouple: shrink the parameter by the learning rate times `weight_decay` of itself instead, as AdamW.
        use_bias_correction: correct the moments for their bias, as Adam.
        d0: the first estimate, > 0; it should be below the distance.
        growth_rate: the largest factor by which the estimate grows in a step, >= 1; None is no bound.

    Example:
        >>> import hyperopt_nested as hn
        >>> hn.dadapt_adam(weight_decay=hn.learn(0.1)).learned
        {'weight_decay': learn(0.1)}
    """
    rate, root = _rate(state, lr, beta1, beta2, use_bias_correction), torch.sqrt(beta2)
    shrunk, grad = decayed(param, grad, rate, weight_decay, decouple)
    along, size = reduced.unbind()
    moves = kink(size) > 0
    numerator = average(state["numerator"], along, root)
    d_hat = _ratio(numerator, (1 - root) * size, moves, state["d"])
    bounded = d_hat if growth_rate is None else smaller(d_hat, state["d"] * growth_rate)
    new = {
        "step": state["step"] + moves,
        "exp_avg": average(state["exp_avg"], rate * grad, beta1),
        "exp_avg_sq": average(state["exp_avg_sq"], grad * grad, beta2),
        "s": average(state["s"], rate * grad, root),
        "d": larger(bounded, state["d"]),
        "numerator": torch.where(moves, numerator, state["numerator"]),
    }
    return torch.where(moves, shrunk - new["exp_avg"] / (safe_sqrt(new["exp_avg_sq"]) + eps), param), new


def _init_prodigy(param: Tensor, *, d0: float, growth_rate: float | None) -> State:
    zero = accumulator(param)
    estimates = {key: zero + _checked(d0) for key in ("d", *["d_max"] * (growth_rate is not None))}
    return {**counted("exp_avg", "exp_avg_sq", "s")(param), "initial": copy_of(param), **estimates, "numerator": zero}


def _prodigy_averages(
    grad: Tensor, state: State, rate: Tensor, beta2: Tensor, beta3: float | None, safeguard_warmup: bool, d0: float
) -> tuple[Tensor | float, Tensor]:
    """The decay rate of the estimate's averages, and the average of gradients after one more."""
    decay = torch.sqrt(beta2) if beta3 is None else beta3
    return decay, decay * state["s"] + state["d"] / d0 * (state["d"] if safeguard_warmup else rate) * grad


def _prodigy_terms(
    param: Tensor,
    grad: Tensor,
    state: State,
    *,
    lr: Tensor,
    beta1: Tensor,
    beta2: Tensor,
    weight_decay: Tensor,
    beta3: float | None,
    decouple: bool,
    use_bias_correction: bool,
    safeguard_warmup: bool,
    d0: float,
) -> Tensor:
    rate = _rate(state, lr, beta1, beta2, use_bias_correction)
    _, grad = decayed(param, grad, rate, weight_decay, decouple)
    _, s = _prodigy_averages(grad, state, rate, beta2, beta3, safeguard_warmup, d0)
    return _sums(state["d"] / d0 * rate * grad * (_initial(param, state) - param), kink(s).abs())


@rule(_init_prodigy, separable="element", global_reduce=_prodigy_terms)
def prodigy(
    param: Tensor,
    grad: Tensor,
    state: State,
    *,
    lr: Tensor = NonNegative(1.0),
    beta1: Tensor = UnitInterval(0.9),
    beta2: Tensor = UnitInterval(0.999),
    eps: Tensor = Positive(1e-8),
    weight_decay: Tensor = NonNegative(0.0),
    beta3: float | None = None,
    decouple: bool = True,
    use_bias_correction: bool = False,
    safeguard_warmup: bool = False,
    d0: float = 1e-6,
    d_coef: float = 1.0,
    growth_rate: float | None = None,
    reduced: Tensor,
) -> tuple[Tensor, State]:
    r"""Prodigy (Mishchenko and Defazio 2023, arXiv 2306.06101, algorithm 4), as `prodigyopt.Prodigy`.

    Adam with the learning rate \(\gamma_k = d_k\,\eta\), with an estimate \(d\) of the distance from the start to the solution, over all
    tensors:

    \(r_{k+1} = \beta_3 r_k + d_k \gamma_k \langle g_k, x_0 - x_k\rangle\), \(s_{k+1} = \beta_3 s_k + d_k \gamma_k g_k\),
    \(d_{k+1} = \max(d_k, c\,r_{k+1} / \|s_{k+1}\|_1)\), where both moments are of \(d_k g_k\).

    All tensors that one `Nested` or `HyperOptimizer` steps with it have one estimate; a tensor without a gradient keeps that of its last
    step. Where all gradients so far are zero, nothing moves.

    Args:
        lr: factor \(\eta\) of the learning rate, >= 0.
        beta1: decay rate of the first moment, in [0, 1).
        beta2: decay rate of the second moment, in [0, 1).
        eps: times the estimate, added to the root of the second moment, > 0.
        weight_decay: decoupled: the parameter shrinks by the learning rate times `weight_decay` of itself, >= 0.
        beta3: decay rate \(\beta_3\) of the estimate's averages, in [0, 1); None is the root of `beta2`.
        decouple: if not, the gradient gets `weight_decay` times the parameter instead.
        use_bias_correction: correct the moments for their bias, as Adam.
        safeguard_warmup: leave \(\eta\) out of \(s\), for learning rates that grow in a warm-up.
        d0: the first estimate, > 0; it should be below the distance.
        d_coef: factor \(c > 0\) of the estimate.
        growth_rate: the largest factor by which the estimate grows in a step, >= 1; None is no bound.

    Example:
        >>> import hyperopt_nested as hn
        >>> hn.prodigy(weight_decay=hn.learn(0.1)).learned
        {'weight_decay': learn(0.1)}
    """
    d, rate = state["d"], _rate(state, lr, beta1, beta2, use_bias_correction)
    shrunk, grad = decayed(param, grad, rate, weight_decay, decouple)
    decay, s = _prodigy_averages(grad, state, rate, beta2, beta3, safeguard_warmup, d0)
    along, size = reduced.unbind()
    moves = kink(size) > 0
    numerator = decay * state["numerator"] + along
    d_hat = _ratio(d_coef * numerator, size, moves, d)
    new = {
        "step": state["step"] + moves,
        "exp_avg": average(state["exp_avg"], d * grad, beta1),
        "exp_avg_sq": average(state["exp_avg_sq"], d * d * grad * grad, beta2),
        "s": s,
        "initial": _initial(param, state),
        "d": larger(d_hat, d),
        "numerator": torch.where(moves, numerator, state["numerator"]),
    }
    if growth_rate is not None:
        first = kink(d, d0) == d0  # the first estimate is replaced at once
        new["d_max"] = larger(d_hat, state["d_max"])
        new["d"] = torch.where(moves, smaller(new["d_max"], torch.where(first, larger(d_hat, d), d) * growth_rate), d)
    step = rate * new["exp_avg"] / (safe_sqrt(new["exp_avg_sq"]) + new["d"] * eps)
    return torch.where(moves, shrunk - step, param), new


def _init_dog(param: Tensor, *, reps_rel: float | Learn, eps: float | Learn, init_eta: float | None) -> State:
    if init_eta is not None and not init_eta > 0:
        raise ValueError(f"init_eta={init_eta!r} must be > 0, or None")
    distance, squares = accumulator(param, reps_rel), accumulator(param, eps)
    return {**counted()(param), "initial": copy_of(param), "distance": distance, "squares": squares}


def _squares(param: Tensor, grad: Tensor, state: State, weight_decay: Tensor) -> tuple[Tensor, Tensor]:
    """Squares of how far each entry is from the start (in the first step: from zero), and of the gradient."""
    grad = grad + weight_decay * param
    moved = torch.where(state["step"] == 0, param, param - state["initial"])
    return moved * moved, grad * grad


def _dog_terms(param: Tensor, grad: Tensor, state: State, *, weight_decay: Tensor) -> Tensor:
    return _sums(*_squares(param, grad, state, weight_decay))


def _dog(
    param: Tensor,
    grad: Tensor,
    state: State,
    distance: Tensor,
    squares: Tensor,
    lr: Tensor,
    reps_rel: Tensor,
    weight_decay: Tensor,
    eps: Tensor,
    init_eta: float | None,
) -> tuple[Tensor, State]:
    first, norm = state["step"] == 0, safe_sqrt(distance)
    start = reps_rel * (1 + norm) if init_eta is None else torch.zeros_like(norm)
    new = {
        "step": state["step"] + 1,
        "initial": _initial(param, state),
        "distance": torch.where(first, start, larger(norm, state["distance"])),
        "squares": torch.where(first, eps, state["squares"]) + squares,
    }
    rate = lr * new["distance"] / torch.sqrt(new["squares"])
    if init_eta is not None:
        rate = torch.where(first, init_eta, rate)
    return param - rate * (grad + weight_decay * param), new


@rule(_init_dog, separable="element", global_reduce=_dog_terms)
def dog(
    param: Tensor,
    grad: Tensor,
    state: State,
    *,
    lr: Tensor = NonNegative(1.0),
    reps_rel: Tensor = Positive(1e-6),
    weight_decay: Tensor = NonNegative(0.0),
    eps: Tensor = Positive(1e-8),
    init_eta: float | None = None,
    reduced: Tensor,
) -> tuple[Tensor, State]:
    r"""DoG, distance over gradients (Ivgi, Hinder and Carmon 2023, arXiv 2302.12022), as `dog.DoG`.

    SGD with the learning rate \(\eta_t = c \max_{i \le t} \|x_i - x_0\| / \sqrt{\sum_{i \le t} \|g_i\|^2 + \epsilon}\), where norms are
    over all tensors that one `Nested` or `HyperOptimizer` steps with it. The paper evaluates an average of the weights: see `ema`.

    Args:
        lr: factor \(c \ge 0\) of the learning rate.
        reps_rel: the first distance, relative to one plus the norm of the start, > 0.
        weight_decay: added to the gradient times the parameter, >= 0.
        eps: added to the sum of squares, > 0. The first update reads it and `reps_rel`: later ones have no derivative with respect to
            them.
        init_eta: the first learning rate, > 0, in the place of `reps_rel`.

    Example:
        >>> import hyperopt_nested as hn
        >>> hn.dog(weight_decay=hn.learn(0.1)).learned
        {'weight_decay': learn(0.1)}
    """
    return _dog(param, grad, state, reduced[0], reduced[1], lr, reps_rel, weight_decay, eps, init_eta)


@rule(_init_dog, separable="tensor")
def ldog(
    param: Tensor,
    grad: Tensor,
    state: State,
    *,
    lr: Tensor = NonNegative(1.0),
    reps_rel: Tensor = Positive(1e-6),
    weight_decay: Tensor = NonNegative(0.0),
    eps: Tensor = Positive(1e-8),
    init_eta: float | None = None,
) -> tuple[Tensor, State]:
    r"""Layer-wise DoG (Ivgi, Hinder and Carmon 2023, arXiv 2302.12022, L-DoG), as `dog.LDoG`: `dog` for each tensor on its own.

    Args:
        lr: factor of the learning rate, >= 0.
        reps_rel: the first distance, relative to one plus the norm of the start, > 0.
        weight_decay: added to the gradient times the parameter, >= 0.
        eps: added to the sum of squares, > 0. The first update reads it and `reps_rel`: later ones have no derivative with respect to
            them.
        init_eta: the first learning rate, > 0, in the place of `reps_rel`.

    Example:
        >>> import hyperopt_nested as hn
        >>> hn.ldog(weight_decay=hn.learn(0.1)).learned
        {'weight_decay': learn(0.1)}
    """
    distance, squares = (each.sum() for each in _squares(param, grad, state, weight_decay))
    return _dog(param, grad, state, distance, squares, lr, reps_rel, weight_decay, eps, init_eta)
