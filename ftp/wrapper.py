"""`FTP`: Fast Trainable Projection around any `torch.optim.Optimizer`."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast, overload

import torch
from torch import Tensor

import hyperopt_nested as hn
from ftp.anchored import Anchors, Exclude
from ftp.optimizers import FTPOptimizer
from ftp.rule import Radius, identity

_PREFIX = "ftp."
"""Of the entries of a state dict that FTP adds to those of the optimizer inside."""

_LEAVE_GRADIENTS = "torch.optim.", "hyperopt_nested."
"""Modules of optimizers that are known not to change gradients in place, as some others do: radii learn from what they were before."""


class FTP(torch.optim.Optimizer):
    """Fast Trainable Projection (arXiv 2310.19182, algorithm 1) around any optimizer: torch's, this library's, or anybody's.

    The optimizer steps; then every tensor is projected into the MARS ball around its anchor, the weights that it had before its first
    step. Its radius is learned from the gradient that the step had anyway. The result is that of `AdamP` and `SGDP`, around other
    optimizers than these.

    It is a `torch.optim.Optimizer`: schedulers, gradient scalers, hooks and trainers take it in place of the one inside. Its
    `param_groups`, `state` and `defaults` are that one's, so learning rates may be changed at either, and attributes that it does not
    have, such as `train` and `eval` of schedule-free optimizers, are looked up there. `state_dict` holds the state of both.

    Args:
        optimizer: what steps the tensors. It must leave the gradients in `grad`; it may change them.
        k: annealing of positive radius gradients, in [0, 1]: 1 projects most strongly; with 0 a radius shrinks only with the largest
            row norm, its upper bound.
        exclude: what is not projected, as a new head is: names, glob patterns of names, modules or tensors.
        anchor: what the weights stay near: None, the values that each tensor has before its first step; a mapping from names to
            tensors, such as a state dict, which is copied; or "zero", which takes no memory, for LoRA factors.
        anchor_decay: as `FTPOptimizer`.
        radius_lr: learning rate of the radii, >= 0, or `hn.learn(...)`.
        radius: a variant of the radii; see `Radius`. With `scheduled=True`, schedules are those of `lr` in the groups of `optimizer`,
            relative to what it was when this was made (or to `initial_lr`, if a scheduler has set that).
        named_parameters: names of the tensors, such as `model.named_parameters()`, where `optimizer` was made without: for `exclude`,
            `anchor` and reports.
        saturation: derivative with respect to the radius where the projection is inactive; "straight-through" as published.
        backend: what runs projections, with the same results up to rounding; see `hyperopt_nested.Backend`.
        displacement_dtype: the dtype of the last displacement, which the radius learns from; None is the parameter's.
        anchor_dtype: the dtype of the anchors, which are rounded to it; None is the parameter's.
        anchor_device: where anchors are kept, and fetched from in each step; None is with the parameter.

    Attributes:
        optimizer: the optimizer inside.
        projection: the `HyperOptimizer` that projects.
        radius: the variant.

    Raises:
        TypeError: `optimizer` is no optimizer, or another argument is of a wrong type.
        ValueError: `optimizer` projects already; `k` or `radius_lr` is outside its domain; an entry of `exclude` matches nothing; or an
            anchor is missing or of another shape. The message names it.

    Example:
        >>> import torch
        >>> from ftp import FTP
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
        >>> opt = FTP(torch.optim.AdamW(model.parameters(), lr=1e-2), exclude=model[1])
        >>> for _ in range(3):
        ...     opt.zero_grad()
        ...     model(torch.ones(3, 4)).square().mean().backward()
        ...     opt.step()
        >>> sorted(opt.learned())
        ['radius/0.0', 'radius/0.1']
    """

    optimizer: torch.optim.Optimizer
    projection: FTPOptimizer
    radius: Radius
    _step_supports_amp_scaling = False  # what a scaler knows of the gradients, it tells by leaving out the step

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        k: float = 1.0,
        exclude: Exclude = (),
        anchor: Anchors = None,
        anchor_decay: float = 1.0,
        radius_lr: float | hn.Learn = 1e-2,
        radius: Radius = Radius(),
        named_parameters: Iterable[tuple[str, Tensor]] | None = None,
        saturation: hn.typing.Saturation = "straight-through",
        backend: hn.typing.Backend = "auto",
        displacement_dtype: torch.dtype | None = None,
        anchor_dtype: torch.dtype | None = None,
        anchor_device: str | torch.device | None = None,
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            kind = f"is the class {optimizer.__name__}" if isinstance(optimizer, type) else f"has type {type(optimizer).__name__}"
            raise TypeError(f"optimizer {kind}; it must be a torch.optim.Optimizer, such as torch.optim.AdamW(model.parameters())")
        if isinstance(optimizer, (FTP, FTPOptimizer)):
            raise ValueError(f"optimizer is {type(optimizer).__name__}, which projects already: use it alone, or give what is inside")
        names = {} if named_parameters is None else {id(p): name for name, p in named_parameters}
        projection = FTPOptimizer(
            [_projected(index, group, names, radius) for index, group in enumerate(optimizer.param_groups)],
            identity(),
            k=k,
            radius_lr=radius_lr,
            radius=radius,
            exclude=exclude,
            anchor=anchor,
            anchor_decay=anchor_decay,
            saturation=saturation,
            backend=backend,
            displacement_dtype=displacement_dtype,
            anchor_dtype=anchor_dtype,
            anchor_device=anchor_device,
        )
        self.__setstate__({"optimizer": optimizer, "projection": projection, "radius": radius})

    def __getstate__(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer, "projection": self.projection, "radius": self.radius}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # makes the hooks, too
        self._synchronize()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "optimizer":
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.optimizer, name)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of the optimizer inside."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """The state of the optimizer inside; that of projections is in `projection.state`."""
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The defaults of the optimizer inside."""
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.optimizer.defaults = defaults

    def _synchronize(self) -> None:
        """Let the projection have the tensors that the optimizer inside has."""
        own, groups = self.projection.param_groups, self.optimizer.param_groups
        for index, group in enumerate(groups[len(own) :], start=len(own)):
            self.projection.add_param_group(_projected(index, group, {}, self.radius))
        del own[len(groups) :]
        for mine, group in zip(own, groups, strict=True):
            mine["params"] = group["params"]
            if self.radius.scheduled:
                mine["lr"] = group["lr"]

    @overload
    def step(self, closure: None = None, **arguments: Any) -> None: ...
    @overload
    def step(self, closure: Callable[[], float], **arguments: Any) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, **arguments: Any) -> float | None:
        """Step the optimizer inside; then learn the radii, and project the tensors that have a gradient.

        Args:
            closure: evaluates the model again and returns the loss; the optimizer inside calls it.
            arguments: what else the step of the optimizer inside takes, such as `loss`.

        Returns:
            What the optimizer inside returns.

        Raises:
            RuntimeError: a gradient is sparse. Nothing has been changed then.
        """
        left: dict[Tensor, Tensor | None] = {}
        try:
            return self.projection.step(lambda: self._step_inside(closure, arguments, left))  # which torch.compile does not trace
        finally:
            for p, grad in left.items():
                p.grad = grad

    @torch.no_grad()
    def _step_inside(self, closure: Callable[[], float] | None, arguments: Mapping[str, Any], left: dict[Tensor, Tensor | None]) -> float:
        """Step the optimizer inside; then put gradients in place as they were before, and so that they descend, for radii to learn from.

        Args:
            closure: as of `step`.
            arguments: as of `step`.
            left: is given the gradients that the optimizer inside leaves, where others are put in their place.
        """
        self._synchronize()
        before: dict[Tensor, Tensor] = {}
        may_change = not type(self.optimizer).__module__.startswith(_LEAVE_GRADIENTS)

        def begin() -> None:
            self.projection.begin()
            for group in self.param_groups:
                ascends = group.get("maximize", False) or (isinstance(self.optimizer, hn.HyperOptimizer) and self.optimizer.maximizes)
                for p in group["params"] if may_change or ascends else ():
                    if p.grad is not None:
                        before[p] = -p.grad if ascends else p.grad.clone()

        def evaluated() -> float:
            loss = cast(Callable[[], float], closure)()
            begin()
            return loss

        if closure is None:
            begin()
        loss = cast(float, self.optimizer.step(evaluated if closure is not None else None, **arguments))
        left |= {p: p.grad for p in before}
        for p, grad in before.items():
            p.grad = grad
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the optimizer inside. Its tensors are projected, too, unless a pattern in `exclude` matches their names.

        Args:
            param_group: as that optimizer takes it.
        """
        self.optimizer.add_param_group(param_group)
        self._synchronize()

    def reset_anchor(self) -> None:
        """Let the tensors stay near what they are now; see `AnchoredOptimizer.reset_anchor`."""
        self._synchronize()
        self.projection.reset_anchor()

    def hypers(self) -> dict[str, dict[str, Tensor]]:
        """The learned radii, `{"radius": {name: ...}}`, and learned values of what learns them; see `HyperOptimizer.hypers`."""
        return self.projection.hypers()

    def learned(self) -> dict[str, float]:
        """The same as floats: `{"radius/0.weight": 0.012, ...}`; see `HyperOptimizer.learned`."""
        return self.projection.learned()

    def learned_tensors(self) -> dict[str, Tensor]:
        """The same as tensors of shape (); see `HyperOptimizer.learned_tensors`."""
        return self.projection.learned_tensors()

    def __repr__(self) -> str:
        radii = self.learned().items()
        shown = ", ".join(f"{name}={value:.4g}" for name, value in list(radii)[:4]) + (", ..." if len(radii) > 4 else "")
        return f"FTP(\nlearned: {shown or 'nothing'}\naround: {self.optimizer!r}\n)"

    def state_dict(self) -> dict[str, Any]:
        """The state dict of the optimizer inside, in which the entries of each tensor are joined by those of its projection, `ftp.*`."""
        self._synchronize()
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        joined = self.optimizer.state_dict()
        state = {key: dict(entries) if isinstance(entries, dict) else entries for key, entries in joined["state"].items()}
        for index, entries in self.projection.state_dict()["state"].items():
            state[index] = {**state.get(index, {}), **{f"{_PREFIX}{key}": value for key, value in entries.items()}}
        joined = {**joined, "state": state}
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, joined)
            joined = joined if changed is None else changed
        return joined

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned: continuing is bitwise what not stopping would have been.

        Raises:
            ValueError: the state is not one of FTP around such an optimizer with these parameters. Nothing has been changed then.
        """
        self._synchronize()
        if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
            raise ValueError(f"state_dict={state_dict!r} must be what state_dict() of an optimizer returned")
        given = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, given)
            given = given if changed is None else changed
        own = self.projection.state_dict()
        sizes = [[len(group["params"]) for group in groups] for groups in (given["param_groups"], own["param_groups"])]
        if sizes[0] != sizes[1]:
            raise ValueError(f"state_dict has groups of {sizes[0]} tensors, the optimizer of {sizes[1]}: give one of the same groups")
        parts: list[dict[Any, dict[str, Any]]] = [{}, {}]
        for index, entries in given["state"].items():
            for key, value in entries.items():
                parts[key.startswith(_PREFIX)].setdefault(index, {})[key.removeprefix(_PREFIX)] = value
        if given["state"] and not parts[1]:
            raise ValueError("state_dict has no entries of FTP: load it into the optimizer inside, before FTP is put around it")
        groups = [dict(group) for group in own["param_groups"]]
        for mine, theirs in zip(groups, given["param_groups"], strict=True):
            mine["params"] = theirs["params"]
            names = [*theirs.get("param_names", ())]
            if sorted(names) == sorted(mine["param_names"]):  # else both go by position
                mine["param_names"] = names
        self.projection.load_state_dict({"state": parts[1], "param_groups": groups})
        try:
            self.optimizer.load_state_dict({**given, "state": parts[0]})
        except BaseException:
            self.projection.load_state_dict(own)
            raise
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)


def _projected(index: int, group: dict[str, Any], names: dict[int, str], radius: Radius) -> dict[str, Any]:
    """A group of the optimizer inside as the projection takes it."""
    projected: dict[str, Any] = {"params": _named(index, group, names)}
    if not radius.scheduled:
        return projected
    if "lr" not in group:
        raise ValueError(f"scheduled=True of radius needs groups with 'lr'; group {index} of the optimizer has {', '.join(group)}")
    return {**projected, "lr": float(group.get("initial_lr", group["lr"]))}


def _named(index: int, group: dict[str, Any], names: dict[int, str]) -> list[tuple[str, Tensor]]:
    """The tensors of a group with their names: those given, those that the group has, or `<group>.<index>`."""
    own = group.get("param_names") or [f"{index}.{i}" for i in range(len(group["params"]))]
    return [(names.get(id(p), name), p) for p, name in zip(group["params"], own, strict=True)]
