"""The law of derivatives: those of an update, with respect to all that it reads, agree with finite differences."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hyperopt_nested.ops import watch_kinks
from hyperopt_nested.testing.differences import LEVELS, Difference, extrapolated, steps
from hyperopt_nested.testing.gradients import EXACT, TOLERANCE, room
from hyperopt_nested.testing.strategies import Case
from hyperopt_nested.testing.subject import RuleError, Subject, Tree, direct, history, leaves, numbers
from hyperopt_nested.trees import State

Group = dict[str, Tensor]
"""One sort of input or output, such as the parameter, or one entry of the state: by tensor."""

_FINER = 2.0**-7
"""How much smaller the steps are of the second look at what seems wrong."""


def check_derivatives(subject: Subject, case: Case) -> None:
    """The new parameter's and the new state's derivatives with respect to parameter, gradient, state and hypers, in reverse mode.

    Each is taken along one random direction, in which entries move in proportion to their size: zeros stay, and signs too. Counts and
    masks, which are integers before and after the update, stay. Where slopes up and down differ, there is no derivative.
    """
    optimizer = subject.fixed(case)
    params, states = history(optimizer, case)
    grads, hypers = case.grads[-1], numbers(case, optimizer)
    base = _outputs(*direct(optimizer, params, grads, states, hypers))
    old = _groups(states)
    whole = {f"new {name}" for name, group in old.items() if f"new {name}" in base and _whole(group) and _whole(base[f"new {name}"])}
    generator = torch.Generator().manual_seed(len(case.grads))
    inputs = {"the parameter": params, "the gradient": grads, **{f"the old {name}": group for name, group in old.items()}}
    along = {
        name: {tensor: leaf * _factors(leaf, generator) for tensor, leaf in group.items()}
        for name, group in inputs.items()
        if _moves(group) and name.replace("the old", "new") not in whole
    }
    rooms = {name: room(optimizer.rule.hypers[name], case.hypers[name]) for name in subject.own}
    weights = {name: {tensor: _factors(leaf, generator) for tensor, leaf in group.items()} for name, group in base.items() if _moves(group)}
    moving = [*along, *rooms]
    if not moving or not weights:
        return

    def changes(offsets: Tensor) -> tuple[Tensor, list[Tensor]]:
        """How far each output is from where it was, in one direction."""
        offset = dict(zip(moving, offsets.unbind(), strict=True))

        def at(name: str, group: Group) -> Group:
            return {tensor: leaf + offset[name] * along[name][tensor] for tensor, leaf in group.items()} if name in along else group

        here = {name: at(name, group) for name, group in inputs.items()}
        with watch_kinks() as kinks:
            new = direct(
                optimizer,
                here["the parameter"],
                here["the gradient"],
                {tensor: _placed(state, tensor, here) for tensor, state in states.items()},
                {tensor: {**by, **{h: by[h] + offset[h] * rooms[h] for h in rooms}} for tensor, by in hypers.items()},
            )
        outputs = _outputs(*new)
        found = [
            torch.stack([(each * (outputs[name][tensor] - base[name][tensor])).sum() for tensor, each in group.items()]).sum()
            for name, group in weights.items()
        ]
        return torch.stack(found), [torch.sign(each) for each in kinks if each.numel()]

    zero = torch.zeros(len(moving), dtype=torch.float64)
    pulled: Any = torch.func.vjp(changes, zero, has_aux=True)
    _, pull, here = pulled
    slopes = torch.stack([pull(row)[0] for row in torch.eye(len(weights), dtype=torch.float64)], dim=1)  # (inputs, outputs)
    noise = torch.stack([_noise(name, group, base, inputs) for name, group in weights.items()]).expand(len(moving), -1)
    vmapped: Any = torch.func.vmap(torch.func.vmap(changes))
    expected, wrong = _differences(vmapped, here, slopes, noise, 1.0)
    if bool(wrong.any()):  # unless the update is so steep here that the steps are too large
        finer, still = _differences(vmapped, here, slopes, noise, _FINER)
        wrong &= still & ((finer.value - expected.value).abs() <= 4 * (finer.error + expected.error) + 1e-3 * expected.value.abs())
    if bool(wrong.any()):
        i, o = (int(index) for index in wrong.nonzero()[0])
        what, by = list(weights)[o], moving[i]
        shapes = ", ".join(str(tuple(p.shape)) for p in params.values())
        value, error = expected.value[i, o].item(), expected.error[i, o].item()
        raise RuleError(
            f"the derivative of the {what} with respect to {by} is {slopes[i, o].item():.10g}, but by finite differences "
            f"{value:.10g}, with an estimated error of {error:.3g} (along one direction, tensors of shape {shapes}, "
            f"step {len(case.grads)}): is something detached?"
        )


def _differences(
    changes: Callable[[Tensor], tuple[Tensor, list[Tensor]]], signs: list[Tensor], slopes: Tensor, noise: Tensor, scale: float
) -> tuple[Difference, Tensor]:
    """Derivatives (inputs, outputs) by finite differences, and which of the slopes are wrong."""
    h = steps(torch.full((len(slopes),), scale, dtype=torch.float64))
    values, signs_there = changes(torch.diag_embed(h))  # (steps, inputs, outputs)
    smooth = torch.ones(len(slopes), dtype=torch.bool)
    for sign, middle in zip(signs_there, signs, strict=True):
        smooth &= (sign == middle).reshape(*h.shape, -1).all(-1).all(0)
    many = h[:, :, None].expand_as(values)
    flat = extrapolated(values.flatten(1), many.flatten(1), noise.flatten())
    found = Difference(flat.value.reshape(slopes.shape), flat.error.reshape(slopes.shape))
    up, down = values[:LEVELS] / many[:LEVELS], values[LEVELS : 2 * LEVELS] / many[:LEVELS]
    allowed = 4 * found.error + TOLERANCE * found.value.abs() + EXACT * torch.maximum(up.abs(), down.abs()).amax(0)
    bends = (up + down).abs()  # the slope up minus the slope down: at a kink, it stays
    kinked = (bends[-1] > 0.75 * bends[-2]) & (bends[-1] > allowed)
    right = (slopes - found.value).abs() <= allowed  # not where a slope is NaN
    return found, ~right & torch.isfinite(allowed) & ~kinked & smooth[:, None]


def _groups(states: Mapping[str, State]) -> dict[str, Group]:
    """Entries of the states by path: `state.exp_avg`."""
    found: dict[str, Group] = {}
    for tensor, state in states.items():
        for path, leaf in leaves(state).items():
            found.setdefault(f"state.{path}", {})[tensor] = leaf
    return found


def _outputs(params: Tree, states: Mapping[str, State]) -> dict[str, Group]:
    return {"new parameter": params, **{f"new {name}": group for name, group in _groups(states).items()}}


def _placed(tree: State, tensor: str, groups: Mapping[str, Group], prefix: str = "the old state.") -> State:
    """A tensor's state with other leaves."""
    return {
        key: _placed(leaf, tensor, groups, f"{prefix}{key}.") if isinstance(leaf, dict) else groups[f"{prefix}{key}"][tensor]
        for key, leaf in tree.items()
    }


def _moves(group: Group) -> bool:
    """Whether differences can be taken: all else is counters, in float32 or integers, and masks."""
    return all(leaf.dtype == torch.float64 for leaf in group.values()) and any(leaf.numel() for leaf in group.values())


def _whole(group: Group) -> bool:
    return all(bool((leaf == leaf.round()).all()) for leaf in group.values() if leaf.is_floating_point())


def _factors(leaf: Tensor, generator: torch.Generator) -> Tensor:
    """Random numbers in size from 1/2 to 1, of both signs."""
    drawn = torch.rand(leaf.shape, generator=generator, dtype=torch.float64) - 0.5
    return drawn + torch.where(drawn < 0, -0.5, 0.5)


def _noise(name: str, weights: Group, base: Mapping[str, Group], inputs: Mapping[str, Group]) -> Tensor:
    """Rounding that an output has at least: a new parameter that of the old one too."""
    sizes = [(weights[t] * leaf).abs().sum() for t, leaf in base[name].items()]
    if name == "new parameter":
        sizes += [(weights[t] * leaf).abs().sum() for t, leaf in inputs["the parameter"].items()]
    return torch.finfo(torch.float64).eps * torch.stack(sizes).sum()
