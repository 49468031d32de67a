"""What is learned, where people look: `effective_lr` of groups, names of values, recorders, callbacks and pictures."""

import copy
import importlib
import io
import json
import pickle
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hyperopt_nested as hn
from ftp import FTP

X = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)


def network() -> torch.nn.Sequential:
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int, after: Callable[[], object] = lambda: None) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        (model(X) - 1).square().mean().backward()
        optimizer.step()
        after()


def learned(start: float, **how: Any) -> hn.Learn:
    return hn.learn(start, by=hn.sgd(lr=1e-3), **how)


def plain(model: torch.nn.Module, rule: Any, **how: Any) -> hn.HyperOptimizer:
    return hn.HyperOptimizer(model.named_parameters(), rule, backend="reference", **how)


# effective_lr


@pytest.mark.parametrize("per", ["model", "tensor", "row", "element"])
def test_effective_lr_is_the_mean_of_the_rates_in_use(per: Any) -> None:
    model = network()
    opt = plain(model, hn.sgd(lr=learned(0.1, per=per)))
    (group,) = opt.param_groups
    assert group["effective_lr"] == pytest.approx(group["lr"])
    train(model, opt, 4)
    rates = [value.mean() for value in opt.hypers()["lr"].values()]
    assert type(group["effective_lr"]) is float
    assert group["effective_lr"] == pytest.approx(float(sum(rates) / len(rates)))
    assert group["effective_lr"] != group["lr"] == 0.1
    group["lr"] = 0.05
    half = group["effective_lr"]
    group["lr"] = 0.1
    assert half == pytest.approx(group["effective_lr"] / 2)


def test_effective_lr_is_that_of_the_group() -> None:
    model = network()
    groups = [{"params": model[0].named_parameters(prefix="0")}, {"params": model[2].named_parameters(prefix="2"), "lr": learned(0.3)}]
    opt = hn.HyperOptimizer(groups, hn.sgd(lr=learned(0.1)), backend="reference")
    opt.add_param_group({"params": [("new", torch.nn.Parameter(torch.ones(2)))], "lr": 0.2})
    train(model, opt, 3)
    one, own, new = (group["effective_lr"] for group in opt.param_groups)
    assert one == opt.learned()["lr/group 0"]
    assert own == opt.learned()["lr/group 1"]
    assert new == pytest.approx(2 * one)
    constant = hn.optim.SGD(network().parameters(), lr=0.1)
    assert constant.param_groups[0]["effective_lr"] == 0.1


def test_effective_lr_has_the_schedule_of_a_level() -> None:
    model = network()
    opt = plain(model, hn.adamw(lr=hn.learn(1e-3)), total_steps=100)
    train(model, opt, 2)
    assert opt.param_groups[0]["effective_lr"] == opt.learned()["lr"] == float(opt.hypers()["lr"]["group 0"])


def test_copies_of_a_group_are_plain_and_hold_the_number() -> None:
    model = network()
    opt = plain(model, hn.sgd(lr=learned(0.1)))
    train(model, opt, 3)
    (group,), rate = opt.param_groups, opt.learned()["lr"]
    copies = [{**group}, dict(group), group.copy(), group | {}, copy.copy(group), copy.deepcopy(group), pickle.loads(pickle.dumps(group))]
    for each in [*copies, opt.state_dict()["param_groups"][0]]:
        assert type(each) is dict
        assert each["effective_lr"] == rate
    assert group.get("effective_lr") == dict(group.items())["effective_lr"] == rate
    assert rate in group.values()
    assert group.get("nothing") is None
    assert "'effective_lr': 0.1" in repr(group)
    assert json.loads(json.dumps({**group, "params": 0}))["effective_lr"] == rate
    group["effective_lr"] = 7.0
    group.update(copies[0], effective_lr=8.0)
    assert group["effective_lr"] == rate
    with pytest.raises(KeyError):
        group["nothing"]


