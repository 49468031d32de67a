"""`AdamP` and `SGDP`: AdamW and SGD with Fast Trainable Projection, as drop-in optimizers."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn

import hyperopt_nested as hn
from ftp.rule import ftp_radius

Exclude = Iterable[str | nn.Module | Tensor] | str | nn.Module | Tensor
Anchors = Mapping[str, Tensor] | Literal["zero"] | None


@dataclass(frozen=True)
class _Choose:
    """The optimizer of a tensor: projected around its anchor, unless it is excluded."""

    base: hn.Optimizer
    projected: hn.Optimizer
    names: frozenset[str]
    patterns: tuple[str, ...]
    anchors: Mapping[str, Tensor] | None
    how: Mapping[str, Any]

    def __call__(self, name: str, tensor: Tensor) -> hn.Optimizer:
        if name in self.names or any(fnmatchcase(name, pattern) for pattern in self.patterns):
            return self.base
        if self.anchors is None:
            return self.projected
        if name not in self.anchors:
            raise ValueError(f"anchor has no entry for parameter {name!r}: add one, or exclude the parameter")
        anchor = self.anchors[name]
        if not isinstance(anchor, Tensor):
            raise TypeError(f"anchor[{name!r}] is a {type(anchor).__name__}; it must be a tensor of the parameter's shape")
        if not bool(torch.isfinite(anchor).all()):
            raise ValueError(f"anchor[{name!r}] has entries that are not finite: give finite weights, or exclude the parameter")
        if anchor.shape != tensor.shape:
            raise ValueError(
                f"anchor[{name!r}] has shape {tuple(anchor.shape)}, the parameter {tuple(tensor.shape)}: they must be equal; "
                "exclude a parameter that is new, such as a head"
            )
        radius = self.projected.settings["radius"]
        return hn.project(self.base, radius=radius, anchor=anchor, **self.how)


class ProjectedOptimizer(hn.HyperOptimizer):
    """An optimizer of the engine with a learned projection of every tensor, and exclusions and anchors: what FTP and TPGM share.

    Args:
        params: as `FTPOptimizer`; so for what is not said here.
        base: the optimizer that is projected.
        radius: the radius, learned per tensor.
        onto: the ball.
        exclude: what is not projected.
        anchor: what the weights stay near.
        saturation: derivative with respect to the radius where the projection is inactive.
        backend: what runs the steps.
        learn_from: which loss the radius learns from.
        displacement_dtype: what the last displacement, scaled, is kept in.
        state_dtype: what the base keeps its moments in.
        anchor_dtype: what anchors are kept in.
        anchor_device: where anchors are kept.
    """

    def __init__(
        self,
        params: Any,
        base: hn.Optimizer,
        radius: hn.Learn,
        *,
        onto: hn.typing.Ball,
        exclude: Exclude,
        anchor: Anchors,
        saturation: hn.typing.Saturation,
        backend: hn.typing.Backend,
        learn_from: Literal["training", "validation"] = "training",
        displacement_dtype: torch.dtype | None = None,
        state_dtype: torch.dtype | None = None,
        anchor_dtype: torch.dtype | None = None,
        anchor_device: str | torch.device | None = None,
    ) -> None:
        if isinstance(anchor, str) and anchor != "zero":
            raise ValueError(f"anchor={anchor!r} must be None, 'zero', or a mapping from names to tensors")
        if not (anchor is None or isinstance(anchor, (str, Mapping))):
            kind = type(anchor).__name__
            raise TypeError(f"anchor has type {kind}; it must be None, 'zero', or a mapping from names to tensors, such as a state dict")
        for argument, dtype in (("displacement_dtype", displacement_dtype), ("state_dtype", state_dtype), ("anchor_dtype", anchor_dtype)):
            if not (dtype is None or isinstance(dtype, torch.dtype)):
                raise TypeError(f"{argument}={dtype!r} ({type(dtype).__name__}) must be a dtype, such as torch.bfloat16, or None")
        centre: hn.typing.Anchor = "zero" if isinstance(anchor, str) else "start"
        how: dict[str, Any] = {"onto": onto, "saturation": saturation, "anchor_dtype": anchor_dtype, "anchor_device": anchor_device}
        projected = hn.project(base, radius=radius, anchor=centre, **how)
        groups = _groups(params)
        anchors = anchor if isinstance(anchor, Mapping) else None
        choose = _Choose(base, projected, *_resolve(exclude, list(_named(groups))), anchors, how)
        kept: dict[str, Any] = {"horizon": hn.OneStep(dtype=displacement_dtype), "state_dtype": state_dtype}
        super().__init__(groups, choose, learn_from=learn_from, backend=backend, **kept)


class FTPOptimizer(ProjectedOptimizer):
    """FTP around any optimizer of the engine, with exclusions and anchors; `AdamP` and `SGDP` are instances.

    Args:
        params: `model.named_parameters()`, tensors, or groups of either.
        base: the optimizer that is projected.
        k: annealing of positive radius gradients, in [0, 1]: 1 projects most strongly; with 0 a radius shrinks only with the largest
            row norm, its upper bound.
        radius_lr: learning rate of the radii, >= 0, or `hn.learn(...)`.
        exclude: what is optimized without projection, as a new head is: names, glob patterns of names, modules or tensors.
        anchor: what the weights stay near: None, the values that each tensor has before its first step, so that pre-trained weights may
            also be loaded after construction; a mapping from names to tensors, such as a state dict, which is copied; or "zero", which
            takes no memory, for LoRA factors.
        saturation: derivative with respect to the radius where the projection is inactive; "straight-through" as published.
        backend: what runs the steps, with the same results up to rounding; see `hyperopt_nested.Backend`.
        displacement_dtype: the dtype of the last displacement, which the radius learns from: torch.bfloat16 halves its memory, and rounds
            the radius's gradient. None is the parameter's.
        state_dtype: the dtype of the moments that `base` keeps; None is the parameter's, or float32 if that is wider; of SGD, the
            parameter's.
        anchor_dtype: the dtype of the anchors, which are rounded to it; None is the parameter's.
        anchor_device: where anchors are kept, and fetched from in each step: "cpu" saves a GPU's memory. None is with the parameter.

    Raises:
        ValueError: `k` or `radius_lr` is outside its domain, an entry of `exclude` matches nothing, or an anchor is missing or of another
            shape. The message names the entry or the tensor.
    """

    def __init__(
        self,
        params: Any,
        base: hn.Optimizer,
        *,
        k: float = 1.0,
        radius_lr: float | hn.Learn = 1e-2,
        exclude: Exclude = (),
        anchor: Anchors = None,
        saturation: hn.typing.Saturation = "straight-through",
        backend: hn.typing.Backend = "auto",
        displacement_dtype: torch.dtype | None = None,
        state_dtype: torch.dtype | None = None,
        anchor_dtype: torch.dtype | None = None,
        anchor_device: str | torch.device | None = None,
    ) -> None:
        how: dict[str, Any] = {"exclude": exclude, "anchor": anchor, "saturation": saturation, "backend": backend}
        kept: dict[str, Any] = {"displacement_dtype": displacement_dtype, "state_dtype": state_dtype}
        kept |= {"anchor_dtype": anchor_dtype, "anchor_device": anchor_device}
        super().__init__(params, base, ftp_radius(k, radius_lr), onto=hn.mars, **how, **kept)


class AdamP(FTPOptimizer):
    """AdamW with Fast Trainable Projection (arXiv 2310.19182): a drop-in for `torch.optim.AdamW`.

    Args:
        params: as `FTPOptimizer`; with names, `exclude` and `anchor` can refer to them.
        lr: learning rate, or `hn.learn(...)`; so for the next three.
        betas: decay rates of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled; 0 by default, as published, since the projection already regularises (AdamW has 1e-2).
        amsgrad: use the largest second moment so far.
        maximize: ascend.
        k: as `FTPOptimizer`.
        radius_lr: as `FTPOptimizer`.
        exclude: as `FTPOptimizer`.
        anchor: as `FTPOptimizer`.
        saturation: as `FTPOptimizer`.
        backend: as `FTPOptimizer`.
        displacement_dtype: as `FTPOptimizer`.
        state_dtype: as `FTPOptimizer`.
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
        lr: float | hn.Learn = 1e-3,
        betas: tuple[float | hn.Learn, float | hn.Learn] = (0.9, 0.999),
        eps: float | hn.Learn = 1e-8,
        weight_decay: float | hn.Learn = 0.0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        k: float = 1.0,
        radius_lr: float | hn.Learn = 1e-2,
        exclude: Exclude = (),
        anchor: Anchors = None,
        saturation: hn.typing.Saturation = "straight-through",
        backend: hn.typing.Backend = "auto",
        displacement_dtype: torch.dtype | None = None,
        state_dtype: torch.dtype | None = None,
        anchor_dtype: torch.dtype | None = None,
        anchor_device: str | torch.device | None = None,
    ) -> None:
        base = hn.adamw(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad, maximize=maximize)
        kept: dict[str, Any] = {"displacement_dtype": displacement_dtype, "state_dtype": state_dtype}
        kept |= {"anchor_dtype": anchor_dtype, "anchor_device": anchor_device}
        super().__init__(
            params, base, k=k, radius_lr=radius_lr, exclude=exclude, anchor=anchor, saturation=saturation, backend=backend, **kept
        )


