"""The registry under test: parametrization for pytest, and the table of what is verified."""

from typing import Any, NamedTuple

from hyperopt_nested import registry
from hyperopt_nested.rule import Per
from hyperopt_nested.testing.check import verify
from hyperopt_nested.testing.comparison import RuleError
from hyperopt_nested.testing.hypergradients import PERS
from hyperopt_nested.testing.subject import subject


class Row(NamedTuple):
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

    Returns:
        The decorator.

    Example:
        >>> import hyperopt_nested as hn
        >>> @hn.testing.every_rule("my_package")
        ... def test_rule(name):
        ...     hn.testing.check_rule(name)
    """
    import pytest

    found = [name for name in registry.names() if not packages or registry.origin(name).split(".")[0] in packages]
    return pytest.mark.parametrize("name", found)


def rows(name: str, examples: int = 0) -> list[Row]:
    """Rows of one entry of the registry; verified with so many examples, or, with none, not verified."""
    checked = subject(name)
    rule, defaults = checked.template.rule, checked.template.declared
    zero, wrong, right = "derivative zero; learning is refused", "", dict[tuple[str, Per], float]()
    if examples and checked.own:
        try:
            right |= verify(checked, examples=examples).verified
        except RuleError as error:
            wrong = str(error).splitlines()[0]

    def verified(hyper: str) -> str:
        at = ", ".join(per for per in PERS if (hyper, per) in right)
        return wrong or (zero if hyper in rule.nondifferentiable else f"per {at}") if examples else ""

    found = [Row(name, hyper, str(rule.hypers[hyper]), f"{defaults[hyper]:g}", verified(hyper), bool(wrong)) for hyper in checked.own]
    return found or [Row(name)]
