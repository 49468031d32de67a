"""FTP around other optimizers: equal to AdamP and SGDP, at home in loops and trainers, and exact after a resume."""

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import prodigyopt
import pytest
import schedulefree
import torch
from cases import EXACT, relative_error
from torch import Tensor, nn

import hyperopt_nested as hn
from ftp import FLOOR, FTP, SGDP, AdamP

Make = Callable[[nn.Module], torch.optim.Optimizer]


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5, dtype=dtype), nn.Tanh(), nn.Linear(5, 2, dtype=dtype))


def batch(step: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(step), dtype=dtype)


def train(model: nn.Module, opt: Any, steps: int = 5, first: int = 0, between: Callable[[], Any] = lambda: None) -> None:
    for step in range(first, first + steps):
        opt.zero_grad()
        (model(batch(step, next(model.parameters()).dtype)) - 1).square().mean().backward()
        between()
        opt.step()


class Manual(torch.optim.Optimizer):
    """By hand: steps along signs, with momentum in the state, and changes gradients in place."""

    def __init__(self, params: Any, lr: float = 1e-2, decay: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    average = self.state[p].setdefault("average", torch.zeros_like(p))
                    p.grad.add_(p, alpha=group["decay"])
                    average.lerp_(p.grad, 0.1)
                    p.sub_(average.sign(), alpha=group["lr"])
        return loss


class Free(schedulefree.AdamWScheduleFree):  # type: ignore[misc]
    """In its training mode from the start."""

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, **settings)
        self.train()


LEARNING = hn.adam(lr=hn.learn(0.05, by=hn.sgd(lr=1e-4)))
OPTIMIZERS: dict[str, Make] = {
    "AdamW, fused": lambda model: torch.optim.AdamW(model.parameters(), lr=0.05, fused=True),
    "SGD": lambda model: torch.optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9),
    "Muon": lambda model: torch.optim.Muon([p for p in model.parameters() if p.ndim == 2], lr=0.02),
    "schedule-free": lambda model: Free(model.parameters(), lr=0.05),
    "Prodigy": lambda model: prodigyopt.Prodigy(model.parameters(), d0=1e-2),
    "by hand": lambda model: Manual(model.parameters()),
    "this library's": lambda model: hn.HyperOptimizer(model.named_parameters(), LEARNING, horizon=hn.OneStep("kept")),
}


def foreign(function: Any) -> Any:
    return pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)(function)


def norms(model: nn.Module, opt: FTP, anchors: dict[str, Tensor]) -> Iterator[tuple[float, float]]:
    """Of each tensor that is projected: the largest row sum of its displacement, and its radius."""
    radii = opt.hypers()["radius"]
    for name, p in model.named_parameters():
        if name in radii:
            yield hn.mars.norm(p.detach() - anchors[name]).item(), float(radii[name])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, EXACT), (torch.float32, 1e-6)], ids=["float64", "float32"])
@pytest.mark.parametrize("k", [1.0, 0.3])
def test_it_is_adamp_and_sgdp_around_torchs_own(k: float, dtype: torch.dtype, tolerance: float) -> None:
    pairs: list[tuple[Make, Make]] = [
        (
            lambda model: FTP(torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1, fused=True), k=k, exclude=model[2]),
            lambda model: AdamP(model.named_parameters(), lr=0.05, weight_decay=0.1, k=k, exclude="2.*"),
        ),
        (
            lambda model: FTP(torch.optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9, nesterov=True), k=k, radius_lr=3e-3),
            lambda model: SGDP(model.named_parameters(), lr=0.1, momentum=0.9, nesterov=True, k=k, radius_lr=3e-3),
        ),
    ]
    for made, wanted in pairs:
        results = []
        for make in (made, wanted):
            model = network(dtype)
            opt = make(model)
            train(model, opt, 20)
            results.append([*model.parameters(), *opt.hypers()["radius"].values()])  # type: ignore[attr-defined]
        for found, expected in zip(*results, strict=True):
            assert relative_error(found.detach(), expected.detach()) < tolerance


@pytest.mark.parametrize("module", [torch.optim, hn.optim])
def test_radii_ascend_with_the_optimizer_inside(module: Any) -> None:
    models = network(), network()
    how = {"lr": 0.05, "weight_decay": 0.1, "maximize": True}
    train(models[0], FTP(module.AdamW(models[0].parameters(), **how)), 6)
    train(models[1], AdamP(models[1].parameters(), **how), 6)
    for found, expected in zip(*(model.parameters() for model in models), strict=True):
        assert relative_error(found.detach(), expected.detach()) < EXACT


@foreign
def test_other_optimizers_step_inside_the_ball_and_learn_its_radius(make: Make) -> None:
    model = network()
    anchors = {name: p.detach().clone() for name, p in model.named_parameters()}
    opt = FTP(make(model), named_parameters=model.named_parameters(), exclude="2.weight")
    train(model, opt, 12)
    found = [*norms(model, opt, anchors)]
    assert len(found) == len(opt.learned()) >= 1
    assert "radius/2.weight" not in opt.learned()
    for norm, radius in found:
        assert norm <= radius * (1 + 1e-6)
        assert radius > 2 * FLOOR


