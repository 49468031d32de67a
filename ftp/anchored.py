"""Optimizers of the engine with an anchor for every tensor, and with exclusions: what FTP, TPGM and WiSE-FT share."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn

import hyperopt_nested as hn

Exclude = Iterable[str | nn.Module | Tensor] | str | nn.Module | Tensor
Anchors = Mapping[str, Tensor] | Literal["zero"] | None


@dataclass(frozen=True)
class _Choose:
    """The optimizer of a tensor: one with an anchor, unless it is excluded."""

    base: hn.Optimizer
    anchored: hn.Optimizer
    around: Callable[..., hn.Optimizer]
    names: frozenset[str]
    patterns: tuple[str, ...]
    anchors: Mapping[str, Tensor] | None

    def __call__(self, name: str, tensor: Tensor) -> hn.Optimizer:
        if name in self.names or any(fnmatchcase(name, pattern) for pattern in self.patterns):
            return self.base
        if self.anchors is None:
            return self.anchored
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
        return self.around(self.base, anchor=anchor)


class AnchoredOptimizer(hn.HyperOptimizer):
    """An optimizer of the engine, put around another one with an anchor for each tensor that is not excluded.

    Args:
        params: `model.named_parameters()`, tensors, or groups of either.
        base: what steps the tensors that are excluded.
        around: makes the optimizer of the others: `around(base, anchor=...)`; a combinator, with other arguments bound by
            `functools.partial`.
        exclude: names, glob patterns of names, modules or tensors.
        anchor: None, the values that each tensor has before its first step; a mapping from names to tensors; or "zero".
        settings: further arguments of `HyperOptimizer`.

    Raises:
        TypeError: `params`, `exclude` or `anchor` is of a wrong type.
        ValueError: an entry of `exclude` matches nothing, or an anchor is missing, not finite or of another shape.

    Example:
        >>> import functools, torch, hyperopt_nested as hn
        >>> from ftp.anchored import AnchoredOptimizer
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
        >>> near = functools.partial(hn.l2_sp, decay=0.1)
        >>> opt = AnchoredOptimizer(
        ...     model.named_parameters(), hn.adam(), near, exclude="1.*", anchor=None
        ... )
    """

    def __init__(
        self,
        params: Any,
        base: hn.Optimizer,
        around: Callable[..., hn.Optimizer],
        *,
        exclude: Exclude = (),
        anchor: Anchors = None,
        **settings: Any,
    ) -> None:
        if isinstance(anchor, str) and anchor != "zero":
            raise ValueError(f"anchor={anchor!r} must be None, 'zero', or a mapping from names to tensors")
        if not (anchor is None or isinstance(anchor, (str, Mapping))):
            kind = type(anchor).__name__
            raise TypeError(f"anchor has type {kind}; it must be None, 'zero', or a mapping from names to tensors, such as a state dict")
        anchored = around(base, anchor="zero" if isinstance(anchor, str) else "start")
        groups = _groups(params)
        anchors = anchor if isinstance(anchor, Mapping) else None
        choose = _Choose(base, anchored, around, *resolve(exclude, list(_named(groups))), anchors)
        super().__init__(groups, choose, **settings)

    @torch.no_grad()
    def reset_anchor(self) -> None:
        """Let the tensors stay near what they are now, as between the tasks of continual learning.

        Learned values and the state of the optimizer inside go on; the next step bounds radii by its displacement from the new anchors.
        Anchors that are zero stay; so do norms that radii are relative to.

        Example:
            >>> import torch
            >>> from ftp import AdamP
            >>> weight = torch.nn.Parameter(torch.ones(2))
            >>> opt = AdamP([("weight", weight)], lr=0.1)
            >>> for task in range(2):
            ...     for _ in range(3):
            ...         opt.zero_grad()
            ...         weight.square().sum().backward()
            ...         opt.step()
            ...     opt.reset_anchor()
            >>> bool((opt.rule_states()["weight"]["anchor"] == weight).all())
            True
        """
        states = self.rule_states()
        for name, param in self.named_parameters():
            for anchor in _anchors(states.get(name, {})):
                anchor.copy_(param)


def full_tensor(tensor: Any) -> Tensor:
    """A plain tensor; of a sharded one, all of it."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full


def _anchors(state: hn.typing.State) -> Iterator[Tensor]:
    """The anchors in the state of a rule and of those inside."""
    for key, leaf in state.items():
        if isinstance(leaf, dict):
            yield from _anchors(leaf)
        elif key == "anchor":
            yield leaf


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


def resolve(exclude: Exclude, named: list[tuple[str, Tensor]], argument: str = "exclude") -> tuple[frozenset[str], tuple[str, ...]]:
    """Find the tensors that are excluded.

    Args:
        exclude: names, glob patterns of names, modules or tensors.
        named: all tensors, with their names.
        argument: what `exclude` is called in messages.

    Returns:
        Names of tensors, and the patterns.

    Raises:
        TypeError: an entry has a wrong type.
        ValueError: an entry matches nothing.
    """
    if not isinstance(exclude, (str, nn.Module, Tensor, Iterable)):
        kind = type(exclude).__name__
        raise TypeError(f"{argument}={exclude!r} ({kind}) must be names, glob patterns, modules or tensors; () is none of them")
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
            raise TypeError(f"{argument} has {entry!r} ({type(entry).__name__}); give names, glob patterns, modules or tensors")
        if not matched:
            some = ", ".join(name for name, _ in named[:4])
            raise ValueError(
                f"{argument}: {shown} matches none of the {len(named)} parameters ({some}, ...); for names, pass model.named_parameters()"
            )
        names.update(matched)
    return frozenset(names), tuple(entry for entry in entries if isinstance(entry, str))
