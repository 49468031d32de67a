"""What others do to an optimizer between steps: to its groups, its state, its tensors, and what it is saved to and loaded from."""

import collections
import copy
import io
import itertools
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hyperopt_nested as hn
from ftp import FLOOR, SGDP, TPGM, AdamP, Radius

BACKENDS = ["reference", "foreach", "fused"]
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def cells(names: str, *of_reference: Any, also: Any) -> pytest.MarkDecorator:
    """All cells by the reference, and one of them by the others, which take their time."""
    each = [value if isinstance(value, tuple) else (value,) for value in of_reference]
    rest = [(*(also if isinstance(also, tuple) else (also,)), backend) for backend in BACKENDS[1:]]
    return pytest.mark.parametrize(f"{names}, backend", [*((*value, "reference") for value in each), *rest])


pytestmark = pytest.mark.usefixtures("quick_programs")


def network(seed: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


def train(model: nn.Module, opt: torch.optim.Optimizer, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        opt.zero_grad()
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step), dtype=next(model.parameters()).dtype)
        (model(x) - 1).square().mean().backward()
        opt.step()


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def close(one: nn.Module, other: nn.Module) -> None:
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def step(opt: torch.optim.Optimizer, *tensors: Tensor, grad: float = 1.0) -> None:
    opt.zero_grad()
    for tensor in tensors:
        tensor.grad = torch.full_like(tensor, grad)
    opt.step()


def learned_adamw() -> hn.Optimizer:
    return hn.adamw(lr=hn.learn(0.01, by=hn.sgd(lr=1e-4)), weight_decay=hn.learn(0.1, by=hn.sgd(lr=1e-2), per="tensor"))


MAKERS: dict[str, Callable[[Any], Any]] = {
    "plain": lambda groups: hn.HyperOptimizer(groups, hn.adamw(lr=0.01)),
    "learned": lambda groups: hn.HyperOptimizer(groups, learned_adamw()),
    "by function": lambda groups: hn.HyperOptimizer(groups, lambda name, p: hn.adam() if p.ndim > 1 else hn.sgd()),
    "AdamP": lambda groups: AdamP(groups, lr=0.01),
    "SGDP": lambda groups: SGDP(groups, lr=0.1, momentum=0.9),
}

# Groups without tensors


def test_empty_groups_of_tpgm() -> None:
    models = [network(), network()]
    for model, groups in zip(models, ([], [{"params": []}]), strict=True):
        tpgm = TPGM([*groups, {"params": list(model.parameters())}, *groups], updates=2)
        train(model, torch.optim.SGD(model.parameters(), lr=0.5), 3)
        tpgm.step(lambda model=model: (model(torch.ones(2, 4)) - 2).square().mean().backward())
    assert same(*models)


@cells("how", "append", "group", "assign", also="append")
def test_all_groups_are_empty_until_there_are_tensors(how: str, backend: Any) -> None:
    model, reference = network(), network()
    opts = hn.HyperOptimizer([{"params": []}], hn.adamw(lr=0.01), backend=backend), torch.optim.AdamW([{"params": []}], lr=0.01)
    for net, opt in zip((model, reference), opts, strict=True):
        opt.step()
        if how == "append":
            opt.param_groups[0]["params"].extend(net.parameters())
        elif how == "assign":
            opt.param_groups[0]["params"] = list(net.parameters())
        else:
            opt.add_param_group({"params": net.parameters()})
        train(net, opt, 4)
    close(model, reference)


def test_no_groups_at_all_is_refused_as_in_torch() -> None:
    for make in (MAKERS["plain"], MAKERS["AdamP"], TPGM):
        with pytest.raises(ValueError, match="empty parameter list"):
            make([])


# State that is emptied


RESETS: dict[str, Callable[[Any], None]] = {
    "assigned": lambda opt: setattr(opt, "state", collections.defaultdict(dict)),
    "plain dict": lambda opt: setattr(opt, "state", {}),
    "cleared": lambda opt: opt.state.clear(),
    "emptied": lambda opt: [state.clear() for state in opt.state.values()] and None,
    "popped": lambda opt: [opt.state.pop(p) for group in opt.param_groups for p in group["params"]] and None,
}


@cells("how, rule", *itertools.product([how for how in RESETS if how != "plain dict"], ["AdamW", "SGD"]), also=("cleared", "AdamW"))
def test_a_reset_state_begins_anew_as_in_torch(how: str, rule: str, backend: Any) -> None:
    model, reference = network(), network()
    settings: dict[str, Any] = {"lr": 0.05} if rule == "AdamW" else {"lr": 0.05, "momentum": 0.9}
    opts = (
        hn.HyperOptimizer(model.parameters(), hn.get(rule.lower())(**settings), backend=backend),
        getattr(torch.optim, rule)(reference.parameters(), **settings),
    )
    for net, opt in zip((model, reference), opts, strict=True):
        for first in (0, 3, 6):
            train(net, opt, 3, first)
            RESETS[how](opt)
        opt.state_dict()
        train(net, opt, 2, 9)
    close(model, reference)


@cells("how", *RESETS, also="cleared")
def test_learned_values_and_their_learners_outlive_a_reset(how: str, backend: Any) -> None:
    model = network()
    opt = hn.HyperOptimizer(model.named_parameters(), learned_adamw(), backend=backend)
    train(model, opt, 4)
    before = repr(opt.hypers())
    assert opt._store.taken == 4
    RESETS[how](opt)
    assert repr(opt.hypers()) == before
    assert opt._store.taken == 0
    assert not any(entry.any() for entry in kept(opt, "rule.").values())
    train(model, opt, 1, 4)
    assert repr(opt.hypers()) == before  # there is no last update to learn from
    train(model, opt, 1, 5)
    assert repr(opt.hypers()) != before


def kept(opt: torch.optim.Optimizer, prefix: str) -> dict[Any, Tensor]:
    found = [state for group in opt.param_groups for p in group["params"] if (state := opt.state.get(p))]
    return {(i, key): leaf.clone() for i, state in enumerate(found) for key, leaf in state.items() if key.startswith(prefix)}


