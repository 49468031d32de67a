"""The law of derivatives: those of an update, with respect to all that it reads, agree with finite differences."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hyperopt_nested.testing.comparison import EXACT, TOLERANCE, RuleError
from hyperopt_nested.testing.differences import Slopes, slopes
from hyperopt_nested.testing.strategies import Case, room
from hyperopt_nested.testing.subject import Subject, Tree, by_path, direct
from hyperopt_nested.trees import State, filled

Group = dict[str, Tensor]
"""One sort of input or output, such as the parameter, or one entry of the state: by tensor."""

_FINER = 2.0**-7
"""How much smaller the steps are of the second look at what seems wrong."""


def check_derivatives(subject: Subject, case: Case) -> None:
    """The new parameter's and the new state's derivatives with respect to parameter, gradient, state and hypers, in reverse mode.

    Each is taken along one random direction, in which entries move in proportion to their size: zeros stay, and signs too. Counts and
    masks, which are integers before and after the update, stay. Where slopes up and down differ, there is no derivative.
    """
    step = subject.step(case)
    inputs = {**_groups(step.params, step.states), "the gradient": step.grads}
    outputs = _groups(*step())
    counts = [kind for kind in inputs if kind.startswith("state.") and _whole(inputs[kind]) and _whole(outputs[kind])]
    generator = torch.Generator().manual_seed(len(case.grads))
    along, weights = (
        {kind: {t: _factors(leaf, generator) for t, leaf in group.items()} for kind, group in groups.items() if _moves(group)}
        for groups in ({kind: group for kind, group in inputs.items() if kind not in counts}, outputs)
    )
    rooms = {name: room(step.optimizer.rule.hypers[name], case.hypers[name]) for name in subject.own}
    moving = [*along, *rooms]
    if not moving or not weights:
        return

    def changes(offsets: Tensor) -> Tensor:
        """How far each output is from where it was, in one direction."""
        offset = dict(zip(moving, offsets.unbind(), strict=True))
        at = inputs | {kind: {t: inputs[kind][t] * (1 + offset[kind] * each) for t, each in group.items()} for kind, group in along.items()}
        old = {t: filled(state, [at[f"state.{path}"][t] for path in by_path(state)]) for t, state in step.states.items()}
        values = {t: {**fixed, **{name: fixed[name] + offset[name] * rooms[name] for name in rooms}} for t, fixed in step.hypers.items()}
        new = _groups(*direct(step.optimizer, at["the parameter"], at["the gradient"], old, values))
        sums = [[(each * (new[kind][t] - outputs[kind][t])).sum() for t, each in group.items()] for kind, group in weights.items()]
        return torch.stack([torch.stack(each).sum() for each in sums])

    sizes = [sum(float(leaf.abs().sum()) for side in (inputs, outputs) for leaf in side[kind].values()) for kind in weights]
    noise = torch.finfo(torch.float64).eps * torch.tensor(sizes, dtype=torch.float64)

    def differences(scale: float) -> Slopes:
        return slopes(changes, torch.full((len(moving),), scale, dtype=torch.float64), noise)

    pulled: Any = torch.func.vjp(changes, torch.zeros(len(moving), dtype=torch.float64))
    found = torch.stack([pulled[1](row)[0] for row in torch.eye(len(weights), dtype=torch.float64)], dim=1)  # (inputs, outputs)
    expected = differences(1.0)
    wrong = _wrong(found, expected)
    if bool(wrong.any()):  # unless the update is so steep here that the steps are too large
        finer = differences(_FINER)
        same = (finer.value - expected.value).abs() <= 4 * (finer.error + expected.error) + 1e-3 * expected.value.abs()
        wrong &= same & _wrong(found, finer)
    if bool(wrong.any()):
        row, column = (int(index) for index in wrong.nonzero()[0])
        what, by = list(weights)[column].removeprefix("the "), moving[row]
        value, error = expected.value[row, column].item(), expected.error[row, column].item()
        raise RuleError(
            f"the derivative of the new {what} with respect to {'the old ' if by.startswith('state.') else ''}{by} is "
            f"{found[row, column].item():.10g}, but by finite differences {value:.10g}, with an estimated error of {error:.3g} "
            f"(along one direction, {case.where}): is something detached?"
        )


def _wrong(found: Tensor, expected: Slopes) -> Tensor:
    """Which derivatives are not those of finite differences, though these exist."""
    up, down = expected.up, expected.down
    allowed = 4 * expected.error + TOLERANCE * expected.value.abs() + EXACT * torch.maximum(up.abs(), down.abs()).amax(0)
    bends = (up - down).abs()  # at a kink, it stays when steps become smaller
    kinked = (bends[-1] > 0.75 * bends[-2]) & (bends[-1] > allowed)
    right = (found - expected.value).abs() <= allowed  # not where a slope is NaN
    return ~right & torch.isfinite(allowed) & ~kinked & expected.smooth[:, None]


def _groups(params: Tree, states: Mapping[str, State]) -> dict[str, Group]:
    """Parameters, and entries of the states by path: `state.exp_avg`."""
    found = {"the parameter": params}
    for tensor, state in states.items():
        for path, leaf in by_path(state).items():
            found.setdefault(f"state.{path}", {})[tensor] = leaf
    return found


def _moves(group: Group) -> bool:
    """Whether differences can be taken: all else is counters, in float32 or integers, and masks."""
    return all(leaf.dtype == torch.float64 for leaf in group.values()) and any(leaf.numel() for leaf in group.values())


def _whole(group: Group) -> bool:
    return all(bool((leaf == leaf.round()).all()) for leaf in group.values() if leaf.is_floating_point())


def _factors(leaf: Tensor, generator: torch.Generator) -> Tensor:
    """Random numbers in size from 1/2 to 1, of both signs."""
    drawn = torch.rand(leaf.shape, generator=generator, dtype=torch.float64) - 0.5
    return drawn + torch.where(drawn < 0, -0.5, 0.5)
