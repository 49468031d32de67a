"""`ftp.finetune` on a tiny problem: what each method does to the weights, and what a run leaves alone."""

import dataclasses
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

import ftp
from ftp.finetuning import METHODS, Progress, Result
from ftp.finetuning.batches import Batches, split
from ftp.finetuning.phases import phases, schedule

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(96, 6, generator=GENERATOR)
Y = (X[:, :2].sum(1) > 0).long() + (X[:, 2] > 1).long()
TRAIN, VALIDATION, TEST = (X[:48], Y[:48]), (X[48:72], Y[48:72]), (X[72:], Y[72:])


@pytest.fixture(autouse=True)
def _float32(_float64_and_seed: None) -> None:
    torch.set_default_dtype(torch.float32)


def network(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3))


def tune(model: nn.Module, train: Any = TRAIN, validation: Any = VALIDATION, **settings: Any) -> Result:
    how = {"head": "4.*", "lr": 1e-2, "epochs": 4, "batch_size": 8, **settings}
    return ftp.finetune(model, train, validation, **how)


def distance(model: nn.Sequential) -> float:
    return math.dist(*(torch.cat([p.detach().flatten() for p in m[0].parameters()]).tolist() for m in (model, network())))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns(method: str, optimizer: str) -> None:
    model = network()
    result = tune(model, method=method, optimizer=optimizer, lr={"adamw": 1e-2, "sgd": 3e-2}[optimizer], epochs=8, tests={"test": TEST})
    best = max(entry.validation_accuracy for entry in result.epochs)
    assert best > result.epochs[0].validation_accuracy + 0.1
    assert list(result.evaluations) == ["validation", "test"]
    assert [entry.epoch for entry in result.epochs] == list(range(9))
    if METHODS[method].share is None and METHODS[method].beside_each == "epoch":  # others change the best weights
        assert result.evaluations["validation"].accuracy == best
    predictions = model.eval()(TEST[0]).argmax(1)
    assert torch.equal(result.evaluations["test"].predictions, predictions)
    assert result.evaluations["test"].accuracy == (predictions == TEST[1]).double().mean()
    assert (distance(model) == 0) == (method == "linear-probe") or method == "lp-ft"  # whose best epoch may be one of the probe


def test_ftp_is_adamp_in_a_loop_of_ones_own() -> None:
    model, own = network(), network()
    result = tune(model, epochs=3, warmup=0.0)
    groups = [{"params": [*own.named_parameters()][:4], "lr": 1e-2}, {"params": [*own.named_parameters()][4:], "lr": 1e-1}]
    optimizer = ftp.AdamP(groups, exclude="4.*")
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 18)
    scores, best = [], {}
    stream = Batches(TRAIN, 8).endless(0)
    for step in range(18):
        own.train()
        own[1].eval()
        optimizer.zero_grad()
        x, y = next(stream)
        F.cross_entropy(own(x), y).backward()
        optimizer.step()
        scheduler.step()
        if step % 6 == 5:
            logits = own.eval()(VALIDATION[0]).detach()
            score = (float((logits.argmax(1) == VALIDATION[1]).double().mean()), -float(F.cross_entropy(logits, VALIDATION[1])))
            if not scores or score > max(scores):
                best = {name: value.clone() for name, value in own.state_dict().items()}
            scores.append(score)
    assert [entry.validation_accuracy for entry in result.epochs[1:]] == [accuracy for accuracy, _ in scores]
    torch.testing.assert_close(model.state_dict(), best)
    assert result.epochs[-1].radii == pytest.approx(optimizer.learned(), rel=1e-4)
    moved = {name: (p - q).norm().item() for (name, p), q in zip(own.named_parameters(), network().parameters(), strict=True)}
    assert result.epochs[-1].distances == pytest.approx({name: moved[name] for name in list(moved)[:4]}, rel=1e-4)


def test_wise_ft_is_part_of_the_way_to_full_fine_tuning() -> None:
    start, full, wise = network(), network(), network()
    tune(full, method="full")
    tune(wise, method="wise-ft", strength=0.25)
    for (name, p), q, r in zip(start.named_parameters(), full.parameters(), wise.parameters(), strict=True):
        torch.testing.assert_close(r, q if name.startswith("4.") else p + 0.25 * (q - p))


@pytest.mark.parametrize(("method", "strength"), [("l2-sp", 10.0), ("ftp", 1.0), ("spd", 10.0)])
def test_a_strong_method_stays_nearer_than_full_fine_tuning(method: str, strength: float) -> None:
    full, held = network(), network()
    tune(full, method="full")
    tune(held, method=method, strength=strength)
    assert 0 < distance(held) < distance(full)