@pytest.mark.parametrize("key", ["rule.exp_avg", "rule.step", "steps", "memory.taken"])
def test_one_tensor_or_one_entry_is_removed(key: str) -> None:
    """What is left of a rule's state without one entry is no state: all of it begins anew; memory alone may be forgotten alone."""
    model = network()
    opt = hn.HyperOptimizer(model.named_parameters(), learned_adamw())
    train(model, opt, 3)
    others = {at: leaf for at, leaf in kept(opt, "rule.").items() if at[0] != 0}
    hypers = repr(opt.hypers())
    del opt.state[model[0].weight][key]
    opt.hypers()
    state = opt.state[model[0].weight]
    assert float(state["rule.step"]) == float(state["steps"]) == (3 if key == "memory.taken" else 0)
    assert bool(state["rule.exp_avg"].any()) == (key == "memory.taken")
    assert not state["memory.taken"].any()
    assert repr(opt.hypers()) == hypers
    assert all(torch.equal(kept(opt, "rule.")[at], leaf) for at, leaf in others.items())
    del opt.state[model[0].weight]
    train(model, opt, 1, 3)
    assert float(opt.state[model[0].weight]["steps"]) == 1
    assert float(opt.state[model[2].bias]["steps"]) == 4


def test_learners_with_a_memory_of_their_own_outlive_a_reset() -> None:
    model = network()
    opt = hn.HyperOptimizer(model.parameters(), hn.sgd(lr=hn.learn(0.1, by=hn.adam(lr=hn.learn(1e-3, by=hn.sgd(lr=1e-6))), per="tensor")))
    train(model, opt, 4)
    hypers, learners = repr(opt.hypers()), repr(kept(opt, "learners."))
    assert "learners.lr.rule.exp_avg" in learners
    opt.state.clear()
    assert (repr(opt.hypers()), repr(kept(opt, "learners."))) == (hypers, learners)


def test_what_rules_copy_from_weights_is_taken_anew_after_a_reset() -> None:
    model = network()
    opt = AdamP(model.named_parameters(), lr=0.05)
    train(model, opt, 8)
    opt.state.clear()
    before = copy.deepcopy(model)
    train(model, opt, 1, 8)
    for p, anchor in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(opt.state[p]["rule.anchor"], anchor)


# Tensors and groups that are replaced, added or taken away


def follow(opt: Any, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    found = change(opt.param_groups)
    if found is not None:
        opt.param_groups = found


CHANGES: dict[str, Callable[[list[dict[str, Any]], nn.Parameter, nn.Parameter], Any]] = {
    "replaced": lambda groups, one, two: groups[0]["params"].__setitem__(0, one),
    "appended": lambda groups, one, two: groups[1]["params"].extend([one, two]),
    "inserted": lambda groups, one, two: groups[0]["params"].insert(0, one),
    "deleted": lambda groups, one, two: groups[0]["params"].__delitem__(0),
    "swapped": lambda groups, one, two: groups[0]["params"].reverse(),
    "list replaced": lambda groups, one, two: groups[0].__setitem__("params", [one, two]),
    "first group deleted": lambda groups, one, two: groups.__delitem__(0),
    "last group deleted": lambda groups, one, two: groups.pop() and None,
    "group appended": lambda groups, one, two: groups.append({**groups[0], "params": [one, two]}),
    "groups replaced": lambda groups, one, two: [{**groups[1], "params": [one, *groups[0]["params"]]}],
    "groups merged": lambda groups, one, two: [{**groups[0], "params": groups[0]["params"] + groups[1]["params"]}],
}


@cells("change", *CHANGES, also="groups replaced")
def test_changed_groups_are_followed_as_in_torch(change: str, backend: Any) -> None:
    ends = []
    for make in (torch.optim.AdamW, lambda groups, lr: hn.HyperOptimizer(groups, hn.adamw(lr=lr), backend=backend)):
        torch.manual_seed(0)
        tensors = [nn.Parameter(torch.randn(shape)) for shape in [(2, 3), (4,), (2, 3), (), (5, 3), (2,)]]
        opt = make([{"params": tensors[:2], "weight_decay": 0.2}, {"params": tensors[2:4]}], lr=0.05)
        for first in (0, 3):
            for count in range(first, first + 3):
                for i, p in enumerate(tensors):
                    p.grad = torch.cos(p.detach() * (i + 1) + count)
                opt.step()
            if not first:
                follow(opt, lambda groups, tensors=tensors: CHANGES[change](groups, tensors[4], tensors[5]))
        ends.append([p.detach() for p in tensors])
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@cells("popped, named", *itertools.product([False, True], [False, True]), also=(True, False))
def test_a_replaced_tensor_has_its_name_new_state_and_what_was_learned(popped: bool, named: bool, backend: Any) -> None:
    points, other = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    params: Any = [("points", points), ("other", other)] if named else [points, other]
    opt = hn.HyperOptimizer(params, learned_adamw(), backend=backend)
    for _ in range(3):
        step(opt, points, other)
    before = opt.hypers()
    grown = nn.Parameter(torch.cat([points.detach(), torch.ones(2)]))
    if popped:
        opt.state.pop(points)
    opt.param_groups[0]["params"][0] = grown
    assert repr(opt.hypers()) == repr(before)
    assert list(opt.hypers()["weight_decay"]) == (["points", "other"] if named else ["0.0", "0.1"])
    start = grown.detach().clone()
    step(opt, grown, other)
    lr, decay = before["lr"]["group 0"], before["weight_decay"]["points" if named else "0.0"]
    lr = opt.hypers()["lr"]["group 0"]  # the other tensor has moved it
    assert lr != before["lr"]["group 0"]
    torch.testing.assert_close(grown.detach(), start * (1 - lr * decay) - lr, rtol=1e-7, atol=0)
    assert opt.state[grown]["rule.exp_avg"].shape == (5,)
    assert (float(opt.state[grown]["steps"]), float(opt.state[other]["steps"]), opt._store.taken) == (1, 4, 4)


def test_learned_values_of_a_replaced_tensor_that_do_not_fit_begin_anew_with_their_learner() -> None:
    w = nn.Parameter(torch.ones(2, 3))
    opt = hn.HyperOptimizer([w], hn.sgd(lr=hn.learn(0.1, by=hn.adam(lr=0.01), per="row"), momentum=0.9))
    for _ in range(3):
        step(opt, w)
    same_shape, longer = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(4, 3))
    learned = opt.hypers()["lr"]["0.0"]
    opt.param_groups[0]["params"][0] = same_shape
    assert torch.equal(opt.hypers()["lr"]["0.0"], learned)
    opt.param_groups[0]["params"][0] = longer
    assert torch.equal(opt.hypers()["lr"]["0.0"], torch.full((4, 1), 0.1))
    assert float(opt.state[longer]["learners.lr.rule.step"]) == 0
    step(opt, longer)
    assert longer.detach().flatten().tolist() == pytest.approx([0.9] * 12)


