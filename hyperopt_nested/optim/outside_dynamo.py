"""Functions that `torch.compile` does not trace, without the import of its machinery where nothing is compiled.

That import takes a second, and fails where its cache folder cannot be made.
"""

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch._compile import _disable_dynamo

F = TypeVar("F", bound=Callable[..., Any])


def outside_dynamo(function: F) -> F:
    """Return the function, run outside of compiled code."""
    disabled = _disable_dynamo(function)

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        return (disabled if "torch._dynamo" in sys.modules else function)(*args, **kwargs)

    return cast(F, run)


add_param_group = outside_dynamo(inspect.unwrap(torch.optim.Optimizer.add_param_group))
"""torch's method."""
