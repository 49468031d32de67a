"""The report is one file that needs nothing else, says what the results say, and holds no markup of others."""

import os
import re
import sys
from collections import Counter
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from ftp.finetuning import Epoch, Evaluation, Result
from ftp.finetuning.comparison import accuracy, difference
from ftp.finetuning.report import write_report

VOID = {"meta", "link", "br", "img", "input", "hr"}
NASTY = ["<script>alert(1)</script>", "$\\frac$ & 'x' \"y\"", "_<b>日本", "\udc80\x01\n--!><img src=x onerror=alert(1)>"]


class Page(HTMLParser):
    """Tags, attributes and text of a page; refuses tags that do not match."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str | None]] = []
        self.sections: dict[str, str] = {}
        self.open: list[str] = []
        self.title = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.title = data
        if "style" not in self.open:
            self.sections[self.title] = self.sections.get(self.title, "") + " " + data


def evaluation(share: float, classes: int, count: int, seed: int) -> Evaluation:
    labels = torch.randint(classes, (count,), generator=torch.Generator().manual_seed(0))
    wrong = torch.rand(count, generator=torch.Generator().manual_seed(seed)) > share
    return Evaluation(labels, (labels + wrong) % classes)


def run(
    method: str = "ftp",
    seed: int = 0,
    classes: list[str] | None = None,
    sets: tuple[str, ...] = ("validation", "test", "sketch", "paint", "test/fog/1", "test/fog/5", "test/gaussian_noise/2"),
    tensors: int = 4,
    epochs: int = 3,
    count: int = 60,
) -> Result:
    names = [f"layer{i}.weight" for i in range(tensors)]
    history = [
        Epoch(
            epoch,
            step=10 * epoch,
            lr=1e-3,
            train_loss=1 / epoch if epoch else torch.nan,
            validation_loss=2 / (epoch + 1),
            validation_accuracy=0.3 + 0.2 * min(epoch, 2),
            seconds=2.5,
            radii={f"radius/{name}": 0.01 * 3**i * epoch for i, name in enumerate(names)} if method == "ftp" else {},
            distances=dict.fromkeys(names, 0.0 if method == "linear-probe" else 0.1 * epoch),
        )
        for epoch in range(epochs)
    ]
    classes = ["cat", "dog", "owl"] if classes is None else classes
    evaluations = {name: evaluation(0.9 - 0.1 * i, len(classes), count, 10 * seed + i + len(method)) for i, name in enumerate(sets)}
    settings = {"lr": 1e-3, "k": 1.5 if method == "ftp" else None, "seed": seed}
    return Result(method, seed, settings, classes, history, evaluations, {"torch": "2.13"}, "cmd")


def written(results: list[Result], folder: Path) -> str:
    write_report(results, folder / "report.html")
    return (folder / "report.html").read_text("utf-8")


@pytest.fixture(scope="module")
def results() -> list[Result]:
    return [run(method, seed) for method in ("full", "linear-probe", "ftp") for seed in (0, 1)]


@pytest.fixture(scope="module")
def text(results, tmp_path_factory) -> str:
    return written(results, tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def page(text) -> Page:
    return Page(text)


def check_page(text: str) -> Page:
    """The page is well-formed, loads nothing, runs nothing, and its references lead somewhere."""
    page = Page(text)
    assert not {"script", "img", "b", "iframe", "object", "link"} & page.tags.keys()
    names = [name for name, _ in page.attributes]
    assert not [name for name in names if name.startswith("on") or name == "src"]
    ids = Counter(value for name, value in page.attributes if name == "id")
    assert set(ids.values()) == {1}
    targets = [value or "" for name, value in page.attributes if name in ("href", "xlink:href")]
    assert all(target.startswith(("#", "data:image/png;base64,")) for target in targets)
    targets += ["#" + found for found in re.findall(r"url\(#([^)]*)\)", text)]
    assert {target[1:] for target in targets if target.startswith("#")} <= ids.keys()
    assert {value for name, value in page.attributes if value and "://" in value and not name.startswith("xmlns")} == set()
    assert "@import" not in text
    assert "mathdefault" not in text
    return page


def test_the_page_needs_nothing_else(text):
    check_page(text)


def test_sections(page):
    assert [title for title in page.sections if title] == [
        "Accuracy",
        "Difference to the first method",
        "In and out of distribution",
        "Corruptions",
        "Training",
        "Distance to the pre-trained model",
        "Learned values",
        "Agreement of methods",
        "Classes",
        "Settings",
    ]
    assert page.tags["svg"] == 5 + 3
    assert "3 methods, 2 seeds (0, 1), 3 classes. Images: validation 60, test 60, sketch 60, paint 60." in page.sections[""]


def rows(text: str, title: str) -> dict[str, list[str]]:
    """The first table of a section: cells by the first of a row."""
    section = text[text.index(f"<h2>{title}</h2>") :]
    table = section[: section.index("</table>")]
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", table)]
    return {name: [re.sub("<[^>]*>", "", cell) for cell in others] for name, *others in cells}


def test_tables_hold_the_results(text, results):
    sets = {
        "validation": ["validation"],
        "test (ID)": ["test"],
        "sketch": ["sketch"],
        "paint": ["paint"],
        "mean of shifts": ["sketch", "paint"],
        "mean of corruptions": ["test/fog/1", "test/fog/5", "test/gaussian_noise/2"],
    }
    table, differences = rows(text, "Accuracy"), rows(text, "Difference to the first method")
    assert table.pop("accuracy in %") == differences.pop("points") == [*sets]
    assert ([*table], [*differences]) == (["full", "linear-probe", "ftp"], ["linear-probe", "ftp"])
    by_method = {method: [each for each in results if each.method == method] for method in table}
    for method, cells in table.items():
        for cell, names in zip(cells, sets.values(), strict=True):
            value, error = accuracy(by_method[method], names)
            assert cell == f"{100 * value:.1f} ± {100 * error:.1f}"
    for method, cells in differences.items():
        for cell, names in zip(cells, sets.values(), strict=True):
            value, error = difference(by_method[method], by_method["full"], names)
            assert cell == f"{100 * value:+.1f} ± {100 * error:.1f}".replace("-0.0", "+0.0")
            section = text[text.index("<h2>Difference") : text.index("<h2>In and out")]
            bold = f'<span class="clear">{cell.split()[0]}</span> <span class="error">± {cell.split()[-1]}'
            assert bold in section or abs(value) <= 2 * error
    assert rows(text, "Training")["ftp"] == ["2, 2", "2, 2", "20", "70.0", "7.5 s"]
    first, second = by_method["full"][0].evaluations["test"], by_method["ftp"][0].evaluations["test"]
    both = int(((first.labels == first.predictions) & (second.labels == second.predictions)).sum())
    assert rows(text, "Agreement of methods")["full / ftp"][0] == str(both)
    assert rows(text, "Settings") == {"setting": ["full", "linear-probe", "ftp"], "k": ["none", "none", "1.5"]}


def test_methods_are_told_apart():
    from ftp.finetuning.figures import styles

    many = [f"method {i}" for i in range(143)]
    assert len({*styles(many).values()}) == 143
    assert len({style.color for style in styles(many[:11]).values()}) == 11


def test_equal_results_give_equal_bytes(results, tmp_path):
    assert written(results[:1], tmp_path) == written(results[:1], tmp_path)


def test_what_others_wrote_is_text(tmp_path):
    results = [run(method, classes=NASTY, sets=("validation", "test", NASTY[0], f"test/{NASTY[1]}/1")) for method in ("ftp", *NASTY[:3])]
    results[0] = Result(**{**vars(results[0]), "settings": {NASTY[0]: NASTY}, "versions": {NASTY[0]: NASTY[1]}, "command": NASTY[3]})
    text = written(results, tmp_path)
    page = check_page(text)
    assert {"html", "svg", "section"} < page.tags.keys()
    for name in NASTY[:3]:
        assert name in unescape(page.sections["Accuracy"] + page.sections["Classes"])


def test_one_run_with_little_to_tell(tmp_path):
    text = written([run(sets=("validation",), tensors=0, epochs=0)], tmp_path)
    assert [title for title in check_page(text).sections if title] == ["Accuracy", "Classes", "Settings"]
    text = written([run(sets=(), tensors=0, epochs=1)], tmp_path)
    assert [title for title in check_page(text).sections if title] == ["Training", "Settings"]


def test_methods_with_other_sets_and_tensors(tmp_path):
    first, second = run("full", sets=("test", "sketch", "test/fog/1")), run("ftp", sets=("test", "paint", "test/fog/2"), tensors=9)
    text = written([first, second], tmp_path)
    check_page(text)
    table = rows(text, "Accuracy")
    assert table["accuracy in %"][1:] == ["sketch", "paint", "mean of shifts", "mean of corruptions"]
    assert table["full"][2:] == ["n/a", "n/a", "n/a"]
    assert rows(text, "Difference to the first method")["ftp"][1:] == ["n/a"] * 4


def test_dense_predictions_and_classes_without_a_name(tmp_path):
    labels = torch.randint(3, (20, 4, 4))
    predictions = torch.where(torch.rand(20, 4, 4) < 0.3, 4, labels)
    evaluations = {"test": Evaluation(labels, predictions)}
    results = [Result(method, 0, {}, classes, [], evaluations) for method, classes in (("full", ["sky", "sea"]), ("ftp", ["sky"]))]
    text = written(results, tmp_path)
    assert [title for title in check_page(text).sections if title] == ["Accuracy", "Difference to the first method", "Classes"]
    assert [*rows(text, "Classes")] == ["accuracy in %", "sky", "sea", "2", "3", "4"]
    assert rows(text, "Classes")["4"] == ["0", "n/a", "n/a"]
    shares = (labels == predictions).double().mean((1, 2))
    assert rows(text, "Accuracy")["ftp"] == [f"{100 * shares.mean():.1f} ± {100 * shares.std(correction=0) / 20**0.5:.1f}"]


def test_a_large_run(tmp_path):
    classes = [f"class {i}" for i in range(120)]
    text = written([run("a" * 60, classes=classes, count=1000), run("ftp", classes=classes, tensors=200, count=1000)], tmp_path)
    page = check_page(text)
    assert "class 119" in page.sections["Classes"]
    assert len(text) < 600_000


def test_a_diverged_run(tmp_path):
    last = Epoch(3, 30, 1e-3, torch.nan, torch.inf, 0.3, 1.0, {"radius/layer0.weight": torch.nan}, {"layer0.weight": 1e30})
    own = run()
    text = written([Result(**{**vars(own), "epochs": [*own.epochs, last], "stopped": "the loss is not finite in epoch 3"})], tmp_path)
    check_page(text)
    assert rows(text, "Training")["ftp"][::5] == ["2", "the loss is not finite in epoch 3"]


def test_an_older_file_stays_if_the_new_one_cannot_be_written(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("older")

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_report([run(sets=("test",), tensors=0, epochs=0)], path)
    assert path.read_text() == "older"
    assert [*tmp_path.iterdir()] == [path]


def test_what_is_no_set_of_results_is_refused(tmp_path):
    path = tmp_path / "report.html"
    with pytest.raises(ValueError, match="results is empty: a report needs at least one finished run"):
        write_report([], path)
    with pytest.raises(ValueError, match=r"classes differ: \['a', 'b'\] of full, and \['cat', 'dog', 'owl'\]"):
        write_report([run(), run("full", classes=["a", "b"])], path)
    with pytest.raises(ValueError, match="two results of ftp with equal settings and seeds"):
        write_report([run(), run()], path)
    assert not path.exists()


def test_the_extra_with_matplotlib_is_named(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "ftp.finetuning.figures", raising=False)
    monkeypatch.delattr("ftp.finetuning.figures", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r'^matplotlib is not installed: pip install "hyperopt-nested\[finetune\]"$'):
        write_report([run()], tmp_path / "report.html")