def test_names_of_tensors_that_came_later() -> None:
    a, b, c, d, e = (nn.Parameter(torch.ones(2)) for _ in range(5))
    opt = hn.HyperOptimizer([("a", a), ("b", b)], hn.sgd(lr=hn.learn(0.1, by=hn.sgd(), per="tensor")))
    group = opt.param_groups[0]
    group["params"].append(c)
    assert list(opt.hypers()["lr"]) == ["a", "b", "0.2"]
    assert group["param_names"] == ["a", "b", "0.2"]
    group["params"] = [b, c, d]
    assert list(opt.hypers()["lr"]) == ["b", "0.2", "0.2#2"]
    group["params"], group["param_names"] = [b, e], ["b", "e"]
    assert list(opt.hypers()["lr"]) == ["b", "e"]
    assert opt.state_dict()["param_groups"][0]["param_names"] == ["b", "e"]


def test_shared_values_move_on_when_the_tensor_goes_that_they_were_kept_with() -> None:
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    opt = hn.HyperOptimizer([{"params": [first]}, {"params": [second]}], hn.sgd(lr=hn.learn(0.1, by=hn.sgd(lr=0.01))))
    for _ in range(2):
        step(opt, first, second)
    group = opt.param_groups[0]
    del opt.param_groups[0]
    step(opt, second)
    assert {key: float(value) for key, value in opt.hypers()["lr"].items()} == {"group 0": pytest.approx(0.16)}
    assert opt.state_dict()["state"].keys() == {0}
    opt.param_groups.insert(0, group)  # what it still had of shared values is old
    assert {key: float(value) for key, value in opt.hypers()["lr"].items()} == {
        "group 0": pytest.approx(0.16),
        "group 1": pytest.approx(0.16),
    }
    assert float(opt.state[first]["steps"]) == 2
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert float(opt.hypers()["lr"]["group 0"]) == pytest.approx(0.16)


def test_a_group_that_learns_its_own_keeps_it_when_one_before_it_goes() -> None:
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    own = {"params": [second], "lr": hn.learn(0.5, by=hn.sgd(lr=0.01))}
    opt = hn.HyperOptimizer([{"params": [first]}, own], hn.sgd(lr=hn.learn(0.1, by=hn.sgd(lr=0.01))))
    for _ in range(2):
        step(opt, first, second)
    del opt.param_groups[0]
    step(opt, second)
    assert {key: {k: float(v) for k, v in values.items()} for key, values in opt.hypers().items() if values} == {
        "lr#2": {"group 0": pytest.approx(0.54)}
    }
    opt.param_groups[0]["params"].append(appended := nn.Parameter(torch.ones(2)))  # it gets what the group was given
    step(opt, appended)
    assert appended.detach().tolist() == pytest.approx([1 - 0.54] * 2)


@cells("shape", *[((4, 3),), ((1, 1),), ((3,),), ((2, 3),)], also=((4, 3),))
def test_a_tensor_that_was_resized_is_refused_until_its_state_is_removed(shape: tuple[int, ...], backend: Any) -> None:
    w, other = nn.Parameter(torch.ones(1, 3)), nn.Parameter(torch.ones(2))
    opt = hn.HyperOptimizer([("w", w), ("other", other)], hn.adamw(lr=0.1), backend=backend)
    step(opt, w, other)
    w.data, before = torch.ones(shape), other.detach().clone()
    with pytest.raises(ValueError, match=r"'w' has shape \(.*\), but its state is of shape \(1, 3\): .*optimizer\.state\.pop"):
        step(opt, w, other)
    assert torch.equal(other, before)
    opt.state.pop(w)
    step(opt, w, other)
    assert w.detach().flatten().tolist() == pytest.approx([1 * (1 - 0.001) - 0.1] * w.numel())
    assert float(opt.state[other]["steps"]) == 2


def test_a_tensor_may_be_resized_or_converted_before_its_first_step() -> None:
    w = nn.Parameter(torch.ones(1, 3, dtype=torch.bfloat16))
    opt = AdamP([("w", w)], lr=0.1)
    w.data = torch.full((4, 3), 1 / 3, dtype=torch.float64)
    step(opt, w)
    assert w.detach().flatten().tolist() == pytest.approx([1 / 3] * 12, abs=1e-7)
    assert opt.state[w]["rule.anchor"].dtype == torch.float64


@every_backend
def test_state_entries_of_another_shape_are_refused_and_of_another_dtype_are_cast(backend: Any) -> None:
    w = nn.Parameter(torch.ones(4, 3))
    opt = hn.HyperOptimizer([("w", w)], hn.adamw(lr=hn.learn(0.1, by=hn.sgd(lr=1e-3))), backend=backend)
    step(opt, w)
    good = {key: leaf.clone() for key, leaf in opt.state[w].items()}
    for key, bad in [
        ("rule.exp_avg", torch.zeros(1, 3)),
        ("rule.exp_avg", torch.zeros(5, 2)),
        ("rule.step", torch.zeros(1)),
        ("hypers.lr", torch.ones(2)),
    ]:
        opt.state[w][key] = bad
        with pytest.raises(ValueError, match=rf"the state of 'w' has '{key}' of shape .*, which must be .*: replace it"):
            step(opt, w)
        opt.state[w][key] = good[key]
    opt.state[w]["rule.exp_avg"] = torch.full((4, 3), 0.1, dtype=torch.float32)
    step(opt, w)
    assert opt.state[w]["rule.exp_avg"].dtype == torch.float64
    torch.testing.assert_close(opt.state[w]["rule.exp_avg"], torch.full((4, 3), 0.19), rtol=1e-7, atol=0)


