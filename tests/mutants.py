"""Wrong rules: what each gets wrong, what the kit must say of it, and, where only the paper can tell, the reference to check against."""

import math
from typing import Any

import torch
from torch import Tensor

import hyperopt_nested as hn

LR, BETA = hn.Positive(0.1), hn.UnitInterval(0.9)
_calls = [0]


def _state(param: Tensor) -> hn.typing.State:
    return {"step": hn.rules.counter(param), "average": hn.rules.zeros_like(param)}


def _average(state: Any, grad: Tensor, beta: Any) -> Tensor:
    return beta * state["average"] + (1 - beta) * grad


def _direction(average: Tensor, beta: Tensor, step: Tensor) -> Tensor:
    return average / (1 - beta**step)


@hn.rule(_state, separable="element")
def right(param: Any, grad: Any, state: Any, *, lr: Any = LR, beta: Any = BETA) -> Any:
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


@hn.rule(_state, separable="element")
def dropped_bias_correction(param: Any, grad: Any, state: Any, *, lr: Any = LR, beta: Any = BETA) -> Any:
    average = _average(state, grad, beta)
    return param - lr * average, {"step": state["step"] + 1, "average": average}


@hn.rule(_state, separable="element")
def off_by_one_step(param: Any, grad: Any, state: Any, *, lr: Any = LR, beta: Any = BETA) -> Any:
    average, step = _average(state, grad, beta), state["step"] + 1
    return param - lr * _direction(average, beta, step + 1), {"step": step, "average": average}


@hn.rule(_state, separable="element")
def old_step(param: Any, grad: Any, state: Any, *, lr: Any = LR, beta: Any = BETA) -> Any:
    average = _average(state, grad, beta)
    return param - lr * _direction(average, beta, state["step"]), {"step": state["step"] + 1, "average": average}


@hn.rule(_state, separable="element")
def wrong_sign(param: Any, grad: Any, state: Any, *, lr: Any = LR, beta: Any = BETA) -> Any:
    average, step = _average(state, grad, beta), state["step"] + 1
    return param + lr * _direction(average, beta, step), {"step": step, "average": average}


@hn.rule(_state, separable="element")
def wrong_sign_of_a_derivative(param: Any, grad: Any, state: Any, *, lr: Any = LR, beta: Any = BETA) -> Any:
    average, step = _average(state, grad, beta), state["step"] + 1
    return param - (2 * lr.detach() - lr) * _direction(average, beta, step), {"step": step, "average": average}


@hn.rule(_state, separable="element")
def math_sqrt(param: Any, grad: Any, state: Any, *, lr: Any = LR, beta: Any = BETA) -> Any:
    average, step = _average(state, grad, beta), state["step"] + 1
    return param - lr * average / math.sqrt(1 - beta**step), {"step": step, "average": average}


@hn.rule(_state, separable="element")
def detached_correction(param: Any, grad: Any, state: Any, *, lr: Any = LR, beta: Any = BETA) -> Any:
    average, step = _average(state, grad, beta), state["step"] + 1
    return param - lr * _direction(average, beta.detach(), step), {"step": step, "average": average}


@hn.rule(_state, separable="element")
def detached_hyper(param: Any, grad: Any, state: Any, *, lr: Any = LR, beta: Any = BETA) -> Any:
    average = _average(state, grad, beta)
    return param - lr.detach() * average, {"step": state["step"] + 1, "average": average}


@hn.rule(_state, separable="element")
def unused_hyper(param: Any, grad: Any, state: Any, *, lr: Any = LR, beta: Any = BETA) -> Any:
    return param - lr * grad, {"step": state["step"] + 1, "average": _average(state, grad, beta)}


@hn.rule(_state, separable="element")
def state_in_place(param: Any, grad: Any, state: Any, *, lr: Any = LR, beta: Any = BETA) -> Any:
    state["average"].copy_(_average(state, grad, beta.detach()))
    return param - lr * beta * state["average"], {"step": state["step"] + 1, "average": state["average"]}


@hn.rule(_state, separable="element")
def param_in_place(param: Any, grad: Any, state: Any, *, lr: Any = LR, beta: Any = BETA) -> Any:
    average = _average(state, grad, beta)
    return param.sub_(lr * average), {"step": state["step"] + 1, "average": average}


