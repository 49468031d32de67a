"""What an editor and a user see: drop-in classes, signatures, public names, and values of hypers by name."""

import copy
import inspect
import io
import pickle
import pydoc
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jedi
import pytest
import stubs
import torch
from cases import EXACT, relative_error

import hyperopt_nested as hn

ROOT = Path(__file__).parent.parent
TORCH = [name for name in hn.optim.__all__ if hasattr(torch.optim, name)]
OWN = [name for name in hn.optim.__all__ if name not in {*TORCH, "DropIn", "HyperOptimizer"}]
REFUSED = {"foreach": True, "fused": True, "capturable": True, "differentiable": True}


def models(count: int = 2, *, bias: bool = True) -> list[torch.nn.Sequential]:
    torch.manual_seed(0)
    layers = torch.nn.Linear(4, 3, bias=bias), torch.nn.Tanh(), torch.nn.Linear(3, 2, bias=bias)
    model = torch.nn.Sequential(*layers).double()
    return [copy.deepcopy(model) for _ in range(count)]


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int, scheduler: Any = None, first: int = 0) -> None:
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(8, 4, generator=generator, dtype=torch.float64)).square().mean().backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def difference(one: torch.nn.Module, other: torch.nn.Module) -> float:
    return max(relative_error(a.detach(), b.detach()) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def learned_lr(value: float = 1e-2) -> hn.Learn:
    return hn.learn(value, by=hn.sgd(lr=1e-4))


SETTINGS: dict[str, list[dict[str, Any]]] = {
    "SGD": [{"lr": 0.1}, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True}, {"lr": 0.1, "maximize": True}],
    "AdamW": [{"amsgrad": True, "betas": (0.8, 0.9)}],
    "NAdam": [{"decoupled_weight_decay": True, "weight_decay": 0.1}],
    "RMSprop": [{"centered": True, "momentum": 0.5, "alpha": 0.9}],
    "Rprop": [{"etas": (0.4, 1.3), "step_sizes": (1e-5, 1.0)}],
    "Adafactor": [{"eps": (1e-4, 1e-2)}, {"eps": (None, 1e-2)}],
    "Muon": [{"ns_steps": 3, "nesterov": False}],
    "ASGD": [{"t0": 2}],
}


@pytest.mark.parametrize(("name", "settings"), [(name, settings) for name in TORCH for settings in [{}, *SETTINGS.get(name, [])]])
def test_a_class_steps_as_torchs_own(name: str, settings: dict[str, Any]) -> None:
    ours, theirs = models(bias=name != "Muon")
    train(ours, getattr(hn.optim, name)(ours.parameters(), **settings), 5)
    train(theirs, getattr(torch.optim, name)(theirs.parameters(), **settings), 5)
    assert difference(ours, theirs) < EXACT


@pytest.mark.parametrize("name", TORCH)
def test_arguments_are_those_of_torch(name: str) -> None:
    """Names, order and defaults; what torch says of how it computes, and of maximizing, comes by name."""
    ours = inspect.signature(getattr(hn.optim, name)).parameters
    theirs = inspect.signature(getattr(torch.optim, name)).parameters
    expected = {key: each.default for key, each in theirs.items() if key not in {*REFUSED, "maximize", "decoupled_weight_decay"} - {*ours}}
    by_position = [key for key, each in ours.items() if each.kind is each.POSITIONAL_OR_KEYWORD]
    assert by_position == [key for key in expected if key != "maximize"]
    assert {key: ours[key].default for key in by_position} == {key: expected[key] for key in by_position}
    assert ours["backend"].default == "auto"


def test_every_rule_has_a_class() -> None:
    covered = {cls._rule for cls in (getattr(hn.optim, name) for name in [*TORCH, *OWN])}
    learners = {hn.coherent_adam, hn.coin_betting, hn.erfi_tuner}  # which step no weights
    assert covered == {hn.get(name) for name in hn.names() if hn.get(name).__module__.startswith("hyperopt_nested.rules.")} - learners


