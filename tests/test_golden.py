"""The published programs' recorded trajectories, reproduced by the drop-in optimizers with each backend, and by the pure engine."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import EXACT, SQUARE, TANH, relative_error

import ftp
import hyperopt_nested as hn
from ftp import SGDP, TPGM, AdamP, ftp_rule

GOLDEN = Path(__file__).parent / "golden"
FTP = sorted(path.stem for path in GOLDEN.glob("ftp_*.npz"))
SHARED = ("amsgrad", "weight_decay", "momentum", "nesterov")


def load(name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return json.loads(str(file["config"])), {key: torch.tensor(file[key]) for key in file if key != "config"}


def grads_at(data: dict[str, torch.Tensor], step: int) -> dict[str, torch.Tensor]:
    prefix = f"grad/{step}/"
    return {key.removeprefix(prefix): value for key, value in data.items() if key.startswith(prefix)}


def starts(data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.removeprefix("init/"): value for key, value in data.items() if key.startswith("init/")}


def named_groups(config: dict[str, Any], params: dict[str, torch.nn.Parameter]) -> Any:
    items = list(params.items())
    return [{"params": items[: len(items) // 2]}, {"params": items[len(items) // 2 :]}] if config["groups"] == 2 else items


def trajectory(
    opt: Any, params: dict[str, torch.nn.Parameter], config: dict[str, Any], data: dict[str, torch.Tensor]
) -> Iterator[tuple[dict[str, torch.Tensor], list[torch.Tensor]]]:
    """Parameters and radii after each step of an optimizer, with the schedule and the gradients that were recorded."""
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, config["lr_schedule"] or 1.0)
    for step in range(1, config["steps"] + 1):
        grads = grads_at(data, step)
        for name, param in params.items():
            param.grad = grads.get(name)
        opt.step()
        scheduler.step()
        yield {name: p.detach() for name, p in params.items()}, [opt.hypers()["radius"][name] for name in config["constrained"]]


DISTANCE = sorted(path.stem for path in GOLDEN.glob("distance_*.npz"))


@pytest.mark.parametrize("name", DISTANCE)
def test_distances_are_estimated_as_published(name: str) -> None:
    config, data = load(name)
    rule, drop_in = {
        "DAdaptAdam": (hn.dadapt_adam, hn.optim.DAdaptAdam),
        "DoG": (hn.dog, hn.optim.DoG),
        "LDoG": (hn.ldog, hn.optim.LDoG),
        "Prodigy": (hn.prodigy, hn.optim.Prodigy),
    }[config["optimizer"]]
    nested, params = hn.Nested(rule(**config["settings"])), starts(data)
    st = nested.init(params)
    weights = {key: torch.nn.Parameter(value.clone()) for key, value in params.items()}
    opt: Any = drop_in(weights.items(), **config["settings"])
    for step in range(config["steps"]):
        grads, lr = {key: data[f"grad/{key}"][step] for key in params}, data["lr"][step].item()
        params, st = nested.step(params, grads, st, {key: {"lr": lr} for key in params})
        opt.param_groups[0]["lr"] = lr
        for key, weight in weights.items():
            weight.grad = grads[key].clone()
        opt.step()
        for key, new in params.items():
            for found in (new, weights[key].detach()):
                assert relative_error(found, data[f"param/{key}"][step]) < EXACT, (key, step)
        if "d" in data:
            for state in st["rule"].values():
                assert state["d"].item() == pytest.approx(data["d"][step].item(), rel=EXACT)


def drop_in(
    config: dict[str, Any], data: dict[str, torch.Tensor], backend: Any = "reference"
) -> Iterator[tuple[dict[str, torch.Tensor], list[torch.Tensor]]]:
    """Parameters and radii after each step of AdamP or SGDP."""
    params = {name: torch.nn.Parameter(value) for name, value in starts(data).items()}
    settings = {key: config[key] for key in (*SHARED, "lr", "k") if key in config}
    make = {"adamp": AdamP, "sgdp": SGDP}[config["optimizer"]]
    return trajectory(make(named_groups(config, params), exclude=config["exclude"], backend=backend, **settings), params, config, data)


def wrapped(config: dict[str, Any], data: dict[str, torch.Tensor]) -> Iterator[tuple[dict[str, torch.Tensor], list[torch.Tensor]]]:
    """Parameters and radii after each step of FTP around torch's own optimizers."""
    params = {name: torch.nn.Parameter(value) for name, value in starts(data).items()}
    settings = {"weight_decay": 0.0, **{key: config[key] for key in (*SHARED, "lr") if key in config}}
    inside = {"adamp": torch.optim.AdamW, "sgdp": torch.optim.SGD}[config["optimizer"]](named_groups(config, params), **settings)
    return trajectory(ftp.FTP(inside, k=config.get("k", 1.0), exclude=config["exclude"]), params, config, data)


