"""The law of hypergradients: every memory and finite differences agree, for every hyper at every granularity."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import get_args

import torch
from torch import Tensor

from hyperopt_nested.engine.nested import Nested
from hyperopt_nested.engine.one_step import Memory, OneStep
from hyperopt_nested.rule import Per
from hyperopt_nested.testing.comparison import EXACT, TOLERANCE, RuleError
from hyperopt_nested.testing.differences import Difference, Slopes, slopes
from hyperopt_nested.testing.strategies import Case, room
from hyperopt_nested.testing.subject import Inapplicable, Step, Subject, Tree, losses
from hyperopt_nested.trees import map_tree

PERS: tuple[Per, ...] = get_args(Per)

_SHARP = 1e-9
"""Where differences have a smaller error, relative to the hyper's largest, forward and reverse agree to `EXACT`."""


@dataclass
class Record:
    """What was found so far.

    Attributes:
        wanted: hypers and granularities to verify.
        worst: largest relative error of the hypergradients that differences could resolve, by hyper and granularity.
        kinks: how many derivatives were left out because the update has a kink beside the example.
        focus: the hyper that failed, if one did: only it is looked at when the example is being shrunk.
    """

    wanted: Sequence[tuple[str, Per]] = ()
    worst: dict[tuple[str, Per], float] = field(default_factory=dict)
    kinks: int = 0
    focus: str | None = None

    @property
    def missing(self) -> list[tuple[str, Per]]:
        return [pair for pair in self.wanted if pair not in self.worst]


def learnable(subject: Subject, case: Case, name: str, memory: Memory = "kept") -> bool:
    """Whether the engine can learn a hyper at the granularity of a case: not all that enter a sum over all tensors."""
    rule = subject.template.rule
    if name in rule.nondifferentiable or not rule.reduction:
        return name not in rule.nondifferentiable
    try:
        Nested(subject.learning(case, {name: case.per}), horizon=OneStep(memory)).init(case.params)
    except ValueError as error:
        return "enters the sum" not in str(error)
    return True


def check_granularities(subject: Subject, case: Case, record: Record) -> None:
    """`check_hypergradients`, and again at other granularities where those of the hypers that the case resolves are still missing."""
    resolved = check_hypergradients(subject, case, record)
    for per in PERS:
        if any((name, per) in record.missing for name in resolved):
            other = replace(case, per=per)
            try:
                check_hypergradients(subject, other, record)
            except RuleError as error:
                error.case = other
                raise


def check_hypergradients(subject: Subject, case: Case, record: Record) -> set[str]:
    """Raise RuleError unless the hypergradients of a case are right; return the hypers whose finite differences resolve them."""
    step, focus = subject.step(case), record.focus
    rule = step.optimizer.rule
    names = [name for name in subject.own if focus in (None, name)]
    memories: tuple[Memory, ...] = ("kept", "reverse", "auto") if rule.late else ("kept", "reverse")
    learned = {memory: {name: case.per for name in names if learnable(subject, case, name, memory)} for memory in memories}
    names = [name for name in names if name in learned["kept"] or name in rule.nondifferentiable]
    differences = _by_differences(step, case, names) if names else {}
    found = {memory: _by_engine(subject, case, step, hypers, memory) for memory, hypers in learned.items() if hypers}
    where = f"per {case.per}, {case.where}"
    resolved: set[str] = set()
    for name, (expected, ok) in differences.items():
        record.focus = name  # if an error is raised
        record.kinks += int((~ok).sum())
        smooth = Difference(expected.value[ok], expected.error[ok])
        by_differences = f"by finite differences {_shown(smooth.value)}"
        if name in rule.nondifferentiable:
            if bool((smooth.value.abs() > 4 * smooth.error).any()):
                raise RuleError(f"{name} is declared nondifferentiable, but its hypergradient is {by_differences} ({where})")
            continue
        largest = float(smooth.value.abs().amax()) if smooth.value.numel() else 0.0
        found_here = {memory: values for memory, (values, _) in found.items() if name in values}
        for memory, values in found_here.items():
            if not smooth.agrees(values[name][ok]):
                only_forward = memory != "reverse" and "reverse" in found_here and smooth.agrees(found_here["reverse"][name][ok])
                doubt = f"; in reverse it is right: is the rule's separable={rule.separable!r} true?" if only_forward else ""
                raise RuleError(
                    f"the hypergradient of {name} is {_shown(values[name][ok])} with memory={memory!r}, but {by_differences}, "
                    f"with an estimated error of {_shown(smooth.error)} ({where}){doubt}"
                )
            kept, size = (each[name] for each in found["kept"])
            magnified = expected.error > _SHARP * largest  # where rounding is, by cancellation, it is in both programs
            if bool(((values[name] - kept).abs() > EXACT * size + torch.where(magnified, expected.error / 10, 0)).any()):
                raise RuleError(
                    f"the hypergradient of {name} is {_shown(kept)} with memory='kept', but {_shown(values[name])} with "
                    f"memory={memory!r} ({where})"
                )
        if largest > 0 and float(smooth.error.amax()) <= TOLERANCE * largest:
            off = max(float((values[name][ok] - smooth.value).abs().amax()) for values in found_here.values()) / largest
            record.worst[name, case.per] = max(off, record.worst.get((name, case.per), 0.0))
            resolved.add(name)
    record.focus = focus
    return resolved