def test_lp_ft_leaves_the_backbone_alone_for_half_of_the_steps() -> None:
    result = tune(network(), method="lp-ft", epochs=4)
    assert [sum(entry.distances.values()) > 0 for entry in result.epochs] == [False, False, False, True, True]
    assert [(phase.first, phase.end) for phase in phases(("head", "all"), 5)] == [(0, 2), (2, 5)]


def test_tpgm_and_learned_wise_ft_train_without_what_they_learn_from() -> None:
    for method in ("tpgm", "learned-wise-ft", "ftp"):
        seen: dict[bool, set[float]] = {True: set(), False: set()}
        model = network()
        handle = model[0].register_forward_pre_hook(lambda module, x, seen=seen: seen[module.training].update(x[0][:, 0].tolist()))
        result = tune(model, method=method, epochs=6)
        handle.remove()
        own = set(TRAIN[0][:, 0].tolist())
        if method == "ftp":
            assert seen[True] == own
            assert not seen[False] & own
        else:
            assert seen[True] | (seen[False] & own) == own
            assert len(seen[True]) == 38
            assert not seen[True] & seen[False]
            assert any(result.epochs[-1].radii)
        assert result.epochs[-1].step == 36  # as many as of methods that hold nothing out


def test_a_seed_decides_everything_and_nothing_global_changes() -> None:
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(runs))
        model = network(dropout=0.5)
        torch.manual_seed(len(runs))
        before = torch.get_rng_state()
        result = tune(model, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        runs.append((model, [dataclasses.replace(entry, seconds=0.0) for entry in result.epochs]))
    assert repr(runs[0][1]) == repr(runs[1][1]) != repr(runs[2][1])
    torch.testing.assert_close(runs[0][0].state_dict(), runs[1][0].state_dict(), rtol=0, atol=0)


def test_modes_and_flags_are_left_as_they_were() -> None:
    model = network().eval()
    model[2].train()
    model[0].bias.requires_grad_(False)
    before = model[0].bias.clone()
    tune(model, method="lp-ft")
    assert [module.training for module in model] == [False, False, True, False, False]
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True, True, True]
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(model[0].bias, before)


def test_statistics_of_batch_normalization_move_only_if_they_may() -> None:
    for frozen in (True, False):
        model = network()
        tune(model, freeze_norm=frozen)
        assert (model[1].num_batches_tracked > 0) != frozen


class Pairs(Dataset[Any]):
    """Examples one by one."""

    def __init__(self, noise: float = 0.0) -> None:
        self.noise = noise

    def __len__(self) -> int:
        return len(TRAIN[0])

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return TRAIN[0][i] + self.noise * torch.randn(6), TRAIN[1][i]


def test_all_kinds_of_data_give_the_same() -> None:
    weights = []
    for train in (TRAIN, TensorDataset(*TRAIN), Subset(TensorDataset(X, Y), range(48)), Pairs()):
        model = network()
        tune(model, train)
        weights.append(model.state_dict())
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], rtol=0, atol=0)
    model = network()
    tune(model, DataLoader(TensorDataset(*TRAIN), batch_size=8, shuffle=True), DataLoader(TensorDataset(*VALIDATION), batch_size=5))
    assert distance(model) > 0


@pytest.mark.parametrize("data", [TRAIN, Pairs(noise=1.0), DataLoader(Pairs(noise=1.0), batch_size=8, shuffle=True)])
def test_batches_are_the_same_wherever_one_begins(data: Any) -> None:
    batches, generator = Batches(data, 8), iter(range(10**9))
    first = [next(stream) for stream in [batches.endless(3)] for _ in range(14)]
    for start in (0, 4, 6, 13):
        torch.manual_seed(next(generator))
        stream = batches.endless(3, start)
        for x, y in first[start:]:
            again = next(stream)
            torch.rand(5)  # dropout
            assert torch.equal(again[0], x)
            assert torch.equal(again[1], y)


def test_a_batch_in_other_processes_is_the_same() -> None:
    stream, own = Batches(Pairs(noise=1.0), 8, workers=1).endless(3, 2), Batches(Pairs(noise=1.0), 8).endless(3, 2)
    assert all(torch.equal(next(stream)[0], next(own)[0]) for _ in range(4))


@pytest.mark.parametrize("data", [TRAIN, TensorDataset(*TRAIN), DataLoader(TensorDataset(*TRAIN), batch_size=10, shuffle=True)])
def test_split_parts_the_examples(data: Any) -> None:
    parts = [torch.cat([x for x, _ in Batches(part, 7).in_order()])[:, 0].tolist() for part in split(data, 0.25, 0)]
    assert [len(part) for part in parts] == [36, 12]
    assert set(parts[0]) | set(parts[1]) == set(TRAIN[0][:, 0].tolist())


def test_epochs_may_be_of_any_number_of_steps() -> None:
    result = tune(network(), epochs=2, steps_per_epoch=10)
    assert [entry.step for entry in result.epochs] == [0, 10, 20]
    assert result.settings["steps_per_epoch"] == 10


