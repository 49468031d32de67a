"""The registry under test: parametrisation for pytest, and the table of what is verified."""

from dataclasses import dataclass
from typing import Any

from hyperopt_nested import registry
from hyperopt_nested.testing.check import verify
from hyperopt_nested.testing.comparison import RuleError
from hyperopt_nested.testing.hypergradients import PERS
from hyperopt_nested.testing.subject import subject


@dataclass(frozen=True)
class Row:
    """One hyper of one registered rule, as tables show it; a rule without hypers has one row."""

    rule: str
    hyper: str = ""
    domain: str = ""
    default: str = ""
    verified: str = ""
    wrong: bool = False


def every_rule(*packages: str) -> Any:
    """A `pytest.mark.parametrize` that runs a test with `name`, once for each entry of the registry.

    Args:
        *packages: only entries that these packages define; none: all.

    Example:
        ```python
        @hn.testing.every_rule("my_package")
        def test_rule(name):
            hn.testing.check_rule(name)
        ```
    """
    import pytest

    found = [name for name in registry.names() if not packages or registry.origin(name).split(".")[0] in packages]
    return pytest.mark.parametrize("name", found)


def rows(name: str, examples: int = 0) -> list[Row]:
    """Rows of one entry of the registry; verified with so many examples, or, with none, not verified."""
    checked = subject(name)
    rule, defaults = checked.template.rule, checked.template.declared
    wrong, verified = False, ""
    if examples and checked.own:
        try:
            verify(checked, examples=examples)
            verified = f"per {', '.join(PERS)}"
        except RuleError as error:
            wrong, verified = True, str(error).splitlines()[0]
    return [
        Row(
            name,
            hyper,
            str(rule.hypers[hyper]),
            f"{defaults[hyper]:g}",
            "derivative zero; learning is refused" if examples and hyper in rule.nondifferentiable and not wrong else verified,
            wrong,
        )
        for hyper in checked.own
    ] or [Row(name)]