def test_state_may_be_moved_to_the_tensor_that_replaces_another() -> None:
    """As implementations of Gaussian splatting do: moments are cut or extended, and go to the new tensor."""
    w = nn.Parameter(torch.ones(3))
    opt = hn.HyperOptimizer([w], hn.adam(lr=0.1))
    step(opt, w)
    state, longer = opt.state.pop(w), nn.Parameter(torch.ones(5))
    for key in ("rule.exp_avg", "rule.exp_avg_sq"):
        state[key] = torch.cat([state[key], torch.zeros(2)])
    opt.param_groups[0]["params"][0], opt.state[longer] = longer, state
    step(opt, longer)
    torch.testing.assert_close(opt.state[longer]["rule.exp_avg"], torch.tensor([0.19, 0.19, 0.19, 0.1, 0.1]))
    assert float(opt.state[longer]["steps"]) == float(opt.state[longer]["rule.step"]) == 2


def test_what_cannot_be_followed_is_named_and_changes_nothing() -> None:
    model = network()
    opt = AdamP(model.named_parameters(), lr=0.1, anchor=model.state_dict())
    train(model, opt, 2)
    state, new = copy.deepcopy(opt.state_dict()), nn.Parameter(torch.ones(2))
    opt.param_groups[0]["params"].append(new)
    for call in (opt.step, opt.hypers, opt.state_dict):
        with pytest.raises(ValueError, match=r"anchor has no entry for parameter '0\.4'"):
            call()
    opt.param_groups[0]["params"].pop()
    assert repr(opt.state_dict()) == repr(state)


def test_a_group_that_cannot_be_learned_is_not_added() -> None:
    w = nn.Parameter(torch.ones(2))
    opt = hn.HyperOptimizer([w], hn.sgd(lr=0.1))
    with pytest.raises(ValueError, match="dampening is learned"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(2))], "dampening": hn.learn(0.1, by=hn.sgd())})
    assert len(opt.param_groups) == 1
    step(opt, w)
    assert w.detach().tolist() == pytest.approx([0.9] * 2)


# What rules copy from a tensor is what it is at its first step


COPIES: dict[str, Callable[[Any, Any], Any]] = {
    "project": lambda ps, backend: hn.HyperOptimizer(ps, hn.project(hn.sgd(lr=0.5), radius=0.1), backend=backend),
    "l2_sp": lambda ps, backend: hn.HyperOptimizer(ps, hn.l2_sp(hn.sgd(lr=0.1), decay=0.5), backend=backend),
    "coupled_decay": lambda ps, backend: hn.HyperOptimizer(ps, hn.coupled_decay(hn.adam(), decay=0.5, anchor="start"), backend=backend),
    "decoupled_decay": lambda ps, backend: hn.HyperOptimizer(ps, hn.decoupled_decay(hn.adam(), decay=5.0, anchor="start"), backend=backend),
    "spd": lambda ps, backend: hn.HyperOptimizer(ps, hn.spd(hn.adam(lr=0.1)), backend=backend),
    "ema": lambda ps, backend: hn.HyperOptimizer(ps, hn.ema(hn.sgd(lr=0.1), decay=0.9), backend=backend),
    "lookahead": lambda ps, backend: hn.HyperOptimizer(ps, hn.lookahead(hn.sgd(lr=0.1), k=2), backend=backend),
    "schedule_free_sgd": lambda ps, backend: hn.HyperOptimizer(ps, hn.schedule_free_sgd(lr=0.1), backend=backend),
    "schedule_free_adamw": lambda ps, backend: hn.HyperOptimizer(ps, hn.schedule_free_adamw(lr=0.1), backend=backend),
    "asgd": lambda ps, backend: hn.HyperOptimizer(ps, hn.asgd(lr=0.1), backend=backend),
    "nested": lambda ps, backend: hn.HyperOptimizer(ps, hn.ema(hn.project(hn.lookahead(hn.sgd(lr=0.1)), radius=0.2)), backend=backend),
    "AdamP": lambda ps, backend: AdamP(ps, lr=0.05, backend=backend),
    "SGDP": lambda ps, backend: SGDP(ps, lr=0.05, momentum=0.9, backend=backend),
    "bfloat16": lambda ps, backend: AdamP(ps, lr=0.05, anchor_dtype=torch.bfloat16, state_dtype=torch.bfloat16, backend=backend),
}


@cells("name", *COPIES, also="AdamP")
def test_weights_may_be_loaded_after_construction(name: str, backend: Any) -> None:
    pretrained = network(2)
    model, early, late = network(), COPIES[name], COPIES[name]
    opt = early(model.named_parameters(), backend)
    model.load_state_dict(pretrained.state_dict())
    for key, value in opt.eval_params().items():
        assert torch.equal(value, pretrained.state_dict()[key])
    other = late(pretrained.named_parameters(), backend)
    for net, each in ((model, opt), (pretrained, other)):
        train(net, each, 4)
    assert same(model, pretrained)
    assert all(torch.equal(a, b) for a, b in zip(opt.eval_params().values(), other.eval_params().values(), strict=True))


def test_each_tensor_has_a_first_step_of_its_own() -> None:
    model = network()
    model[0].requires_grad_(False)
    opt = hn.HyperOptimizer(model.named_parameters(), hn.l2_sp(hn.sgd(lr=0.1)))
    train(model, opt, 2)
    model[0].requires_grad_(True)
    with torch.no_grad():
        model[0].weight.add_(1)
    before = model[0].weight.detach().clone()
    anchor = opt.state[model[2].weight]["rule.anchor"].clone()
    train(model, opt, 2)
    assert torch.equal(opt.state[model[0].weight]["rule.anchor"], before)
    assert torch.equal(opt.state[model[2].weight]["rule.anchor"], anchor)
    assert opt._store.taken == 4


