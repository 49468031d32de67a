"""`WiSEFT`: weights between the pre-trained and the fine-tuned ones, by a share that is learned from a validation loss."""

import functools
from typing import Any

from torch import Tensor

import hyperopt_nested as hn
from ftp.anchored import Anchors, Exclude
from ftp.validated import ValidatedOptimizer


def _init(param: Tensor, *, anchor: hn.typing.Anchor = "start") -> hn.typing.State:
    return hn.rules.keep_anchor(param, anchor)


@hn.combinator(_init, separable="element")
def interpolate(
    param: Tensor, grad: Tensor, state: hn.typing.State, step: hn.typing.Step, *, share: Tensor = hn.Interval(1.0, 0.0, 1.0)
) -> tuple[Tensor, hn.typing.State]:
    r"""The optimizer, and the way back to the anchor in part: \(\theta_0 + \alpha (\theta' - \theta_0)\).

    Weights in between are those of WiSE-FT (Wortsman et al. 2022, arXiv 2109.01903, equation 1).

    Args:
        share: \(\alpha\) in [0, 1]; 1 is the optimizer alone.
        anchor: \(\theta_0\): "start", the values before the first step, "zero", or a tensor.

    Example:
        >>> import hyperopt_nested as hn
        >>> import ftp
        >>> ftp.interpolate(hn.sgd(lr=0.1), share=hn.learn(0.5)).learned
        {'share': learn(0.5)}
    """
    new = step(param, grad)
    return new - (1 - share) * hn.rules.displacement(new, state), state


class WiSEFT(ValidatedOptimizer):
    """Interpolation between pre-trained and fine-tuned weights (WiSE-FT, arXiv 2109.01903) with a learned share.

    It stands beside the optimizer that trains. After training, `step` sets every tensor to `anchor + share * (tensor - anchor)`.
    The share starts at 1, the fine-tuned weights, and is learned by Adam from a validation loss.

    Args:
        params: `model.named_parameters()`, tensors, or groups of either; other values in a group are ignored.
        per: one share for the "model", or one a "tensor".
        lr: learning rate of the shares.
        updates: how often a `step` evaluates the validation loss and steps the shares.
        exclude: what is left alone, as a new head is: names, glob patterns of names, modules or tensors.
        anchor: the pre-trained weights: None, the values at construction; a mapping from names to tensors, such as a state dict, which is
            copied; or "zero".

    Raises:
        ValueError: `per`, `lr` or `updates` is outside its domain, an entry of `exclude` matches nothing, or an anchor is missing or of
            another shape. The message names the argument.

    Example:
        >>> import torch
        >>> from ftp import WiSEFT
        >>> model = torch.nn.Linear(2, 1)
        >>> wise = WiSEFT(model.named_parameters(), updates=20)
        >>> with torch.no_grad():  # training
        ...     _ = [p.add_(1.0) for p in model.parameters()]
        >>> def validation():
        ...     loss = (model(torch.ones(1, 2)) - 1.0).square().mean()
        ...     loss.backward()
        ...     return loss
        >>> loss = wise.step(validation)
        >>> wise.learned()["share"] < 1
        True
    """

    def __init__(
        self,
        params: Any,
        *,
        per: hn.typing.Per = "model",
        lr: float = 1e-2,
        updates: int = 100,
        exclude: Exclude = (),
        anchor: Anchors = None,
    ) -> None:
        if per not in ("model", "tensor"):
            raise ValueError(f"per={per!r} must be 'model' or 'tensor'")
        around = functools.partial(interpolate, share=hn.learn(1.0, by=hn.adam(lr=lr), per=per))
        super().__init__(params, around, updates=updates, exclude=exclude, anchor=anchor)