@foreign
def test_schedulers_scalers_clipping_and_hooks_take_it_as_an_optimizer(make: Make) -> None:
    model, plain = network(torch.float32), network(torch.float32)
    results = []
    for net, opt in (
        (model, FTP(make(model), exclude=[*make(model).param_groups[0]["params"]])),
        (plain, make(plain)),
    ):  # nothing is projected
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 10)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        calls: list[int] = []
        opt.register_step_post_hook(lambda *_, calls=calls: calls.append(1))
        for step in range(5):
            net.zero_grad()
            loss = (net(batch(step, torch.float32)) - 1).square().mean() * (torch.inf if step == 2 else 1.0)
            scaler.scale(loss).backward()
            scaler.unscale_(opt)
            nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            scaler.step(opt)
            scaler.update()
            scheduler.step()
        results.append((calls, opt.param_groups[0]["lr"], [p.detach() for p in net.parameters()]))
    assert len(results[0][0]) == 4  # a step was left out, which fused ones of torch leave out inside
    assert results[0][1] == results[1][1] < make(plain).param_groups[0]["lr"]
    assert all(torch.equal(a, b) for a, b in zip(results[0][2], results[1][2], strict=True))


@foreign
@pytest.mark.parametrize("how", ["state dict", "copy", "pickle"])
def test_a_resumed_run_is_bitwise_the_same(make: Make, how: str) -> None:
    model = network()
    opt = FTP(make(model))
    train(model, opt, 4)
    if how == "state dict":
        saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
        other = network()
        with torch.no_grad():
            other[0].weight.add_(1.0)
        again = FTP(make(other))  # before the weights are there, as trainers do
        other.load_state_dict(saved[0])
        again.load_state_dict(saved[1])
    else:
        other, again = copy.deepcopy((model, opt)) if how == "copy" else pickle.loads(pickle.dumps((model, opt)))
    assert again.learned() == opt.learned()
    train(model, opt, 4, first=4)
    train(other, again, 4, first=4)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert again.learned() == opt.learned()


def test_names_that_only_ftp_was_given_do_not_stand_in_the_way_of_a_load() -> None:
    model = network()
    named = [(f"net.{name}", p) for name, p in model.named_parameters()]
    opt = FTP(torch.optim.SGD(model.named_parameters(), lr=0.1), named_parameters=named)
    train(model, opt, 3)
    again = FTP(torch.optim.SGD(model.named_parameters(), lr=0.1), named_parameters=named)
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert again.learned() == opt.learned()
    assert opt.learned()["radius/net.0.weight"] > 2 * FLOOR


def test_groups_and_state_are_those_of_the_optimizer_inside() -> None:
    model = network()
    inside = torch.optim.AdamW(model[0].parameters(), lr=0.05)
    opt = FTP(inside)
    assert isinstance(opt, torch.optim.Optimizer)
    train(model, opt, 2)
    assert opt.state is inside.state
    assert opt.param_groups is inside.param_groups
    opt.param_groups[0]["lr"] = 0.0
    before = copy.deepcopy(model.state_dict())
    train(model, opt, 1)
    moved = [p.detach() - before[name] for name, p in model.named_parameters()]
    assert max(float(each.abs().max()) for each in moved) < 1e-12
    inside.add_param_group({"params": [*model[2].parameters()], "lr": 0.05})
    anchors = {f"1.{i}": p.detach().clone() for i, p in enumerate(model[2].parameters())}
    train(model, opt, 3)
    assert sorted(opt.learned()) == ["radius/0.0", "radius/0.1", "radius/1.0", "radius/1.1"]
    for i, p in enumerate(model[2].parameters()):
        assert hn.mars.norm(p.detach() - anchors[f"1.{i}"]).item() <= opt.learned()[f"radius/1.{i}"] * (1 + 1e-9)


def test_anchors_are_the_weights_before_the_first_step() -> None:
    model = network()
    opt = FTP(torch.optim.SGD(model.parameters(), lr=1e-3))
    pretrained = {name: value + 5 for name, value in model.state_dict().items()}
    model.load_state_dict(pretrained)
    train(model, opt, 1)
    assert all(float((p.detach() - pretrained[name]).abs().max()) < 1e-6 for name, p in model.named_parameters())


def test_a_closure_is_evaluated_by_the_optimizer_inside() -> None:
    model, plain = network(), network()
    opts = FTP(torch.optim.LBFGS(model.parameters(), max_iter=3), exclude=model), torch.optim.LBFGS(plain.parameters(), max_iter=3)
    for net, opt in zip((model, plain), opts, strict=True):

        def closure(net: nn.Module = net, opt: torch.optim.Optimizer = opt) -> Any:
            opt.zero_grad()
            loss = (net(batch(0)) - 1).square().mean()
            loss.backward()
            return loss

        assert opt.step(closure).item() > 0  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    start = network()
    projected = FTP(torch.optim.LBFGS(start.parameters(), max_iter=3))
    anchors = {f"0.{i}": p.detach().clone() for i, p in enumerate(start.parameters())}
    projected.step(lambda: closure(start, projected))
    for i, p in enumerate(start.parameters()):
        assert hn.mars.norm(p.detach() - anchors[f"0.{i}"]).item() <= projected.learned()[f"radius/0.{i}"] * (1 + 1e-9)