@hn.rule(_state, separable="element")
def keeps_the_gradient_itself(param: Any, grad: Any, state: Any, *, lr: Any = LR, beta: Any = BETA) -> Any:
    return param - lr * _average(state, grad, beta), {"step": state["step"] + 1, "average": grad}


@hn.rule(_state, separable="element")
def view_of_the_parameter(param: Any, grad: Any, state: Any, *, lr: Any = LR, beta: Any = BETA) -> Any:
    return param - lr * _average(state, grad, beta), {"step": state["step"] + 1, "average": param[...]}


@hn.rule(_state, separable="element")
def hidden_state(param: Any, grad: Any, state: Any, *, lr: Any = LR, beta: Any = BETA) -> Any:
    _calls[0] += 1
    average = _average(state, grad, beta)
    return param - lr * average * (1 + 1 / _calls[0]), {"step": state["step"] + 1, "average": average}


@hn.rule(_state, separable="element")
def random_numbers(param: Any, grad: Any, state: Any, *, lr: Any = LR, beta: Any = BETA) -> Any:
    average = _average(state, grad, beta)
    torch.rand(())
    return param - lr * average, {"step": state["step"] + 1, "average": average}


@hn.rule(_state, separable="element")
def branch_on_a_value(param: Any, grad: Any, state: Any, *, lr: Any = LR, beta: Any = BETA) -> Any:
    average = _average(state, grad, beta)
    if state["step"] > 1:
        average = average / 2
    return param - lr * average, {"step": state["step"] + 1, "average": average}


@hn.rule(_state, separable="element")
def other_dtype(param: Any, grad: Any, state: Any, *, lr: Any = LR, beta: Any = BETA) -> Any:
    average = _average(state, grad, beta)
    return param - lr * average, {"step": state["step"] + 1, "average": average.double()}


@hn.rule(_state, separable="element")
def other_device(param: Any, grad: Any, state: Any, *, lr: Any = LR, beta: Any = BETA) -> Any:
    average = _average(state, grad, beta)
    return param - lr * average, {"step": torch.zeros(()), "average": average}


@hn.rule(_state, separable="element")
def grows_its_state(param: Any, grad: Any, state: Any, *, lr: Any = LR, beta: Any = BETA) -> Any:
    average = _average(state, grad, beta)
    return param - lr * average, {"step": state["step"] + 1, "average": average, "last": lr * average}


@hn.rule(_state, separable="element")
def root_of_zero(param: Any, grad: Any, state: Any, *, lr: Any = LR, beta: Any = BETA) -> Any:
    second = beta * state["average"] + (1 - beta) * grad * grad
    return param - lr * grad / (second.sqrt() + 1e-8), {"step": state["step"] + 1, "average": second}


@hn.rule(_state, separable="element")
def wrong_coupling(param: Any, grad: Any, state: Any, *, lr: Any = LR, beta: Any = BETA) -> Any:
    average = _average(state, grad, beta)
    return param - lr * average / (1 + (lr * average).square().sum()), {"step": state["step"] + 1, "average": average}


@hn.rule(_state, separable="element", nondifferentiable=("beta",))
def not_flat(param: Any, grad: Any, state: Any, *, lr: Any = LR, beta: Any = BETA) -> Any:
    average = _average(state, grad, beta)
    return param - lr * average, {"step": state["step"] + 1, "average": average}


@hn.rule(_state, separable="element")
def flat_undeclared(param: Any, grad: Any, state: Any, *, lr: Any = LR, beta: Any = BETA) -> Any:
    average = _average(state, grad, beta)
    return param - lr * hn.rules.kink(average).sign(), {"step": state["step"] + 1, "average": average}


@hn.rule(_state, separable="element")
def without_vmap(param: Any, grad: Any, state: Any, *, lr: Any = LR, beta: Any = BETA) -> Any:
    average = _average(state, grad, beta)
    buffer = torch.zeros(param.shape, dtype=param.dtype, device=param.device)
    buffer.add_(average)
    return param - lr * buffer, {"step": state["step"] + 1, "average": average}


@hn.rule(_state, separable="element")
def detached_old_state(param: Any, grad: Any, state: Any, *, lr: Any = LR, beta: Any = BETA) -> Any:
    average = beta * state["average"].detach() + (1 - beta) * grad
    return param - lr * average, {"step": state["step"] + 1, "average": average}