def _by_engine(subject: Subject, case: Case, step: Step, learned: Mapping[str, Per], memory: Memory) -> tuple[Tree, Tree]:
    """Hypergradients by the engine, flattened over tensors, and the size of what each is a sum of."""
    nested = Nested(subject.learning(case, learned), horizon=OneStep(memory))
    try:
        st = nested.init(step.params)
    except ValueError as error:
        if "does not use it" in str(error):
            raise RuleError(f"no hypergradient: {error}") from error
        raise Inapplicable(str(error)) from error
    # one number may stand for a tensor where hypers are not learned so finely
    full = {
        name: map_tree(lambda leaf, like: leaf.expand(like.shape).clone(), state, st["rule"][name]) for name, state in step.states.items()
    }
    new, st = nested.step(step.params, step.grads, {**st, "rule": full}, losses(step.optimizer, step.grads))
    found = nested.hypergradients(new, case.after, st)
    moves = torch.stack([(case.after[t] * (new[t] - param)).abs().sum() for t, param in step.params.items()]).sum()
    sizes = {name: moves / room(nested.learned[name].hyper, case.hypers[name]) for name in learned}
    for tensor, memory_of in st["memory"].items():
        for name, sensitivity in memory_of["sensitivity"].items():
            sizes[name] = sizes[name] + (case.after[tensor] * sensitivity).abs().sum()
    return {name: torch.cat([found[name][key].flatten() for key in st["hypers"][name]]) for name in learned}, sizes


def _by_differences(step: Step, case: Case, names: Sequence[str]) -> dict[str, tuple[Difference, Tensor]]:
    """Derivatives by finite differences, and whether the update is smooth between the points, per hyper: entries of all tensors."""
    params, fixed, (base, _) = step.params, step.hypers, step()
    shapes = {name: _shape(param, case.per) for name, param in params.items()}
    counts = [shape.numel() for shape in shapes.values()]
    size = 1 if case.per == "model" else sum(counts)

    def objective(offsets: Tensor) -> Tensor:
        values = {name: dict(by) for name, by in fixed.items()}
        for hyper, row in zip(names, offsets.reshape(len(names), size), strict=True):
            pieces = [row] * len(params) if case.per == "model" else row.split(counts)
            for (tensor, shape), piece in zip(shapes.items(), pieces, strict=True):
                values[tensor][hyper] = fixed[tensor][hyper] + piece.reshape(shape)
        new, _ = replace(step, hypers=values)()
        return torch.stack([(case.after[name] * (new[name] - base[name])).sum() for name in params]).sum()[None]

    scale = torch.tensor([room(step.optimizer.rule.hypers[name], case.hypers[name]) for name in names], dtype=torch.float64)
    noise = sum(float((case.after[name] * (base[name].abs() + params[name].abs())).abs().sum()) for name in params)
    found: Slopes = slopes(objective, scale.repeat_interleave(size), torch.finfo(torch.float64).eps * noise)
    parts = (each.reshape(len(names), size) for each in (found.value, found.error, found.smooth))
    return {name: (Difference(value, error), smooth) for name, value, error, smooth in zip(names, *parts, strict=True)}


def _shape(param: Tensor, per: Per) -> torch.Size:
    """Shape of a hyper's value beside a parameter."""
    rows = (*param.shape[:1], *(1 for _ in param.shape[1:])) if param.ndim > 1 else (1,) * param.ndim
    return torch.Size({"row": rows, "element": param.shape}.get(per, ()))


def _shown(values: Tensor) -> str:
    return f"{values.item():.10g}" if values.numel() == 1 else str([float(f"{value:.10g}") for value in values.tolist()])
