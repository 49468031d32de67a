"""With nothing learned, the rules are torch.optim's; with a learner that does not move, they are themselves, bit for bit."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from cases import EXACT, SHAPES, examples, problem, randn, relative_error
from hypothesis import given
from hypothesis import strategies as st
from test_unrolled import PER_MODEL, RULES
from torch.testing._internal.common_optimizers import optim_db

import hyperopt_nested as hn

FLOAT32 = 1e-5  # the same in float32
Settings = dict[str, Any]

rates = st.floats(1e-3, 0.3)
betas = st.floats(0.0, 0.999)
seconds = st.floats(0.5, 0.999)  # below, steps divide by one gradient, however small, and rounding grows
decay = st.one_of(st.just(0.0), st.floats(0.0, 0.5))
momenta = st.one_of(st.just(0.0), st.floats(0.1, 1.0))
epsilons = st.floats(1e-8, 1e-1)
flags = st.booleans()


@st.composite
def sgd_settings(draw: st.DrawFn) -> Settings:
    momentum = draw(momenta)
    nesterov = draw(flags) and momentum > 0
    dampening = 0.0 if nesterov else draw(st.one_of(st.just(0.0), st.floats(-1.0, 1.0)))
    return {**draw(keywords()), "momentum": momentum, "dampening": dampening, "nesterov": nesterov}


def keywords(**more: st.SearchStrategy[Any]) -> st.SearchStrategy[Settings]:
    return st.fixed_dictionaries({"lr": rates, "weight_decay": decay, "maximize": flags, **more})


def adams(**more: st.SearchStrategy[Any]) -> st.SearchStrategy[Settings]:
    return keywords(betas=st.tuples(betas, seconds), eps=epsilons, **more)


def without(strategy: st.SearchStrategy[Settings], key: str) -> st.SearchStrategy[Settings]:
    return strategy.map(lambda settings: {name: value for name, value in settings.items() if name != key})


PAIRS = {"betas": ("beta1", "beta2"), "etas": ("etaminus", "etaplus"), "step_sizes": ("step_size_min", "step_size_max")}


def unpacked(settings: Settings, dtype: torch.dtype) -> Settings:
    """Our names: each number has its own."""
    found: Settings = {}
    for key, value in settings.items():
        found |= dict(zip(PAIRS[key], value, strict=True)) if key in PAIRS else {key: value}
    return found


def of_adafactor(settings: Settings, dtype: torch.dtype) -> Settings:
    eps1, eps2 = settings.get("eps", (None, 1e-3))
    others = {key: value for key, value in settings.items() if key != "eps"}
    return {**others, "eps1": torch.finfo(dtype).eps if eps1 is None else eps1, "eps2": eps2}


@dataclass(frozen=True)
class Row:
    """An optimizer of torch: what its keyword arguments are drawn from, what they are in our rule, and the tensors that it accepts."""

    settings: st.SearchStrategy[Settings]
    ours: Callable[[Settings, torch.dtype], Settings] = unpacked
    shapes: dict[str, tuple[int, ...]] = field(default_factory=lambda: {**SHAPES, "empty": (0, 3)})


TORCH = {
    "SGD": Row(sgd_settings()),
    "Adam": Row(adams(amsgrad=flags)),
    "AdamW": Row(adams(amsgrad=flags)),
    "NAdam": Row(adams(momentum_decay=st.floats(0.0, 0.1), decoupled_weight_decay=flags)),
    "RAdam": Row(adams(decoupled_weight_decay=flags)),
    "Adamax": Row(adams()),
    "Adagrad": Row(keywords(lr_decay=decay, initial_accumulator_value=decay, eps=st.floats(1e-10, 1e-1))),
    "Adadelta": Row(keywords(lr=st.floats(0.0, 1.0), rho=st.floats(0.0, 1.0), eps=epsilons)),
    "RMSprop": Row(keywords(alpha=seconds, eps=epsilons, momentum=momenta, centered=flags)),
    "Rprop": Row(
        without(
            keywords(
                etas=st.tuples(st.floats(0.1, 0.9), st.floats(1.05, 2.0)),
                step_sizes=st.tuples(st.floats(1e-6, 1e-2), st.floats(1e-2, 50.0)),
            ),
            "weight_decay",
        )
    ),
    "ASGD": Row(keywords(lambd=decay, alpha=st.floats(0.0, 2.0), t0=st.sampled_from([0, 10.0, 1e6]))),
    "Adafactor": Row(
        keywords(
            beta2_decay=st.floats(-1.5, 0.0),
            eps=st.tuples(st.one_of(st.none(), epsilons), st.floats(0.0, 1.0)),
            d=st.floats(1.0, 2.0),
        ),
        of_adafactor,
        SHAPES,  # torch divides by the number of entries
    ),
    "Muon": Row(
        without(
            keywords(
                momentum=betas,
                eps=epsilons,
                nesterov=flags,
                ns_steps=st.integers(1, 6),
                adjust_lr_fn=st.sampled_from([None, "original", "match_rms_adamw"]),
            ),
            "maximize",
        ),
        lambda settings, dtype: {**settings, "ns_dtype": torch.bfloat16},
        {"tall": (3, 2), "bias": (1, 3), "wide": (2, 4), "square": (3, 3), "empty": (0, 3)},
    ),
}


def compare(
    name: str, settings: Settings, seed: int, dtype: torch.dtype = torch.float64, steps: int = 50, ours: Settings | None = None
) -> float:
    """Largest difference from torch.optim over all steps, relative to the tensor's largest entry so far; gradients have exact zeros."""
    generator = torch.Generator().manual_seed(seed)
    shapes = TORCH[name].shapes
    params = {key: torch.nn.Parameter(randn(shape, generator).to(dtype)) for key, shape in shapes.items()}
    theirs = {key: torch.nn.Parameter(p.detach().clone()) for key, p in params.items()}
    opt = hn.HyperOptimizer(params.items(), hn.get(name.lower())(**(ours or TORCH[name].ours(settings, dtype))))
    reference = getattr(torch.optim, name)(theirs.values(), **settings)
    errors, largest = [], dict.fromkeys(shapes, 0.0)
    for step in range(steps):
        for key, shape in shapes.items():
            grad = randn(shape, generator).to(dtype) * (torch.rand(shape, generator=generator) > 0.2)
            params[key].grad, theirs[key].grad = (None, None) if step % 7 == 3 and key == "bias" else (grad, grad.clone())
        opt.step()
        reference.step()
        for key, theirs_now in theirs.items():
            largest[key] = max(largest[key], theirs_now.detach().abs().amax().item() if theirs_now.numel() else 0.0)
            errors.append(relative_error(params[key].detach(), theirs_now.detach(), largest[key]))
    evaluated = opt.eval_params()
    for key, theirs_now in theirs.items():
        average = reference.state[theirs_now].get("ax", theirs_now).detach()
        errors.append(relative_error(evaluated[key], average, largest[key]))
    return torch.tensor(errors).max().item()  # NaN if one is


