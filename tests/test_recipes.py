"""Published recipes are compositions: each does what its equations say, written out here, for 20 steps."""

from typing import Any

import pytest
import torch
from cases import EXACT, Tensors, gradients, problem, relative_error

import hyperopt_nested as hn

STEPS = 20


def dot(a: Tensors, b: Tensors) -> Any:
    return sum((a[name] * b[name]).sum() for name in a)


def check(found: Tensors, expected: Tensors) -> None:
    for name, tensor in expected.items():
        assert relative_error(found[name], tensor) < EXACT, name


@hn.rule(lambda param: {"previous": hn.rules.copy_of(param)}, separable="element")
def two_rates(param: Any, grad: Any, state: Any, *, lr: Any = hn.Real(0.1), beta: Any = hn.Real(0.9)) -> Any:
    return param - lr * grad + beta * (param - state["previous"]), {"previous": param}


@hn.combinator(separable="element", global_reduce=lambda grad: grad.square().sum())
def per_squared_norm(param: Any, grad: Any, state: Any, step: Any, *, reduced: Any) -> Any:
    """The optimizer, with its derivatives divided by the squared norm of the gradient."""
    new = step(param, grad)
    return new.detach() + (new - new.detach()) / reduced, state


def test_hypergradient_descent_with_heavy_ball() -> None:
    r"""HDM (arXiv 2502.11229), both hypers learned by AdaGrad, a preconditioner with one entry per element.

    \(x^+ = x - P \circ g + \beta (x - x^-)\), and with the feedback \((f(x^+) - f(x)) / \|g\|^2\), the gradients
    \(-g^+ \circ g / \|g\|^2\) and \(\langle g^+, x - x^-\rangle / \|g\|^2\).
    """
    rate, eps = 0.02, 1e-10
    adagrad = hn.adagrad(lr=rate, eps=eps)
    optimizer = per_squared_norm(two_rates(lr=hn.learn(0.01, by=adagrad, per="element"), beta=hn.learn(0.5, by=adagrad)))
    x, loss = problem(0)
    nested = hn.Nested(optimizer)
    params, st = x, nested.init(x)
    previous = x
    P, beta = {name: torch.full_like(each, 0.01) for name, each in x.items()}, torch.tensor(0.5)
    squares, square = {name: torch.zeros_like(each) for name, each in x.items()}, torch.tensor(0.0)
    for _ in range(STEPS):
        params, st = nested.step(params, gradients(loss, params), st)
        grads = gradients(loss, x)
        new = {name: x[name] - P[name] * grads[name] + beta * (x[name] - previous[name]) for name in x}
        check(params, new)
        after, norm = gradients(loss, new), dot(grads, grads)
        of_P = {name: -after[name] * grads[name] / norm for name in x}
        of_beta = dot(after, {name: x[name] - previous[name] for name in x}) / norm
        squares, square = {name: squares[name] + of_P[name] ** 2 for name in x}, square + of_beta**2
        P = {name: P[name] - rate * of_P[name] / (squares[name].sqrt() + eps) for name in x}
        beta = beta - rate * of_beta / (square.sqrt() + eps)
        previous, x = x, new
    assert abs(float(beta) - 0.5) > 0.01


def test_normalized_hypergradient_descent() -> None:
    r"""HDM without momentum, with one rate: \(\eta^+ = \eta + \eta' \langle g^+, g\rangle / \|g\|^2\)."""
    optimizer = per_squared_norm(hn.sgd(lr=hn.learn(0.01, by=hn.sgd(lr=0.01))))
    x, loss = problem(1)
    nested = hn.Nested(optimizer)
    params, st = x, nested.init(x)
    lr = torch.tensor(0.01)
    for _ in range(STEPS):
        params, st = nested.step(params, gradients(loss, params), st)
        grads = gradients(loss, x)
        x = {name: x[name] - lr * grads[name] for name in x}
        check(params, x)
        lr = lr + 0.01 * dot(gradients(loss, x), grads) / dot(grads, grads)
    assert float(lr) > 0.05