def test_training_stops_early() -> None:
    result = tune(network(), lr=1e-9, head_lr=1e-9, epochs=20, patience=3, freeze_norm=False)
    best = max(result.epochs, key=lambda entry: (entry.validation_accuracy, -entry.validation_loss))
    assert len(result.epochs) <= 20
    assert result.epochs[-1].epoch == best.epoch + 3
    assert result.stopped == f"no better epoch than {best.epoch} in the last 3"


def test_a_loss_that_is_not_finite_stops_training_with_the_weights_before() -> None:
    model = network()
    x = TRAIN[0].clone()
    x[5] = math.nan
    with pytest.warns(UserWarning, match=r"not finite in epoch 1: training stops, and the weights are those of epoch 0"):
        result = tune(model, (x, TRAIN[1]))
    assert result.stopped == "the loss is not finite in epoch 1"
    torch.testing.assert_close(model.state_dict(), network().state_dict(), rtol=0, atol=0)
    with torch.no_grad():
        model[0].bias.fill_(math.nan)
    with pytest.raises(ValueError, match="nan before training: look at the weights"):
        tune(model)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_learns(precision: str) -> None:
    result = tune(network(), precision=precision, method="ftp")
    assert result.epochs[-1].train_loss < result.epochs[1].train_loss
    assert network()[0].weight.dtype == torch.float32


def test_learning_rates_rise_and_fall() -> None:
    rates = [schedule(step, 20, 0.25) for step in range(20)]
    assert rates[:5] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert all(0 < later < earlier for earlier, later in pairwise(rates[5:]))


def test_progress_tells_every_step_and_evaluation() -> None:
    seen: list[Progress] = []
    tune(network(), progress=seen.append, tests={"test": TEST})
    assert [(each.step, each.evaluating) for each in seen] == [*((i, "") for i in range(1, 25)), (24, "validation"), (24, "test")]
    assert {each.steps for each in seen} == {24}
    assert [each.epoch.epoch for each in seen[:24:6]] == [0, 1, 2, 3]


def test_what_is_excluded_has_no_anchor_and_trains_as_the_backbone() -> None:
    result = tune(network(), exclude="1.*", method="wise-ft", strength=0.0)
    assert set(result.epochs[-1].distances) == {"0.weight", "0.bias"}
    model = network()
    tune(model, exclude="1.*", method="wise-ft", strength=0.0)
    assert torch.equal(model[0].weight, network()[0].weight)
    assert not torch.equal(model[1].weight, network()[1].weight)


def test_histories_name_what_was_learned() -> None:
    result = tune(network(), method="digrap")
    assert set(result.epochs[-1].radii) == {f"strength/{name}" for name in result.epochs[-1].distances}
    assert result.epochs[0].radii == {}
    assert math.isnan(result.epochs[0].train_loss)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "ftpp"}, "method='ftpp' must be one of full, linear-probe"),
        ({"optimizer": "adam"}, "optimizer='adam' must be one of adamw, sgd"),
        ({"precision": "half"}, "precision='half' must be one of float32, bfloat16, float16"),
        ({"lr": -1}, "lr=-1 must be at least 0"),
        ({"lr": math.nan}, "lr=nan must be at least 0"),
        ({"strength": 2.0}, r"strength=2.0 must be in \[0, 1\]"),
        ({"method": "full", "strength": 1.0}, "the method 'full' has none"),
        ({"epochs": 0}, "epochs=0 must be at least 1"),
        ({"warmup": 2}, r"warmup=2 must be in \[0, 1\]"),
        ({"momentum": 1.0}, "momentum=1.0 must be less than 1"),
        ({"head": "5.*"}, "head: '5.*' matches none of the 6 parameters"),
        ({"exclude": "5.*"}, "exclude: '5.*' matches none of the 6 parameters"),
        ({"head": (), "method": "linear-probe"}, "trains the head alone, and there is none"),
        ({"train": (X[:0], Y[:0])}, "there are no examples"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tune(network(), **settings)
    with pytest.raises(TypeError, match=r"epochs=2\.5 \(float\) must be a whole number"):
        tune(network(), epochs=2.5)


def test_running_statistics_of_a_backbone_that_does_not_train_stay() -> None:
    model, start = network(), network()
    tune(model, method="linear-probe", freeze_norm=False)
    assert torch.equal(model[1].running_mean, start[1].running_mean)


@pytest.mark.parametrize(("share", "stays"), [(0.0, True), (1.0, False)])
def test_wise_ft_interpolates_running_statistics(share: float, stays: bool) -> None:
    model, start = network(), network()
    tune(model, method="wise-ft", strength=share, freeze_norm=False)
    assert torch.equal(model[1].running_mean, start[1].running_mean) == stays
    assert torch.equal(model[0].weight, start[0].weight) == stays