@pytest.mark.parametrize("name", TORCH)
@given(st.data(), st.integers(0, 2**31))
@examples(6)
def test_a_rule_is_torch(name: str, data: st.DataObject, seed: int) -> None:
    assert compare(name, data.draw(TORCH[name].settings), seed) < EXACT


@pytest.mark.parametrize("name", TORCH)
@given(st.data(), st.integers(0, 2**31))
@examples(2)
def test_a_rule_is_torch_in_float32(name: str, data: st.DataObject, seed: int) -> None:
    assert compare(name, data.draw(TORCH[name].settings), seed, torch.float32) < FLOAT32


@given(TORCH["Muon"].settings, st.integers(0, 2**31))
@examples(6)
def test_muon_is_torch_in_full_precision(settings: Settings, seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)  # torch goes on in place
        assert compare("Muon", settings, seed, ours=settings) < EXACT


@pytest.mark.parametrize("shape", [(), (3,), (2, 2, 1, 2)])
def test_muon_is_for_matrices(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"a tensor of shape {shape} is none: pass HyperOptimizer a function (name, tensor)")):
        hn.Nested(hn.get("muon")()).init({"w": torch.ones(shape)})
    with pytest.raises(ValueError, match="adjust_lr_fn='rms' must be None or one of 'original', 'match_rms_adamw'"):
        hn.Nested(hn.get("muon")(adjust_lr_fn="rms")).init({"w": torch.ones(2, 2)})