@pytest.mark.parametrize("steps", [0, 2])
def test_a_state_that_was_saved_before_the_first_step_has_it_still_before_it(steps: int) -> None:
    model = network()
    opt = AdamP(model.named_parameters(), lr=0.05)
    train(model, opt, steps)
    resumed_model = network(3)
    resumed = AdamP(resumed_model.named_parameters(), lr=0.05)
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    train(resumed_model, resumed, 1)
    expected = (network() if steps else network(3))[0].weight
    assert torch.equal(resumed.state[resumed_model[0].weight]["rule.anchor"], expected)
    assert resumed._store.taken == steps + 1


def test_anchors_that_were_given_stay_what_they_were() -> None:
    model, pretrained = network(), network(2).state_dict()
    opt = AdamP(model.named_parameters(), lr=0.05, anchor=pretrained, radius=Radius(start=FLOOR))
    kept_anchor = {name: value.clone() for name, value in pretrained.items()}
    with torch.no_grad():
        for value in (*pretrained.values(), *model.parameters()):
            value.add_(3)
    train(model, opt, 1)
    for name, p in model.named_parameters():
        assert torch.equal(opt.state[p]["rule.anchor"], kept_anchor[name])
        torch.testing.assert_close(p.detach(), kept_anchor[name], rtol=0, atol=1e-7)


def test_tpgm_keeps_the_weights_of_its_construction() -> None:
    model, start = network(), network()
    tpgm = TPGM(model.named_parameters())
    train(model, torch.optim.SGD(model.parameters(), lr=0.5), 3)
    tpgm.step(lambda: (model(torch.ones(2, 4)) - 2).square().mean().backward())
    assert all(torch.equal(tpgm.state[p]["rule.anchor"], q) for p, q in zip(model.parameters(), start.parameters(), strict=True))
    assert tpgm._store.taken == 2


# Going on with what was saved


def learner(name: str, start: float, move: float = 1e-3) -> hn.Optimizer:
    by = hn.sgd(lr=move)
    return {
        "lr": lambda: hn.sgd(lr=hn.learn(start, by=by)),
        "lr per tensor": lambda: hn.sgd(lr=hn.learn(start, by=by, per="tensor"), momentum=0.9),
        "lr by its log": lambda: hn.adamw(lr=hn.learn(start, by=by, via="log")),
        "lr of a tower": lambda: hn.sgd(lr=hn.learn(start, by=hn.sgd(lr=hn.learn(start / 10, by=hn.sgd(lr=1e-7))))),
        "weight_decay": lambda: hn.adamw(lr=0.01, weight_decay=hn.learn(start, by=by, per="row")),
        "beta1": lambda: hn.adam(lr=0.01, beta1=hn.learn(start, by=by)),
        "eps": lambda: hn.adam(lr=0.01, eps=hn.learn(start, by=by, per="element")),
    }[name]()


@cells("name", "lr", "lr per tensor", "lr by its log", "lr of a tower", "weight_decay", "beta1", "eps", also="lr")
def test_a_resumed_run_that_declares_another_start_goes_on_as_the_saved_one(name: str, backend: Any) -> None:
    straight, model = network(), network()
    saved_from = hn.HyperOptimizer(straight.named_parameters(), learner(name, 0.05), backend=backend)
    schedule = torch.optim.lr_scheduler.LambdaLR(saved_from, lambda step: 1 / (1 + step))
    for count in range(4):
        train(straight, saved_from, 1, count)
        schedule.step()
    saved = copy.deepcopy((straight.state_dict(), saved_from.state_dict(), schedule.state_dict()))
    resumed = hn.HyperOptimizer(model.named_parameters(), learner(name, 0.5), backend=backend)
    again = torch.optim.lr_scheduler.LambdaLR(resumed, lambda step: 1 / (1 + step))
    train(model, resumed, 1)  # programs exist that know the other declared value
    model.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    again.load_state_dict(saved[2])
    assert repr(resumed.hypers()) == repr(saved_from.hypers())
    for count in range(4, 7):
        for net, opt, each in ((straight, saved_from, schedule), (model, resumed, again)):
            train(net, opt, 1, count)
            each.step()
    assert same(straight, model)
    other_model, other = copy.deepcopy((model, resumed))
    third_model, third = pickle.loads(pickle.dumps((model, resumed)))
    fourth_model = copy.deepcopy(model)
    fourth = hn.HyperOptimizer(fourth_model.named_parameters(), learner(name, 0.2), backend=backend)
    fourth.load_state_dict(resumed.state_dict())
    for net, opt in ((straight, saved_from), (other_model, other), (third_model, third), (fourth_model, fourth)):
        train(net, opt, 2, 7)
        assert repr(opt.hypers()) == repr(saved_from.hypers())
        assert same(net, straight)


@pytest.mark.parametrize(("saved", "resumed"), [*itertools.permutations(["log", "softplus", "projection"], 2)])
def test_learned_values_in_other_coordinates_are_refused(saved: Any, resumed: Any) -> None:
    w = nn.Parameter(torch.ones(2))
    for tower in (
        lambda via: hn.learn(0.1, by=hn.sgd(lr=1e-3), via=via),
        lambda via: hn.learn(0.1, by=hn.sgd(lr=hn.learn(0.1, by=hn.sgd(), via=via))),
    ):
        opt, other = (hn.HyperOptimizer([w], hn.sgd(lr=tower(via))) for via in (saved, resumed))
        with pytest.raises(ValueError, match=rf"learned with via='{saved}', and this optimizer with via='{resumed}'"):
            other.load_state_dict(opt.state_dict())
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        opt.state.clear()
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))


def test_groups_that_come_after_loading_have_the_saved_factor() -> None:
    w, later = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    opt = hn.HyperOptimizer([w], learner("lr", 0.05))
    for _ in range(3):
        step(opt, w)
    resumed = hn.HyperOptimizer([w], learner("lr", 0.5))
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    resumed.add_param_group({"params": [later]})
    resumed.param_groups.append({"params": [appended := nn.Parameter(torch.ones(2))]})
    step(resumed, later, appended)
    lr = float(opt.hypers()["lr"]["group 0"])
    assert {key: float(value) for key, value in resumed.hypers()["lr"].items()} == {f"group {i}": pytest.approx(lr) for i in range(3)}
    assert later.detach().tolist() == appended.detach().tolist() == pytest.approx([1 - lr] * 2)