def test_online_scaling_with_null_steps() -> None:
    r"""Gradient methods with online scaling (OSGM-HX, arXiv 2505.23081), a diagonal preconditioner learned by AdaGrad.

    \(x' = x - P \circ g\) is taken if \(f(x') \le f(x)\); \(P\) is learned from \(-g' \circ g / \|g\|^2\) in both cases.
    """
    rate, eps, start = 0.3, 1e-10, 3.0
    adagrad = hn.adagrad(lr=rate, eps=eps)
    optimizer = hn.null_step(per_squared_norm(hn.sgd(lr=hn.learn(start, by=adagrad, per="element"))))
    x, loss = problem(3)
    nested = hn.Nested(optimizer)
    params, st = x, nested.init(x)
    P, squares = (
        {name: torch.full_like(each, start) for name, each in x.items()},
        {name: torch.zeros_like(each) for name, each in x.items()},
    )
    rejected = 0
    for _ in range(STEPS):
        trial_loss = loss(params)
        params, st = nested.step(params, gradients(loss, params), st, {name: {"loss": trial_loss} for name in x})
        grads = gradients(loss, x)
        trial = {name: x[name] - P[name] * grads[name] for name in x}
        check(params, trial)
        check(nested.eval_params(params, st), x)
        after, norm = gradients(loss, trial), dot(grads, grads)
        of_P = {name: -after[name] * grads[name] / norm for name in x}
        squares = {name: squares[name] + of_P[name] ** 2 for name in x}
        P = {name: (P[name] - rate * of_P[name] / (squares[name].sqrt() + eps)).clamp(min=0) for name in x}
        if loss(trial) <= loss(x):
            x = trial
        else:
            rejected += 1
    assert 0 < rejected < STEPS


BASES = {
    "sgd": lambda lr: hn.sgd(lr=lr, weight_decay=0.1),
    "adamw": lambda lr: hn.adamw(lr=lr, weight_decay=0.1),
}
META = {"lion": hn.lion(lr=0.05, beta1=0.9, beta2=0.99), "adam": hn.adam(lr=0.05)}


@pytest.mark.parametrize("meta", META)
@pytest.mark.parametrize("base", BASES)
def test_metaoptimize(base: str, meta: str) -> None:
    r"""MetaOptimize (arXiv 2402.02342) without Hessians: \(\beta = \log\alpha\) is stepped by Lion or Adam along \(\langle h, g\rangle\).

    \(w^+ = w - \Delta\), with \(\Delta = \alpha (u + \lambda w)\), and \(h^+ = \gamma (1 - \alpha\lambda) h - \Delta\). There, the
    weights are stepped with \(\beta\) as it was before; here, learners step first: the new state is put together of both.
    """
    discount, decay = 0.9, 0.1
    nested = hn.Nested(BASES[base](hn.learn(0.01, by=META[meta], via="log")), horizon=hn.Discounted(discount))
    w, loss = problem(2)
    params, st = w, nested.init(w)
    zeros = {name: torch.zeros_like(each) for name, each in w.items()}
    h, first, second = zeros, zeros, zeros
    log_alpha, m, v = torch.tensor(0.01).log(), torch.tensor(0.0), torch.tensor(0.0)
    for t in range(1, STEPS + 1):
        grads = gradients(loss, params)
        learned = nested.hyper_step(params, grads, st)
        params, st = nested.step(params, grads, st, learn=False)
        st = {**st, "hypers": learned["hypers"], "learners": learned["learners"]}

        grads, alpha = gradients(loss, w), log_alpha.exp()
        along = dot(h, grads)
        if base == "sgd":
            u = grads
        else:
            first = {name: 0.9 * first[name] + 0.1 * grads[name] for name in w}
            second = {name: 0.999 * second[name] + 0.001 * grads[name] ** 2 for name in w}
            u = {name: first[name] / (1 - 0.9**t) / ((second[name] / (1 - 0.999**t)).sqrt() + 1e-8) for name in w}
        delta = {name: alpha * (u[name] + decay * w[name]) for name in w}
        h = {name: discount * (1 - alpha * decay) * h[name] - delta[name] for name in w}
        w = {name: w[name] - delta[name] for name in w}
        if meta == "lion":
            log_alpha = log_alpha - 0.05 * (0.9 * m + 0.1 * along).sign()
            m = 0.99 * m + 0.01 * along
        else:
            m, v = 0.9 * m + 0.1 * along, 0.999 * v + 0.001 * along**2
            log_alpha = log_alpha - 0.05 * m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        check(params, w)
        assert relative_error(nested.hypers(st)["lr"]["model"], log_alpha.exp()) < EXACT
    assert float(log_alpha.exp()) > 0.015