@hn.rule(_state, separable="element")
def detached_new_state(param: Any, grad: Any, state: Any, *, lr: Any = LR, beta: Any = BETA) -> Any:
    average = _average(state, grad, beta)
    return param - lr * average, {"step": state["step"] + 1, "average": average.detach()}


@hn.rule(_state, separable="element")
def new_state_without_grad(param: Any, grad: Any, state: Any, *, lr: Any = LR, beta: Any = BETA) -> Any:
    new = param - lr * _average(state, grad, beta)
    with torch.no_grad():
        return new, {"step": state["step"] + 1, "average": _average(state, grad, beta)}


@hn.rule(_state, separable="element")
def detached_parameter(param: Any, grad: Any, state: Any, *, lr: Any = LR, beta: Any = BETA) -> Any:
    average = _average(state, grad, beta)
    return param.detach() - lr * average, {"step": state["step"] + 1, "average": average}


@hn.rule(_state, separable="element")
def detached_gradient(param: Any, grad: Any, state: Any, *, lr: Any = LR, beta: Any = BETA) -> Any:
    average = _average(state, grad.detach(), beta)
    return param - lr * average, {"step": state["step"] + 1, "average": average}


@hn.rule(_state, separable="element")
def detached_hyper_of_the_state(param: Any, grad: Any, state: Any, *, lr: Any = LR, beta: Any = BETA) -> Any:
    new = param - lr * _average(state, grad, beta)
    return new, {"step": state["step"] + 1, "average": _average(state, grad, beta.detach())}


@hn.rule(lambda p: {"nested": {"sum": hn.rules.zeros_like(p)}, "seen": torch.zeros_like(p, dtype=torch.bool)}, separable="element")
def detached_nested_state(param: Any, grad: Any, state: Any, *, lr: Any = LR, beta: Any = BETA) -> Any:
    total = grad + torch.where(state["seen"], beta * state["nested"]["sum"].detach(), 0)
    return param - lr * total, {"nested": {"sum": total}, "seen": torch.ones_like(state["seen"])}


def _maximum(state: Any, grad: Tensor, beta: Any) -> tuple[Tensor, Tensor]:
    second = beta * state["second"] + (1 - beta) * grad * grad
    return second, hn.rules.kink(state["largest"], second) > second


@hn.rule(hn.rules.zeros("second", "largest"), separable="element")
def detached_in_one_branch(param: Any, grad: Any, state: Any, *, lr: Any = LR, beta: Any = BETA) -> Any:
    second, stays = _maximum(state, grad, beta)
    largest = torch.where(stays, state["largest"].detach(), second)
    return param - lr * grad / (hn.rules.safe_sqrt(largest) + 0.1), {"second": second, "largest": largest}


@hn.rule(_state, separable="element")
def detached_if_large(param: Any, grad: Any, state: Any, *, lr: Any = LR, beta: Any = BETA) -> Any:
    average = _average(state, grad.detach() if grad.numel() > 100 else grad, beta)
    return param - lr * average, {"step": state["step"] + 1, "average": average}


@hn.rule(_state, separable="element")
def detached_hyper_if_large(param: Any, grad: Any, state: Any, *, lr: Any = LR, beta: Any = BETA) -> Any:
    average = _average(state, grad, beta)
    return param - (lr.detach() if param.numel() > 2000 else lr) * average, {"step": state["step"] + 1, "average": average}


@hn.rule(_state, separable="element")
def detached_after_twenty_steps(param: Any, grad: Any, state: Any, *, lr: Any = LR, beta: Any = BETA) -> Any:
    average, step = _average(state, grad, beta), state["step"] + 1
    return param - lr * average, {"step": step, "average": torch.where(step > 20, average.detach(), average)}


@hn.rule(_state, separable="element")
def detached_hyper_after_ninety_steps(param: Any, grad: Any, state: Any, *, lr: Any = LR, beta: Any = BETA) -> Any:
    average, step = _average(state, grad, beta), state["step"] + 1
    return param - torch.where(step > 90, lr.detach(), lr) * average, {"step": step, "average": average}


@hn.rule(_state, separable="element")
def number_in_float32(param: Any, grad: Any, state: Any, *, lr: Any = LR, beta: Any = BETA) -> Any:
    average = _average(state, grad, beta) * torch.tensor(0.1, dtype=torch.float32, device=param.device)
    return param - lr * average, {"step": state["step"] + 1, "average": average}


