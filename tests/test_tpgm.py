"""TPGM beside an optimizer: what it projects, what it learns, what survives, and what it refuses."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hyperopt_nested as hn
from ftp import TPGM


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


def inputs(seed: int) -> Tensor:
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))


def train(model: nn.Module, opt: torch.optim.Optimizer, seed: int = 0, steps: int = 5) -> None:
    for step in range(steps):
        opt.zero_grad()
        (model(inputs(100 * seed + step)) - 1).square().mean().backward()
        opt.step()


def validation(model: nn.Module, seed: int = 0) -> Callable[[], Tensor]:
    """A closure whose calls take one batch after the other; the loss does not want what training wants."""
    calls = iter(range(1000 * seed, 1000 * seed + 1000))

    def closure() -> Tensor:
        loss = (model(inputs(-1 - next(calls))) + 0.2).square().mean()
        torch.autograd.backward(loss)
        return loss

    return closure


def moved(model: nn.Module, norm: hn.typing.Ball = hn.mars) -> dict[str, float]:
    start = network().state_dict()
    return {name: norm.norm(p.detach() - start[name]).item() for name, p in model.named_parameters()}


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("norm", ["mars", "l2"])
def test_beside_adamw_every_step_ends_inside_the_balls(norm: Any) -> None:
    model = network()
    opt = torch.optim.AdamW(model.parameters(), lr=0.05)
    tpgm = TPGM(model.named_parameters(), norm=norm, updates=3)
    ball = {"mars": hn.mars, "l2": hn.frobenius}[norm]
    for epoch in range(4):
        train(model, opt, epoch)
        before = moved(model, ball)
        tpgm.step(validation(model, epoch))
        for name, radius in tpgm.hypers()["radius"].items():
            assert 1e-8 <= float(radius) <= before[name] + 2e-8
            assert moved(model, ball)[name] <= float(radius) * (1 + 1e-9)
        assert sum(moved(model, ball).values()) < 0.9 * sum(before.values())


def test_each_update_projects_the_same_weights_and_takes_the_next_call() -> None:
    """The weights that the closure sees are the tuned ones, projected with the radii of that moment."""
    model = network()
    tpgm = TPGM(model.named_parameters(), updates=4)
    train(model, torch.optim.SGD(model.parameters(), lr=0.5))
    tuned, start, evaluate, losses = weights(model), network().state_dict(), validation(model), []

    def check() -> None:
        for name, radius in tpgm.hypers()["radius"].items():
            expected = hn.mars.project(tuned[name], radius, center=start[name])
            torch.testing.assert_close(dict(model.named_parameters())[name].detach(), expected, rtol=1e-12, atol=0)

    def closure() -> Tensor:
        check()
        assert all(p.grad is None for p in model.parameters())
        losses.append(evaluate())
        return losses[-1]

    with torch.no_grad():  # as evaluation often is
        loss = tpgm.step(closure)
    check()
    assert loss is losses[-1]
    assert len(losses) == 4
    assert len({each.item() for each in losses}) == 4
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("norm", ["mars", "l2"])
def test_radii_start_at_half_of_the_smallest_norm_and_only_once(norm: Any) -> None:
    model = network()
    opt = torch.optim.SGD(model.parameters(), lr=0.5)
    tpgm = TPGM(model.named_parameters(), norm=norm, lr=1e-4)
    train(model, opt)
    change = {name: p - network().state_dict()[name] for name, p in weights(model).items()}
    rows = {name: d.abs().reshape(-1, d.shape[-1]).sum(1) if norm == "mars" else d.norm()[None] for name, d in change.items()}
    tpgm.step(validation(model))
    first = tpgm.hypers()["radius"]
    for name, radius in first.items():
        assert float(radius) == pytest.approx(rows[name].min().item() / 2, abs=1.01e-4)
    train(model, opt, 1, 20)
    tpgm.step(validation(model))
    for name, radius in tpgm.hypers()["radius"].items():
        assert float(radius) == pytest.approx(float(first[name]), abs=1.01e-4)


def test_radii_descend_the_validation_loss() -> None:
    model = network()
    tpgm = TPGM(model.named_parameters(), updates=200)
    train(model, torch.optim.SGD(model.parameters(), lr=0.5), steps=20)
    losses = []

    def closure() -> Tensor:
        losses.append((model(inputs(-1)) - 1).square().mean())
        torch.autograd.backward(losses[-1])
        return losses[-1]

    tpgm.step(closure)
    assert losses[-1].item() < 0.7 * losses[0].item()


def test_weights_that_did_not_move_have_the_smallest_radius_and_stay() -> None:
    model = network()
    tpgm = TPGM(model.named_parameters())
    tpgm.step(validation(model))
    assert all(float(radius) == pytest.approx(1e-8, rel=1e-6) for radius in tpgm.hypers()["radius"].values())
    assert not any(moved(model).values())


@pytest.mark.parametrize(
    "exclude", ["2.*", lambda model: model[2], lambda model: list(model[2].parameters())], ids=["name", "module", "tensors"]
)
def test_what_is_excluded_or_frozen_is_left_alone(exclude: Any) -> None:
    model = network()
    model[0].bias.requires_grad_(False)
    tpgm = TPGM(model.named_parameters(), exclude=exclude(model) if callable(exclude) else exclude)
    train(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5))
    tuned = weights(model)
    tpgm.step(validation(model))
    assert list(tpgm.hypers()["radius"]) == ["0.weight"]
    assert [name for name, p in weights(model).items() if not torch.equal(p, tuned[name])] == ["0.weight"]
    with torch.no_grad():
        model[0].weight.mul_(2).requires_grad_(False)
    before = weights(model)
    model[2].weight.grad = torch.ones_like(model[2].weight)
    tpgm.step(lambda: None)
    assert all(torch.equal(p, before[name]) for name, p in weights(model).items())


def test_anchors() -> None:
    pretrained, model = network().state_dict(), network()
    train(model, torch.optim.SGD(model.parameters(), lr=0.5))
    tuned = weights(model)
    tpgm = TPGM(model.named_parameters(), anchor=pretrained)
    pretrained["0.weight"].zero_()  # it was copied
    tpgm.step(validation(model))
    radius = float(tpgm.hypers()["radius"]["0.weight"])
    assert moved(model)["0.weight"] == pytest.approx(radius)
    model.load_state_dict(tuned)
    tpgm = TPGM(model.named_parameters(), anchor="zero")
    assert not any("anchor" in key for state in tpgm.state.values() for key in state)
    tpgm.step(validation(model))
    for name, p in model.named_parameters():
        assert hn.mars.norm(p.detach()).item() == pytest.approx(float(tpgm.hypers()["radius"][name]))


def test_groups_lend_their_tensors_alone_and_may_come_later() -> None:
    """Groups made for the optimizer that trains, with its rates and decays, serve here as well."""
    model = network()
    tpgm = TPGM([{"params": list(model[0].named_parameters(prefix="0")), "lr": 0.1, "weight_decay": 0.5}])
    tpgm.add_param_group({"params": list(model[2].named_parameters(prefix="2")), "lr": 0.1, "weight_decay": 0.5, "radius": 3.0})
    other = network()
    plain = TPGM(other.parameters())
    for net, each in ((model, tpgm), (other, plain)):
        train(net, torch.optim.SGD(net.parameters(), lr=0.5))
        each.step(validation(net))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_tensor_without_a_validation_gradient_keeps_its_radius() -> None:
    model = network()
    train(model, torch.optim.SGD(model.parameters(), lr=0.5))
    tpgm = TPGM(model.named_parameters(), anchor=network().state_dict(), updates=3)
    seen = []

    def closure() -> None:
        seen.append(tpgm.hypers()["radius"])
        torch.autograd.backward(model[2](torch.ones(3, 5)).square().mean())

    tpgm.step(closure)
    after = tpgm.hypers()["radius"]
    assert all((after[name] == seen[0][name]) == name.startswith("0.") for name in after)


def test_validation_gradients_that_are_not_finite_are_skipped_and_counted() -> None:
    model = network()
    train(model, torch.optim.SGD(model.parameters(), lr=0.5))
    tpgm = TPGM(model.named_parameters(), anchor=network().state_dict())
    seen = []

    def closure() -> None:
        seen.append(tpgm.hypers()["radius"])
        torch.autograd.backward(model(torch.full((2, 4), torch.nan)).square().mean())

    tpgm.step(closure)
    assert repr(tpgm.hypers()["radius"]) == repr(seen[0])
    assert int(tpgm.nonfinite_counts()["radius"]) == 4
    assert all(p.isfinite().all() for p in model.parameters())
    train(model, torch.optim.SGD(model.parameters(), lr=0.5))
    tpgm.step(validation(model))
    assert repr(tpgm.hypers()["radius"]) != repr(seen[0])


def test_hooks_run_once_a_step() -> None:
    hn.HyperOptimizer([nn.Parameter(torch.ones(1))], hn.sgd())  # torch wraps the step of a class when it is first used
    model, calls = network(), []
    tpgm = TPGM(model.named_parameters(), updates=3)
    tpgm.register_step_pre_hook(lambda *_: calls.append("before"))
    tpgm.register_step_post_hook(lambda *_: calls.append("after"))
    tpgm.step(validation(model))
    assert calls == ["before", "after"]


@pytest.mark.parametrize("used", [False, True])
def test_if_the_closure_raises_nothing_is_lost(used: bool) -> None:
    model = network()
    opt = torch.optim.SGD(model.parameters(), lr=0.5)
    tpgm = TPGM(model.named_parameters(), updates=3)
    if used:
        train(model, opt)
        tpgm.step(validation(model))
    train(model, opt, 1)
    tuned, before, evaluate = weights(model), copy.deepcopy(tpgm.state_dict()), validation(model)
    calls = []

    def closure() -> Tensor:
        calls.append(evaluate())
        if len(calls) == 2:
            raise KeyboardInterrupt
        return calls[-1]

    with pytest.raises(KeyboardInterrupt):
        tpgm.step(closure)
    assert all(torch.equal(p, tuned[name]) for name, p in weights(model).items())
    assert repr(tpgm.state_dict()) == repr(before)
    assert all(p.grad is None for p in model.parameters())


def resumed(model: nn.Module, opt: torch.optim.Optimizer, tpgm: TPGM) -> tuple[nn.Module, torch.optim.Optimizer, TPGM]:
    """The three, made anew from checkpoints."""
    saved = [copy.deepcopy(each.state_dict()) for each in (model, opt, tpgm)]
    other = network()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)  # the anchors come from the checkpoint
    made = other, torch.optim.AdamW(other.parameters()), TPGM(other.named_parameters(), updates=2, exclude="2.bias")
    for each, state in zip(made, saved, strict=True):
        each.load_state_dict(state)
    return made


@pytest.mark.parametrize("epochs", [0, 2])
@pytest.mark.parametrize("copied", [resumed, lambda *all_: copy.deepcopy(all_), lambda *all_: pickle.loads(pickle.dumps(all_))])
def test_what_was_resumed_or_copied_goes_on_bit_for_bit(copied: Any, epochs: int) -> None:
    model = network()
    run = model, torch.optim.AdamW(model.parameters(), lr=0.05), TPGM(model.named_parameters(), updates=2, exclude="2.bias")

    def go_on(run: Any, first: int) -> None:
        for epoch in range(first, first + 2):
            train(*run[:2], epoch)
            run[2].step(validation(run[0], epoch))

    if epochs:
        go_on(run, 0)
    other = copied(*run)
    go_on(run, 2)
    go_on(other, 2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other[0].parameters(), strict=True))
    assert repr(run[2].hypers()) == repr(other[2].hypers())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = network().to(dtype)
    tpgm = TPGM(model.named_parameters(), updates=2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.5)
    tpgm.step(lambda: torch.autograd.backward(model(torch.ones(3, 4, dtype=dtype)).square().mean()))
    assert all(p.dtype == dtype for p in model.parameters())
    assert float(tpgm.hypers()["radius"]["0.weight"]) == pytest.approx(1, abs=0.05)


def test_a_tensor_without_elements_is_no_trouble() -> None:
    empty, full = nn.Parameter(torch.ones(0, 3)), nn.Parameter(torch.ones(2, 3))
    tpgm = TPGM([("empty", empty), ("full", full)], anchor="zero")
    tpgm.step(lambda: torch.autograd.backward(full.sum() + empty.sum()))
    assert full.detach().flatten().tolist() == pytest.approx([0.5 - 0.01 / 3] * 6)


def test_bad_arguments_are_named() -> None:
    model = network()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"norm": "linf"}, "norm='linf' must be 'mars' or 'l2'"),
        ({"updates": 0}, "updates=0 must be a whole number, at least 1"),
        ({"updates": 1.5}, r"updates=1\.5 must be a whole number"),
        ({"lr": -1.0}, r"lr=-1\.0 is outside its domain"),
        ({"exclude": "head"}, "exclude: 'head' matches none of the 4 parameters"),
        ({"anchor": "origin"}, "anchor='origin' must be None, 'zero', or a mapping"),
        ({"anchor": {}}, "anchor has no entry for parameter '0.weight'"),
    ]
    for arguments, words in cases:
        with pytest.raises(ValueError, match=words):
            TPGM(model.named_parameters(), **arguments)
    with pytest.raises(ValueError, match="closure=None: step needs a function that evaluates the validation loss"):
        TPGM(model.named_parameters()).step()
