"""The documentation: its code runs, prints what it says, and covers every public name."""

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import griffe
import hooks
import mktestdocs
import pytest
import torch

import ftp
import hyperopt_nested

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
PACKAGES = [hyperopt_nested, ftp]
UNLIMITED = {"api", "reference", "results"}
"""Folders of pages that are looked things up in: they may be long."""
NUMBER = re.compile(r"(-?\d+(?:\.\d+)?(?:e-?\d+)?)")


def label(value: object) -> str | None:
    return value.__name__ if isinstance(value, ModuleType) else str(value.relative_to(ROOT)) if isinstance(value, Path) else None


@pytest.fixture(autouse=True)
def _as_a_reader_has_it(_float64_and_seed: None) -> Iterator[None]:
    """float32; and one thread, since the models are small."""
    threads = torch.get_num_threads()
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_code_runs_and_prints_what_the_page_says(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = page.read_text(encoding="utf-8")
    shown = re.findall(r"```python\n(?:(?!```).)*```\n\n```text\n(.*?)```", text, re.DOTALL)
    mktestdocs.check_md_file(page, memory=True)
    printed, expected = NUMBER.split(capsys.readouterr().out), NUMBER.split("".join(shown))
    assert printed[::2] == expected[::2]
    assert [float(number) for number in printed[1::2]] == pytest.approx([float(number) for number in expected[1::2]], rel=0.05)


def test_one_line_is_what_the_first_example_changes(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code = text.partition("```python\n")[2].partition("```")[0]
    before, changes = re.subn(r"# (opt = torch\.optim\..*)\nopt = hn\.optim\..*", r"\1", code)
    assert changes == 1
    exec(before, {})
    (loss,) = re.findall(r"test loss (\S+)", capsys.readouterr().out)
    assert f"The line in the comment gives {loss}." in text


def test_links_of_contributors_lead_somewhere() -> None:
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")):
        assert (ROOT / link).exists(), f"CONTRIBUTING.md links to {link}"


def test_links_of_the_readme_are_absolute_and_lead_somewhere() -> None:
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
    site, files = urls["Documentation"], f"{urls['Repository']}/blob/main/"
    links = re.findall(r"\]\(([^)\s]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert [link for link in links if not link.startswith("https://")] == []
    assert sum(link.startswith(site) for link in links) > 10
    for link in links:
        path, _, heading = link.partition("#")
        if path.startswith(files):
            assert (ROOT / path.removeprefix(files)).is_file(), link
        elif path.startswith(site):
            inside = ROOT / "docs" / path.removeprefix(site)
            page = inside / "index.md" if inside.is_dir() else inside.with_suffix(".md") if path.endswith("/") else inside
            assert page.is_file(), link
            headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE) if heading else []
            assert not heading or heading in [re.sub(r"[^\w]+", "-", each.lower()).strip("-") for each in headings], link


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_no_code_escapes_the_test(page: Path) -> None:
    opened = re.findall(r"^ *```(.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(opened[::2]) <= {"python", "text", "sh"}
    assert set(opened[1::2]) <= {""}


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_code_fits_80_columns(page: Path) -> None:
    for block in re.findall(r"^```\w+\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        assert max(map(len, block.splitlines())) <= 80, block


@pytest.mark.parametrize("package", PACKAGES, ids=label)
def test_examples_of_docstrings_fit_80_columns(package: ModuleType) -> None:
    for path in (ROOT / package.__name__).rglob("*.py"):
        for example in re.finditer(r"^( *)>>> .*\n(?:\1[^\s\"].*\n)*", path.read_text(encoding="utf-8"), re.MULTILINE):
            lines = [line.removeprefix(example[1]).partition("  # doctest:")[0] for line in example[0].splitlines()]
            assert max(map(len, lines)) <= 80, f"{path.name}: {lines}"


@pytest.mark.parametrize(
    "page", [page for page in PAGES if "docs" in page.parts and UNLIMITED.isdisjoint(page.relative_to(ROOT).parts)], ids=label
)
def test_pages_are_short(page: Path) -> None:
    assert len(page.read_text(encoding="utf-8").split()) <= 1500


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "tutorials").glob("*.md")), ids=label)
def test_every_tutorial_has_a_figure(page: Path) -> None:
    figures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
    assert figures
    assert [figure for figure in figures if not (page.parent / figure).is_file()] == []


def test_messages_that_are_explained_are_said() -> None:
    sources = [*(ROOT / "hyperopt_nested").rglob("*.py"), *(ROOT / "ftp").rglob("*.py")]
    said = re.sub(r'"\s*f?"', "", "".join(path.read_text(encoding="utf-8") for path in sources))
    text = (ROOT / "docs" / "how-to" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `(.*?)` \|", text, re.MULTILINE)
    parts = [part for message in messages for part in re.split(r"\.\.\.|'\w+'", message) if len(part) > 8]
    assert len(parts) > 20
    assert [part for part in parts if part.strip(" ,;:=") not in said] == []


def test_the_gallery_has_every_example_and_its_notebook() -> None:
    text = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
    for path in (ROOT / "examples").glob("*.py"):
        program = path.read_text(encoding="utf-8")
        assert f"(repo:examples/{path.name})" in text
        assert (f"(examples/{path.stem}.ipynb)" in text) == ("__file__" not in program)
        title, arguments, *cells = json.loads(hooks.notebook(program))["cells"]
        assert arguments["source"].startswith("import sys\n\nsys.argv")
        assert program.endswith("\n\n\n".join(cell["source"] for cell in cells) + "\n")
        assert title["source"].partition("\n")[0] in program
    figures = re.findall(r"!\[[^]]+\]\((assets/[^)]+)\)", text)
    assert len(figures) == len(list((ROOT / "examples").glob("*.py")))
    for file in [ROOT / "docs" / figure for figure in figures] + [ROOT / link for link in re.findall(r"\(repo:([^)]+)\)", text)]:
        assert file.exists()


def test_the_api_pages_show_the_public_names() -> None:
    assert hooks.problems(ROOT / "docs") == []


@pytest.mark.parametrize("package", hooks.PACKAGES)
def test_every_public_name_has_a_docstring(package: str) -> None:
    source = griffe.load(package, search_paths=[ROOT])
    for path in hooks.entries(ROOT / "docs", package):
        shown = source[path]
        assert shown.has_docstring, f"{package}.{path} has no docstring"
        assert not shown.is_module, f"{package}.{path} is a module: give the path of the object"


def test_the_tests_that_contributors_are_sent_to_exist() -> None:
    named = re.findall(r"`(?:tests/)?(\w+\*?\.py)`", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    tests = [name for name in named if name.startswith(("test_", "cases", "mutants"))]
    assert len(tests) > 20
    assert [name for name in tests if not list((ROOT / "tests").glob(name))] == []


def test_make_targets_exist() -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for page in ("README.md", "CONTRIBUTING.md"):
        named = re.findall(r"(?:^|`)make (\w+)", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
        assert named
        assert set(named) <= set(targets)
