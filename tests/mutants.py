"""Wrong rules: what each gets wrong, what the kit must say of it, and, where only the paper can tell, the reference to check against."""

import math
from typing import Any

import torch
from torch import Tensor

import hyperopt_nested as hn

HYPERS = {"lr": hn.Positive(0.1), "beta": hn.UnitInterval(0.9)}
_calls = [0]


def _state(param: Tensor) -> hn.State:
    return {"step": hn.counter(param), "average": hn.zeros_like(param)}


def _average(state: Any, grad: Tensor, beta: Any) -> Tensor:
    return beta * state["average"] + (1 - beta) * grad


def _direction(average: Tensor, beta: Tensor, step: Tensor) -> Tensor:
    return average / (1 - beta**step)


@hn.rule(_state, coupling="element", **HYPERS)
def right(param: Any, grad: Any, state: Any, *, lr: Any, beta: Any) -> Any:
    average, step = _average(state, grad, beta), state["step"] + 1
    return param - lr * _direction(average, beta, step), {"step": step, "average": average}


class Averaged(torch.optim.Optimizer):
    """What `right` should do, written as optimizers usually are."""

    def __init__(self, params: Any, lr: float, beta: float) -> None:
        super().__init__(params, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state.setdefault(p, {"step": 0, "average": torch.zeros_like(p)}) or self.state[p]
                state["step"] += 1
                state["average"].lerp_(p.grad, 1 - group["beta"])
                p.sub_(state["average"] / (1 - group["beta"] ** state["step"]), alpha=group["lr"])


def reference(params: Any, hypers: dict[str, float]) -> torch.optim.Optimizer:
    return Averaged(params, **hypers)


@hn.rule(_state, coupling="element", **HYPERS)
def dropped_bias_correction(param: Any, grad: Any, state: Any, *, lr: Any, beta: Any) -> Any:
    average = _average(state, grad, beta)
    return param - lr * average, {"step": state["step"] + 1, "average": average}


@hn.rule(_state, coupling="element", **HYPERS)
def off_by_one_step(param: Any, grad: Any, state: Any, *, lr: Any, beta: Any) -> Any:
    average, step = _average(state, grad, beta), state["step"] + 1
    return param - lr * _direction(average, beta, step + 1), {"step": step, "average": average}


@hn.rule(_state, coupling="element", **HYPERS)
def old_step(param: Any, grad: Any, state: Any, *, lr: Any, beta: Any) -> Any:
    average = _average(state, grad, beta)
    return param - lr * _direction(average, beta, state["step"]), {"step": state["step"] + 1, "average": average}


@hn.rule(_state, coupling="element", **HYPERS)
def wrong_sign(param: Any, grad: Any, state: Any, *, lr: Any, beta: Any) -> Any:
    average, step = _average(state, grad, beta), state["step"] + 1
    return param + lr * _direction(average, beta, step), {"step": step, "average": average}


@hn.rule(_state, coupling="element", **HYPERS)
def wrong_sign_of_a_derivative(param: Any, grad: Any, state: Any, *, lr: Any, beta: Any) -> Any:
    average, step = _average(state, grad, beta), state["step"] + 1
    return param - (2 * lr.detach() - lr) * _direction(average, beta, step), {"step": step, "average": average}


@hn.rule(_state, coupling="element", **HYPERS)
def math_sqrt(param: Any, grad: Any, state: Any, *, lr: Any, beta: Any) -> Any:
    average, step = _average(state, grad, beta), state["step"] + 1
    return param - lr * average / math.sqrt(1 - beta**step), {"step": step, "average": average}


@hn.rule(_state, coupling="element", **HYPERS)
def detached_correction(param: Any, grad: Any, state: Any, *, lr: Any, beta: Any) -> Any:
    average, step = _average(state, grad, beta), state["step"] + 1
    return param - lr * _direction(average, beta.detach(), step), {"step": step, "average": average}


@hn.rule(_state, coupling="element", **HYPERS)
def detached_hyper(param: Any, grad: Any, state: Any, *, lr: Any, beta: Any) -> Any:
    average = _average(state, grad, beta)
    return param - lr.detach() * average, {"step": state["step"] + 1, "average": average}


@hn.rule(_state, coupling="element", **HYPERS)
def unused_hyper(param: Any, grad: Any, state: Any, *, lr: Any, beta: Any) -> Any:
    return param - lr * grad, {"step": state["step"] + 1, "average": _average(state, grad, beta)}


@hn.rule(_state, coupling="element", **HYPERS)
def state_in_place(param: Any, grad: Any, state: Any, *, lr: Any, beta: Any) -> Any:
    state["average"].copy_(_average(state, grad, beta.detach()))
    return param - lr * beta * state["average"], {"step": state["step"] + 1, "average": state["average"]}


@hn.rule(_state, coupling="element", **HYPERS)
def param_in_place(param: Any, grad: Any, state: Any, *, lr: Any, beta: Any) -> Any:
    average = _average(state, grad, beta)
    return param.sub_(lr * average), {"step": state["step"] + 1, "average": average}


@hn.rule(_state, coupling="element", **HYPERS)
def keeps_the_gradient_itself(param: Any, grad: Any, state: Any, *, lr: Any, beta: Any) -> Any:
    return param - lr * _average(state, grad, beta), {"step": state["step"] + 1, "average": grad}


@hn.rule(_state, coupling="element", **HYPERS)
def view_of_the_parameter(param: Any, grad: Any, state: Any, *, lr: Any, beta: Any) -> Any:
    return param - lr * _average(state, grad, beta), {"step": state["step"] + 1, "average": param[...]}


@hn.rule(_state, coupling="element", **HYPERS)
def hidden_state(param: Any, grad: Any, state: Any, *, lr: Any, beta: Any) -> Any:
    _calls[0] += 1
    average = _average(state, grad, beta)
    return param - lr * average * (1 + 1 / _calls[0]), {"step": state["step"] + 1, "average": average}


@hn.rule(_state, coupling="element", **HYPERS)
def random_numbers(param: Any, grad: Any, state: Any, *, lr: Any, beta: Any) -> Any:
    average = _average(state, grad, beta)
    torch.rand(())
    return param - lr * average, {"step": state["step"] + 1, "average": average}


@hn.rule(_state, coupling="element", **HYPERS)
def branch_on_a_value(param: Any, grad: Any, state: Any, *, lr: Any, beta: Any) -> Any:
    average = _average(state, grad, beta)
    if state["step"] > 1:
        average = average / 2
    return param - lr * average, {"step": state["step"] + 1, "average": average}


@hn.rule(_state, coupling="element", **HYPERS)
def other_dtype(param: Any, grad: Any, state: Any, *, lr: Any, beta: Any) -> Any:
    average = _average(state, grad, beta)
    return param - lr * average, {"step": state["step"] + 1, "average": average.double()}


@hn.rule(_state, coupling="element", **HYPERS)
def other_device(param: Any, grad: Any, state: Any, *, lr: Any, beta: Any) -> Any:
    average = _average(state, grad, beta)
    return param - lr * average, {"step": torch.zeros(()), "average": average}


@hn.rule(_state, coupling="element", **HYPERS)
def grows_its_state(param: Any, grad: Any, state: Any, *, lr: Any, beta: Any) -> Any:
    average = _average(state, grad, beta)
    return param - lr * average, {"step": state["step"] + 1, "average": average, "last": lr * average}


@hn.rule(_state, coupling="element", **HYPERS)
def root_of_zero(param: Any, grad: Any, state: Any, *, lr: Any, beta: Any) -> Any:
    second = beta * state["average"] + (1 - beta) * grad * grad
    return param - lr * grad / (second.sqrt() + 1e-8), {"step": state["step"] + 1, "average": second}


@hn.rule(_state, coupling="element", **HYPERS)
def wrong_coupling(param: Any, grad: Any, state: Any, *, lr: Any, beta: Any) -> Any:
    average = _average(state, grad, beta)
    return param - lr * average / (1 + (lr * average).square().sum()), {"step": state["step"] + 1, "average": average}


@hn.rule(_state, coupling="element", flat=("beta",), **HYPERS)
def not_flat(param: Any, grad: Any, state: Any, *, lr: Any, beta: Any) -> Any:
    average = _average(state, grad, beta)
    return param - lr * average, {"step": state["step"] + 1, "average": average}


@hn.rule(_state, coupling="element", **HYPERS)
def flat_undeclared(param: Any, grad: Any, state: Any, *, lr: Any, beta: Any) -> Any:
    average = _average(state, grad, beta)
    return param - lr * hn.kink(average).sign(), {"step": state["step"] + 1, "average": average}


@hn.rule(_state, coupling="element", **HYPERS)
def without_vmap(param: Any, grad: Any, state: Any, *, lr: Any, beta: Any) -> Any:
    average = _average(state, grad, beta)
    buffer = torch.zeros(param.shape, dtype=param.dtype, device=param.device)
    buffer.add_(average)
    return param - lr * buffer, {"step": state["step"] + 1, "average": average}


MUTANTS: dict[hn.FunctionRule, tuple[str, bool]] = {
    dropped_bias_correction: ("but the reference has", True),
    off_by_one_step: ("but the reference has", True),
    old_step: ("is not finite", False),
    wrong_sign: ("goes up the gradient", False),
    wrong_sign_of_a_derivative: ("the hypergradient of lr is", False),
    math_sqrt: ("fails on tensors without values", False),
    detached_correction: ("the hypergradient of beta is", False),
    detached_hyper: ("lr is learned, but detached_hyper does not use it", False),
    unused_hyper: ("beta is learned, but unused_hyper does not use it", False),
    state_in_place: ("changes its input state.a.average in place", False),
    param_in_place: ("changes its input param.a in place", False),
    keeps_the_gradient_itself: ("new state.a.average is, or is a view of, the input grad.a", False),
    view_of_the_parameter: ("new state.a.average is, or is a view of, the input param.a", False),
    hidden_state: ("when it is repeated with the same inputs", False),
    random_numbers: ("draws from the global random number generator", False),
    branch_on_a_value: ("fails on tensors without values", False),
    other_dtype: ("state.a.average was", False),
    other_device: ("state.a.step is on cpu", False),
    grows_its_state: ("state.a.last was None", False),
    root_of_zero: ("is not finite: nan", False),
    wrong_coupling: ("is the rule's coupling='element' true?", False),
    not_flat: ("beta is declared flat, but", False),
    flat_undeclared: ("the hypergradient of beta per model could not be verified", False),
    without_vmap: ("does not run under torch.func.vmap", False),
}