def pure(config: dict[str, Any], data: dict[str, torch.Tensor]) -> Iterator[tuple[dict[str, torch.Tensor], list[torch.Tensor]]]:
    """Parameters and radii after each step of the engine's own expression of FTP."""
    settings = {"weight_decay": 0.0, **{key: config[key] for key in (*SHARED, "lr") if key in config}}
    base = {"adamp": hn.adamw, "sgdp": hn.sgd}[config["optimizer"]](**settings)
    projected = ftp_rule(base, config.get("k", 1.0))
    params = starts(data)
    nested = hn.Nested({name: base if name in config["exclude"] else projected for name in params})
    st, lr = nested.init(params), config["lr"]
    for step in range(1, config["steps"] + 1):
        params, st = nested.step(params, grads_at(data, step), st, {name: {"lr": lr} for name in params})
        lr *= config["lr_schedule"] or 1.0
        yield params, [nested.hypers(st)["radius"][name] for name in config["constrained"]]


RUNS = {
    "reference": drop_in,
    "pure": pure,
    "wrapped": wrapped,
    **{each: partial(drop_in, backend=each) for each in ("foreach", "compile", "fused")},
}
COMPILED = ("ftp_adamp_k_half_decay", "ftp_sgdp_nesterov_decay")  # of each program one: they are traced anew for every tensor


@pytest.mark.parametrize(("case", "run"), [(case, run) for case in FTP for run in RUNS if run != "compile" or case in COMPILED])
@pytest.mark.usefixtures("quick_programs")
def test_ftp(case: str, run: str) -> None:
    config, data = load(case)
    tolerance = 1e-4 if config["dtype"] == "float32" else EXACT
    for step, (params, radii) in enumerate(RUNS[run](config, data), start=1):
        for name, param in params.items():
            assert relative_error(param, data[f"param/{step}/{name}"]) < tolerance, (step, name)
        assert relative_error(torch.stack(radii), data[f"gamma/{step}"].double()) < tolerance, step
    assert step == config["steps"]


def test_all_cases_of_ftp_are_there() -> None:
    assert len(FTP) == 8


@hn.rule(hn.rules.zeros("second"), separable="element")
def rmsprop_eps_inside(
    param: Any,
    grad: Any,
    state: Any,
    *,
    lr: Any = hn.NonNegative(1e-2, via=SQUARE),
    decay: Any = hn.UnitInterval(0.99),
    eps: Any = hn.Positive(1e-8),
) -> Any:
    """RMSProp as in the published towers: eps inside the root, the root of lr is learned."""
    second = decay * state["second"] + (1 - decay) * grad * grad
    return param - lr * grad / torch.sqrt(second + eps), {"second": second}


def learned(value: float, by: float | hn.Learn, **how: Any) -> hn.Learn:
    return hn.learn(value, by=hn.sgd(lr=by), **how)


def _second_moment_at_eps(param: torch.Tensor) -> Any:
    state = hn.rules.counted("exp_avg", "exp_avg_sq")(param)
    return {**state, "exp_avg_sq": state["exp_avg_sq"] + 1e-8}


