"""The project's own shape: imports run one way and in no circle, ftp stands on public names only, torch is the one dependency."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import hyperopt_nested as hn
from hyperopt_nested.optim.param_state import STEPS, is_entry

ROOT = Path(__file__).parent.parent
FLOORS = [
    ["checks", "trees"],
    ["domains", "ops"],
    ["recipes", "registry", "signatures", "rule"],
    ["projections"],
    ["rules"],
    ["combinators"],
    ["engine"],
    ["backends"],
    ["hypergradients"],
    ["optim"],
    ["integrations"],
    ["testing", "cli", "plot", "typing", "__main__"],
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("hyperopt_nested", "ftp")
    for path in sorted(ROOT.glob(f"{package}/**/*.py"))
}
PUBLIC = ["optim", "rules", "typing"]
OPTIONAL = [
    "PIL",
    "hypothesis",
    "lightning",
    "matplotlib",
    "peft",
    "pytorch_lightning",
    "rich",
    "safetensors",
    "scipy",
    "sklearn",
    "tensorboard",
    "transformers",
    "typer",
]


def imports(path: Path) -> Iterator[tuple[str, list[str]]]:
    """All modules that a file imports, with the names taken from them: in functions and for type checkers too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield str(node.module), [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)


def own_imports(path: Path) -> set[str]:
    """The project's modules that a file imports."""
    named = {f"{module}.{name}" if f"{module}.{name}" in MODULES else module for module, names in imports(path) for name in names or [""]}
    return named & MODULES.keys()


def members(path: Path) -> Iterator[str]:
    """All names of attributes and methods in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.ClassDef):
            yield from (each.name for each in node.body if isinstance(each, ast.FunctionDef))


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module: str) -> None:
    package, _, inside = module.partition(".")
    if package == "ftp" or not inside:
        return
    own, *below = inside.split(".")
    is_folder = bool(below) or MODULES[module].name == "__init__.py"
    for imported in own_imports(MODULES[module]):
        assert imported.startswith("hyperopt_nested."), f"{module} imports {imported}: import modules of hyperopt_nested, and never ftp"
        other = imported.split(".")[1]
        assert FLOOR[other] < FLOOR[own] or other == own or (FLOOR[other] == FLOOR[own] and not is_folder), f"{module} imports {imported}"


def test_imports_have_no_circle() -> None:
    TopologicalSorter({module: own_imports(path) for module, path in MODULES.items()}).prepare()


def test_every_module_has_its_floor() -> None:
    rooms = {module.split(".")[1] for module in MODULES if module.startswith("hyperopt_nested.")}
    assert sorted(rooms) == sorted(FLOOR)


@pytest.mark.parametrize("module", [module for module in MODULES if module.split(".")[0] == "ftp"])
def test_ftp_imports_only_public_names(module: str) -> None:
    for imported, names in imports(MODULES[module]):
        if imported.split(".")[0] == "hyperopt_nested":
            assert imported == "hyperopt_nested", f"{imported} is not public: import hyperopt_nested as hn"
            assert set(names) <= set(hn.__all__)
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        path = ast.unparse(node).split(".") if isinstance(node, ast.Attribute) and not isinstance(node.value, ast.Call) else []
        if path[:1] == ["hn"]:
            assert path[1] in hn.__all__, f"hn.{path[1]} is not public"
            if path[1] in PUBLIC and len(path) > 2:
                assert path[2] in getattr(hn, path[1]).__all__, f"hn.{path[1]}.{path[2]} is not public"


def test_ftp_uses_no_private_attribute_and_no_key_of_the_state() -> None:
    private = {name for path in ROOT.glob("hyperopt_nested/optim/*.py") for name in members(path)} - {*dir(torch.optim.Optimizer)}
    private = {name for name in private if name.startswith("_") and not name.endswith("__")}
    assert {"_follow", "_store", "_take"} <= private
    for path in sorted(ROOT.glob("ftp/**/*.py")):
        assert not private.intersection(members(path)), f"{path} uses attributes of HyperOptimizer that are not public"
        texts = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
        keys = [text for text in texts if is_entry(text) and text != STEPS]
        assert not keys, f"{path} has keys of the engine's state"


def test_public_names_exist() -> None:
    for module in (hn, *(getattr(hn, name) for name in PUBLIC)):
        assert all(hasattr(module, name) for name in module.__all__)
    assert sorted(hn.__all__) == hn.__all__ == dir(hn)
    assert len(hn.__all__) < 75


def test_names_elsewhere_are_found() -> None:
    with pytest.raises(AttributeError, match=r"has no attribute 'zeros'; it is in hn\.rules$"):
        hn.zeros  # type: ignore[attr-defined]  # noqa: B018
    assert not hasattr(hn, "nothing")


def test_the_version_is_that_of_the_installed_package() -> None:
    assert hn.__version__ == version("hyperopt-nested")
    hidden = "import importlib.metadata as m; m.version = lambda name: (_ for _ in ()).throw(m.PackageNotFoundError(name))"
    assert run(f"{hidden}; import hyperopt_nested as hn; print(hn.__version__)").stdout == "0+unknown\n"


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


def test_torch_is_all_that_the_packages_need() -> None:
    absent = f"import sys; sys.modules |= dict.fromkeys({[*OPTIONAL, 'numpy']})"
    found = run(
        f"{absent}; import ftp, hyperopt_nested as hn, torch; print(hn.sgd(lr=0.1).declared['lr'], type(hn.typing.Audit([])).__name__)"
    )
    assert (found.returncode, found.stdout) == (0, "0.1 Audit\n"), found.stderr


def test_import_loads_no_optional_package() -> None:
    found = run(f"import sys, hyperopt_nested, ftp; print([name for name in {OPTIONAL} if name in sys.modules])")
    assert (found.returncode, found.stdout) == (0, "[]\n"), found.stderr


@pytest.mark.parametrize(
    ("package", "extra", "use"),
    [
        ("hypothesis", "testing", "hn.testing"),
        ("hypothesis", "testing", "from hyperopt_nested.testing import check_rule"),
        ("hypothesis", "cli", "import hyperopt_nested.cli"),
        ("typer", "cli", "import hyperopt_nested.cli"),
        ("rich", "cli", "hn.typing.Audit([]).table()"),
        ("matplotlib", "demo", "hn.typing.Audit([]).figure()"),
        ("matplotlib", "plot", "hn.plot.heatmap(hn.integrations.Record([1], {'lr/w': [1.0]}), 'lr')"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(package: str, extra: str, use: str) -> None:
    found = run(f"import sys; sys.modules[{package!r}] = None; import hyperopt_nested as hn; {use}")
    assert found.stderr.splitlines()[-1] == f'ModuleNotFoundError: {package} is not installed: pip install "hyperopt-nested[{extra}]"'


def test_a_benchmark_starts() -> None:
    """Its folder is the first that modules are looked for in: none there may have the name of one that torch imports."""
    program = ROOT / "benchmarks" / "optimizer_steps.py"
    subprocess.run([sys.executable, program, "--help"], check=True, capture_output=True)
