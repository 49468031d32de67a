"""What is published: the wheel, the source distribution, their metadata, and the workflow that publishes them."""

import ast
import email
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Callable, Iterable
from email.message import Message
from importlib.metadata import distribution
from pathlib import Path

import pytest
import release
import yaml
from packaging.requirements import Requirement

import hyperopt_nested as hn

ROOT = Path(__file__).parent.parent
PACKAGES = ("hyperopt_nested", "ftp")
FILES = {
    path.relative_to(ROOT).as_posix()
    for package in PACKAGES
    for path in (ROOT / package).rglob("*")
    if path.is_file() and path.suffix not in (".pyc", ".pyo")
}
NAMES = {"PIL": "pillow", "sklearn": "scikit-learn"}  # of packages whose modules are called otherwise


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of both, built without a network."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", str(folder)], cwd=ROOT, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> zipfile.ZipFile:
    (path,) = built.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    return email.message_from_bytes(wheel.read(name))


def test_the_wheel_has_every_file_of_the_packages_and_no_other(wheel: zipfile.ZipFile) -> None:
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == FILES
    assert {f"{package}/py.typed" for package in PACKAGES} <= FILES
    assert {"hyperopt_nested/optim/__init__.pyi", "hyperopt_nested/backends/kernel.h", "hyperopt_nested/backends/driver.h"} <= FILES
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel.namelist())