@pytest.mark.parametrize(("momentum", "has"), [(0.0, False), (0.5, True), (hn.learn(0.0, by=hn.sgd()), True)])
def test_rmsprop_keeps_only_what_it_needs(momentum: Any, has: bool) -> None:
    state = hn.Nested(hn.get("rmsprop")(momentum=momentum)).init({"w": torch.ones(2)})["rule"]["w"]
    assert state.keys() == ({"square_avg", "momentum_buffer"} if has else {"square_avg"})


OTHERS = {"LBFGS": "evaluates the model several times a step", "SparseAdam": "is for sparse gradients"}  # torch's that are no rules
HOW = ("foreach", "fused", "capturable", "differentiable")  # how torch computes, not what


def settings_of_torch() -> Iterator[Any]:
    """The settings that torch's own tests try. All of them can be expressed."""
    assert {info.optim_cls.__name__ for info in optim_db} == {*TORCH, *OTHERS}
    for info in optim_db:
        name = info.optim_cls.__name__
        for given_ in info.optim_inputs_func(device="cpu") if name in TORCH else ():
            settings = {key: value for key, value in given_.kwargs.items() if key not in HOW}
            settings |= {"lr": settings["lr"].double()} if isinstance(settings.get("lr"), torch.Tensor) else {}  # Muon multiplies it
            yield pytest.param(name, settings, id=f"{name}-{given_.desc}")


@pytest.mark.parametrize(("name", "settings"), list(settings_of_torch()))
def test_the_settings_of_torchs_own_tests(name: str, settings: Settings) -> None:
    assert compare(name, settings, seed=1, steps=20) < EXACT


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_momentum_is_kept_as_torch_keeps_it(dtype: torch.dtype) -> None:
    params = [torch.nn.Parameter(torch.linspace(-1, 1, 24).reshape(4, 6).to(dtype)) for _ in range(2)]
    ours = hn.HyperOptimizer([("w", params[0])], hn.sgd(lr=0.01, momentum=0.9))
    torchs = torch.optim.SGD(params[1:], lr=0.01, momentum=0.9)
    for _ in range(10):
        for param in params:
            param.grad = torch.cos(3 * param.detach())
        ours.step()
        torchs.step()
    buffers = ours.state[params[0]]["rule.momentum_buffer"], torchs.state[params[1]]["momentum_buffer"]
    for found, expected in (buffers, params):
        assert found.dtype == expected.dtype == dtype
        assert relative_error(found.detach().double(), expected.detach().double()) < 4 * torch.finfo(dtype).eps


# One value is kept in float64 whatever the parameter's dtype, many values in float32: those round differently beside narrow parameters.
KEPT = [("model", torch.float64), ("model", torch.float32), ("model", torch.bfloat16), ("tensor", torch.float32)]
KEPT += [("row", torch.float64), ("element", torch.float64)]


@pytest.mark.parametrize(("per", "dtype"), KEPT)
@pytest.mark.parametrize("name", [name for name in RULES if name not in PER_MODEL])
def test_learners_that_do_not_move_change_nothing(name: str, per: Any, dtype: torch.dtype) -> None:
    rule = hn.get(name)
    values = {hyper: declared or 0.1 for hyper, declared in rule().declared.items()}
    fixed = rule().rule.nondifferentiable
    learned = {hyper: hn.learn(value, by=hn.sgd(lr=0.0), per=per) for hyper, value in values.items() if hyper not in fixed}
    start, loss = problem(3, {"weight": (3, 2)} if name == "muon" else SHAPES)
    models = []
    for settings in (values, {**values, **learned}):
        params = {key: torch.nn.Parameter(p.to(dtype)) for key, p in start.items()}
        opt = hn.HyperOptimizer(params.items(), rule(**settings), backend="reference")  # as "auto" takes the first steps
        for _ in range(4):
            opt.zero_grad()
            loss(params).backward()
            opt.step()
        models.append(params)
    for key in start:
        assert torch.equal(models[0][key], models[1][key]), key