@hn.rule(_state, separable="element")
def gradient_in_float32(param: Any, grad: Any, state: Any, *, lr: Any = LR, beta: Any = BETA) -> Any:
    average = _average(state, grad.float().to(grad.dtype), beta)
    return param - lr * average, {"step": state["step"] + 1, "average": average}


@hn.rule(lambda p: {"average": torch.zeros_like(p, dtype=torch.float32)}, separable="element")
def state_in_float32(param: Any, grad: Any, state: Any, *, lr: Any = LR, beta: Any = BETA) -> Any:
    average = _average(state, grad, beta)
    return param - lr * average, {"average": average.float()}


@hn.rule(_state, separable="element")
def gradient_in_place(param: Any, grad: Any, state: Any, *, lr: Any = LR, beta: Any = BETA) -> Any:
    average = _average(state, grad.mul_(0.5), beta)
    return param - lr * average, {"step": state["step"] + 1, "average": average}


@hn.rule(_state, separable="element")
def hyper_in_place(param: Any, grad: Any, state: Any, *, lr: Any = LR, beta: Any = BETA) -> Any:
    average = _average(state, grad, beta)
    return param - lr.detach().mul_(0.99) * lr * average, {"step": state["step"] + 1, "average": average}


@hn.rule(lambda p: {"step": torch.zeros((), dtype=torch.int64, device=p.device), "average": hn.rules.zeros_like(p)}, separable="element")
def integer_becomes_real(param: Any, grad: Any, state: Any, *, lr: Any = LR, beta: Any = BETA) -> Any:
    average = _average(state, grad, beta)
    return param - lr * average, {"step": state["step"] + 1.0, "average": average}


@hn.rule(_state, separable="element")
def loses_its_state(param: Any, grad: Any, state: Any, *, lr: Any = LR, beta: Any = BETA) -> Any:
    average = beta * state.get("average", 0.0) + (1 - beta) * grad
    return param - lr * average, {"step": state["step"] + 1}


@hn.rule(_state, separable="element")
def state_of_another_shape(param: Any, grad: Any, state: Any, *, lr: Any = LR, beta: Any = BETA) -> Any:
    average = _average(state, grad, beta)
    return param - lr * average, {"step": state["step"] + 1, "average": average[None]}


MUTANTS: dict[hn.typing.FunctionRule, tuple[str, bool]] = {
    dropped_bias_correction: ("differs from the reference", True),
    off_by_one_step: ("differs from the reference", True),
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
    wrong_coupling: ("is the rule's separable='element' true?", False),
    not_flat: ("beta is declared nondifferentiable, but", False),
    flat_undeclared: ("the hypergradient of beta per model could not be verified", False),
    without_vmap: ("does not run under torch.func.vmap", False),
    detached_old_state: ("the derivative of the new parameter with respect to the old state.average is 0, but", False),
    detached_new_state: ("the derivative of the new state.average with respect to the gradient is 0, but", False),
    new_state_without_grad: ("the derivative of the new state.average with respect to the gradient is 0, but", False),
    detached_parameter: ("the derivative of the new parameter with respect to the parameter is 0, but", False),
    detached_gradient: ("the derivative of the new parameter with respect to the gradient is 0, but", False),
    detached_hyper_of_the_state: ("the derivative of the new state.average with respect to beta is 0, but", False),
    detached_nested_state: ("the derivative of the new parameter with respect to the old state.nested.sum is 0, but", False),
    detached_in_one_branch: ("with respect to the old state.largest is 0, but by finite differences", False),
    detached_if_large: ("(along one direction, tensors of shape (2, 64), step 1)", False),
    detached_hyper_if_large: ("the derivative of the new parameter with respect to lr is 0, but", False),
    detached_after_twenty_steps: ("(along one direction, tensors of shape (3,), step 21)", False),
    detached_hyper_after_ninety_steps: ("the derivative of the new parameter with respect to lr is 0, but", False),
    number_in_float32: ("the update uses a number in torch.float32, 0.1", False),
    gradient_in_float32: ("the update casts float64 to torch.float32", False),
    state_in_float32: ("the update casts float64 to torch.float32", False),
    gradient_in_place: ("changes its input grad.a in place", False),
    hyper_in_place: ("changes its input hyper.a.lr in place", False),
    integer_becomes_real: ("state.a.step was", False),
    loses_its_state: ("state.a.average was", False),
    state_of_another_shape: ("state.a.average was", False),
}
