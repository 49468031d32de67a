"""What goes from step to step besides the tensors that are trained: the buffers of modules.

While `hypergradient`, `audit` and `sweep` call losses, the functions that `functional` makes read their buffers in `CARRIED`, and leave the
new ones there. Outside, there is nothing to read.
"""

import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor

CARRIED: ContextVar["Carried | None"] = ContextVar("carried", default=None)
"""What is carried by the call of a loss that runs now; None outside."""


class Carried:
    """The buffers at one step, by name, and what a loss is called with.

    Args:
        params: the tensors that the loss is called with.
        buffers: the buffers before the step; those that no step has changed yet are missing.
        twin: by name, a tensor of the same value through which what modules compute under `torch.no_grad` (such as a power iteration) is
            differentiated; None: it is not.
        lift: makes a start value of a buffer one of many runs under `torch.func.vmap`.
        checked: names of buffers that were found not to depend on `params`, to be added to; None: nothing is differentiated in reverse.
        apart: whether running statistics must not be used by the call that changes them.
        unknown: names of running statistics that must not be used.
    """

    def __init__(
        self,
        params: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        *,
        twin: Callable[[str], Tensor] | None = None,
        lift: Callable[[Tensor], Tensor] | None = None,
        checked: set[str] | None = None,
        apart: bool = False,
        unknown: Collection[str] = (),
    ) -> None:
        self.params, self.buffers, self.lift, self.checked, self._apart = params, dict(buffers), lift, checked, apart
        self._unknown, self._twin = unknown, twin
        self.changed: set[str] = set()

    @cached_property
    def _names(self) -> dict[int, str]:
        return {id(p): name for name, p in self.params.items()}

    def prefix(self, given: Mapping[str, Tensor], has_statistics: bool) -> str | None:
        """What the names of a module's tensors have before them in `params`; None if `given` is not made of `params`.

        Raises:
            ValueError: `given` is computed from `params` under other names, and the module evaluates with running statistics.
        """
        if given is self.params:
            return ""
        for name, tensor in given.items():
            found = self._names.get(id(tensor))
            if found is not None:
                return found.removesuffix(name) if found.endswith(name) else f"{found}/"
        if not any(tensor.requires_grad or torch._C._functorch.is_functorch_wrapped_tensor(tensor) for tensor in given.values()):
            return None
        if given.keys() <= self.params.keys():
            return ""
        if self.buffers and has_statistics:
            raise ValueError(
                f"a function made by hn.functional was called with tensors {sorted(given)[:3]} that were computed from params "
                f"{sorted(self.params)[:3]} under other names: its running statistics cannot be told. Keep the names, or make it with "
                "hn.functional(module, buffers='fixed')"
            )
        return None

    def read(self, key: str, own: Tensor) -> Tensor | None:
        """A buffer that a step has changed; None if there is none that fits."""
        found = self.buffers.get(key)
        return found if found is not None and found.shape == own.shape and found.dtype == own.dtype else None

    def check_read(self, key: str) -> None:
        """Refuse to normalize by statistics that are not known, or that a training loss has changed itself: they are constants to it.

        Raises:
            NotImplementedError: they are; the message names them.
        """
        if key in self._unknown:
            raise NotImplementedError(
                f"outer_loss normalizes by {key!r}, which method='implicit' does not carry from train_loss: use method='reverse' or "
                "'forward', train with the module in evaluation mode, or make it with hn.functional(module, buffers='fixed')"
            )
        if self._apart and key in self.changed:
            raise NotImplementedError(
                f"train_loss changes {key!r} in training mode, and then uses it in evaluation mode: normalize by the batch in both, or use "
                "hn.functional(module, buffers='fixed') for the second"
            )

    def twin(self, tensor: Tensor) -> Tensor | None:
        """The tensor of the same value through which a power iteration on `tensor` is differentiated; None: it is not.

        Raises:
            NotImplementedError: it must be, but `tensor` is computed from `params`.
        """
        if self._twin is None:
            return None
        name = self._names.get(id(tensor))
        if name is None and (tensor.requires_grad or torch._C._functorch.is_functorch_wrapped_tensor(tensor)):
            raise NotImplementedError(
                "spectral_norm of a weight that is computed from params cannot be differentiated twice: give the function that "
                "hn.functional made the tensors themselves, or put the module into evaluation mode"
            )
        return None if name is None else self._twin(name)


class _Plain:
    """In the place of torch.utils.checkpoint.CheckpointFunction."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:  # noqa: ARG004
        return function(*args)


def _plain(*args: Any, **kwargs: Any) -> Iterator[None]:  # noqa: ARG001
    """In the place of what torch.utils.checkpoint does around the function."""
    yield


_LOCK = threading.Lock()
_REPLACED = {"CheckpointFunction": _Plain, "_checkpoint_without_reentrant_generator": _plain}
_kept: dict[str, Any] = {}
_inside = [0]


@contextmanager
def no_recomputation() -> Iterator[None]:
    """Let `torch.utils.checkpoint` keep activations instead of computing them again in backward.

    Then the parameters that a module was called with are its own again, and derivatives would be taken at these.
    """
    with _LOCK:
        if not _inside[0]:
            for name, plain in _REPLACED.items():
                _kept[name] = getattr(torch.utils.checkpoint, name)
                setattr(torch.utils.checkpoint, name, plain)
        _inside[0] += 1
    try:
        yield
    finally:
        with _LOCK:
            _inside[0] -= 1
            if not _inside[0]:
                for name, original in _kept.items():
                    setattr(torch.utils.checkpoint, name, original)
