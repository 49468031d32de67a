"""The project's own shape: imports run one way, modules stay short, ftp stands on public names only."""

import ast
from pathlib import Path

import pytest

import hyperopt_nested as hn

ROOT = Path(__file__).parent.parent
MODULES = sorted([*ROOT.glob("hyperopt_nested/**/*.py"), *ROOT.glob("ftp/**/*.py")])
LAYERS = [
    "outside_dynamo",
    "callers",
    "checks",
    "hyper",
    "registry",
    "ops",
    "signatures",
    "rule",
    "projections",
    "combinator",
    "sensitivity",
    "rules",
    "combinators",
]
LAYERS += ["learned", "tensor_update", "joint_update", "horizon", "learnable", "last_update", "nested", "twice", "draws", "carried"]
LAYERS += ["layers", "functional", "losses", "implicit", "training", "unrolled", "sweep", "audit", "kept_state", "pinned"]
LAYERS += ["backends", "group", "roster", "weights", "param_state", "loading", "grouped", "optimizer", "testing", "cli"]
PACKAGES = ["rules", "combinators", "backends", "testing"]


def imported(path: Path) -> list[tuple[str, list[str]]]:
    """Modules that a file imports when it runs, with the names taken from them."""
    tree = ast.parse(path.read_text())
    typing_only = [
        node
        for check in ast.walk(tree)
        if isinstance(check, ast.If) and "TYPE_CHECKING" in ast.unparse(check.test)
        for node in ast.walk(check)
    ]
    found = [
        (node.module, [a.name for a in node.names])
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node not in typing_only
    ]
    found += [(a.name, []) for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names]
    return [(module, names) for module, names in found if module]


def layer(path: Path) -> str:
    return path.relative_to(ROOT / "hyperopt_nested").parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    for module, names in imported(path):
        package, *rest = module.split(".")
        rest = rest or names
        if path.is_relative_to(ROOT / "hyperopt_nested"):
            assert package != "ftp", f"{module}: the engine knows nothing of ftp"
            if package == "hyperopt_nested" and path != ROOT / "hyperopt_nested" / "__init__.py":
                own, other = layer(path), rest[0]
                assert LAYERS.index(other) < LAYERS.index(own) or own == other in PACKAGES, f"{own} imports {other}"


def test_every_module_has_its_layer() -> None:
    assert sorted({layer(path) for path in ROOT.glob("hyperopt_nested/**/*.py")} - {"__init__"}) == sorted(LAYERS)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_is_long(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize("path", sorted(ROOT.glob("ftp/**/*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_ftp_imports_only_public_names(path: Path) -> None:
    for module, names in imported(path):
        if module.split(".")[0] == "hyperopt_nested":
            assert module == "hyperopt_nested", f"{module} is not public: import hyperopt_nested as hn"
            assert set(names) <= set(hn.__all__)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "hn":
            assert node.attr in hn.__all__, f"hn.{node.attr} is not public"


def test_public_names_exist() -> None:
    assert all(hasattr(hn, name) for name in hn.__all__)
    assert sorted(hn.__all__) == hn.__all__
