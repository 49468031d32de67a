from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

collect_ignore = ["mutants.py", "processes.py", "trainers.py"]  # no doctests; mutants, imported again, would register its rules again
torch.set_num_threads(1)  # one worker a core

# Examples are seeds of random problems: shrinking a seed explains nothing, and takes minutes.
PHASES = [Phase.explicit, Phase.generate]
for name, examples in (("quick", 15), ("thorough", 150)):
    settings.register_profile(
        name, max_examples=examples, deadline=None, derandomize=True, phases=PHASES, suppress_health_check=[HealthCheck.too_slow]
    )
settings.load_profile("quick")  # the option --hypothesis-profile comes after


NEEDED = {
    "test_site.py": "no Chromium is installed. The site was not checked in a browser.",
    "test_trainers.py::test_timm": "timm is not in .venv/no-deps, where `make test` installs it.",
    "test_cuda.py": "there is no CUDA device. Nothing was checked on a GPU.",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On a GPU, what Triton compiles comes last: a run that is cut off has checked all else."""
    items.sort(key=lambda item: item.path.name == "test_cuda.py" and "compile" in item.name)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say it where checks were skipped that need what is not here."""
    skipped = [report.nodeid for report in terminalreporter.stats.get("skipped", [])]
    for file, why in NEEDED.items():
        if any(file in nodeid for nodeid in skipped):
            terminalreporter.write_line(f"tests/{file} did not run: {why}", yellow=True)


@pytest.fixture(autouse=True)
def _float64_and_seed() -> Iterator[None]:
    """Every test computes in float64 unless it says otherwise, from one seed."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(autouse=True)
def _nothing_compiled_in_vain(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Kernels are compiled when a step needs them; those begun with the first step are of use to few tests (`compiled_ahead`)."""
    if "compiled_ahead" not in request.fixturenames:
        monkeypatch.setattr("hyperopt_nested.backends.choice.Programs.begin", lambda *_: None)


@pytest.fixture
def compiled_ahead() -> None:
    """Kernels are begun with the first step, and are compiled beside the engine's steps, as for users."""


@pytest.fixture
def quick_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs are made without optimization: as they are traced, without inductor's code, or in the compiler's quickest way."""
    monkeypatch.setattr("torch._inductor.compile", lambda graph, examples: graph)
    monkeypatch.setattr("hyperopt_nested.backends.compiler.FLAGS", ("-O0",))
