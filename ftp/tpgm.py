"""`TPGM`: projections whose radii are learned from a validation loss, beside any optimizer."""

import functools
from typing import Any, Literal

from torch import Tensor

import hyperopt_nested as hn
from ftp.anchored import Anchors, Exclude, full_tensor
from ftp.rule import largest_norm
from ftp.validated import ValidatedOptimizer

_SMALLEST = 1e-8
_BALLS = {"mars": hn.mars, "l2": hn.frobenius}


class TPGM(ValidatedOptimizer):
    """Trainable Projected Gradient Method (arXiv 2303.10720, algorithm 1): it stands beside the optimizer that trains the model.

    That one trains as ever. Now and then, after each epoch for example, `step` projects every tensor into a ball around its anchor.
    The radii, one a tensor, are learned by Adam from a validation loss. Each starts, at the first `step`, at half of the norm by which
    its tensor has moved by then (with "mars": half of the smallest row's), and is kept between 1e-8 and the largest norm.

    Args:
        params: `model.named_parameters()`, tensors, or groups of either; other values in a group are ignored. What is frozen when this is
            made is not projected.
        norm: the ball: "mars", the largest row sum of absolute changes, or "l2", the Euclidean norm of the tensor.
        lr: learning rate of the radii.
        updates: how often a `step` evaluates the validation loss and steps the radii.
        exclude: what is left alone, as a new head is: names, glob patterns of names, modules or tensors.
        anchor: what the weights stay near: None, the values at construction (of tensors added later, at that time), so make this when
            the pre-trained weights are loaded and training has not begun; a mapping from names to tensors, such as a state dict, which is
            copied; or "zero", which takes no memory, for LoRA factors.

    Raises:
        ValueError: `norm`, `lr` or `updates` is outside its domain, an entry of `exclude` matches nothing, or an anchor is missing or
            of another shape. The message names the argument.

    Example:
        >>> import torch
        >>> from ftp import TPGM
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
        >>> opt = torch.optim.AdamW(model.parameters(), lr=1e-2)
        >>> tpgm = TPGM(model.named_parameters(), updates=5, exclude=model[1])
        >>> x, held_out = torch.randn(16, 4), torch.randn(8, 4)
        >>> def validation():
        ...     loss = (model(held_out) - 1).square().mean()
        ...     loss.backward()
        ...     return loss
        >>> for epoch in range(3):
        ...     opt.zero_grad()
        ...     (model(x) - 1).square().mean().backward()
        ...     opt.step()
        ...     loss = tpgm.step(validation)
        >>> sorted(tpgm.hypers()["radius"])
        ['0.bias', '0.weight']
    """

    pinned_at_ends = frozenset({"radius"})  # where the validation loss wants the anchor

    def __init__(
        self,
        params: Any,
        *,
        norm: Literal["mars", "l2"] = "mars",
        lr: float = 1e-2,
        updates: int = 1,
        exclude: Exclude = (),
        anchor: Anchors = None,
    ) -> None:
        if norm not in _BALLS:
            raise ValueError(f"norm={norm!r} must be {' or '.join(map(repr, _BALLS))}")
        self._norm = norm
        radius = hn.learn(1.0, by=hn.adam(lr=lr), per="tensor", bounds=(_SMALLEST, largest_norm))
        around = functools.partial(hn.project, radius=radius, onto=_BALLS[norm], saturation="exact")
        super().__init__(params, around, updates=updates, exclude=exclude, anchor=anchor)

    def _start(self, params: dict[str, Tensor]) -> None:
        """Set the radii of tensors that were never projected."""
        states = self.rule_states()
        for name, param in params.items():
            if not states[name]["largest_norm"]:
                moved = full_tensor(hn.rules.displacement(param.to(hn.rules.state_dtype(param)), states[name]))
                smallest = _BALLS[self._norm].norms(moved.nan_to_num(0, 0, 0)).amin().item()
                self.set_hyper(f"radius/{name}", max(smallest / 2, _SMALLEST))

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_norm": self._norm}