@hn.rule(_second_moment_at_eps, separable="element")
def adam_from_eps(
    param: Any,
    grad: Any,
    state: Any,
    *,
    lr: Any = hn.NonNegative(1e-2),
    beta1: Any = hn.UnitInterval(0.9),
    beta2: Any = hn.UnitInterval(0.999),
    eps: Any = hn.Positive(1e-8),
) -> Any:
    """Adam as in the published towers: the second moment starts at eps."""
    new = hn.rules.moments(grad, state, beta1, beta2)
    return param - lr * hn.rules.direction(new["step"], new["exp_avg"], new["exp_avg_sq"], beta1, beta2, eps), new


def adam(**settings: Any) -> hn.Optimizer:
    return adam_from_eps(lr=learned(1e-2, 1e-4), **settings)


TOWERS = {
    "tower_sgd_sgd": hn.sgd(lr=learned(2e-2, 1e-4)),
    "tower_sgd_sgd_sgd": hn.sgd(lr=learned(2e-2, learned(1e-4, 1e-7))),
    "tower_sgd_momentum_sgd": hn.sgd(lr=learned(2e-2, 1e-4), momentum=learned(0.5, 1e-4)),
    "tower_adam_alpha_sgd": adam(),
    "tower_adam_sgd": adam(beta1=learned(0.9, 1e-4, via=TANH), beta2=learned(0.999, 1e-4, via=TANH)),
    "tower_rmsprop_alpha_sgd": rmsprop_eps_inside(lr=learned(1e-2, 1e-4)),
}


@pytest.mark.parametrize("backend", ["reference", "foreach", "compile", "fused"])
@pytest.mark.parametrize("case", sorted(path.stem for path in GOLDEN.glob("tower_*.npz")))
@pytest.mark.usefixtures("quick_programs")
def test_tower_by_programs(case: str, backend: Any) -> None:
    config, data = load(case)
    params = {name: torch.nn.Parameter(data[f"x0/{name}"]) for name in ("u", "v")}
    opt = hn.HyperOptimizer(list(params.items()), TOWERS[case], backend=backend)
    for step in range(1, config["steps"] + 1):
        for name, x in params.items():
            x.grad = data[f"A/{name}"] @ x.detach() - data[f"b/{name}"]
        opt.step()
        for name, x in params.items():
            assert relative_error(x.detach(), data[f"x/{step}/{name}"]) < EXACT
    for path, values in opt.hypers().items():
        assert relative_error(next(iter(values.values())), data[f"hyper/{path}/{step}"]) < EXACT


@pytest.mark.parametrize("case", sorted(path.stem for path in GOLDEN.glob("tower_*.npz")))
def test_tower(case: str) -> None:
    config, data = load(case)
    nested = hn.Nested(TOWERS[case])
    params = {name: data[f"x0/{name}"] for name in ("u", "v")}
    st = nested.init(params)
    compared = 0
    for step in range(1, config["steps"] + 1):
        params, st = nested.step(params, {name: data[f"A/{name}"] @ x - data[f"b/{name}"] for name, x in params.items()}, st)
        for name, x in params.items():
            assert relative_error(x, data[f"x/{step}/{name}"]) < EXACT
        for path, values in nested.hypers(st).items():
            assert relative_error(values["model"], data[f"hyper/{path}/{step}"]) < EXACT
            compared += 1
    assert compared >= config["steps"]


@pytest.mark.parametrize("case", sorted(path.stem for path in GOLDEN.glob("spd_*.npz")))
def test_spd(case: str) -> None:
    config, data = load(case)
    nested = hn.Nested(hn.spd(hn.adam(lr=config["lr"], amsgrad=config.get("amsgrad", False)), decay=config["weight_decay"]))
    params = starts(data)
    st = nested.init(params)
    for step in range(1, config["steps"] + 1):
        params, st = nested.step(params, grads_at(data, step), st)
        for name, param in params.items():
            assert relative_error(param, data[f"param/{step}/{name}"]) < EXACT, (step, name)