@pytest.mark.parametrize("name", [name for name in TORCH if name not in ("ASGD", "Adafactor")])  # which keep other things
def test_a_run_of_torch_goes_on(name: str) -> None:
    """A state of torch.optim is loaded into the same rule, which goes on as torch does; also where it learns."""
    how = {"lr": 0.02} | ({"momentum": 0.9} if name in ("SGD", "RMSprop") else {})
    params, loss = problem(0, {key: shape for key, shape in TORCH[name].shapes.items() if key != "empty"})
    theirs = {key: torch.nn.Parameter(value.clone()) for key, value in params.items()}

    def step(opt: torch.optim.Optimizer, tensors: dict[str, torch.nn.Parameter]) -> None:
        opt.zero_grad()
        loss(dict(tensors)).backward()  # type: ignore[arg-type]
        opt.step()

    other = getattr(torch.optim, name)(theirs.values(), **how)
    for _ in range(5):
        step(other, theirs)
    ours = {key: torch.nn.Parameter(value.detach().clone()) for key, value in theirs.items()}
    opt = getattr(hn.optim, name)(ours.values(), **how)
    opt.load_state_dict(other.state_dict())
    learned = {key: torch.nn.Parameter(value.detach().clone()) for key, value in theirs.items()}
    rate = 0.02 if name == "Rprop" else hn.learn(0.02, by=hn.sgd(1e-6))  # its rate is of the first step alone
    learning = getattr(hn.optim, name)(learned.values(), **{**how, "lr": rate})
    learning.load_state_dict(other.state_dict())
    for _ in range(5):
        step(other, theirs)
        step(opt, ours)
        step(learning, learned)
    back = getattr(torch.optim, name)(learned.values(), lr=1.0)
    back.load_state_dict(opt.torch_state_dict())
    copies = [torch.nn.Parameter(value.detach().clone()) for value in ours.values()]
    back.param_groups[0]["params"], back.state = copies, {copy: back.state[p] for copy, p in zip(copies, learned.values(), strict=True)}
    step(other, theirs)
    step(back, dict(zip(ours, copies, strict=True)))
    for copied, value in zip(copies, theirs.values(), strict=True):
        assert relative_error(copied.detach(), value.detach()) < EXACT
    step(opt, ours)
    for key, value in theirs.items():
        assert relative_error(ours[key].detach(), value.detach()) < EXACT, key
    assert name == "Rprop" or learning.learned()["lr"] != 0.02


def test_a_state_for_torch_has_learned_values_or_is_refused() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    opt = hn.optim.AdamW([weight], lr=hn.learn(0.1, by=hn.sgd(0.01)), betas=(hn.learn(0.9, by=hn.sgd(0.01)), 0.99))
    for _ in range(3):
        weight.grad = torch.ones(2)
        opt.step()
    (group,) = opt.torch_state_dict()["param_groups"]
    learned = opt.learned()
    assert (group["lr"], group["betas"][0]) == (learned["lr"], learned["beta1"]) != (0.1, 0.9)
    with pytest.raises(ValueError, match=r"lr is learned by tensor, row or element, but torch\.optim has one number in group 0"):
        hn.optim.SGD([weight], lr=hn.learn(0.1, by=hn.sgd(), per="tensor")).torch_state_dict()
    with pytest.raises(ValueError, match=r"torch\.optim has no clip_by_norm\(sgd\)"):
        hn.HyperOptimizer([weight], hn.clip_by_norm(hn.sgd())).torch_state_dict()


def test_a_state_of_another_rule_of_torch_is_refused() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    other = torch.optim.AdamW([weight], amsgrad=True)
    other.step()
    opt = hn.optim.AdamW([weight])
    message = r"its entries for '0.0' are 'step', 'exp_avg', 'exp_avg_sq', 'max_exp_avg_sq', and those of this rule 'step', 'exp_avg', "
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(other.state_dict())