@pytest.mark.parametrize("name", [*TORCH, *OWN])
def test_a_class_runs_learns_copies_and_says_what_it_is(name: str) -> None:
    cls = getattr(hn.optim, name)
    model = models(1, bias=False)[0]
    learns = name not in ("SGDHD", "AdamHD")
    optimizer = cls(model.named_parameters(), lr=learned_lr() if learns else 1e-2, backend="reference")
    train(model, optimizer, 3)
    assert re.match(rf"{name} \(\nrule: \w+\nbackend: reference\nlearned: lr=0\.\d+", repr(optimizer))
    assert [*optimizer.learned()] == ["lr"]
    assert re.search(r"\n    lr: .*\n", inspect.getdoc(cls))
    twin_model, twin = copy.deepcopy((model, optimizer))
    loaded_model, loaded = pickle.loads(pickle.dumps((model, optimizer)))
    new_model = models(1, bias=False)[0]
    new = cls(new_model.named_parameters(), lr=learned_lr() if learns else 1e-2, backend="reference")
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer)
    new_model.load_state_dict(saved["model"])
    new.load_state_dict(saved["optimizer"])
    for other_model, other in [(model, optimizer), (twin_model, twin), (loaded_model, loaded), (new_model, new)]:
        assert type(other) is cls
        train(other_model, other, 2, first=3)
        assert difference(other_model, model) == 0
        assert other.learned() == optimizer.learned()


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("name", ["SGD", "AdamW", "Rprop", "Adafactor"])
def test_groups_and_schedulers_work_as_in_torch(name: str, scheduled: bool) -> None:
    pair = []
    for module, model in zip((hn.optim, torch.optim), models(), strict=True):
        own: dict[str, Any] = {"lr": 0.2}
        own |= {"betas": (0.5, 0.6)} if name == "AdamW" else {"etas": (0.3, 1.4)} if name == "Rprop" else {"weight_decay": 0.3}
        groups = [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters()), **own}]
        optimizer = getattr(module, name)(groups, lr=0.1)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step) if scheduled else None
        train(model, optimizer, 3, scheduler)
        optimizer.param_groups[0]["lr"] = 0.05
        for key, value in (("betas", (0.7, 0.8)), ("etas", (0.2, 1.1))):
            if key in optimizer.param_groups[0]:
                optimizer.param_groups[0][key] = value
        train(model, optimizer, 3, first=3)
        pair.append(model)
    assert difference(*pair) < EXACT


def test_a_learned_rate_is_scaled_by_a_schedule() -> None:
    model = models(1)[0]
    optimizer = hn.optim.AdamW(model.parameters(), lr=hn.learn(0.1, by=hn.sgd(lr=0.0)), betas=(hn.learn(0.9, by=hn.sgd(lr=1e-3)), 0.99))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    train(model, optimizer, 2, scheduler)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.025)
    assert optimizer.learned()["lr"] == pytest.approx(0.025)
    assert [*optimizer.learned()] == ["lr", "beta1"]


class Own(hn.optim.DropIn, rule=hn.lion):
    """A class of one's own."""


class Derived(hn.optim.AdamW):
    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr, (0.5, 0.5))


