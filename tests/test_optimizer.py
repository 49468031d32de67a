"""`HyperOptimizer` as a torch.optim.Optimizer."""

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import hyperopt_nested as hn
from ftp import AdamP

FACTORIES: dict[str, Any] = {
    "plain": lambda: hn.sgd(lr=0.1),
    "per model": lambda: hn.adamw(lr=hn.learn(0.01, by=hn.adam(lr=1e-3))),
    "tower": lambda: hn.sgd(lr=hn.learn(0.1, by=hn.sgd(lr=hn.learn(1e-3, by=hn.sgd(lr=1e-5), per="tensor"))), momentum=0.9),
    "per row": lambda: hn.adam(lr=hn.learn(0.01, by=hn.sgd(lr=1e-3), per="row"), beta1=hn.learn(0.9, by=hn.sgd(lr=1e-4), via="logit")),
    "projected": lambda: hn.project(
        hn.sgd(lr=hn.learn(0.1, by=hn.sgd(lr=1e-3), per="element")), onto=hn.mars, radius=hn.learn(0.5, by=hn.adam(lr=0.1), per="tensor")
    ),
}
every = pytest.mark.parametrize("name", FACTORIES)


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)


def train(model: nn.Module, opt: torch.optim.Optimizer, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64).to(next(model.parameters()).dtype)
        opt.zero_grad()
        model(x).square().mean().backward()
        opt.step()


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@every
def test_saving_and_loading_is_not_stopping(name: str) -> None:
    straight, model = network(), network()
    train(straight, hn.HyperOptimizer(straight.named_parameters(), FACTORIES[name]()), 8)
    opt = hn.HyperOptimizer(model.named_parameters(), FACTORIES[name]())
    train(model, opt, 4)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file)
    fresh = network()
    fresh.load_state_dict(saved["model"])
    resumed = hn.HyperOptimizer(fresh.named_parameters(), FACTORIES[name]())
    resumed.load_state_dict(saved["opt"])
    train(fresh, resumed, 4, first=4)
    assert same(fresh, straight)


@every
def test_copies_and_pickles_go_on_alike(name: str) -> None:
    model = network()
    opt = hn.HyperOptimizer(model.named_parameters(), FACTORIES[name]())
    train(model, opt, 3)
    copied_model, copied = copy.deepcopy((model, opt))
    pickled_model, pickled = pickle.loads(pickle.dumps((model, opt)))
    for other_model, other in ((model, opt), (copied_model, copied), (pickled_model, pickled)):
        train(other_model, other, 3, first=3)
    assert same(model, copied_model)
    assert same(model, pickled_model)
    assert repr(opt.hypers()) == repr(copied.hypers()) == repr(pickled.hypers())


def test_state_is_there_before_the_first_step_and_is_plain_tensors() -> None:
    opt = hn.HyperOptimizer(network().named_parameters(), FACTORIES["tower"]())
    assert all(isinstance(leaf, torch.Tensor) and not leaf.requires_grad for state in opt.state.values() for leaf in state.values())
    assert len(opt.state) == 4
    before = {id(p): set(state) for p, state in opt.state.items()}
    train(model := network(), opt2 := hn.HyperOptimizer(model.named_parameters(), FACTORIES["tower"]()), 2)
    assert [set(state) for state in opt2.state.values()] == list(before.values())


def test_groups_are_plain_floats_as_in_torch() -> None:
    opt = hn.HyperOptimizer(network().parameters(), hn.adamw(lr=hn.learn(0.01, by=hn.sgd()), beta2=0.99))
    (group,) = opt.param_groups
    assert {key: value for key, value in group.items() if key != "params"} == {
        "lr": 0.01,
        "betas": (0.9, 0.99),
        "eps": 1e-8,
        "weight_decay": 0.01,
        "effective_lr": 0.01,
    }
    assert opt.defaults["betas"] == (0.9, 0.99)