Run = Iterator[tuple[list[torch.Tensor], dict[str, torch.Tensor]]]


def held_out_loss(data: dict[str, torch.Tensor], params: dict[str, Any], batch: int) -> torch.Tensor:
    hidden = torch.tanh(data[f"x/{batch}"] @ params["fc1.weight"].T + params["fc1.bias"])
    return torch.nn.functional.cross_entropy(hidden @ params["fc2.weight"].T + params["fc2.bias"], data[f"y/{batch}"])


def tuned_weights(data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.removeprefix("start/"): value for key, value in data.items() if key.startswith("start/")}


def tpgm_beside(config: dict[str, Any], data: dict[str, torch.Tensor]) -> Run:
    """Radii after each step of them, and the weights after one step of `TPGM`."""
    params = {name: torch.nn.Parameter(value) for name, value in starts(data).items()}
    norm: Any = config["norm"].removesuffix("_norm")
    opt = TPGM(params.items(), norm=norm, lr=config["learner_lr"], updates=config["radius_updates"], exclude=config["exclude"])
    with torch.no_grad():
        for name, value in tuned_weights(data).items():
            params[name].copy_(value)
    seen = []

    def closure() -> torch.Tensor:
        seen.append([opt.hypers()["radius"][name] for name in config["constrained"]])
        loss = held_out_loss(data, params, (len(seen) - 1) % 4)
        assert relative_error(loss.detach(), data[f"loss/{len(seen)}"]) < EXACT
        torch.autograd.backward(loss)
        return loss

    opt.step(closure)
    for radii in [*seen[1:], [opt.hypers()["radius"][name] for name in config["constrained"]]]:
        yield radii, {name: p.detach() for name, p in params.items()}


def tpgm_by_the_engine(config: dict[str, Any], data: dict[str, torch.Tensor]) -> Run:
    """Radii after each step of them, and the weights projected with these, by an expression of the engine."""
    ball = {"mars_norm": hn.mars, "l2_norm": hn.frobenius}[config["norm"]]
    anchors, tuned = starts(data), tuned_weights(data)

    def projected(name: str) -> hn.Optimizer:
        radius = ball.norms(tuned[name] - anchors[name]).amin().item() / 2
        by = hn.learn(radius, by=hn.adam(lr=config["learner_lr"]), per="tensor", bounds=(1e-8, ftp.largest_norm))
        return hn.project(hn.sgd(lr=0.0), onto=ball, radius=by, anchor=anchors[name], saturation="exact")

    nested = hn.Nested({name: projected(name) if name in config["constrained"] else hn.sgd(lr=0.0) for name in tuned})
    st, nothing = nested.init(tuned), {name: torch.zeros_like(value) for name, value in tuned.items()}
    params, st = nested.step(tuned, nothing, st, learn=False)
    for step in range(config["radius_updates"]):
        st = nested.hyper_step(params, torch.func.grad(held_out_loss, argnums=1)(data, params, step % 4), st)
        params, st = nested.step(tuned, nothing, st, learn=False)
        found = nested.hypers(st)
        yield [found[nested.bindings[name].learned["radius"].key][name] for name in config["constrained"]], params


@pytest.mark.parametrize("run", [tpgm_beside, tpgm_by_the_engine])
@pytest.mark.parametrize("case", sorted(path.stem for path in GOLDEN.glob("tpgm_*.npz")))
def test_tpgm(case: str, run: Any) -> None:
    """TPGM projects the same fine-tuned weights again and again; the radii learn from the validation loss after each projection."""
    config, data = load(case)
    found = list(run(config, data))
    assert len(found) == config["radius_updates"]
    for step, (radii, _) in enumerate(found, start=1):
        assert relative_error(torch.stack(radii), data[f"radius/{step}"]) < EXACT, step
    for name, param in found[-1][1].items():
        assert relative_error(param, data[f"param/{name}"]) < EXACT, name