def test_classes_of_ones_own() -> None:
    model = models(1)[0]
    assert Own.__doc__ == "A class of one's own."
    assert [*inspect.signature(Own).parameters][:4] == ["params", "lr", "betas", "weight_decay"]
    own = pickle.loads(pickle.dumps(Own(model.parameters(), 0.1, (0.5, 0.6))))
    assert own.param_groups[0]["betas"] == (0.5, 0.6)
    assert copy.deepcopy(Derived(model.parameters(), 0.1)).param_groups[0]["betas"] == (0.5, 0.5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        *[
            (lambda p, key=key: hn.optim.AdamW(p, **{key: True}), f"AdamW has no argument {key!r} (given True): leave it out")
            for key in REFUSED
        ],
        (lambda p: hn.optim.SGD(p, fused=True), "say what runs the steps: backend='fused'"),
        (lambda p: hn.optim.SGD(p, foreach=False), "say what runs the steps: backend='foreach'"),
        (lambda p: hn.optim.NAdam(p, amsgrad=True), "leave it out; hn.optim.Adam and hn.optim.AdamW have it"),
        (lambda p: hn.optim.Adam(p, decoupled_weight_decay=True), "hn.optim.AdamW decouples the decay"),
        (lambda p: hn.optim.AdamW(p, learning_rate=0.1), "AdamW has no argument 'learning_rate' (given 0.1): it is called lr"),
        (lambda p: hn.optim.AdamW(p, lrr=0.1), "AdamW has no argument 'lrr' (given 0.1): did you mean 'lr'?"),
        (lambda p: hn.optim.AdamW(p, beta1=0.1), "did you mean 'betas'?"),
        (lambda p: hn.optim.Lion(p, xyz=0.1), "it has params, lr, betas, weight_decay, maximize"),
        (lambda p: hn.optim.AdamW(p, 0.1, lr=0.1), "AdamW: lr is given by position and by name"),
        (
            lambda p: hn.optim.Lion(p, 0.1, (0.9, 0.9), 0.1, 7),
            "Lion takes params, lr, betas, weight_decay by position, and no 7 after them",
        ),
        (lambda p: hn.optim.AdamW(p, betas=0.9), "betas=0.9 (float) must be 2 numbers, one each for beta1, beta2"),
        (lambda p: hn.optim.AdamW(p, lr="x"), "lr='x' (str) must be a number, or learn("),
    ],
)
def test_mistakes_in_a_class_are_explained(make: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(TypeError, match=re.escape(message)):
        make(models(1)[0].parameters())


def test_domains_of_a_class_are_checked() -> None:
    with pytest.raises(ValueError, match=re.escape("etas=(0.5,) must be 2 numbers")):
        hn.optim.Rprop(models(1)[0].parameters(), etas=(0.5,))  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=re.escape("a group gives step_sizes=(0.5,), which must be 2 numbers: step_size_min, step_size_max")
    ):
        hn.optim.Rprop([{"params": models(1)[0].parameters(), "step_sizes": (0.5,)}])
    with pytest.raises(ValueError, match="lr=-1 is outside its domain"):
        hn.optim.SGD(models(1)[0].parameters(), -1)


def two_groups(**settings: Any) -> hn.HyperOptimizer:
    model = models(1)[0]
    names = [f"{name}" for name, _ in model.named_parameters()]
    tensors = dict(zip(names, model.parameters(), strict=True))
    groups = [{"params": [(name, p) for name, p in tensors.items() if name[0] == layer]} for layer in "02"]
    groups[1] |= settings
    return hn.HyperOptimizer(groups, hn.adamw(lr=learned_lr(0.1), weight_decay=hn.learn(0.1, by=hn.sgd(lr=1e-4), per="tensor")))


DECAYS = {f"weight_decay/{name}": 0.1 for name in ("0.weight", "0.bias", "2.weight", "2.bias")}


@pytest.mark.parametrize(
    ("settings", "rates"),
    [
        ({}, {"lr": 0.1}),
        ({"lr": 0.05}, {"lr/group 0": 0.1, "lr/group 1": 0.05}),
        ({"lr": learned_lr(0.2)}, {"lr/group 0": 0.1, "lr/group 1": 0.2}),
    ],
)
def test_learned_values_have_one_name_each(settings: dict[str, Any], rates: dict[str, float]) -> None:
    optimizer = two_groups(**settings)
    assert optimizer.learned() == {**rates, **DECAYS}
    for name, value in optimizer.learned().items():
        optimizer.set_hyper(name, value)
    assert optimizer.learned() == {**rates, **DECAYS}
    for name in rates:
        optimizer.set_hyper(name, 0.4)
        assert optimizer.learned()[name] == 0.4


