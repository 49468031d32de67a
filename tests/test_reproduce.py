"""The harness of the evidence, on synthetic images: runs are rows, an interrupted study goes on, tables follow from rows."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.pool import alone
from benchmarks.reproduce import __main__ as command
from benchmarks.reproduce import data, emoji, fine_tune, networks, plan, tables, tasks
from benchmarks.reproduce.data import Examples, Package
from benchmarks.reproduce.plan import Scale
from benchmarks.reproduce.rows import Rows, Run
from benchmarks.reproduce.statistics import FAILS, HOLDS, NOISY, TRADE, answer, estimate

TINY = Scale((0,), (100,), (1e-3, 1e-2), 1, shorten=60, one_network=True, pretraining_steps=5, test_images=30)
VARY = ("seconds", "date")


def synthetic(part: str) -> Examples:
    """Ten blurred random pictures, one a digit, under noise."""
    generator = torch.Generator().manual_seed(0)
    pictures = torch.nn.functional.interpolate(torch.rand(10, 1, 5, 5, generator=generator), size=(28, 28))
    labels = torch.arange(10).repeat(300 if part == "train" else 20)
    return Examples((pictures[labels] + 0.1 * torch.randn(len(labels), 1, 28, 28, generator=generator)).clamp(0, 1), labels)


class Averages(torch.nn.Module):
    """A linear model of the mean color."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.head = torch.nn.Linear(3, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(images.mean((2, 3)))
        return logits


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("HYPEROPT_NESTED_DATA", str(tmp_path / "cache"))
    monkeypatch.setattr(data, "mnist", synthetic)
    monkeypatch.setattr(data, "uci", lambda: synthetic("t10k"))
    for method in set(plan.STRENGTHS) - {"full", "ftp"}:
        monkeypatch.delitem(plan.STRENGTHS, method)
    monkeypatch.setitem(plan.STUDIES, "near", plan._tuned("near", "near", "cnn"))
    entries = [{"category": category, "subcategory": f"{category} {i % 2}"} for category in (*emoji.OLD, *emoji.NEW) for i in range(60)]
    drawn = torch.rand(len(entries), 4, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    monkeypatch.setattr(emoji, "_list", lambda: entries)
    monkeypatch.setattr(emoji, "pictures", lambda vendor: drawn if vendor == "google" else 1 - drawn)
    monkeypatch.setattr(tasks, "VALIDATION_PER_CLASS", 20)
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    tasks.clear()


def numbers(rows: Rows, study: str) -> list[dict[str, str]]:
    return [{name: value for name, value in row.items() if name not in VARY} for row in rows.of(study)]


def test_an_interrupted_study_goes_on_where_it_stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole, parts = Rows(tmp_path / "whole"), Rows(tmp_path / "parts")
    command.work(whole, ["near"], TINY)
    assert [row["stage"] for row in whole.of("near")] == ["tune"] * 4 + ["test"] * 2

    done: list[Run] = []

    def interrupted(run: Run, scale: Scale, device: str) -> dict[str, object]:
        if len(done) in (2, 6):
            done.append(run)
            raise KeyboardInterrupt
        done.append(run)
        return fine_tune.perform(run, scale, device)

    monkeypatch.setattr(command, "perform", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            command.work(parts, ["near"], TINY)
        parts = Rows(tmp_path / "parts")
    command.work(parts, ["near"], TINY)
    assert numbers(Rows(tmp_path / "parts"), "near") == numbers(whole, "near")
    assert len(done) == 6 + 2  # of which two raised

    tables.write(whole)
    page = (tmp_path / "whole/index.md").read_text()
    assert "| FTP | 0." in page
    assert "better OOD at equal ID than Full fine-tuning (CNN, `near`) | better | OOD" in page
    assert "(U-Net, `outlines`) | better |  |  | not run" in page
    assert (tmp_path / "whole/near.svg").stat().st_size > 1000


def test_variants_are_compared_at_settings_of_the_study_without_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variant in set(plan.VARIANTS) - {"ftp-row"}:
        monkeypatch.delitem(plan.VARIANTS, variant)
    monkeypatch.setattr(plan, "RIVALS", ("full", "ftp"))
    monkeypatch.setitem(plan.STUDIES, "near-variants", plan._tuned("near-variants", "near", "cnn", variants=True))
    rows = Rows(tmp_path)
    command.work(rows, ["near", "near-variants"], TINY)
    assert [(row["stage"], row["method"]) for row in rows.of("near-variants")] == [
        ("tune", "ftp-row"), ("tune", "ftp-row"), ("test", "full"), ("test", "ftp"), ("test", "ftp-row"),
    ]  # fmt: skip
    one, other = (
        [{**row, "study": ""} for row in numbers(rows, study) if row["stage"] == "test" and row["method"] != "ftp-row"]
        for study in ("near", "near-variants")
    )
    assert one == other
    tables.write(rows)
    assert "| FTP, row | " in (tmp_path / "index.md").read_text()


def test_no_run_begins_after_the_end(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "rows")
    command.work(rows, ["near"], TINY, end=0.0)
    assert not rows.of("near")
    tables.write(rows)
    assert "Not run." in (tmp_path / "rows/index.md").read_text()


@pytest.mark.parametrize(
    ("study", "task", "network", "column"),
    [
        ("corruptions", "near", "vit", "fog/5"),
        ("continual", "far", "cnn", "forgetting"),
        ("outlines", "outlines", "unet", "photograph"),
        ("emoji", "emoji", "unet", "vendor"),
    ],
)
def test_other_runs(monkeypatch: pytest.MonkeyPatch, study: str, task: str, network: str, column: str) -> None:
    if study == "emoji":  # the network of the study is large
        monkeypatch.setitem(networks.NETWORKS, network, Averages)
    run = Run(study, "test", task, network, "full", "sgd", 0.1, None, 4, 5, 0)
    assert 0 <= float(str(fine_tune.perform(run, TINY)[column])) <= 100


def test_settings_that_were_not_searched_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="settings of l2-sp are those of the study 'near', which has no rows: run it before"):
        command.work(Rows(tmp_path), ["rates"], TINY)


def test_rows_survive_a_kill_while_they_are_written(tmp_path: Path) -> None:
    run = Run("near", "tune", "near", "cnn", "full", "adamw", 1e-3, None, 20, 300, 0)
    Rows(tmp_path).add(run, {"validation": "90.00"})
    (tmp_path / "near.part1").write_text("study,sta")
    rows = Rows(tmp_path)
    assert run in rows
    assert rows.of("near", stage="tune")[0]["validation"] == "90.00"


def test_a_fetched_file_is_checked(tmp_path: Path) -> None:
    package = Package("nothing@1", "nothing-1.tgz", "0" * 64)
    (data.cache() / package.file).write_bytes(b"other")
    with pytest.raises(RuntimeError, match="remove it, and it is fetched again"):
        package.fetch()


@pytest.mark.parametrize(
    ("inside", "outside", "expected"),
    [
        ([0.1, 0.2, 0.0, 0.1, 0.1], [2.0, 2.5, 1.8, 2.2, 2.1], HOLDS),
        ([-1.0, -1.2, -0.9, -1.1, -1.0], [2.0, 2.5, 1.8, 2.2, 2.1], TRADE),
        ([0.1, 0.2, 0.0, 0.1, 0.1], [-2.0, -2.5, -1.8, -2.2, -2.1], FAILS),
        ([0.1, 0.2, 0.0, 0.1, 0.1], [4.0, -2.5, 1.8, -2.2, 3.0], NOISY),
        ([0.1], [5.0], NOISY),
    ],
)
def test_answers(inside: list[float], outside: list[float], expected: str) -> None:
    assert answer(estimate(inside), estimate(outside)) == expected


def test_the_command_names_studies(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main(["nothing"])
    assert "there is no study 'nothing': choose from near, corruptions" in capsys.readouterr().err


def test_two_commands_do_not_add_rows_to_one_folder(tmp_path: Path) -> None:
    with alone(tmp_path), pytest.raises(SystemExit, match=f"another process adds rows to {tmp_path}: wait until it ends, or give another"):
        command.main(["--tables", "--out", str(tmp_path)])
    with alone(tmp_path):
        pass
