"""Optimizers that stand beside the one that trains, and learn from a validation loss how far its result goes from the anchors."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import hyperopt_nested as hn
from ftp.anchored import AnchoredOptimizer, Anchors, Exclude
from ftp.rule import identity


class ValidatedOptimizer(AnchoredOptimizer):
    """What `TPGM` and `WiSEFT` share: weights that training has made are changed by a combinator whose hyper learns from a validation loss.

    Args:
        params: `model.named_parameters()`, tensors, or groups of either; other values in a group are ignored.
        around: as `AnchoredOptimizer`; the optimizer inside is `identity()`.
        updates: how often a `step` evaluates the validation loss and steps the learned values.
        exclude: as `AnchoredOptimizer`.
        anchor: as `AnchoredOptimizer`, but None is the values at construction.

    Raises:
        ValueError: `updates` is no whole number from 1 on.
    """

    begins_at_first_step = False  # its first step comes after training

    def __init__(self, params: Any, around: Callable[..., hn.Optimizer], *, updates: int, exclude: Exclude, anchor: Anchors) -> None:
        if not isinstance(updates, int) or isinstance(updates, bool) or updates < 1:
            raise ValueError(f"updates={updates!r} must be a whole number, at least 1: each steps what is learned once")
        self._updates = updates
        how: dict[str, Any] = {"learn_from": "validation", "backend": "reference"}  # which replaces state, so `step` can put it back
        super().__init__(params, identity(), around, exclude=exclude, anchor=anchor, **how)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of tensors to project; other values in it are ignored, since they are meant for the optimizer that trains."""
        super().add_param_group({"params": param_group["params"]})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]  # the closure has the loss
        """Learn from a validation loss, and change the weights with what was learned.

        Each of the `updates` changes the same weights, those that the model had before this call, with the present values, and steps
        these with the gradient that the validation loss has there. At the end these weights are changed once more. Afterwards no
        tensor has a gradient. If something raises, weights and learned values are what they were before.

        Args:
            closure: evaluates the validation loss of the model, calls `backward` and returns the loss. Each call may take another
                batch. It need not clear gradients.

        Returns:
            The last loss.

        Raises:
            ValueError: there is no closure.
        """
        if closure is None:
            raise ValueError("closure=None: step needs a function that evaluates the validation loss, calls backward and returns the loss")
        self.begin()
        states = self.rule_states()  # of what is excluded, empty
        projected = {name: p for name, p in self.named_parameters() if states.get(name) and p.requires_grad and p.numel()}
        tuned = {p: p.detach().clone() for p in projected.values()}
        before = {  # single numbers are copied, since steps are counted in place
            p: {key: entry.clone() if isinstance(entry, Tensor) and entry.ndim == 0 else entry for key, entry in entries.items()}
            for p, entries in self.state.items()
        }
        try:
            self._start(projected)
            for _ in range(self._updates):
                self._project(tuned)
                with torch.enable_grad():
                    loss = closure()
                self.hyper_step()
            self._project(tuned)
        except BaseException:
            for p, value in tuned.items():
                p.copy_(value)
            self.state.update(before)
            raise
        finally:
            self.zero_grad()
        return loss

    def _start(self, params: dict[str, Tensor]) -> None:
        """Set learned values of tensors that were never changed. `params` is what `step` is about to change, by name."""

    def _project(self, tuned: dict[Tensor, Tensor]) -> None:
        """Give the tensors the projections of `tuned`, and clear all gradients."""
        self.zero_grad()
        for p, value in tuned.items():
            p.copy_(value)
            p.grad = torch.zeros_like(p)
        self.update()
        self.zero_grad()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_updates": self._updates}
