"""AdamP, SGDP and the rule behind them: exclusions, anchors, annealing, and what they say to bad input."""

import copy
import itertools
from typing import Any

import pytest
import torch
from cases import EXACT, problem, relative_error, run
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import hyperopt_nested as hn
from ftp import FLOOR, FTP, SGDP, AdamP, Anneal, FTPOptimizer, Radius, ftp_rule


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


def train(model: nn.Module, opt: torch.optim.Optimizer, steps: int = 5) -> None:
    for step in range(steps):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        opt.zero_grad()
        (model(x) - 1).square().mean().backward()
        opt.step()


@pytest.mark.parametrize(
    "exclude",
    [["2.weight", "2.bias"], "2.*", {"2.*"}, lambda model: model[2], lambda model: [model[2].weight, model[2].bias]],
    ids=["names", "pattern", "set", "module", "tensors"],
)
def test_excluded_tensors_are_optimized_without_projection(exclude: Any) -> None:
    model, plain = network(), network()
    opt = AdamP(model.named_parameters(), lr=0.05, weight_decay=0.1, exclude=exclude(model) if callable(exclude) else exclude)
    assert sorted(opt.hypers()["radius"]) == ["0.bias", "0.weight"]
    reference = torch.optim.AdamW(plain.parameters(), lr=0.05, weight_decay=0.1)
    x = torch.ones(3, 4)
    for net, each in ((model, opt), (plain, reference)):
        net(x).square().mean().backward()
        each.step()
    torch.testing.assert_close(model[2].weight, plain[2].weight, rtol=EXACT, atol=0)
    start = network()
    assert (model[0].weight - start[0].weight).abs().max().item() <= FLOOR
    assert (plain[0].weight - start[0].weight).abs().max().item() > 0.01


def test_every_step_ends_inside_the_ball() -> None:
    model, start = network(), network()
    opt = SGDP(model.named_parameters(), lr=0.1, momentum=0.9)
    for _ in range(10):
        train(model, opt, 1)
        for (name, p), anchor in zip(model.named_parameters(), start.parameters(), strict=True):
            radius = opt.hypers()["radius"][name]
            assert float(radius) >= FLOOR
            assert hn.mars.norm(p.detach() - anchor.detach()).item() <= float(radius) * (1 + 1e-9) + 1e-14
    assert float(opt.hypers()["radius"]["0.weight"]) > 1e-3


def test_anchor_from_a_state_dict() -> None:
    pretrained, model = network(), network()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3)
    opt = AdamP(model.named_parameters(), lr=0.1, anchor=pretrained.state_dict(), radius=Radius(start=FLOOR))
    train(model, opt, 1)
    for p, anchor in zip(model.parameters(), pretrained.parameters(), strict=True):
        torch.testing.assert_close(p, anchor, rtol=0, atol=1e-7)
    unchanged = network()
    assert all(torch.equal(a, b) for a, b in zip(pretrained.parameters(), unchanged.parameters(), strict=True))


@pytest.mark.parametrize("relative", [None, "tensor", "row"])
@pytest.mark.parametrize("per", ["tensor", "row", "model"])
@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_run_that_is_taken_up_midway_goes_on_from_where_it_is(wrapped: bool, copied: bool, per: Any, relative: Any) -> None:
    pretrained, model = network(), network()
    train(model, torch.optim.AdamW(model.parameters(), lr=0.05), 20)
    gone = {name: p.detach() - anchor for (name, p), anchor in zip(model.named_parameters(), pretrained.parameters(), strict=True)}
    anchor, radius = pretrained.state_dict(), Radius(per=per, relative=relative)
    names = list(model.named_parameters())
    if wrapped:
        opt: Any = FTP(torch.optim.SGD(model.parameters(), lr=1e-6), named_parameters=names, anchor=anchor, radius=radius)
    else:
        opt = SGDP(names, lr=1e-6, anchor=anchor, radius=radius)
    if copied:
        model, opt = copy.deepcopy((model, opt))
    train(model, opt, 1)
    for (name, p), start in zip(model.named_parameters(), pretrained.parameters(), strict=True):
        torch.testing.assert_close(p - start, gone[name], rtol=1e-3, atol=1e-5)


def test_the_anchor_is_a_copy() -> None:
    model = network()
    pretrained = copy.deepcopy(model.state_dict())
    opt = AdamP(model.named_parameters(), anchor=pretrained)
    pretrained["0.weight"].zero_()
    train(model, opt, 1)
    torch.testing.assert_close(model[0].weight, network()[0].weight, rtol=0, atol=1e-7)


def test_anchors_of_tensors_that_train_or_come_later() -> None:
    model = network()
    anchors = {name: torch.zeros_like(p) for name, p in model.state_dict().items()}
    model[0].weight.requires_grad_(False)
    opt = AdamP(model[0].named_parameters(prefix="0"), lr=1e-3, anchor=anchors, radius=Radius(start=FLOOR))
    opt.add_param_group({"params": list(model[2].named_parameters(prefix="2"))})
    model[0].weight.requires_grad_(True)
    train(model, opt, 1)
    assert all(p.abs().max().item() <= FLOOR for p in model.parameters())
    with pytest.raises(ValueError, match="anchor has no entry for parameter 'new'"):
        opt.add_param_group({"params": [("new", nn.Parameter(torch.ones(1)))]})
    assert len(opt.param_groups) == 2


def test_anchor_zero_allocates_nothing() -> None:
    """LoRA factors are anchored at zero: no copy is kept, and the first step projects them to (almost) nothing."""
    model = network()
    opt = AdamP(model.named_parameters(), lr=0.1, anchor="zero")
    assert not any("anchor" in key for state in opt.state.values() for key in state)
    train(model, opt, 1)
    assert all(p.abs().max().item() <= FLOOR for p in model.parameters())