def test_a_group_scales_what_is_learned_overrides_what_is_not_and_may_learn_its_own() -> None:
    model = network()
    groups = [
        {"params": model[0].named_parameters(prefix="0"), "lr": 0.05, "weight_decay": 0.5},
        {"params": [("2.weight", model[2].weight)], "lr": hn.learn(0.3, by=hn.sgd(lr=0.0))},
        {"params": [("2.bias", model[2].bias)]},
    ]
    opt = hn.HyperOptimizer(groups, hn.sgd(lr=hn.learn(0.1, by=hn.sgd(lr=0.0))))
    hypers = {key: {k: round(float(v), 12) for k, v in values.items()} for key, values in opt.hypers().items()}
    assert hypers == {"lr": {"group 0": 0.05, "group 2": 0.1}, "lr#2": {"group 1": 0.3}}
    reference = network()
    other = torch.optim.SGD(
        [
            {"params": reference[0].parameters(), "lr": 0.05, "weight_decay": 0.5},
            {"params": [reference[2].weight], "lr": 0.3},
            {"params": [reference[2].bias]},
        ],
        lr=0.1,
    )
    train(model, opt, 5)
    train(reference, other, 5)
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_a_function_may_choose_the_optimizer_of_each_tensor() -> None:
    model, reference = network(), network()
    opt = hn.HyperOptimizer(model.named_parameters(), lambda name, p: hn.adam(lr=0.01) if p.ndim == 2 else hn.sgd(lr=0.01))
    adam = torch.optim.Adam([reference[0].weight, reference[2].weight], lr=0.01)
    sgd = torch.optim.SGD([reference[0].bias, reference[2].bias], lr=0.01)
    for step in range(4):
        train(model, opt, 1, first=step)
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        reference.zero_grad()
        reference(x).square().mean().backward()
        adam.step()
        sgd.step()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_a_schedule_that_switches_momentum_on_gets_its_buffer() -> None:
    model, reference = network(), network()

    def groups(net: nn.Sequential) -> Any:
        return [{"params": net[0].parameters()}, {"params": net[2].parameters()}]

    opts = hn.HyperOptimizer(groups(model), hn.sgd(lr=0.1)), torch.optim.SGD(groups(reference), lr=0.1)
    for step in range(6):
        for net, opt in zip((model, reference), opts, strict=True):
            opt.param_groups[1]["momentum"] = 0.9 if step >= 3 else 0.0
            train(net, opt, 1, step)
    resumed = hn.HyperOptimizer(groups(model), hn.sgd(lr=0.1))
    resumed.load_state_dict(opts[0].state_dict())
    assert "rule.momentum_buffer" in resumed.state[model[2].weight]
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_a_group_may_come_later_and_shares_what_was_learned() -> None:
    model = network()
    opt = hn.HyperOptimizer(model[0].named_parameters(prefix="0"), FACTORIES["per model"]())
    train(model, opt, 4)
    learned = float(opt.hypers()["lr"]["group 0"])
    assert learned != 0.01
    kept = {key: leaf.clone() for key, leaf in opt.state[model[0].weight].items()}
    opt.add_param_group({"params": list(model[2].named_parameters(prefix="2")), "weight_decay": 0.0})
    assert all(torch.equal(leaf, kept[key]) for key, leaf in opt.state[model[0].weight].items())
    assert {key: float(value) for key, value in opt.hypers()["lr"].items()} == {"group 0": learned, "group 1": learned}
    before = model[2].weight.detach().clone()
    train(model, opt, 2)
    assert not torch.equal(before, model[2].weight)
    with pytest.raises(ValueError, match=r"two tensors named '2\.bias'"):
        opt.add_param_group({"params": [("2.bias", nn.Parameter(torch.ones(2)))]})
    assert len(opt.param_groups) == 2