def test_rows_are_shown_by_their_mean_and_towers_by_their_path() -> None:
    model = models(1)[0]
    tower = hn.learn(0.1, by=hn.sgd(lr=hn.learn(1e-4, by=hn.sgd(lr=1e-9))), per="row")
    optimizer = hn.HyperOptimizer(model.named_parameters(), hn.sgd(lr=tower))
    train(model, optimizer, 3)
    rates = optimizer.hypers()["lr"]
    assert optimizer.learned()["lr/0.weight"] == pytest.approx(float(rates["0.weight"].mean()))
    optimizer.set_hyper("lr", 0.3)
    optimizer.set_hyper("lr.lr", 1e-3)
    found = optimizer.learned()
    assert {name: value for name, value in found.items() if name.startswith("lr/")} == dict.fromkeys((f"lr/{name}" for name in rates), 0.3)
    assert {value for name, value in found.items() if name.startswith("lr.lr")} == {1e-3}


@pytest.mark.parametrize("backend", ["reference", "foreach", "fused"])
@pytest.mark.parametrize("memory", ["auto", "kept", "forward", "reverse"])
def test_a_value_that_is_set_is_used(backend: Any, memory: Any) -> None:
    """Setting a value to what it is changes nothing; another value is what the next step takes."""
    plain, same, other = (models(1)[0] for _ in range(3))
    found = []
    for model, value in ((plain, None), (same, "same"), (other, 0.0)):
        optimizer = hn.HyperOptimizer(model.named_parameters(), hn.sgd(lr=learned_lr(0.1)), backend=backend, horizon=hn.OneStep(memory))
        train(model, optimizer, 3)
        before = copy.deepcopy(model)
        if value is not None:
            optimizer.set_hyper("lr", optimizer.learned()["lr"] if value == "same" else value)
        train(model, optimizer, 2, first=3)
        found.append((difference(model, before), optimizer.learned()["lr"]))
    assert difference(plain, same) == 0
    assert found[0] == found[1]
    assert found[2][0] < 0.01 * found[0][0]
    assert found[2][1] < 0.01


def test_numbers_of_groups_are_set() -> None:
    optimizer = two_groups()
    optimizer.set_hyper("eps", 1e-3)
    optimizer.set_hyper("beta2/group 1", 0.5)
    assert [group["eps"] for group in optimizer.param_groups] == [1e-3, 1e-3]
    assert [group["betas"] for group in optimizer.param_groups] == [(0.9, 0.999), (0.9, 0.5)]


def test_a_tensor_in_the_place_of_a_number_stays_and_holds_the_value() -> None:
    rate, model = torch.tensor(0.1), models(1)[0]
    optimizer = hn.HyperOptimizer(model.named_parameters(), hn.sgd())
    optimizer.param_groups[0]["lr"] = rate
    optimizer.set_hyper("lr", 0.3)
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == 0.3


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("lrr", 0.1, ValueError, "there is no hyper 'lrr' to set; did you mean lr"),
        (3, 0.1, ValueError, "there is no hyper 3 to set"),
        ("lr/group 7", 0.1, ValueError, "there is no hyper 'lr/group 7' to set; did you mean lr/group 1, lr/group 0"),
        (
            "lr",
            0.2,
            ValueError,
            "lr=0.2: parameter groups with different numbers share this learned value: set one of lr/group 0, lr/group 1",
        ),
        ("lr/group 1", -1.0, ValueError, "lr/group 1=-1.0 is outside its domain NonNegative"),
        ("weight_decay", float("nan"), ValueError, "is outside its domain NonNegative"),
        ("weight_decay/0.bias", "x", TypeError, "weight_decay/0.bias='x' (str) must be a number"),
        ("beta1", 1.0, ValueError, "beta1/group 0=1.0 is outside its domain UnitInterval"),
    ],
)
def test_a_value_is_checked_before_anything_changes(name: Any, value: Any, error: type[Exception], message: str) -> None:
    optimizer = two_groups(lr=0.05)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(error, match=re.escape(message)):
        optimizer.set_hyper(name, value)
    assert str(optimizer.state_dict()) == str(before)