def test_state_goes_to_the_tensor_of_its_name() -> None:
    model, other = network(), network()
    opt = hn.HyperOptimizer(model.named_parameters(), learned_adamw())
    train(model, opt, 3)
    other.load_state_dict(model.state_dict())
    resumed = hn.HyperOptimizer(reversed(list(other.named_parameters())), learned_adamw())
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert resumed.param_groups[0]["param_names"][0] == "2.bias"
    assert {k: float(v) for k, v in resumed.hypers()["weight_decay"].items()} == {
        k: float(v) for k, v in opt.hypers()["weight_decay"].items()
    }
    for net, each in ((model, opt), (other, resumed)):
        train(net, each, 2, 3)
    close(model, other)


def grouped(model: nn.Module, turned: bool, **more: Any) -> list[dict[str, Any]]:
    named = list(model.named_parameters())
    groups = [{"params": named[1::2], "weight_decay": 0.0, **more}, {"params": named[::2], **more}]
    return groups[::-1] if turned else groups


def test_groups_are_found_by_the_names_in_them() -> None:
    model, other = network(), network()
    opt = hn.HyperOptimizer(grouped(model, False), hn.adamw(lr=hn.learn(0.01, by=hn.sgd(lr=1e-3))))
    train(model, opt, 3)
    other.load_state_dict(model.state_dict())
    resumed = hn.HyperOptimizer(grouped(other, True), hn.adamw(lr=hn.learn(0.01, by=hn.sgd(lr=1e-3))))
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert [group["weight_decay"] for group in resumed.param_groups] == [0.01, 0.0]
    for net, each in ((model, opt), (other, resumed)):
        train(net, each, 2, 3)
    close(model, other)


def renamed(state: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    groups = [{**group, "param_names": [change(name) for name in group["param_names"]]} for group in state["param_groups"]]
    return {**state, "param_groups": groups}


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_may_have_what_wraps_the_model(wrapper: str) -> None:
    model = network()
    opt = hn.HyperOptimizer(model.named_parameters(), learned_adamw())
    train(model, opt, 3)
    saved = copy.deepcopy(opt.state_dict())
    opt.load_state_dict(renamed(saved, lambda name: wrapper + name))
    assert repr(opt.state_dict()) == repr(saved)


def without(state: dict[str, Any], key: str) -> dict[str, Any]:
    return {**state, "state": {i: {k: v for k, v in entries.items() if k != key} for i, entries in state["state"].items()}}


def in_first(state: dict[str, Any], **entries: Any) -> dict[str, Any]:
    return {**state, "state": {i: {**each, **(entries if i == 0 else {})} for i, each in state["state"].items()}}


def of(optimizer: hn.Optimizer) -> Callable[[dict[str, Any]], Any]:
    def make(_: Any) -> Any:
        model = network(2)
        other = hn.HyperOptimizer(model.named_parameters(), optimizer)
        train(model, other, 1)
        return other.state_dict()

    return make


def of_torch(state: Any, **more: Any) -> Any:
    model = network(2)
    other = torch.optim.AdamW(model.named_parameters(), lr=0.1)
    train(model, other, 1)
    groups = [{**group, **more} for group in other.state_dict()["param_groups"]]
    return {**other.state_dict(), "param_groups": groups}


MISFITS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "nothing": (lambda s: None, "state_dict=None must be what state_dict"),
    "a list": (lambda s: [s], "must be what state_dict"),
    "empty": (lambda s: {}, "must have 'state' and 'param_groups'.* it has nothing"),
    "of a model": (lambda s: network().state_dict(), "must have 'state' and 'param_groups'.* it has '0.weight'"),
    "no state": (lambda s: {**s, "state": {}}, "has no entries for any tensor"),
    "no groups": (lambda s: {**s, "param_groups": []}, "different number of parameter groups"),
    "groups of nothing": (lambda s: {**s, "param_groups": [{"lr": 0.1}]}, "has a group without 'params'"),
    "fewer tensors": (lambda s: {**s, "param_groups": [{**s["param_groups"][0], "params": [0, 1]}]}, "size of optimizer's group"),
    "no rate": (
        lambda s: {**s, "param_groups": [{k: v for k, v in s["param_groups"][0].items() if k != "lr"}]},
        "group 0: 'lr' is only in this",
    ),
    "one beta": (lambda s: {**s, "param_groups": [{**s["param_groups"][0], "betas": (0.9,)}]}, r"betas=\(0\.9,\) must have 2 numbers"),
    "another rule": (of(hn.sgd(lr=0.1, momentum=0.9)), "group 0: '(betas|eps)' is only in this optimizer"),
    "another state": (of(hn.adamw(lr=0.1, amsgrad=True)), r"'0\.weight': '.*' is only in"),
    "learned otherwise": (of(hn.adamw(lr=hn.learn(0.01, by=hn.sgd(lr=1e-4)))), r"'0\.weight': '.*' is only in this optimizer"),
    "of another rule of torch": (
        lambda s: without(of_torch(s), "exp_avg"),
        "of another optimizer, such as one of torch.optim: its entries for '0.weight' are 'step', 'exp_avg_sq'",
    ),
    "a moment is missing": (lambda s: without(s, "rule.exp_avg"), r"'0\.weight': 'rule\.exp_avg' is only in this optimizer"),
    "another shape": (lambda s: in_first(s, **{"rule.exp_avg": torch.zeros(2, 2)}), r"rule\.exp_avg has shape \(2, 2\), not \(5, 4\)"),
    "a word": (lambda s: in_first(s, **{"rule.exp_avg": "x"}), r"rule\.exp_avg is 'x', which must be a tensor"),
    "another name": (
        lambda s: renamed(s, lambda name: name.replace("2.", "head.")),
        r"'head\.bias' is only in it, and '2\.bias' is only in this",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_load_that_fails_changes_nothing(name: str) -> None:
    model, straight = network(), network()
    for net in (model, straight):
        net[2].bias.requires_grad_(False)
    opt, other = (hn.HyperOptimizer(net.named_parameters(), learned_adamw()) for net in (model, straight))
    for net, each in ((model, opt), (straight, other)):
        train(net, each, 2)
    bad = MISFITS[name][0](copy.deepcopy(opt.state_dict()))
    held = [id(leaf) for state in opt.state.values() for leaf in state.values()], [id(group) for group in opt.param_groups]
    with pytest.raises(ValueError, match=MISFITS[name][1]):
        opt.load_state_dict(bad)
    assert held == ([id(leaf) for state in opt.state.values() for leaf in state.values()], [id(group) for group in opt.param_groups])
    assert repr(opt.state_dict()) == repr(other.state_dict())
    for net, each in ((model, opt), (straight, other)):
        train(net, each, 2, 2)
    assert same(model, straight)


def test_a_load_that_fails_switches_nothing_on() -> None:
    w, v = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(2), requires_grad=False)
    opt = hn.HyperOptimizer([w, v], hn.sgd(lr=0.1))
    with_momentum = hn.HyperOptimizer([nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))], hn.sgd(lr=0.1, momentum=0.9))
    with pytest.raises(ValueError, match=r"momentum_buffer has shape \(2, 2\), not \(3, 2\)"):
        opt.load_state_dict(with_momentum.state_dict())
    assert opt.param_groups[0]["momentum"] == 0
    assert v not in opt.state
    assert opt.state[w].keys() == {"steps"}
    for _ in range(2):
        step(opt, w)
    assert w.detach().flatten().tolist() == pytest.approx([0.8] * 6)