def test_k_anneals_what_shrinks() -> None:
    grads = torch.tensor([-2.0, 0.0, 3.0])
    assert Anneal(0.5)(grads).tolist() == [-2.0, 0.0, 1.5]
    params, loss = problem(0, {"w": (3, 2)})
    for k in (0.0, 1.0):
        nested, state, radii = hn.Nested(ftp_rule(hn.sgd(lr=0.5), k)), None, []
        moved = params
        for step in range(30):
            sign = -1 if step > 10 and step % 2 else 1  # a gradient against the last update shrinks the radius
            moved, state = run(nested, moved, lambda p, sign=sign: sign * loss(p), 1, state)
            radii.append((float(state["hypers"]["radius"]["w"]), float(state["rule"]["w"]["largest_norm"])))
        falls = [new < old and new != norm for (old, _), (new, norm) in itertools.pairwise(radii)]
        assert any(falls) == (k > 0)  # without k, only the displacement's norm brings a radius down


def test_the_rule_is_the_expression_of_the_design() -> None:
    base = hn.adamw(lr=0.01)
    radius = hn.learn(FLOOR, by=hn.adam(lr=1e-2), per="tensor", grad=Anneal(0.7), bounds=(FLOOR, lambda state: state["largest_norm"]))
    written, registered = hn.project(base, onto=hn.mars, radius=radius), hn.get("ftp")(base, 0.7)
    params, loss = problem(6)
    for one, other in zip(*(run(hn.Nested(o), params, loss, 12)[0].values() for o in (written, registered)), strict=True):
        assert torch.equal(one, other)


def test_forward_and_reverse_memory_train_alike() -> None:
    params, loss = problem(6)
    horizons = hn.OneStep("forward"), hn.OneStep("reverse")
    found = [run(hn.Nested(ftp_rule(hn.adamw(lr=0.05)), horizon=horizon), params, loss, 12)[0] for horizon in horizons]
    assert all(relative_error(found[0][name], found[1][name]) < 1e-10 for name in params)


def test_other_hypers_can_be_learned_beside_the_radii() -> None:
    model = network()
    opt = SGDP(model.named_parameters(), lr=hn.learn(0.05, by=hn.sgd(lr=1e-2)), momentum=0.9, exclude="2.*")
    train(model, opt, 6)
    assert list(opt.hypers()) == ["lr", "radius"]  # the head and the body share one learning rate
    assert float(opt.hypers()["lr"]["group 0"]) != 0.05


def test_ftp_around_another_rule_and_a_group_of_its_own_later() -> None:
    model = network()
    opt = FTPOptimizer(model[0].named_parameters(prefix="0"), hn.adam(lr=0.05, amsgrad=True), exclude="*.bias")
    train(model, opt, 2)
    opt.add_param_group({"params": list(model[2].named_parameters(prefix="2")), "lr": 0.01})
    train(model, opt, 2)
    assert sorted(opt.hypers()["radius"]) == ["0.weight", "2.weight"]


def test_distributed_checkpoint_changes_neither_parameters_nor_radii() -> None:
    model = network()
    opt = AdamP(model.named_parameters(), lr=0.05, weight_decay=0.1)
    before = copy.deepcopy(opt.state_dict())
    state = get_optimizer_state_dict(model, opt)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), network().parameters(), strict=True))
    assert repr(opt.state_dict()) == repr(before)
    assert float(state["state"]["0.weight"]["hypers.radius"]) == FLOOR  # type: ignore[index, call-overload]


def test_bfloat16_radii_leave_their_floor() -> None:
    model = network().to(torch.bfloat16)
    opt = AdamP(model.named_parameters(), lr=0.01)
    for _ in range(5):
        opt.zero_grad()
        model(torch.ones(3, 4, dtype=torch.bfloat16)).square().mean().backward()
        opt.step()
    assert float(opt.hypers()["radius"]["0.weight"]) > 1e-3
    assert opt.state[model[0].weight]["rule.anchor"].dtype == torch.bfloat16


def test_bad_arguments_are_named() -> None:
    model = network()
    named = list(model.named_parameters())
    wrong: dict[str, Any] = {**model.state_dict(), "0.weight": torch.ones(3, 3)}
    missing = {name: p for name, p in model.state_dict().items() if name != "2.bias"}
    for arguments, words in [
        ({"k": 1.5}, r"k=1\.5 must be in \[0, 1\]"),
        ({"k": -0.1}, r"k=-0\.1 must be in \[0, 1\]"),
        ({"exclude": ["head.weight"]}, "exclude: 'head.weight' matches none of the 4 parameters"),
        ({"exclude": nn.Linear(1, 1)}, "exclude: a Linear matches none"),
        ({"anchor": wrong}, r"anchor\['0.weight'\] has shape \(3, 3\), the parameter \(5, 4\)"),
        ({"anchor": missing}, "anchor has no entry for parameter '2.bias'"),
        ({"anchor": "origin"}, "anchor='origin' must be None, 'zero', or a mapping"),
        ({"saturation": "none"}, "saturation='none' must be one of"),
        ({"lr": -1.0}, r"lr=-1\.0 is outside its domain"),
    ]:
        with pytest.raises(ValueError, match=words):
            AdamP(named, **arguments)
    with pytest.raises(TypeError, match="exclude has 3"):
        AdamP(named, exclude=[3])
    with pytest.raises(ValueError, match=r"pass model.named_parameters\(\)"):
        AdamP(model.parameters(), exclude="0.weight")