def test_bounds_and_a_scale_of_zero_are_respected() -> None:
    model = models(1)[0]
    optimizer = hn.optim.SGD(model.parameters(), lr=hn.learn(0.1, by=hn.sgd(lr=1e-4), bounds=(0.01, 0.2)))
    with pytest.raises(ValueError, match=re.escape("lr=0.3 is outside bounds=(0.01, 0.2) of its learn(...)")):
        optimizer.set_hyper("lr", 0.3)
    optimizer.param_groups[0]["lr"] = 0.0
    with pytest.raises(ValueError, match="its parameter group holds 0 for it"):
        optimizer.set_hyper("lr", 0.1)


def test_repr_lists_a_few_values() -> None:
    assert "learned: lr=0.1, weight_decay/0.weight=0.1, " in repr(two_groups())
    many = hn.optim.SGD([torch.nn.Parameter(torch.ones(2)) for _ in range(12)], lr=hn.learn(0.1, by=hn.sgd(), per="tensor"))
    assert re.search(r"learned: lr/0\.0=0\.1, .*, and 4 more\n", repr(many))
    assert "learned: nothing\n" in repr(hn.optim.SGD(models(1)[0].parameters()))


@pytest.mark.parametrize(
    "made",
    [
        hn.sgd(0.1),
        hn.sgd(lr=0.1),
        hn.adamw(betas=(0.8, 0.9)).replace(lr=0.1),
        hn.sgd(hn.learn(0.1, hn.sgd(1e-5))),
    ],
    ids=str,
)
def test_short_calls_work(made: hn.Optimizer) -> None:
    assert made.declared["lr"] == 0.1


@pytest.mark.parametrize(
    ("call", "names"),
    [
        ("hn.adamw", ["lr", "beta1", "beta2", "eps", "weight_decay", "amsgrad", "maximize"]),
        ("hn.sgd", ["lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize"]),
        ("hn.rules.lion", ["lr", "beta1", "beta2", "weight_decay", "maximize"]),
        (
            "hn.project",
            ["optimizer", "radius", "onto", "saturation", "relative", "anchor_decay", "anchor", "anchor_dtype", "anchor_device"],
        ),
        ("hn.learn", ["value", "by", "per", "grad", "bounds", "via", "scheduled_by", "delayed"]),
        ("hn.sgd_hd", ["lr", "hyper_lr", "settings"]),
        ("hn.optim.AdamW", ["params", "lr", "betas", "eps", "weight_decay", "amsgrad", "maximize"]),
        ("hn.optim.SGD", ["params", "lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize"]),
        ("hn.optim.Lion", ["params", "lr", "betas", "weight_decay", "maximize"]),
    ],
)
def test_editors_complete_the_arguments(call: str, names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jedi.settings, "cache_directory", str(tmp_path))  # the user's may be written by another process now
    value = eval(call)
    assert [*inspect.signature(value).parameters][: len(names)] == names
    if torch.__version__ >= "2.12" or not hasattr(value, "hypers"):  # see Definition.__get__
        assert names[-1] in pydoc.render_doc(value)
    code = f"import hyperopt_nested as hn\n{call}("
    (found,) = jedi.Script(code, project=jedi.Project(ROOT)).get_signatures()
    assert [each.name for each in found.params][: len(names)] == names
    completions = [each.name for each in jedi.Script(code, project=jedi.Project(ROOT)).complete()]
    assert {f"{name}=" for name in names} - {*completions} <= {"optimizer=", "settings="}  # which have no keyword