class SGDP(FTPOptimizer):
    """SGD with Fast Trainable Projection (arXiv 2310.19182): a drop-in for `torch.optim.SGD`.

    Args:
        params: as `FTPOptimizer`; with names, `exclude` and `anchor` can refer to them.
        lr: learning rate, or `hn.learn(...)`; so for the next three.
        momentum: momentum factor.
        dampening: dampening of the momentum.
        weight_decay: coupled: added to the gradient.
        nesterov: Nesterov's momentum.
        maximize: ascend.
        k: as `FTPOptimizer`.
        radius_lr: as `FTPOptimizer`.
        exclude: as `FTPOptimizer`.
        anchor: as `FTPOptimizer`.
        saturation: as `FTPOptimizer`.
        backend: as `FTPOptimizer`.
        displacement_dtype: as `FTPOptimizer`.
        state_dtype: as `FTPOptimizer`.
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
        lr: float | hn.Learn = 1e-3,
        momentum: float | hn.Learn = 0.0,
        dampening: float | hn.Learn = 0.0,
        weight_decay: float | hn.Learn = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        k: float = 1.0,
        radius_lr: float | hn.Learn = 1e-2,
        exclude: Exclude = (),
        anchor: Anchors = None,
        saturation: hn.typing.Saturation = "straight-through",
        backend: hn.typing.Backend = "auto",
        displacement_dtype: torch.dtype | None = None,
        state_dtype: torch.dtype | None = None,
        anchor_dtype: torch.dtype | None = None,
        anchor_device: str | torch.device | None = None,
    ) -> None:
        base = hn.sgd(lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov, maximize=maximize)
        kept: dict[str, Any] = {"displacement_dtype": displacement_dtype, "state_dtype": state_dtype}
        kept |= {"anchor_dtype": anchor_dtype, "anchor_device": anchor_device}
        super().__init__(
            params, base, k=k, radius_lr=radius_lr, exclude=exclude, anchor=anchor, saturation=saturation, backend=backend, **kept
        )


def _groups(params: Any) -> list[dict[str, Any]]:
    """Parameters as a list of groups, iterators read; none where there is nothing, which torch refuses.

    Raises:
        TypeError: `params` is a tensor, a module or otherwise none.
    """
    if isinstance(params, nn.Module):
        raise TypeError(f"params is a module ({type(params).__name__}): give its parameters, model.named_parameters()")
    if isinstance(params, Tensor):
        raise TypeError("params is a tensor; it must be an iterable of tensors, of (name, tensor) pairs or of groups: give [tensor]")
    if isinstance(params, (str, Mapping)) or not isinstance(params, Iterable):
        raise TypeError(f"params={params!r} ({type(params).__name__}) must be an iterable of tensors, (name, tensor) pairs or groups")
    entries = list(params)
    if not entries:
        return []
    if not isinstance(entries[0], dict):
        return [{"params": entries}]
    if odd := [group for group in entries if not isinstance(group, dict) or "params" not in group]:
        raise ValueError(f"a group must be a dict with 'params', such as {{'params': [...], 'lr': 1e-3}}; {odd[0]!r} is not")
    return [{**group, "params": [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])} for group in entries]


def _named(groups: list[dict[str, Any]]) -> Iterator[tuple[str, Tensor]]:
    """Tensors with the names that `HyperOptimizer` gives them."""
    for index, group in enumerate(groups):
        for i, entry in enumerate(group["params"]):
            yield entry if isinstance(entry, tuple) else (f"{index}.{i}", entry)


def _resolve(exclude: Exclude, named: list[tuple[str, Tensor]]) -> tuple[frozenset[str], tuple[str, ...]]:
    """Names of excluded tensors, and patterns; every entry must match a tensor."""
    if not isinstance(exclude, (str, nn.Module, Tensor, Iterable)):
        kind = type(exclude).__name__
        raise TypeError(f"exclude={exclude!r} ({kind}) must be names, glob patterns, modules or tensors; () excludes nothing")
    entries = [exclude] if isinstance(exclude, (str, nn.Module, Tensor)) else list(exclude)
    names: set[str] = set()
    for entry in entries:
        if isinstance(entry, str):
            matched = [name for name, _ in named if fnmatchcase(name, entry)]
            shown = repr(entry)
        elif isinstance(entry, (nn.Module, Tensor)):
            tensors = {id(p) for p in entry.parameters()} if isinstance(entry, nn.Module) else {id(entry)}
            matched = [name for name, tensor in named if id(tensor) in tensors]
            shown = f"a {type(entry).__name__}"
        else:
            raise TypeError(f"exclude has {entry!r} ({type(entry).__name__}); give names, glob patterns, modules or tensors")
        if not matched:
            some = ", ".join(name for name, _ in named[:4])
            raise ValueError(
                f"exclude: {shown} matches none of the {len(named)} parameters ({some}, ...); "
                "to exclude by name, pass model.named_parameters()"
            )
        names.update(matched)
    return frozenset(names), tuple(entry for entry in entries if isinstance(entry, str))