def test_a_loss_is_handed_to_the_optimizer_inside() -> None:
    tensors = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    inside, alone = (hn.HyperOptimizer([("w", each)], hn.polyak(hn.sgd(lr=0.1))) for each in tensors)
    wrapped = FTP(inside, exclude="w")
    for _ in range(3):
        for each, opt in zip(tensors, (wrapped, alone), strict=True):
            opt.zero_grad()
            loss = each.square().sum()
            loss.backward()
            opt.step(loss=loss)
    assert torch.equal(*tensors)
    assert tensors[0].ne(1).all()


def test_radii_learn_from_gradients_as_they_were_before_the_step() -> None:
    """The optimizer by hand adds its decay to them, in place; the same without a trace gives the same radii."""

    class Discreet(Manual):
        def step(self, closure: Any = None) -> Any:
            own = [(p, p.grad.clone()) for group in self.param_groups for p in group["params"]]
            super().step(closure)
            for p, grad in own:
                p.grad.copy_(grad)

    results = []
    for make in (Manual, Discreet):
        model = network()
        opt = FTP(make(model.parameters()))
        train(model, opt, 6)
        results.append(opt.learned())
    assert results[0] == pytest.approx(results[1], rel=1e-12)


def test_a_gradient_that_is_not_finite_spoils_what_the_optimizer_inside_would_spoil() -> None:
    model = network()
    opt = FTP(hn.HyperOptimizer(model.named_parameters(), hn.lion(lr=1e-2)))
    train(model, opt, 3)
    opt.zero_grad()
    (model(batch(3)) - 1).square().mean().backward()
    model[0].weight.grad[0, 0] = torch.inf
    opt.step()
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    assert all(0 < value < 10 for value in opt.learned().values())


def test_bad_arguments_are_named_and_change_nothing() -> None:
    model = network()
    inside = torch.optim.AdamW(model.parameters(), lr=0.1)
    wrong: list[tuple[Any, type[Exception], str]] = [
        (lambda: FTP(model), TypeError, "optimizer has type Sequential"),
        (lambda: FTP(FTP(inside)), ValueError, "FTP, which projects already"),
        (lambda: FTP(AdamP(model.parameters())), ValueError, "AdamP, which projects already"),
        (lambda: FTP(inside, k=2.0), ValueError, "k=2.0"),
        (lambda: FTP(inside, radius_lr=-1.0), ValueError, "radius_lr=-1.0"),
        (lambda: FTP(inside, radius_lr="fast"), TypeError, "radius_lr='fast'"),
        (lambda: AdamP(model.parameters(), radius_lr=float("nan")), ValueError, "radius_lr=nan"),
        (lambda: FTP(inside, exclude="head.*"), ValueError, "'head.*' matches none"),
        (lambda: FTP(inside, anchor={"0.0": torch.zeros(5, 4)}), ValueError, "anchor has no entry for parameter '0.1'"),
        (lambda: FTP(inside).load_state_dict({}), ValueError, "state_dict={}"),
        (lambda: FTP(inside).load_state_dict(torch.optim.AdamW(model[0].parameters()).state_dict()), ValueError, "groups of"),
        (lambda: opt.load_state_dict(other), ValueError, "no entries of FTP"),
    ]
    opt = FTP(torch.optim.AdamW(model.parameters(), lr=0.1))
    train(model, opt, 2)
    plain = torch.optim.AdamW(model.parameters())
    train(model, plain, 1)
    other = plain.state_dict()
    weights, state = copy.deepcopy((model.state_dict(), opt.state_dict()["state"]))
    for call, error, message in wrong:
        with pytest.raises(error, match=message.replace("*", r"\*").replace("{", r"\{")):
            call()
    model[0].weight.grad = torch.zeros(5, 4, dtype=torch.float64).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        opt.step()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    after = opt.state_dict()["state"]
    assert all(torch.equal(value, after[i][key]) for i, entries in state.items() for key, value in entries.items())


def test_a_load_that_fails_inside_changes_no_radius() -> None:
    model = network()
    opt = FTP(torch.optim.AdamW(model.parameters(), lr=0.1))
    train(model, opt, 3)
    saved, radii = copy.deepcopy(opt.state_dict()), opt.learned()
    train(model, opt, 3, first=3)
    now = opt.learned()
    assert now != radii

    def refuse(*_: Any) -> None:
        raise ValueError("refused")

    handle = opt.optimizer.register_load_state_dict_pre_hook(refuse)
    with pytest.raises(ValueError, match="refused"):
        opt.load_state_dict(saved)
    assert opt.learned() == now
    handle.remove()
    opt.load_state_dict(saved)
    assert opt.learned() == radii