def test_stubs_are_up_to_date() -> None:
    for path, text in stubs.stubs().items():
        assert path.read_text() == text, f"{path} is not what `make stubs` makes"


RIGHT = """
import torch
import hyperopt_nested as hn

model = torch.nn.Linear(3, 2)
lr = hn.learn(1e-3, hn.sgd(1e-5), per="tensor")
rule = hn.adamw(lr=lr, betas=(0.9, lr), weight_decay=0.1, maximize=True)
also = hn.clip_by_norm(hn.sgd(0.1, momentum=lr), max_norm=1.0)
opt: torch.optim.Optimizer = hn.HyperOptimizer(model.named_parameters(), hn.project(rule, radius=1.0), backend="auto")
adamw = hn.optim.AdamW(model.parameters(), 1e-3, (0.9, lr), weight_decay=lr, backend="fused")
groups = hn.optim.SGD([{"params": [model.weight], "lr": 0.1}, {"params": [model.bias]}], lr=0.1, nesterov=False)
rates: dict[str, float] = adamw.learned()
adamw.set_hyper("lr", 0.1)
one: hn.typing.Rule = hn.adamw
per: hn.typing.Per = "row"

@hn.rule(hn.rules.zeros("average"), separable="element")
def averaged(
    param: torch.Tensor,
    grad: torch.Tensor,
    state: hn.typing.State,
    *,
    lr: torch.Tensor = hn.Positive(1e-4),
    beta: torch.Tensor = hn.UnitInterval(0.9),
) -> tuple[torch.Tensor, hn.typing.State]:
    average = beta * state["average"] + (1 - beta) * grad
    return param - lr * average, {"average": average}

class Averaged(hn.optim.DropIn, rule=averaged): ...

own = Averaged(model.parameters(), lr=0.1)
nested = hn.Nested(averaged(0.1))
"""
MISTAKES = {
    "hn.adamw(lrr=1e-3)": "call-arg",
    'hn.adamw(lr="fast")': "arg-type",
    "hn.sgd(0.1, 0.9)": "call-arg",
    "hn.adamw(betas=0.9)": "arg-type",
    'hn.learn("x", hn.sgd(0.1))': "arg-type",
    "hn.learn(0.1, by=torch.optim.SGD)": "arg-type",
    'hn.learn(0.1, hn.sgd(0.1), per="layer")': "arg-type",
    "hn.optim.AdamW(model.parameters(), learning_rate=0.1)": "call-arg",
    "hn.optim.AdamW(model.parameters(), betas=(0.9, 0.9, 0.9))": "arg-type",
    'hn.optim.SGD(model.parameters(), backend="cuda")': "arg-type",
    "hn.optim.SGD(model.parameters(), fused=True)": "call-arg",
    "hn.optim.SGD(model)": "arg-type",
    'hn.project(hn.sgd(0.1), anchor="middle")': "arg-type",
    'hn.optim.SGD(model.parameters()).set_hyper("lr", "high")': "arg-type",
    "hn.HyperOptimizer(model.parameters(), hn.sgd)": "arg-type",
}


def test_mypy_accepts_the_right_script_and_finds_each_mistake(tmp_path: Path) -> None:
    lines = RIGHT.splitlines()
    script = tmp_path / "script.py"
    script.write_text("\n".join([*lines, *MISTAKES]) + "\n")
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--hide-error-context", str(script)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout
    errors = re.findall(r"script\.py:(\d+): error: .*\[(\S+)\]$", found, re.MULTILINE)  # its cache may know another folder
    assert {int(line): code for line, code in errors} == {len(lines) + i: code for i, code in enumerate(MISTAKES.values(), start=1)}, found


def test_the_package_ships_its_types() -> None:
    assert (ROOT / "hyperopt_nested" / "py.typed").is_file()
