"""Every entry of the registry passes the kit: hypergradients of every hyper at every granularity, and all laws."""

from hypothesis import settings

import ftp  # noqa: F401  registers its rules
import hyperopt_nested as hn
from hyperopt_nested import registry
from hyperopt_nested.testing.strategies import SHAPES
from hyperopt_nested.testing.subject import subject

EXAMPLES = 2 * settings.default.max_examples // 5  # 6 with the quick profile
# With two of their six discounts, which are alike.
SMALLER = {"coin_betting": hn.coin_betting(num_betas=2), "erfi_tuner": hn.erfi_tuner(num_betas=2)}


@hn.testing.every_rule("hyperopt_nested", "ftp")
def test_rule(name: str) -> None:
    report = hn.testing.check_rule(SMALLER.get(name, name), examples=EXAMPLES)
    assert all(error < 1e-6 for error in report.verified.values()), str(report)


@hn.testing.every_rule("hyperopt_nested", "ftp")
def test_all_shapes_are_checked(name: str) -> None:
    """Only Muon is for matrices alone: a rule that refuses more of the kit's shapes would be checked on less than it seems."""
    refused = set(SHAPES) - set(subject(name).shapes())
    assert not refused or name == "muon", refused


def test_every_public_rule_is_registered() -> None:
    public = {name for name in hn.__all__ if isinstance(getattr(hn, name), (hn.typing.FunctionRule, hn.typing.Combinator))}
    found = {name for name in registry.names() if registry.origin(name).split(".")[0] == "hyperopt_nested"}
    assert public <= found
    assert found <= set(hn.__all__)