def test_tensors_without_gradients_frozen_ones_and_empty_ones() -> None:
    used, sometimes, never, empty = (nn.Parameter(torch.ones(shape)) for shape in ((2, 2), (2,), (2,), (0, 3)))
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    names = ["frozen", "used", "sometimes", "never", "empty"]
    opt = hn.HyperOptimizer(zip(names, (frozen, used, sometimes, never, empty), strict=True), FACTORIES["per model"]())
    assert opt.state[frozen].keys() == {
        "hypers.lr",
        "learners.lr.rule.step",
        "learners.lr.rule.exp_avg",
        "learners.lr.rule.exp_avg_sq",
        "nonfinite.lr",
        "pinned.lr",
        "declared.lr",
    }
    opt.step()
    for step in range(4):
        opt.zero_grad()
        loss = used.square().sum() + empty.sum()
        (loss + sometimes.sum() if step % 2 else loss).backward()
        opt.step()
    assert torch.equal(never, torch.ones(2))
    assert not torch.equal(sometimes, torch.ones(2))
    frozen.requires_grad_()
    frozen.sum().backward()
    opt.step()
    assert not torch.equal(frozen, torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_learned_values_are_not_rounded_by_narrow_parameters(dtype: torch.dtype) -> None:
    model = network(dtype)
    opt = hn.HyperOptimizer(
        model.named_parameters(), hn.adamw(lr=hn.learn(0.1, by=hn.sgd(lr=1e-6)), weight_decay=hn.learn(0.1, by=hn.sgd(lr=1e-6), per="row"))
    )
    train(model, opt, 3)
    lr = opt.hypers()["lr"]["group 0"]
    assert lr.dtype == torch.float64
    assert opt.hypers()["weight_decay"]["0.weight"].dtype == torch.float32
    assert 0 < abs(float(lr) - 0.1) < 1e-3
    saved = opt.state_dict()
    other = hn.HyperOptimizer(
        model.named_parameters(), hn.adamw(lr=hn.learn(0.1, by=hn.sgd(lr=1e-6)), weight_decay=hn.learn(0.1, by=hn.sgd(lr=1e-6), per="row"))
    )
    other.load_state_dict(copy.deepcopy(saved))
    for key, leaf in opt.state[model[0].weight].items():
        assert torch.equal(other.state[model[0].weight][key], leaf), key
        assert other.state[model[0].weight][key].dtype == leaf.dtype, key


def test_state_moves_with_the_parameter() -> None:
    """The meta device stands for an accelerator: it has no values, but mixing it with the CPU fails as on one."""
    model = network()
    opt = hn.HyperOptimizer(model.named_parameters(), FACTORIES["tower"]())
    train(model, opt, 2)
    for p in model.parameters():
        p.grad = None
        torch.utils.swap_tensors(p, nn.Parameter(p.detach().to("meta")))
        p.grad = torch.ones_like(p)
    opt.step()
    counted = ("steps", "declared.lr")  # these stay on the CPU
    assert all((leaf.device.type == "meta") == (key not in counted) for state in opt.state.values() for key, leaf in state.items())


def test_states_of_rules_go_by_names_and_may_be_written_to() -> None:
    model, frozen = torch.nn.Linear(2, 1), torch.nn.Parameter(torch.ones(1), requires_grad=False)
    opt = hn.HyperOptimizer([*model.parameters(), frozen], hn.clip_by_norm(hn.sgd(lr=1.0, momentum=0.5), max_norm=1e3))
    tensors = dict(opt.named_parameters())
    assert [*tensors.values()] == [*model.parameters(), frozen]
    assert [*tensors] == ["0.0", "0.1", "0.2"]
    assert opt.rule_states().keys() == {"0.0", "0.1"}
    model.bias.grad = torch.zeros(1)
    opt.step()
    opt.rule_states()["0.1"]["base"]["momentum_buffer"].fill_(4.0)
    before = model.bias.detach().clone()
    opt.step()
    assert torch.equal(model.bias, before - 2.0)


def test_nothing_waits_for_the_device() -> None:
    """No step reads a tensor's value: on the meta device there is none to read."""
    model = network().to("meta")
    for name, factory in FACTORIES.items():
        opt = hn.HyperOptimizer(model.named_parameters(), factory())
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        opt.step()
        assert all(value.device.type == "meta" for values in opt.hypers().values() for value in values.values()), name


@every
def test_distributed_checkpoint_reads_a_fresh_optimizer_without_changing_it(name: str) -> None:
    model, kept = network(), network()
    opt = hn.HyperOptimizer(model.named_parameters(), FACTORIES[name]())
    hypers = repr(opt.hypers())
    state = get_optimizer_state_dict(model, opt)
    assert same(model, kept)
    assert repr(opt.hypers()) == hypers
    train(model, opt, 3)
    state = copy.deepcopy(get_optimizer_state_dict(model, opt))
    other_model = copy.deepcopy(model)
    other = hn.HyperOptimizer(other_model.named_parameters(), FACTORIES[name]())
    set_optimizer_state_dict(other_model, other, state)
    train(model, opt, 2, 3)
    train(other_model, other, 2, 3)
    assert same(model, other_model)


def test_a_state_that_does_not_fit_is_refused_and_nothing_changes() -> None:
    model = network()
    opt = hn.HyperOptimizer(model.named_parameters(), FACTORIES["per model"]())
    train(model, opt, 2)
    before = repr(opt.state_dict())
    other = hn.HyperOptimizer(network().named_parameters(), FACTORIES["per row"]())
    with pytest.raises(ValueError, match=r"state_dict does not fit '0.weight': .* build the optimizer with the same arguments"):
        opt.load_state_dict(other.state_dict())
    wide = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    with pytest.raises(ValueError, match=r"rule.exp_avg has shape \(5, 3\), not \(5, 4\)"):
        opt.load_state_dict(hn.HyperOptimizer(wide.named_parameters(), FACTORIES["per model"]()).state_dict())
    with pytest.raises(ValueError, match="different number of parameter groups"):
        opt.load_state_dict({"state": {}, "param_groups": []})
    assert repr(opt.state_dict()) == before


def test_bad_calls_are_named_and_change_nothing() -> None:
    weight = nn.Parameter(torch.ones(2))
    for params, optimizer, error, words in [
        ([weight], "adam", TypeError, "optimizer='adam'"),
        ([weight], lambda name, p: "adam", TypeError, r"optimizer\('0.0', tensor\) returned 'adam'"),
        ([{"params": [weight], "lr": -1.0}], hn.sgd(), ValueError, r"lr=-1\.0 is outside"),
        ([{"params": [weight], "lr": -1.0}], hn.sgd(lr=hn.learn(0.1, by=hn.sgd())), ValueError, r"lr=-1\.0 is outside"),
        ([{"params": [weight], "weigth_decay": 0.1}], hn.sgd(), ValueError, "'weigth_decay'; did you mean 'weight_decay'"),
        ([{"params": [weight], "nesterov": True}], hn.sgd(), ValueError, "nesterov=True, which is an option"),
        ([("a", weight), ("a", nn.Parameter(torch.ones(1)))], hn.sgd(), ValueError, "two tensors named 'a'"),
        ([nn.Parameter(torch.ones(2, dtype=torch.complex128))], hn.sgd(), TypeError, "complex128; only real"),
    ]:
        with pytest.raises(error, match=words):
            hn.HyperOptimizer(params, optimizer)  # type: ignore[arg-type]
    mixed = [("a", weight), ("b", nn.Parameter(torch.ones(2, 2)))]
    with pytest.raises(ValueError, match=r"group 0 has tensors with lr=0.1 and lr=0.2 \(of 'b'\)"):
        hn.HyperOptimizer(mixed, lambda name, p: hn.sgd(lr=0.1 if name == "a" else 0.2))


def test_sparse_gradients_are_refused_before_anything_changes() -> None:
    table, weight = nn.Embedding(4, 2, sparse=True), nn.Parameter(torch.ones(2))
    opt = hn.HyperOptimizer([("weight", weight), ("table", table.weight)], hn.sgd(lr=0.1))
    (table(torch.tensor([1])).sum() + weight.sum()).backward()
    with pytest.raises(RuntimeError, match=r"gradient of 'table' is torch\.sparse_coo"):
        opt.step()
    assert torch.equal(weight, torch.ones(2))


def test_rejected_hypergradients_are_counted() -> None:
    weight = nn.Parameter(torch.ones(2))
    opt = hn.HyperOptimizer([weight], hn.sgd(lr=hn.learn(0.1, by=hn.sgd(lr=hn.learn(0.1, by=hn.sgd(lr=0.0))))))
    for value in (1.0, float("nan")):
        weight.grad = torch.tensor([value, 1.0])
        opt.step()
    assert {key: float(count) for key, count in opt.nonfinite_counts().items()} == {"lr": 1, "lr.lr": 0}
    assert float(opt.hypers()["lr"]["group 0"]) == 0.1


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item()


RESUME = """
import sys, torch
from ftp import AdamP
torch.set_default_dtype(torch.float64)
model = torch.nn.Linear(3, 2)
saved = torch.load(sys.argv[1])
model.load_state_dict(saved["model"])
opt = AdamP(model.named_parameters(), lr=1e-2)
opt.load_state_dict(saved["opt"])
for step in range(5, 10):
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
    opt.zero_grad()
    model(x).square().mean().backward()
    opt.step()
torch.save(model.state_dict(), sys.argv[2])
"""


def test_ftp_resumes_in_a_fresh_process_bitwise(tmp_path: Path) -> None:
    """Radii, moments and anchors survive: the published program starts its radii again, which puts the weights back to the start."""
    torch.manual_seed(3)
    model = nn.Linear(3, 2)
    start = copy.deepcopy(model)
    opt = AdamP(model.named_parameters(), lr=1e-2)
    for step in range(10):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        opt.zero_grad()
        model(x).square().mean().backward()
        opt.step()
        if step == 4:
            torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, tmp_path / "saved.pt")
            moved = distance(model.weight, start.weight)
    subprocess.run([sys.executable, "-c", RESUME, str(tmp_path / "saved.pt"), str(tmp_path / "resumed.pt")], check=True)
    resumed = torch.load(tmp_path / "resumed.pt")
    assert all(torch.equal(resumed[name], p) for name, p in model.state_dict().items())
    assert moved > 1e-3
    assert distance(resumed["weight"], start.weight) > moved / 2
    # without the state, the radii of a new optimizer with this anchor begin at the present distance: nothing is thrown back
    forgetful = nn.Linear(3, 2)
    forgetful.load_state_dict(torch.load(tmp_path / "saved.pt")["model"])
    lost = AdamP(forgetful.named_parameters(), lr=1e-2, anchor=start.state_dict())
    forgetful(torch.ones(1, 3)).square().mean().backward()
    lost.step()
    assert distance(forgetful.weight, start.weight) > moved / 2
