"""`AdamP` and `SGDP`: AdamW and SGD with Fast Trainable Projection, as drop-in optimizers."""

import functools
from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import Tensor

import hyperopt_nested as hn
from ftp.anchored import AnchoredOptimizer, Anchors, Exclude, full_tensor
from ftp.rule import FLOOR, Radius, projection


class FTPOptimizer(AnchoredOptimizer):
    """FTP around any optimizer of the engine, with exclusions and anchors; `AdamP` and `SGDP` are instances.

    Args:
        params: `model.named_parameters()`, tensors, or groups of either.
        base: the optimizer that is projected.
        k: annealing of positive radius gradients, in [0, 1]: 1 projects most strongly; with 0 a radius shrinks only with the largest
            row norm, its upper bound.
        radius_lr: learning rate of the radii, >= 0, or `hn.learn(...)`.
        radius: a variant of the radii; see `Radius`. The default is the published algorithm.
        exclude: what is optimized without projection, as a new head is: names, glob patterns of names, modules or tensors.
        anchor: what the weights stay near: None, the values that each tensor has before its first step, so that pre-trained weights may
            also be loaded after construction; a mapping from names to tensors, such as a state dict, which is copied; or "zero", which
            takes no memory, for LoRA factors. With a mapping, weights may have moved already: each radius whose start is not given
            starts at the distance of the tensor from its anchor.
        anchor_decay: in [0, 1]: after each step, `anchor = anchor_decay * anchor + (1 - anchor_decay) * weights`; 1, the default, is a
            fixed anchor. Anchors that move are kept in float32 at least.
        saturation: derivative with respect to the radius where the projection is inactive; "straight-through" as published.
        backend: what runs the steps, with the same results up to rounding; see `hyperopt_nested.Backend`.
        displacement_dtype: the dtype of the last displacement, which the radius learns from: torch.bfloat16 halves its memory, and rounds
            the radius's gradient. None is the parameter's.
        state_dtype: the dtype of the moments that `base` keeps; None is the parameter's, or float32 if that is wider; of SGD, the
            parameter's.
        rounding: how parameters and moments in bfloat16 are rounded: "nearest", or "stochastic": up or down at random, which keeps small
            updates in expectation.
        anchor_dtype: the dtype of the anchors, which are rounded to it; None is the parameter's.
        anchor_device: where anchors are kept, and fetched from in each step: "cpu" saves a GPU's memory. None is with the parameter.

    Raises:
        ValueError: `k` or `radius_lr` is outside its domain, an entry of `exclude` matches nothing, or an anchor is missing or of another
            shape. The message names the entry or the tensor.

    Example:
        >>> import torch, hyperopt_nested as hn
        >>> from ftp import FTPOptimizer
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
        >>> params, base = model.named_parameters(), hn.lion(lr=1e-4)
        >>> opt = FTPOptimizer(params, base, exclude=model[1])
        >>> list(opt.learned())
        ['radius/0.weight', 'radius/0.bias']
    """

    pinned_at_ends = frozenset({"radius"})  # where gradients want the anchor
    _start_at_distance = False  # where radii start, if anchors are not what the weights are

    def __init__(
        self,
        params: Any,
        base: hn.Optimizer,
        *,
        k: float = 1.0,
        radius_lr: float | hn.Learn = 1e-2,
        radius: Radius = Radius(),
        exclude: Exclude = (),
        anchor: Anchors = None,
        anchor_decay: float = 1.0,
        saturation: hn.typing.Saturation = "straight-through",
        backend: hn.typing.Backend = "auto",
        displacement_dtype: torch.dtype | None = None,
        state_dtype: torch.dtype | None = None,
        rounding: hn.typing.Rounding = "nearest",
        anchor_dtype: torch.dtype | None = None,
        anchor_device: str | torch.device | None = None,
    ) -> None:
        for argument, dtype in (("displacement_dtype", displacement_dtype), ("state_dtype", state_dtype), ("anchor_dtype", anchor_dtype)):
            if not (dtype is None or isinstance(dtype, torch.dtype)):
                raise TypeError(f"{argument}={dtype!r} ({type(dtype).__name__}) must be a dtype, such as torch.bfloat16, or None")
        how: dict[str, Any] = {"anchor_decay": anchor_decay, "anchor_dtype": anchor_dtype, "anchor_device": anchor_device}
        around = functools.partial(projection(k, radius_lr, radius), saturation=saturation, **how)
        kept: dict[str, Any] = {"horizon": hn.OneStep(dtype=displacement_dtype), "state_dtype": state_dtype, "rounding": rounding}
        self._start_at_distance = isinstance(anchor, Mapping) and radius.start is None
        super().__init__(params, base, around, exclude=exclude, anchor=anchor, backend=backend, **kept)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_start_at_distance": self._start_at_distance}

    def began(self, names: Set[str]) -> None:
        """Let radii start at the distances of the weights from anchors that were given."""
        super().began(names)
        if not self._start_at_distance:
            return
        tensors, states, learned, start = dict(self.named_parameters()), self.rule_states(), self.learned_tensors(), dict[str, float]()
        for name in sorted(names):  # in one order: of sharded tensors, processes compute norms together
            if "anchor" in (state := states[name]):  # else it is excluded
                moved = full_tensor(hn.rules.displacement(tensors[name].detach(), state))
                norms = hn.mars.norms(moved) / full_tensor(state.get("anchor_norm", torch.ones(())))
                value = f"radius/{name}" if f"radius/{name}" in learned else "radius"
                start[value] = max(start.get(value, FLOOR), *norms[norms.isfinite()].flatten().tolist(), FLOOR)
        for value, distance in start.items():
            if distance > FLOOR:
                self.set_hyper(value, distance)