def test_effective_lr_survives_what_optimizers_go_through() -> None:
    model = network()
    opt = plain(model, hn.adamw(lr=learned(0.1)))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
    train(model, opt, 3, scheduler.step)
    rate = opt.param_groups[0]["effective_lr"]
    assert rate == pytest.approx(float(opt.hypers()["lr"]["group 0"]))
    buffer = io.BytesIO()
    torch.save(opt.state_dict(), buffer)
    buffer.seek(0)
    other = plain(network(), hn.adamw(lr=learned(0.3)))
    other.load_state_dict(torch.load(buffer, weights_only=True))
    for each in (other, copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert each.param_groups[0]["effective_lr"] == rate
        each.param_groups[0]["lr"] *= 2
        assert each.param_groups[0]["effective_lr"] == pytest.approx(2 * rate)
    state = opt.state_dict()
    del state["param_groups"][0]["effective_lr"]  # of another program
    opt.load_state_dict(state)
    assert opt.param_groups[0]["effective_lr"] == rate


def test_a_group_outlives_its_optimizer_and_does_not_keep_it() -> None:
    opt = plain(network(), hn.sgd(lr=learned(0.1)))
    (group,) = opt.param_groups
    before = group["effective_lr"]
    del opt
    assert group["effective_lr"] == before


def test_effective_lr_enters_no_number() -> None:
    ends = []
    for reads in (False, True):
        torch.manual_seed(0)
        model = network()
        opt = plain(model, hn.adamw(lr=learned(0.1), weight_decay=learned(0.1, per="tensor")))
        for _ in range(5):
            train(model, opt, 1)
            assert not reads or [dict(group)["effective_lr"] for group in opt.param_groups]
        ends.append([*map(torch.clone, model.parameters())])
    assert all(map(torch.equal, *ends))


class NoSync(torch.overrides.TorchFunctionMode):
    """Refuses what waits for a device."""

    WAITS = torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.__float__, torch.Tensor.__bool__, torch.Tensor.numpy

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in self.WAITS, func
        return func(*args, **(kwargs or {}))


def test_a_recorder_does_not_wait_for_the_device() -> None:
    model = network()
    opt = plain(model, hn.adamw(lr=learned(0.1), weight_decay=learned(0.1, per="row")))
    recorder = hn.integrations.Recorder(opt, rows=4)
    recorder.close()
    for _ in range(10):
        train(model, opt, 1)
        with NoSync():
            recorder._stepped()
    assert recorder.record().steps == [4, 8]


# hypers() and functions that choose optimizers


def test_hypers_have_one_scheme_of_keys() -> None:
    model = network()
    tower = hn.learn(0.1, by=hn.sgd(lr=learned(1e-3)))
    decay = hn.learn(0.1, by=hn.sgd(lr=learned(1e-3)), per="tensor")
    groups = [{"params": model[0].named_parameters(prefix="0")}, {"params": model[2].named_parameters(prefix="2"), "lr": 0.2}]
    opt = hn.HyperOptimizer(groups, hn.sgd(lr=tower, weight_decay=decay), backend="reference")
    found, names = opt.hypers(), [name for name, _ in model.named_parameters()]
    shared = ["group 0", "group 1"]
    assert {hyper: [*values] for hyper, values in found.items()} == {
        "lr": shared,
        "lr.lr": shared,
        "weight_decay": names,
        "weight_decay.lr": shared,
    }
    assert float(found["lr.lr"]["group 1"]) == 1e-3
    assert opt.learned_tensors().keys() == opt.learned().keys()
    assert [float(value) for value in opt.learned_tensors().values()] == [*opt.learned().values()]


def test_a_learn_made_anew_for_every_tensor_warns() -> None:
    with pytest.warns(UserWarning, match=r"makes a new learn\(\.\.\.\) for lr in each call.*outside of the function") as caught:
        hn.HyperOptimizer(network().named_parameters(), lambda name, tensor: hn.sgd(lr=learned(0.1)))
    assert len(caught) == 1
    assert caught[0].filename == __file__
    rule, other = hn.sgd(lr=learned(0.1)), hn.sgd(lr=learned(0.1))
    hn.HyperOptimizer(network().named_parameters(), lambda name, tensor: rule if tensor.ndim > 1 else other)
    hn.HyperOptimizer(network().named_parameters(), lambda name, tensor: hn.sgd(lr=learned(0.1, per="tensor")))
    hn.HyperOptimizer([("w", torch.nn.Parameter(torch.ones(2)))], lambda name, tensor: hn.sgd(lr=learned(0.1)))


@pytest.mark.parametrize("name", [name for name in hn.optim.__all__ if name not in ("DropIn", "HyperOptimizer")])
def test_classes_take_what_trainers_give_them(name: str) -> None:
    """Groups with and without decay, as the Trainer of transformers and timm make them, and a schedule of factors."""
    weights, biases = [torch.nn.Parameter(torch.ones(2, 2))], [torch.nn.Parameter(torch.ones(2))]
    groups = [{"params": weights, "weight_decay": 0.0}, {"params": [] if name == "Muon" else biases, "weight_decay": 0.0}]
    opt = getattr(hn.optim, name)(groups, backend="reference")
    torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 0.5)
    for p in weights + biases:
        p.grad = torch.ones_like(p)
    opt.step()
    assert not torch.equal(weights[0], torch.ones(2, 2))
    assert opt.param_groups[0]["effective_lr"] == opt.param_groups[0]["lr"]