def test_a_tensor_that_was_saved_frozen_begins_anew() -> None:
    model, other = network(), network()
    model[0].requires_grad_(False)
    opt = hn.HyperOptimizer(model.named_parameters(), learned_adamw())
    train(model, opt, 2)
    resumed = hn.HyperOptimizer(other.named_parameters(), learned_adamw())
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert [float(resumed.state[p]["steps"]) for p in other.parameters()] == [0, 0, 2, 2]
    assert repr(resumed.hypers()["lr"]) == repr(opt.hypers()["lr"])
    train(other, resumed, 1, 2)


def test_counts_are_numbers_of_their_own_kind() -> None:
    """Also where weights are narrow, and after a file in which they were rounded by others."""
    model = network().to(torch.bfloat16)
    opt = hn.HyperOptimizer(model.parameters(), hn.adam(lr=0.01))
    train(model, opt, 2)
    for p in model.parameters():
        opt.state[p]["steps"] = torch.tensor(300, dtype=torch.int64)
    train(model, opt, 1)
    steps = [opt.state[p]["steps"] for p in model.parameters()]
    assert all(each.dtype == torch.float64 and each.shape == () and float(each) == 301 for each in steps)
    assert opt._store.taken == 301
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    opt.load_state_dict(torch.load(file))
    assert opt._store.taken == 301
    assert copy.deepcopy(opt)._store.taken == pickle.loads(pickle.dumps(opt))._store.taken == 301


# Weights that were changed between steps


OTHER = torch.tensor([3.0, -2.0], dtype=torch.float64)
WEIGHT_CHANGES: dict[str, Callable[[nn.Parameter], Any]] = {
    "clamped": lambda w: w.clamp_(max=0.5),
    "copied to": lambda w: w.copy_(OTHER),
    "loaded": lambda w: nn.ParameterDict({"w": w}).load_state_dict({"w": OTHER}),
    "data replaced": lambda w: setattr(w, "data", OTHER.clone()),
    "swapped": lambda w: torch.utils.swap_tensors(w, nn.Parameter(OTHER.clone())),
    "scaled": lambda w: w.mul_(2),
}


def late(**how: Any) -> Any:
    rule = hn.adamw(lr=hn.learn(0.1, by=hn.sgd(lr=0.01)), weight_decay=hn.learn(0.1, by=hn.sgd(lr=0.01)))
    w, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    return w, other, hn.HyperOptimizer([("w", w), ("other", other)], rule, **how)


@cells("change", *WEIGHT_CHANGES, also="clamped")
def test_an_update_that_does_not_explain_the_weights_teaches_nothing(change: str, backend: Any) -> None:
    """The learned values move as if this tensor had had no gradient for them; the step itself is as always."""
    w, other, opt = late(backend=backend)
    for _ in range(2):
        step(opt, w, other)
    u, v, alone = late(backend=backend)
    for _ in range(2):
        step(alone, u, v)
    w.grad = None
    with torch.no_grad():
        WEIGHT_CHANGES[change](w)
        u.copy_(w)
        alone.state[u]["memory.taken"].zero_()
    alone._store.weights.note({"w"})
    with pytest.warns(UserWarning, match=r"the weights of 'w' were changed .* as hn\.project, or use horizon=hn\.OneStep\(memory='kept'\)"):
        step(opt, w, other)
    step(alone, u, v)
    assert repr(opt.hypers()) == repr(alone.hypers())
    assert torch.equal(w, u)
    assert opt.changed == {"w": 1}
    before = opt.hypers()["lr"]["group 0"]
    step(opt, w, other)  # and learns again
    assert opt.hypers()["lr"]["group 0"] != before
    with torch.no_grad():
        w.add_(0.5)
    step(opt, w, other)  # is not told again
    assert opt.changed == {"w": 2}


def test_without_a_gradient_a_change_is_minded_at_the_next_step_that_has_one() -> None:
    w, other, opt = late()
    step(opt, w, other)
    with torch.no_grad():
        w.mul_(3)
    step(opt, other)
    assert opt.changed == {}
    with pytest.warns(UserWarning, match="the weights of 'w' were changed"):
        step(opt, w)
    assert opt.changed == {"w": 1}


@pytest.mark.parametrize("memory", ["kept", "forward", "reverse"])
def test_memory_that_does_not_need_the_weights_goes_on_learning(memory: Any) -> None:
    """The hypergradient is the product of the gradient at the weights that there are with the derivative of the last update."""
    w = nn.Parameter(torch.ones(2))
    opt = hn.HyperOptimizer([w], hn.sgd(lr=hn.learn(0.1, by=hn.sgd(lr=0.01))), horizon=hn.OneStep(memory))
    step(opt, w, grad=2.0)
    with torch.no_grad():
        w.clamp_(max=0.5)
    step(opt, w, grad=3.0)
    assert float(opt.hypers()["lr"]["group 0"]) == pytest.approx(0.1 + 0.01 * 2 * 2.0 * 3.0)
    assert opt.changed == {}


