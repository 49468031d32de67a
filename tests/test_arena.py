"""The arena: a batched run is what a user's loop does, finished runs are rows, an interrupted run goes on, tables follow from rows."""

from pathlib import Path

import pytest
import torch

import hyperopt_nested as hn
from benchmarks.arena import __main__ as command
from benchmarks.arena.arms import ARMS, BASES, STARTS
from benchmarks.arena.runs import Cell, groups, perform
from benchmarks.arena.tables import judged, tuned
from benchmarks.arena.tasks import TASKS
from benchmarks.reproduce.rows import Rows

STEPS = 12


@pytest.fixture(autouse=True)
def _float32() -> None:
    torch.set_default_dtype(torch.float32)


def cells(arm: str, rate: float) -> tuple[Cell, ...]:
    return tuple(Cell("logistic", "adamw", arm, rate, seed) for seed in (0, 1))


def by_hand(opt: hn.HyperOptimizer, params: dict[str, torch.nn.Parameter]) -> float:
    task = TASKS["logistic"]
    train, validation = task.data()
    for _ in range(STEPS):
        opt.zero_grad()
        task.loss(dict(params), train).backward()
        opt.step()
    return float(task.loss(dict(params), validation).detach())


@pytest.mark.parametrize("arm", ["learn", "learn, total_steps", "constant"])
def test_a_batched_run_is_the_users(arm: str) -> None:
    found = perform(cells(arm, 1e-2), STEPS)
    for seed, numbers in enumerate(found):
        params = {name: torch.nn.Parameter(value) for name, value in TASKS["logistic"].init(seed).items()}
        lr = 1e-2 if arm == "constant" else hn.learn(1e-2)
        total = STEPS if arm == "learn, total_steps" else None
        opt = hn.optim.AdamW(list(params.items()), lr=lr, total_steps=total, backend="reference")
        assert abs(by_hand(opt, params) - float(str(numbers["loss_1"]))) < 1e-5
        assert float(str(numbers["loss_0"])) > float(str(numbers["loss_1"]))


def test_schedules_warm_up_for_a_twentieth_and_fall_to_zero() -> None:
    for arm in ("linear", "cosine", "D-Adaptation, linear", "Mechanic, linear", "Prodigy, cosine"):
        found = [ARMS[arm].shape(step, 40) for step in (0, 1, 20, 39)]
        assert found == pytest.approx([0.5, 1, 0.5, 0], abs=1e-6), arm


@pytest.mark.parametrize("arm", [arm for arm in ARMS if not arm.startswith("learn")])
def test_every_arm_runs(arm: str) -> None:
    rate = list(ARMS[arm].rates_of("adamw"))[2 if len(ARMS[arm].rates_of("adamw")) > 2 else 0]
    (numbers,) = perform((Cell("quadratic", "adamw", arm, rate, 0),), 3)
    assert 0 < float(str(numbers["loss_1"])) < 2 * float(str(numbers["loss_0"]))


@pytest.mark.parametrize("base", BASES)
def test_every_base_runs_with_one_learned_rate(base: str) -> None:
    """On matrices and vectors, as by a function that chooses the optimizer of a tensor."""
    (numbers,) = perform((Cell("gpt", base, "learn", 1e-3, 0),), 3)
    task, rate = TASKS["gpt"], hn.learn(1e-3)
    params = {name: torch.nn.Parameter(value) for name, value in task.init(0).items()}
    sets = [[(name, p) for name, p in params.items() if (p.ndim == 2) == matrices] for matrices in (True, False)]
    opt = hn.HyperOptimizer([{"params": each} for each in sets], lambda _, p: BASES[base].rule_of(p.shape)(rate), backend="reference")
    (train,), _ = task.data()
    for index in task.batches(0, 3):
        opt.zero_grad()
        task.loss(dict(params), (train[index],)).backward()
        opt.step()
    assert float(str(numbers["rate_at_end"])) == pytest.approx(opt.learned()["lr"], rel=1e-3)
    assert opt.learned().keys() == {"lr"}


def test_a_stopped_arena_goes_on_and_its_tables_follow_from_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = list(groups(["quadratic"], ["adamw"], ["constant", "learn"], 2))
    assert len(planned) == 1 + len(STARTS)
    rows = Rows(tmp_path, Cell)
    command.work(rows, iter(planned[:2]), steps=STEPS)
    count = len(rows.of("quadratic"))
    again = Rows(tmp_path, Cell)
    done: list[object] = []
    monkeypatch.setattr(command, "perform", lambda group, steps, device: done.append(group) or perform(group, steps, device))
    command.work(again, iter(planned), steps=STEPS)
    assert len(done) == len(planned) - 2
    assert len(again.of("quadratic")) == count + 2 * (len(planned) - 2) == 2 * (len(BASES["adamw"].grid) + len(STARTS))
    command.main(["--tables", "--out", str(tmp_path)])
    page = (tmp_path / "index.md").read_text()
    best = tuned({0.1: {"0": 3.0, "1": 1.0}, 0.2: {"0": 1.0, "1": 1.5}, 0.3: {"0": float("inf"), "1": 0.0}})
    assert best == (0.2, {"0": 1.0, "1": 1.5})
    assert "\n".join(judged(again, ["quadratic"], "adamw", "learn", ["constant"])) in page
    assert (tmp_path / "start.png").stat().st_size > 1000