# Recorder


def record_of(steps: int, rule: Any = None, **how: Any) -> tuple[hn.integrations.Recorder, hn.HyperOptimizer, list[dict[str, float]]]:
    model, seen = network(), list[dict[str, float]]()
    opt = plain(model, rule or hn.sgd(lr=hn.learn(0.1, by=hn.sgd(lr=learned(1e-3))), weight_decay=learned(0.1, per="tensor")))
    recorder = hn.integrations.Recorder(opt, **how)
    train(model, opt, steps, lambda: seen.append(opt.learned()))
    return recorder, opt, seen


def test_a_recorder_keeps_what_learned_returns() -> None:
    recorder, _, seen = record_of(6)
    record = recorder.record()
    assert record.steps == [1, 2, 3, 4, 5, 6]
    assert record.values == {name: [each[name] for each in seen] for name in seen[0]}
    assert list(record.values)[:2] == ["lr", "weight_decay/0.weight"]


@pytest.mark.parametrize(
    ("steps", "every", "rows", "kept"), [(40, 1, 8, range(8, 41, 8)), (40, 3, 100, range(3, 40, 3)), (9, 1, 2, [4, 8])]
)
def test_a_recorder_has_bounded_memory(steps: int, every: int, rows: int, kept: Any) -> None:
    recorder, _, seen = record_of(steps, every=every, rows=rows)
    record = recorder.record()
    assert record.steps == [*kept]
    assert len(record.steps) <= rows
    assert record.values["lr"] == [seen[step - 1]["lr"] for step in kept]


def test_a_recorder_follows_new_tensors_and_ends() -> None:
    model, more = network(), torch.nn.Parameter(torch.ones(2))
    opt = plain(model, hn.sgd(lr=learned(0.1, per="tensor")))
    recorder = hn.integrations.Recorder(opt)
    train(model, opt, 2)
    opt.add_param_group({"params": [("more", more)]})
    train(model, opt, 1)
    values = recorder.record().values["lr/more"]
    assert [value == value for value in values] == [False, False, True]
    recorder.close()
    train(model, opt, 1)
    assert recorder.record().steps == [1, 2, 3]


def test_a_recorder_of_what_learns_nothing_is_empty_or_refused() -> None:
    assert record_of(2, hn.sgd(lr=0.1))[0].record() == hn.integrations.Record([], {})
    with pytest.raises(TypeError, match="optimizer is SGD, which learns no hypers"):
        hn.integrations.Recorder(torch.optim.SGD(network().parameters()))
    for how, message in (({"every": 0}, "every=0 must be at least 1"), ({"rows": 1}, "rows=1 must be at least 2")):
        with pytest.raises(ValueError, match=message):
            record_of(0, **how)  # type: ignore[arg-type]


def test_a_recorder_of_radii_and_of_an_optimizer_in_another() -> None:
    model = network()
    opt = FTP(torch.optim.SGD(model.parameters(), lr=0.1), backend="reference")
    recorder = hn.integrations.Recorder(types.SimpleNamespace(optimizer=opt))
    train(model, opt, 3)
    assert list(recorder.record().values) == ["radius/0.0", "radius/0.1", "radius/0.2", "radius/0.3"]
    assert recorder.record().values["radius/0.0"][-1] == opt.learned()["radius/0.0"]


@pytest.mark.parametrize("suffix", ["csv", "json"])
def test_records_are_written_and_read(suffix: str, tmp_path: Path) -> None:
    recorder, _, _ = record_of(3)
    file = tmp_path / f"run.{suffix}"
    recorder.save(file)
    assert hn.integrations.Record.load(str(file)) == recorder.record()
    empty = hn.integrations.Record([], {"lr": []})
    empty.save(file)
    assert hn.integrations.Record.load(file) == empty
    with pytest.raises(ValueError, match=r"must end in \.csv or \.json"):
        empty.save(tmp_path / "run.txt")
    with pytest.raises(ValueError, match=r"must end in \.csv or \.json"):
        hn.integrations.Record.load(tmp_path / "run.txt")


# TensorBoard, Lightning, transformers


class Writer:
    def __init__(self) -> None:
        self.seen: list[tuple[str, float, int]] = []

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.seen.append((tag, value, step))


def test_tensorboard_gets_scalars_every_few_steps() -> None:
    model, writer = network(), Writer()
    opt = plain(model, hn.sgd(lr=learned(0.1)))
    hn.integrations.TensorBoardWriter(opt, writer, every=2, prefix="x/")
    train(model, opt, 5)
    assert [(tag, step) for tag, _, step in writer.seen] == [("x/lr", 2), ("x/lr", 4)]