def test_the_source_distribution_has_no_tests_and_pages(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    others = {name for name in names if not name.startswith(tuple(f"{package}/" for package in PACKAGES))}
    assert names - others == FILES
    assert others == {"CHANGELOG.md", "CITATION.cff", "LICENSE", "PKG-INFO", "README.md", "pyproject.toml", ".gitignore"}


def needed(requirements: Iterable[str], extra: str = "") -> set[str]:
    """Names of the installed distributions that requirements need, with what these need."""
    found = set[str]()
    for each in map(Requirement, requirements):
        if each.name not in found and (each.marker is None or each.marker.evaluate({"extra": extra})):
            found |= {each.name, *needed(distribution(each.name).requires or [])}
    return found


@pytest.fixture
def bare(wheel: zipfile.ZipFile, metadata: Message, tmp_path: Path) -> Callable[[str, str], list[str]]:
    """Run code in a new environment that has the wheel, with an extra, and nothing else: not even a compiler. Return what it prints."""

    def run(code: str, extra: str) -> list[str]:
        venv.create(tmp_path / "bare", symlinks=True)
        (site,) = (tmp_path / "bare").glob("lib/*/site-packages")
        wheel.extractall(site)
        for name in needed(metadata.get_all("Requires-Dist", []), extra):
            files = distribution(name).files or []
            for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
                (site / top).symlink_to(distribution(name).locate_file(top))
        program = [tmp_path / "bare" / "bin" / "python", "-c", f"{code}\nimport hyperopt_nested; print(hyperopt_nested.__file__)"]
        environment = {"PATH": str(program[0].parent), "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(program, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        *printed, file = done.stdout.splitlines()
        assert Path(file).is_relative_to(site)
        return printed

    return run


def examples(*pages: str) -> tuple[str, list[str]]:
    """The code of pages, and what it prints; of README.md, the first block alone."""
    code, shown = list[str](), list[str]()
    for page in pages:
        text = (ROOT / page).read_text(encoding="utf-8")
        blocks = re.findall(r"```python\n((?:(?!```).)*)```\n(?:\n```text\n(.*?)```)?", text, re.DOTALL)
        for block, lines in blocks[:1] if page == "README.md" else blocks:
            code.append(block)
            shown += lines.splitlines()
    return "\n".join(code), shown


def test_the_first_examples_run_where_nothing_else_is_installed(bare: Callable[[str, str], list[str]]) -> None:
    code, shown = examples("README.md", "docs/tutorials/quickstart.md")
    assert bare(code, "demo") == shown


MISSING = """
import runpy
import sys
import torch
import hyperopt_nested as hn

def attempt(function):
    try:
        function()
    except (ImportError, SystemExit) as error:
        print(error)

def command(module, *arguments):
    sys.argv[1:] = arguments
    attempt(lambda: runpy.run_module(module, run_name="__main__"))

parameter = torch.nn.Parameter(torch.ones(2))
parameter.grad = torch.ones(2)
opt = hn.optim.AdamW([parameter], lr=hn.learn())
recorder = hn.integrations.Recorder(opt)
opt.step()
command("hyperopt_nested", "--version")
command("hyperopt_nested", "rules")
command("ftp", "demo")
command("ftp", "finetune", "photos")
attempt(lambda: hn.testing.check_rule(hn.sgd))
attempt(lambda: hn.plot.trajectories(recorder))
attempt(hn.integrations.LightningCallback)
attempt(hn.integrations.HuggingFaceCallback)
attempt(lambda: hn.integrations.TensorBoardWriter(opt, "runs"))
"""


def test_torch_alone_is_enough_and_what_is_missing_is_named(bare: Callable[[str, str], list[str]]) -> None:
    assert bare(MISSING, "") == [
        f"hyperopt-nested {hn.__version__}",
        'typer is not installed: pip install "hyperopt-nested[cli]"',
        'typer is not installed: pip install "hyperopt-nested[demo]"',
        'typer is not installed: pip install "hyperopt-nested[finetune]"',
        'hypothesis is not installed: pip install "hyperopt-nested[testing]"',
        'matplotlib is not installed: pip install "hyperopt-nested[plot]"',
        "lightning is not installed: pip install lightning",
        "transformers is not installed: pip install transformers",
        "tensorboard is not installed: pip install tensorboard",
    ]


def test_the_metadata_says_what_is_needed_and_where_things_are(metadata: Message) -> None:
    needed = [each for each in metadata.get_all("Requires-Dist", []) if "extra ==" not in each]
    assert [re.split(r"\W", each)[0] for each in needed] == ["torch"]
    assert {"testing", "cli", "demo", "finetune", "docs", "all"} <= set(metadata.get_all("Provides-Extra", []))
    urls = dict(url.split(", ") for url in metadata.get_all("Project-URL", []))
    assert {"Repository", "Documentation", "Changelog", "Issues"} == set(urls)
    assert all(url.startswith("https://") for url in urls.values())
    assert metadata["Author"] or metadata["Author-Email"]
    assert metadata["Description-Content-Type"] == "text/markdown"


def test_all_is_every_extra_that_the_packages_import(metadata: Message) -> None:
    def needs(extra: str) -> set[str]:
        """Packages of an extra, and of the extras that it consists of."""
        mine = [each for each in metadata.get_all("Requires-Dist", []) if re.search(rf"extra == ['\"]{extra}['\"]", each)]
        inner = [name for each in mine for name in re.findall(r"^hyperopt-nested\[(.*?)\]", each)]
        found = {re.split(r"[^\w-]", each)[0] for each in mine}
        return found.union(*(needs(name) for names in inner for name in names.split(","))) - {"hyperopt-nested"}

    users = ("testing", "cli", "demo", "finetune", "docs")
    assert needs("all") == set().union(*map(needs, users))
    imported = set()
    for path in sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            imported |= {name.split(".")[0] for name in [*names, *([str(node.module)] if isinstance(node, ast.ImportFrom) else [])]}
    others = {NAMES.get(name, name) for name in imported - sys.stdlib_module_names - {*PACKAGES, "torch", "pytest"}}
    assert others <= needs("all")


def test_one_version_stands_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == hn.__version__
    with pytest.raises(ValueError, match=rf"the tag is 'v9\.9', but the version in pyproject\.toml is {hn.__version__}"):
        release.notes("v9.9", ROOT)


def test_one_command_sets_the_addresses(tmp_path: Path) -> None:
    """They are of a reserved domain, which is nobody's, until then; no release is made with these."""
    version, reserved = hn.__version__, "https://git.example/hyperopt-nested, which is no address: make urls"
    for name in ("Makefile", "pyproject.toml", "README.md"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "CHANGELOG.md").write_text(f"## [{version}]\n\n- This.\n")
    with pytest.raises(ValueError, match=reserved):
        release.notes(f"v{version}", tmp_path)
    urls = {"REPOSITORY": "https://github.com/me/here", "DOCUMENTATION": "https://me.github.io/here/"}
    subprocess.run(["make", "urls", *(f"{key}={url}" for key, url in urls.items())], cwd=tmp_path, check=True, capture_output=True)
    assert release.notes(f"v{version}", tmp_path) == "- This."
    assert ".example" not in (tmp_path / "pyproject.toml").read_text() + (tmp_path / "README.md").read_text()
    set_now = release.facts(tmp_path)["urls"]
    assert (set_now["Repository"], set_now["Documentation"]) == (*urls.values(),)
    assert set_now["Issues"] == "https://github.com/me/here/issues"


def test_release_notes_are_the_section_of_the_version(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "1.0.0"\n')
    changelog = tmp_path / "CHANGELOG.md"
    changelog.write_text(
        "# Changelog\n\n## [Unreleased]\n\n## [1.0.0] - 2026-01-01\n\n### Added\n\n- This.\n\n## [0.9.0]\n\n- That.\n\n[1.0.0]: https://x\n"
    )
    assert release.notes("v1.0.0", tmp_path) == "### Added\n\n- This."
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "0.9.0"\n')
    assert release.notes("v0.9.0", tmp_path) == "- That."
    changelog.write_text("# Changelog\n\n## [Unreleased]\n\n- This.\n")
    with pytest.raises(ValueError, match=r"has no section '## \[0\.9\.0\]'"):
        release.notes("v0.9.0", tmp_path)


def test_the_workflow_publishes_what_is_tagged_and_tested() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8"))
    assert workflow[True] == {"push": {"tags": ["v*"]}}  # YAML reads "on" as true
    build, publish, notes = (workflow["jobs"][name] for name in ("build", "publish", "release"))
    runs = [step["run"] for step in build["steps"] if "run" in step]
    assert runs[0].startswith('python tools/release.py "$GITHUB_REF_NAME"')
    assert "bash .ci/run" in runs
    assert (publish["needs"], publish["permissions"], publish["environment"]) == ("build", {"id-token": "write"}, "pypi")
    assert not re.search("secrets|password", str(workflow))
    assert (notes["needs"], notes["permissions"]) == ("publish", {"contents": "write"})