@every_backend
def test_a_horizon_begins_anew_when_weights_are_changed(backend: Any) -> None:
    w = nn.Parameter(torch.ones(2))
    opt = hn.HyperOptimizer([w], hn.sgd(lr=hn.learn(0.1, by=hn.sgd(lr=0.01))), horizon=hn.Discounted(0.9), backend=backend)
    for _ in range(3):
        step(opt, w)
    before = float(opt.hypers()["lr"]["group 0"])
    with torch.no_grad():
        w.copy_(OTHER)
    with pytest.warns(UserWarning, match="or use horizon="):
        step(opt, w)
    assert float(opt.hypers()["lr"]["group 0"]) == before
    step(opt, w)
    assert float(opt.hypers()["lr"]["group 0"]) == pytest.approx(before + 0.01 * 2)  # the last update alone


def test_hyper_steps_mind_changes_too() -> None:
    w, _, opt = late(learn_from="validation")
    step(opt, w)
    before = repr(opt.hypers())
    with torch.no_grad():
        w.copy_(OTHER)
    with pytest.warns(UserWarning, match="the weights of 'w' were changed"):
        opt.hyper_step()
    assert repr(opt.hypers()) == before
    step(opt, w)
    opt.hyper_step()
    assert repr(opt.hypers()) != before


@pytest.mark.parametrize("how", ["model first", "optimizer first", "copied", "pickled", "converted", "frozen"])
@pytest.mark.filterwarnings("error::UserWarning")
def test_what_is_no_change_is_not_taken_for_one(how: str) -> None:
    model = network()
    opt = hn.HyperOptimizer(model.named_parameters(), learned_adamw())
    train(model, opt, 3)
    if how in ("model first", "optimizer first"):
        saved = copy.deepcopy(model.state_dict()), copy.deepcopy(opt.state_dict())
        train(model, opt, 2, 3)
        for load in [lambda: model.load_state_dict(saved[0]), lambda: opt.load_state_dict(saved[1])][:: 1 if how == "model first" else -1]:
            load()
    elif how == "copied":
        model, opt = copy.deepcopy((model, opt))
    elif how == "pickled":
        model, opt = pickle.loads(pickle.dumps((model, opt)))
    elif how == "converted":
        model.float()
        train(model, opt, 1, 3)
        model.double()
    else:
        model[0].requires_grad_(False)
        train(model, opt, 1, 3)
        model[0].requires_grad_(True)
    before = repr(opt.hypers())
    train(model, opt, 2, 4)
    assert repr(opt.hypers()) != before
    assert opt.changed == {}


@pytest.mark.parametrize("how", [{}, {"horizon": hn.Discounted(0.5)}, {"horizon": hn.OneStep("reverse")}, {"backend": "foreach"}])
def test_a_step_without_any_gradient_does_nothing(how: dict[str, Any]) -> None:
    model = network()
    opt = hn.HyperOptimizer(model.named_parameters(), hn.sgd(lr=hn.learn(0.1, by=hn.adam(lr=1e-3))), **how)
    train(model, opt, 2)
    before = repr(copy.deepcopy(opt.state_dict())), copy.deepcopy(model)
    opt.zero_grad()
    opt.step()
    assert repr(opt.state_dict()) == before[0]
    assert same(model, before[1])
    assert opt._store.taken == 2


def test_groups_that_come_after_others_went_have_names_of_their_own() -> None:
    a, b, c = (nn.Parameter(torch.ones(2)) for _ in range(3))
    opt = hn.HyperOptimizer([{"params": [a]}, {"params": [b]}], hn.sgd(lr=hn.learn(0.1, by=hn.sgd(), per="tensor")))
    del opt.param_groups[0]
    opt.add_param_group({"params": [c]})
    assert list(opt.hypers()["lr"]) == ["1.0", "1.0#2"]


def test_tpgm_follows_a_tensor_that_was_replaced() -> None:
    """It is projected around what it is when it is first seen; the others as before."""
    model = network()
    tpgm = TPGM(model.named_parameters())
    train(model, torch.optim.SGD(model.parameters(), lr=0.5), 2)
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())
    tpgm.param_groups[0]["params"][0] = model[0].weight
    before = model[0].weight.detach().clone()
    tpgm.step(lambda: (model(torch.ones(2, 4)) - 2).square().mean().backward())
    assert torch.equal(model[0].weight, before)
    assert float(tpgm.hypers()["radius"]["0.weight"]) == pytest.approx(1e-8, rel=1e-6)
    assert float(tpgm.hypers()["radius"]["2.weight"]) > 1e-3


@pytest.mark.parametrize("call", ["step", "hyper_step"])
def test_warnings_point_to_the_call(call: str) -> None:
    w, _, opt = late(learn_from="validation" if call == "hyper_step" else "training")
    step(opt, w)
    with torch.no_grad():
        w.mul_(2)
    with pytest.warns(UserWarning, match="were changed") as told:
        getattr(opt, call)()
    assert told[0].filename == __file__


SHARDED = """
import tempfile
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
import hyperopt_nested as hn

def trained(sharded):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 3))
    data = torch.randn(4, 7)
    if sharded:
        fully_shard(model)
    opt = hn.HyperOptimizer(model.named_parameters(), hn.adamw(lr=hn.learn(1e-3, by=hn.sgd(lr=1e-6))))
    for _ in range(3):
        opt.zero_grad()
        model(data).square().sum().backward()
        opt.step()
    return [param.full_tensor() if sharded else param.detach() for param in model.parameters()], opt.learned()["lr"]

with tempfile.TemporaryDirectory() as folder:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    (weights, lr), (sharded_weights, sharded_lr) = trained(False), trained(True)
    dist.destroy_process_group()
torch.testing.assert_close(sharded_weights, weights)
assert lr != 1e-3 and abs(lr - sharded_lr) < 1e-9, (lr, sharded_lr)
"""


def test_sharded_parameters_are_stepped_as_whole_ones() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", SHARDED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