def test_tensorboard_makes_a_writer_of_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = lambda folder: folder  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    assert hn.integrations.TensorBoardWriter(plain(network(), hn.sgd(lr=0.1)), Path("runs")).writer == "runs"


class Callback:
    """Stands in for `lightning.pytorch.Callback`: hooks that do nothing."""

    def on_train_start(self, trainer: Any, module: Any) -> str:
        return "base"


@pytest.fixture
def lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("lightning.pytorch")
    module.Callback = Callback  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lightning.pytorch", module)


class Logger:
    def __init__(self) -> None:
        self.seen: list[tuple[list[str], int]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.seen.append(([*metrics], step))


def batches(callback: Any, models: int, steps: int, accumulated: int = 1) -> list[tuple[list[str], int]]:
    """Call hooks as the loop of Lightning's trainer does, for a number of models with an optimizer each."""
    networks = [network() for _ in range(models)]
    optimizers = [plain(each, hn.sgd(lr=learned(0.1))) for each in networks]
    other = torch.optim.SGD(network().parameters())
    trainer = types.SimpleNamespace(optimizers=[*optimizers, other], loggers=[Logger()], log_every_n_steps=3, global_step=0)
    for batch in range(steps * accumulated):
        if (batch + 1) % accumulated == 0:
            for each, optimizer in zip(networks, optimizers, strict=True):
                train(each, optimizer, 1)
            trainer.global_step += 1
        callback.on_train_batch_end(trainer, None, {}, None, batch)
    seen: list[tuple[list[str], int]] = trainer.loggers[0].seen
    return seen


@pytest.mark.usefixtures("lightning")
def test_lightning_logs_at_the_cadence_of_the_trainer() -> None:
    callback: Any = hn.integrations.LightningCallback()
    assert isinstance(callback, Callback)
    assert isinstance(callback, hn.integrations.LightningCallback)
    assert callback.on_train_start(None, None) == "base"
    assert batches(callback, 1, 6, accumulated=2) == [(["learned/lr"], 3), (["learned/lr"], 6)]
    two = hn.integrations.LightningCallback(every=4, prefix="")
    for each in (two, pickle.loads(pickle.dumps(two)), copy.deepcopy(two)):
        assert batches(each, 2, 5) == [(["0/lr", "1/lr"], 4)]
    assert batches(hn.integrations.LightningCallback(1), 0, 2) == []
    with pytest.raises(ValueError, match="every=0 must be at least 1"):
        hn.integrations.LightningCallback(0)


def test_lightning_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(importlib, "import_module", _missing)
    with pytest.raises(ModuleNotFoundError, match="lightning is not installed: pip install lightning"):
        hn.integrations.LightningCallback()


def _missing(name: str) -> Any:
    raise ModuleNotFoundError(f"No module named {name!r}", name=name)


# Pictures


@pytest.fixture
def record() -> hn.integrations.Record:
    return record_of(5)[0].record()


def titles(figure: Any) -> list[str]:
    return [axes.get_title() for axes in figure.axes]


def test_trajectories_have_a_panel_a_hyper(record: hn.integrations.Record, tmp_path: Path) -> None:
    assert titles(hn.plot.trajectories(record)) == ["lr", "weight_decay", "lr.lr"]
    assert titles(hn.plot.trajectories(record, "lr")) == ["lr"]
    figure = hn.plot.trajectories(record, ["weight_decay/0.weight"])
    (line,) = figure.axes[0].get_lines()
    assert [*line.get_ydata()] == record.values["weight_decay/0.weight"]
    record.save(tmp_path / "run.json")
    hn.plot.trajectories(tmp_path / "run.json").savefig(tmp_path / "run.png", dpi=40)
    assert (tmp_path / "run.png").stat().st_size > 1000


def test_towers_and_heat_maps(record: hn.integrations.Record) -> None:
    assert titles(hn.plot.tower(record)) == ["lr.lr", "lr"]
    figure = hn.plot.heatmap(record, "weight_decay")
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    signed = hn.integrations.Record([1, 2], {"s/a": [-1.0, 1.0], "s/b": [0.0, float("nan")]})
    hn.plot.heatmap(signed, "s")


def test_pictures_of_what_is_not_there_are_refused(record: hn.integrations.Record) -> None:
    for draw in (hn.plot.tower, hn.plot.heatmap, hn.plot.trajectories):
        with pytest.raises(ValueError, match=r"has no values 'beta1' of this kind; it has lr, weight_decay/0\.weight"):
            draw(record, "beta1")
        with pytest.raises(ValueError, match="the record is empty"):
            draw(hn.integrations.Record([], {}), "lr")
