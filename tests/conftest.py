from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

torch.set_num_threads(1)  # one worker a core

# Examples are seeds of random problems: shrinking a seed explains nothing, and takes minutes.
PHASES = [Phase.explicit, Phase.generate]
settings.register_profile(
    "quick", max_examples=15, deadline=None, derandomize=True, phases=PHASES, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("quick")


@pytest.fixture(autouse=True)
def _float64_and_seed() -> Iterator[None]:
    """Every test computes in float64 unless it says otherwise, from one seed."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)