class AdamP(FTPOptimizer):
    """AdamW with Fast Trainable Projection (arXiv 2310.19182): a drop-in for `torch.optim.AdamW`.

    Args:
        params: as `FTPOptimizer`; with names, `exclude` and `anchor` can refer to them.
        lr: learning rate, a number, a tensor of one number, or `hn.learn(...)`; so for the next three.
        betas: decay rates of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled; 0 by default, as published, since the projection already regularises (AdamW has 1e-2).
        amsgrad: use the largest second moment so far.
        maximize: ascend.
        k: as `FTPOptimizer`.
        radius_lr: as `FTPOptimizer`.
        radius: as `FTPOptimizer`.
        exclude: as `FTPOptimizer`.
        anchor: as `FTPOptimizer`.
        anchor_decay: as `FTPOptimizer`.
        saturation: as `FTPOptimizer`.
        backend: as `FTPOptimizer`.
        displacement_dtype: as `FTPOptimizer`.
        state_dtype: as `FTPOptimizer`.
        rounding: as `FTPOptimizer`.
        anchor_dtype: as `FTPOptimizer`.
        anchor_device: as `FTPOptimizer`.

    Raises:
        ValueError: as `FTPOptimizer`.

    Example:
        >>> import torch
        >>> from ftp import AdamP
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
        >>> opt = AdamP(model.named_parameters(), lr=1e-3, exclude=["1.*"])
        >>> sorted(opt.hypers()["radius"])
        ['0.bias', '0.weight']
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor | hn.Learn = 1e-3,
        betas: tuple[float | Tensor | hn.Learn, float | Tensor | hn.Learn] = (0.9, 0.999),
        eps: float | Tensor | hn.Learn = 1e-8,
        weight_decay: float | Tensor | hn.Learn = 0.0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        k: float = 1.0,
        radius_lr: float | hn.Learn = 1e-2,
        radius: Radius = Radius(),
        exclude: Exclude = (),
        anchor: Anchors = None,
        anchor_decay: float = 1.0,
        saturation: hn.typing.Saturation = "straight-through",
        backend: hn.typing.Backend = "auto",
        displacement_dtype: torch.dtype | None = None,
        state_dtype: torch.dtype | None = None,
        rounding: hn.typing.Rounding = "nearest",
        anchor_dtype: torch.dtype | None = None,
        anchor_device: str | torch.device | None = None,
    ) -> None:
        base = hn.adamw(lr=lr, betas=betas, eps=eps, weight_decay=0.0, amsgrad=amsgrad, maximize=maximize)
        base = base.replace(weight_decay=weight_decay)
        kept: dict[str, Any] = {"displacement_dtype": displacement_dtype, "state_dtype": state_dtype, "rounding": rounding}
        kept |= {"anchor_decay": anchor_decay, "anchor_dtype": anchor_dtype, "anchor_device": anchor_device}
        kept |= {"k": k, "radius_lr": radius_lr, "radius": radius, "saturation": saturation}
        super().__init__(params, base, exclude=exclude, anchor=anchor, backend=backend, **kept)


class SGDP(FTPOptimizer):
    """SGD with Fast Trainable Projection (arXiv 2310.19182): a drop-in for `torch.optim.SGD`.

    Args:
        params: as `FTPOptimizer`; with names, `exclude` and `anchor` can refer to them.
        lr: learning rate, a number, a tensor of one number, or `hn.learn(...)`; so for the next three.
        momentum: momentum factor.
        dampening: dampening of the momentum.
        weight_decay: coupled: added to the gradient.
        nesterov: Nesterov's momentum.
        maximize: ascend.
        k: as `FTPOptimizer`.
        radius_lr: as `FTPOptimizer`.
        radius: as `FTPOptimizer`.
        exclude: as `FTPOptimizer`.
        anchor: as `FTPOptimizer`.
        anchor_decay: as `FTPOptimizer`.
        saturation: as `FTPOptimizer`.
        backend: as `FTPOptimizer`.
        displacement_dtype: as `FTPOptimizer`.
        state_dtype: as `FTPOptimizer`.
        rounding: as `FTPOptimizer`.
        anchor_dtype: as `FTPOptimizer`.
        anchor_device: as `FTPOptimizer`.

    Raises:
        ValueError: as `FTPOptimizer`.

    Example:
        >>> import torch
        >>> from ftp import SGDP
        >>> model = torch.nn.Linear(4, 2)
        >>> opt = SGDP(model.named_parameters(), lr=0.1, momentum=0.9, exclude="bias")
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor | hn.Learn = 1e-3,
        momentum: float | Tensor | hn.Learn = 0.0,
        dampening: float | Tensor | hn.Learn = 0.0,
        weight_decay: float | Tensor | hn.Learn = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        k: float = 1.0,
        radius_lr: float | hn.Learn = 1e-2,
        radius: Radius = Radius(),
        exclude: Exclude = (),
        anchor: Anchors = None,
        anchor_decay: float = 1.0,
        saturation: hn.typing.Saturation = "straight-through",
        backend: hn.typing.Backend = "auto",
        displacement_dtype: torch.dtype | None = None,
        state_dtype: torch.dtype | None = None,
        rounding: hn.typing.Rounding = "nearest",
        anchor_dtype: torch.dtype | None = None,
        anchor_device: str | torch.device | None = None,
    ) -> None:
        base = hn.sgd(lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov, maximize=maximize)
        kept: dict[str, Any] = {"displacement_dtype": displacement_dtype, "state_dtype": state_dtype, "rounding": rounding}
        kept |= {"anchor_decay": anchor_decay, "anchor_dtype": anchor_dtype, "anchor_device": anchor_device}
        kept |= {"k": k, "radius_lr": radius_lr, "radius": radius, "saturation": saturation}
        super().__init__(params, base, exclude=exclude, anchor=anchor, backend=backend, **kept)
