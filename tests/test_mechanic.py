"""Mechanic is `rescale` with its scale learned by coin betting: recorded trajectories of optax's and the authors' programs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import EXACT, Tensors, at, gradients, problem, relative_error, run

import hyperopt_nested as hn

GOLDEN = Path(__file__).parent / "golden"
PUBLISHED = 1e-11  # of the largest entry, after 50 steps
NAMES = ("scalar", "bias", "weight")
BACKENDS: list[Any] = ["reference", "foreach", "compile", "fused"]


def load(case: str) -> tuple[dict[str, Any], Tensors, int]:
    with np.load(GOLDEN / f"mechanic_{case}.npz") as file:
        data = {key: torch.from_numpy(file[key]) for key in file if key != "config"}
        return json.loads(str(file["config"])), data, sum(key.startswith("scale/") for key in data)


def grads_of(data: Tensors, params: Any) -> Tensors:
    """Of the loss 0.5 x'Ax - b'x."""
    return {name: (data[f"A/{name}"] @ x.detach().flatten()).reshape(x.shape) - data[f"b/{name}"] for name, x in params.items()}


def check_step(data: Tensors, step: int, params: Any, scale: torch.Tensor) -> None:
    assert relative_error(scale, data[f"scale/{step}"]) < PUBLISHED, step
    for name, x in params.items():
        assert relative_error(x.detach(), data[f"x/{step}/{name}"]) < PUBLISHED, (step, name)


def base(config: dict[str, Any]) -> hn.Optimizer:
    return hn.get(config["base"])(**{key: config[key] for key in ("lr", "momentum", "weight_decay") if key in config})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["optax_sgd", "optax_adam"])
@pytest.mark.usefixtures("quick_programs")
def test_mechanic_is_that_of_optax(case: str, backend: Any) -> None:
    config, data, steps = load(case)
    params = {name: torch.nn.Parameter(data[f"x0/{name}"].clone()) for name in NAMES}
    tuner = hn.coin_betting(eps=config["eps"], num_betas=config["num_betas"])
    opt = hn.HyperOptimizer(params.items(), hn.rescale(base(config), scale=hn.learn(config["s_init"], by=tuner)), backend=backend)
    for step in range(1, steps + 1):
        for name, grad in grads_of(data, params).items():
            params[name].grad = grad
        opt.step()
        check_step(data, step, params, opt.hypers()["scale"]["group 0"])


def test_the_decay_of_mechanic_is_a_term_of_the_hypergradient() -> None:
    r"""With \(\Delta\) of the weights \(x = x_0 + s \Delta\), the published \(\lambda s \|g\| <x, \Delta> / \|x\|\) is one of weights."""
    config, data, steps = load("optax_adam_decay")
    params = {name: torch.nn.Parameter(data[f"x0/{name}"].clone()) for name in NAMES}
    start = {name: x.detach().clone() for name, x in params.items()}

    def norm(tensors: Any) -> Any:
        return sum(each.square().sum() for each in tensors) ** 0.5

    def decayed(hypergradient: torch.Tensor) -> torch.Tensor:
        along = sum((x * (x - start[name])).sum() for name, x in params.items())
        return hypergradient + config["decay"] * norm(x.grad for x in params.values()) * along / norm(params.values())

    tuner = hn.coin_betting(eps=config["eps"], num_betas=config["num_betas"])
    scale = hn.learn(config["s_init"], by=tuner, grad=decayed)
    opt = hn.HyperOptimizer(params.items(), hn.rescale(base(config), scale=scale), backend="reference")
    for step in range(1, steps + 1):
        for name, grad in grads_of(data, params).items():
            params[name].grad = grad
        opt.step()
        check_step(data, step, params, opt.hypers()["scale"]["group 0"])


@pytest.mark.parametrize("case", ["torch_sgd", "torch_adamw"])
def test_mechanic_is_that_of_its_authors(case: str) -> None:
    """Algorithm 1, but for the largest |h|, which starts at 1e-6 in their program."""
    config, data, steps = load(case)
    tuner = hn.coin_betting(eps=config["eps"], clip=False)
    nested = hn.Nested(hn.rescale(base(config), scale=hn.learn(config["s_init"], by=tuner)))
    params = {name: data[f"x0/{name}"] for name in NAMES}
    st = nested.init(params)
    largest = at(st, ("learners", "scale", "rule", "model", "largest"))
    largest.update({key: torch.full_like(leaf, 1e-6) for key, leaf in largest.items()})
    for step in range(1, steps + 1):
        params, st = nested.step(params, grads_of(data, params), st)
        check_step(data, step, params, nested.hypers(st)["scale"]["model"])


@pytest.mark.parametrize("memory", ["auto", "reverse"])
def test_the_hypergradient_of_the_scale_is_gradient_times_displacement(memory: Any) -> None:
    params, loss = problem(0)
    start = {name: x.clone() for name, x in params.items()}
    nested = hn.Nested(
        hn.rescale(hn.adamw(lr=0.1, weight_decay=0.1), scale=hn.learn(0.5, by=hn.sgd(lr=1e-2))), horizon=hn.OneStep(memory=memory)
    )
    st: Any = None
    for _ in range(5):
        params, st = run(nested, params, loss, 1, st)
        grads, scale = gradients(loss, params), nested.hypers(st)["scale"]["model"]
        displacement = {name: st["rule"][name]["displacement"] for name in params}
        for name, x in params.items():
            assert relative_error(x, start[name] + scale * displacement[name]) < EXACT
        expected = sum((grads[name] * displacement[name]).sum() for name in params)
        found = nested.hypergradients(params, grads, st)["scale"]["model"]
        assert relative_error(found, torch.as_tensor(expected)) < EXACT


def test_a_scale_of_one_is_the_optimizer_itself() -> None:
    params, loss = problem(1)
    (plain, _), (scaled, _) = (run(hn.Nested(make), params, loss, 20) for make in (hn.adam(lr=0.1), hn.rescale(hn.adam(lr=0.1))))
    assert all(relative_error(scaled[name], plain[name]) < EXACT for name in params)


@pytest.mark.parametrize("num_betas", [0, -1])
def test_there_is_a_discount(num_betas: int) -> None:
    with pytest.raises(ValueError, match=r"num_betas=.* must be an integer >= 1"):
        hn.Nested(hn.coin_betting(num_betas=num_betas)).init({"w": torch.ones(2)})
