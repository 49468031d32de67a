"""The demo does what it says; which method wins is no business of a test."""

import dataclasses
import sys
from io import StringIO

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import hyperopt_nested as hn
from ftp import TPGM
from ftp.__main__ import main
from ftp.cli import app
from ftp.demo import data, methods, report, train, tune

TINY = train.Steps(pretrain=2, fine_tune=3)


@pytest.fixture(autouse=True)
def _float32():
    """The demo computes as torch does by default."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(scope="module")
def outcomes():
    return train.run([0], TINY)


def rows(examples):
    return {(*image.flatten().tolist(), label) for image, label in zip(examples.images, examples.labels.tolist(), strict=True)}


def test_the_parts_of_the_fine_tuning_digits_are_disjoint_and_complete():
    digits = data.fine_tuning(0)
    parts = [digits.train, digits.validation, digits.test]
    assert len(set().union(*map(rows, parts))) == sum(len(rows(part)) for part in parts)
    assert sum(len(part.labels) for part in parts) + len(data.pretraining().labels) == 1797
    assert digits.train.labels.bincount().tolist() == [10] * 5
    assert not rows(data.pretraining()) & set().union(*map(rows, parts))


def test_test_images_do_not_depend_on_the_seed_and_training_images_do():
    first, second = data.fine_tuning(0), data.fine_tuning(1)
    torch.testing.assert_close(first.test.images, second.test.images, rtol=0, atol=0)
    assert rows(first.train) != rows(second.train)


def test_labels_name_digits_0_to_4_and_5_to_9():
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    digit = {tuple(image / 16): label for image, label in zip(images, labels, strict=True)}
    for examples, first in ((data.pretraining(), 0), (data.fine_tuning(0).test, 5)):
        for image, label in zip(examples.images, examples.labels.tolist(), strict=True):
            assert digit[tuple(image.flatten().tolist())] == label + first


@pytest.mark.parametrize("name", data.SHIFTS)
def test_a_shift_changes_images_and_keeps_shape_and_range(name):
    images = data.pretraining().images[:50]
    shifted = data.shifted(images, 0)[name]
    assert shifted.shape == images.shape
    assert shifted.dtype == images.dtype
    assert shifted.min() >= 0
    assert shifted.max() <= 1
    assert (shifted - images).abs().amax((1, 2, 3)).min() > 0.1
    torch.testing.assert_close(data.shifted(images, 0)[name], shifted, rtol=0, atol=0)


def test_translation_moves_by_one_pixel_both_ways():
    image = torch.zeros(1, 1, 8, 8)
    image[0, 0, 4, 4] = 1
    moved = data.shifted(image, 0)["translation"]
    row, column = divmod(int(moved.argmax()), 8)
    assert moved.max() > 0.99
    assert abs(row - 4) == abs(column - 4) == 1


def test_augmented_images_keep_shape_and_range():
    images = data.pretraining().images[:50]
    augmented = data.augment(images, torch.Generator().manual_seed(0))
    assert augmented.shape == images.shape
    assert augmented.min() >= 0
    assert augmented.max() <= 1


def test_the_network_has_the_size_that_its_docstring_says():
    assert 22_500 < sum(p.numel() for p in methods.Network().parameters()) < 23_500


def test_every_method_has_an_outcome_in_every_condition(outcomes):
    assert list(outcomes) == [method.name for method in methods.METHODS]
    for runs in outcomes.values():
        (run,) = runs
        assert list(run.accuracy) == [train.IN_DISTRIBUTION, *data.SHIFTS]
        assert all(0 <= value <= 100 for value in run.accuracy.values())


def test_learned_values_are_traced(outcomes):
    assert {name: set(runs[0].trace) for name, runs in outcomes.items() if runs[0].trace} == {
        "AdamW, learned lr": {"lr"},
        "AdamP": {"radius"},
        "SGDP": {"radius"},
    }
    radii = outcomes["AdamP"][0].trace["radius"]
    assert all(label.startswith("backbone.") and len(values) == TINY.fine_tune for label, values in radii.items())


@pytest.mark.parametrize("width", [80, 200])
def test_the_table_shows_every_method_and_shift_whole(outcomes, width):
    console = Console(width=width, file=StringIO())
    console.print(report.table(outcomes))
    text = console.file.getvalue()
    assert "…" not in text
    for word in [method.name for method in methods.METHODS] + list(data.SHIFTS):
        assert word in text


def test_the_table_shows_mean_and_standard_error():
    names = (train.IN_DISTRIBUTION, *data.SHIFTS)
    trace = {"lr": {"group 0": [0.1]}}
    runs = [train.Outcome(dict.fromkeys(names, value), trace, [2.0, 4.0] * 10) for value in (70.0, 80.0, 90.0)]
    made = report.table({method.name: runs for method in methods.METHODS})
    assert set(made.columns[1].cells) == {"80.0\n±5.8"}
    assert set(made.columns[-1].cells) == {"3"}


def test_the_figure_is_written(outcomes, tmp_path):
    report.save(outcomes, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert len(report.figure(outcomes).axes) == 3


def test_a_seed_gives_the_same_numbers_whatever_the_global_state(outcomes):
    torch.manual_seed(123)
    before = torch.get_rng_state()
    assert train.run([0], TINY) == outcomes
    torch.testing.assert_close(torch.get_rng_state(), before)


def test_progress_is_reported_once_a_step():
    calls = []
    train.run([0], TINY, advance=lambda: calls.append(1))
    assert len(calls) == TINY.total(1)


def test_fine_tuning_leaves_the_pretrained_network_alone_and_a_probe_its_backbone():
    start = train.pretrain(0, 1)
    before = {name: value.clone() for name, value in start.state_dict().items()}
    probed, _, _ = train.fine_tune(start, methods.linear_probe(0.1), data.fine_tuning(0).train, 0, 2)
    torch.testing.assert_close(start.state_dict(), before, rtol=0, atol=0)
    for name, value in probed.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("backbone.")


def test_tpgm_trains_without_what_it_holds_out_and_projects_the_backbone_after_so_many_steps():
    train_set = data.fine_tuning(0).train
    kept, held_out = data.hold_out(train_set, 0)
    assert rows(kept).isdisjoint(rows(held_out))
    assert rows(kept) | rows(held_out) == rows(train_set)
    assert held_out.labels.bincount().tolist() == [2] * 5
    start, made, calls = train.pretrain(0, 1), [], []

    def tpgm(network):
        made.append(TPGM(network.named_parameters(), exclude=network.head))
        made[0].register_step_post_hook(lambda *_: calls.append(1))
        return made[0]

    method = dataclasses.replace(methods.tpgm(1e-2, every=2, updates=1), tpgm=tpgm)
    network, _, times = train.fine_tune(start, method, train_set, 0, 5)
    assert len(calls) == 3  # after steps 2 and 4, and at the end
    assert len(times) == 5
    for name, radius in made[0].hypers()["radius"].items():
        moved = network.get_parameter(name).detach() - start.get_parameter(name).detach()
        assert hn.mars.norm(moved) <= 1.0001 * radius


def test_the_l2_sp_penalty_holds_the_backbone_near_its_start():
    start, digits = train.pretrain(0, 1), data.fine_tuning(0).train

    def distance(alpha):
        network, _, _ = train.fine_tune(start, methods.l2_sp(1e-2, alpha), digits, 0, 10)
        return sum((p - q).square().sum().item() for p, q in zip(network.backbone.parameters(), start.backbone.parameters(), strict=True))

    assert distance(100.0) < distance(0.0)


def test_the_settings_are_candidates_of_the_tuning_program_but_for_wrong_learning_rates():
    tuned = {method.name: method.lr for method in methods.METHODS if method.name not in ("AdamW, low lr", "SGD", "SGDP")}
    assert list(tuned) == list(tune.CANDIDATES)
    for name, lr in tuned.items():
        assert lr in [candidate.lr for candidate in tune.CANDIDATES[name].values()]


def test_help_lists_the_demo_and_its_options():
    assert "demo" in CliRunner().invoke(app, ["--help"]).output
    text = CliRunner().invoke(app, ["demo", "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).output
    assert "--seeds" in text
    assert "--out" in text


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("demo.svg", "must end in .png"),
        ("demo", "must end in .png"),
        ("absent/demo.png", "there is no folder"),
        ("folder.png", "is a directory"),
    ],
)
def test_a_figure_that_cannot_be_written_is_refused_before_training(out, words, tmp_path, monkeypatch):
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr(train, "run", lambda *_, **__: pytest.fail("something was trained"))
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / out)], env={"COLUMNS": "400"})
    assert result.exit_code == 2
    assert words in result.output


@pytest.mark.parametrize("module", ["sklearn", "matplotlib", "typer"])
def test_a_missing_package_gives_one_line_that_says_what_to_install(module, monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("ftp.cli", "ftp.demo", f"{module}."))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(sys, "argv", ["ftp", "demo"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == f'{module} is not installed: pip install "hyperopt-nested[demo]"'


def test_another_missing_module_is_an_error_as_ever(monkeypatch):
    monkeypatch.setitem(sys.modules, "ftp.cli", None)
    with pytest.raises(ModuleNotFoundError, match=r"ftp\.cli"):
        main()
