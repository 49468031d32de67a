"""The law of hypergradients: every memory and finite differences agree, for every hyper at every granularity."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hyperopt_nested.domains import Hyper
from hyperopt_nested.engine.binding import Memory
from hyperopt_nested.engine.nested import Nested
from hyperopt_nested.ops import watch_kinks
from hyperopt_nested.rule import Optimizer, Per
from hyperopt_nested.testing.differences import Difference, extrapolated, steps
from hyperopt_nested.testing.strategies import Case
from hyperopt_nested.testing.subject import Inapplicable, RuleError, Subject, Tree, direct, history, numbers
from hyperopt_nested.trees import State, map_tree

EXACT = 1e-12
"""Two programs in float64 that compute the same thing, relative to the size of what is summed."""

SHARP = 1e-9
"""Where differences have a smaller error, relative to the hyper's largest, forward and reverse agree to `EXACT`."""

TOLERANCE = 1e-6
"""A hypergradient against finite differences, relative to the hyper's largest."""

PERS: tuple[Per, ...] = ("model", "tensor", "row", "element")


@dataclass
class Record:
    """What was found so far.

    Attributes:
        worst: largest relative error of the hypergradients that differences could resolve, by hyper and granularity.
        kinks: how many derivatives were left out because the update has a kink beside the example.
        focus: the hyper that failed, if one did: only it is looked at when the example is being shrunk.
    """

    worst: dict[tuple[str, Per], float] = field(default_factory=dict)
    kinks: int = 0
    focus: str | None = None


def check_granularities(subject: Subject, case: Case, record: Record, missing: Collection[tuple[str, Per]]) -> None:
    """`check_hypergradients`, and again at other granularities where those of the hypers that the case resolves are still missing."""
    resolved = check_hypergradients(subject, case, record)
    for per in PERS:
        if any((name, per) in missing and (name, per) not in record.worst for name in resolved):
            other = replace(case, per=per)
            try:
                check_hypergradients(subject, other, record)
            except RuleError as error:
                raise RuleError(str(error), other) from None


def check_hypergradients(subject: Subject, case: Case, record: Record) -> set[str]:
    """Raise RuleError unless the hypergradients of a case are right; return the hypers whose finite differences resolve them."""
    plain = subject.fixed(case)
    hypers = {name: plain.rule.hypers[name] for name in subject.own if record.focus in (None, name)}
    params, states = history(plain, case)
    expected, smooth = _differences(plain, case, params, states, hypers)
    resolved: set[str] = set()
    learned: dict[str, Per] = {name: case.per for name in hypers if name not in plain.rule.nondifferentiable}
    memories: tuple[Memory, ...] = ("kept", "reverse", "auto") if plain.rule.late else ("kept", "reverse")
    found = {memory: _by_engine(subject, case, params, states, learned, memory) for memory in memories} if learned else {}
    for name in hypers:
        difference, ok = expected[name], smooth[name]
        record.kinks += int((~ok).sum())
        value, error = difference.value[ok], difference.error[ok]
        largest = float(value.abs().amax()) if value.numel() else 0.0
        where = f"per {case.per}, tensors of shape {', '.join(str(tuple(p.shape)) for p in params.values())}, step {len(case.grads)}"
        if name in plain.rule.nondifferentiable:
            if bool((value.abs() > 4 * error).any()):
                record.focus = name
                raise RuleError(f"{name} is declared flat, but by finite differences its hypergradient is {_shown(value)} ({where})")
            continue
        for memory, (values, _) in found.items():
            got = values[name][ok]
            if not Difference(value, error).agrees(got, relative=TOLERANCE):
                record.focus = name
                only_forward = memory != "reverse" and Difference(value, error).agrees(found["reverse"][0][name][ok], relative=TOLERANCE)
                doubt = f"; in reverse it is right: is the rule's separable={plain.rule.separable!r} true?" if only_forward else ""
                raise RuleError(
                    f"the hypergradient of {name} is {_shown(got)} with memory={memory!r}, but by finite differences {_shown(value)}, "
                    f"with an estimated error of {_shown(error)} ({where}){doubt}"
                )
            forward, size = found["kept"][0][name], found["kept"][1][name]
            magnified = difference.error > SHARP * largest  # where rounding is, by cancellation, it is in both programs
            if bool(((values[name] - forward).abs() > EXACT * size + torch.where(magnified, difference.error / 10, 0)).any()):
                record.focus = name
                raise RuleError(
                    f"the hypergradient of {name} is {_shown(forward)} with memory='kept', but {_shown(values[name])} with "
                    f"memory={memory!r} ({where})"
                )
        if largest > 0 and float(error.amax()) <= TOLERANCE * largest:
            off = max(float((values[name][ok] - value).abs().amax()) for values, _ in found.values()) / largest
            record.worst[name, case.per] = max(off, record.worst.get((name, case.per), 0.0))
            resolved.add(name)
    return resolved


def _expanded(leaf: Tensor, like: Tensor) -> Tensor:
    """An entry of a state as it is kept where hypers are learned more finely: one number may stand for a tensor."""
    return leaf.expand(like.shape).clone()


def _by_engine(
    subject: Subject,
    case: Case,
    params: Tree,
    states: dict[str, State],
    learned: Mapping[str, Per],
    memory: Memory,
) -> tuple[Tree, Tree]:
    """Hypergradients by the engine, flattened over tensors, and the size of what each is a sum of."""
    nested = Nested(subject.learning(case, learned), memory=memory)
    try:
        st = nested.init(params)
    except ValueError as error:
        if "does not use it" in str(error):
            raise RuleError(f"no hypergradient: {error}") from error
        raise Inapplicable(str(error)) from error
    full = {name: map_tree(_expanded, state, st["rule"][name]) for name, state in states.items()}
    new, st = nested.step(params, case.grads[-1], {**st, "rule": full})
    found = nested.hypergradients(new, case.after, st)
    moves = torch.stack([(case.after[t] * (new[t] - param)).abs().sum() for t, param in params.items()]).sum()
    sizes = {name: moves / room(nested.learned[name].hyper, case.hypers[name]) for name in learned}
    for tensor, memory_of in st["memory"].items():
        for name, sensitivity in memory_of["sensitivity"].items():
            sizes[name] = sizes[name] + (case.after[tensor] * sensitivity).abs().sum()
    flat = {name: torch.cat([found[name][key].flatten() for key in st["hypers"][name]]) for name in learned}
    return flat, sizes


def _differences(
    optimizer: Optimizer, case: Case, params: Tree, states: dict[str, State], hypers: Mapping[str, Hyper]
) -> tuple[dict[str, Difference], dict[str, Tensor]]:
    """Derivatives by finite differences, and whether the update is smooth between the points, per hyper: entries of all tensors."""
    fixed = numbers(case, optimizer)
    base, _ = direct(optimizer, params, case.grads[-1], states, fixed)
    shapes = {name: _shape(param, case.per) for name, param in params.items()}
    where = ["model"] if case.per == "model" else list(params)
    counts = [shapes[name].numel() if case.per != "model" else 1 for name in where]
    at = torch.cat([torch.full((count,), case.hypers[name], dtype=torch.float64) for name in hypers for count in counts])
    scale = torch.cat([torch.full((count,), room(hyper, case.hypers[name])) for name, hyper in hypers.items() for count in counts])

    def moved(values: Tensor) -> dict[str, Tree]:
        pieces = iter(torch.split(values, [count for _ in hypers for count in counts]))
        by_hyper = {name: {key: next(pieces) for key in where} for name in hypers}
        return {
            tensor: {
                **fixed[tensor],
                **{name: found[tensor if case.per != "model" else "model"].reshape(shapes[tensor]) for name, found in by_hyper.items()},
            }
            for tensor in params
        }

    def objective(values: Tensor) -> tuple[Tensor, list[Tensor]]:
        with watch_kinks() as kinks:
            new, _ = direct(optimizer, params, case.grads[-1], states, moved(values))
        change = [(case.after[name] * (new[name] - base[name])).sum() for name in params]
        return torch.stack(change).sum(), [torch.sign(each) for each in kinks if each.numel()]

    if not at.numel():
        nothing = Difference(at, at), torch.ones(0, dtype=torch.bool)
        return dict.fromkeys(hypers, nothing[0]), dict.fromkeys(hypers, nothing[1])
    h = steps(scale.to(torch.float64))
    vmapped: Any = torch.func.vmap(torch.func.vmap(objective))
    values, signs = vmapped(at + torch.diag_embed(h))
    _, here = objective(at)
    ok = torch.ones_like(at, dtype=torch.bool)
    for sign, middle in zip(signs, here, strict=True):
        ok &= (sign == middle).reshape(*h.shape, -1).all(-1).all(0)
    eps = torch.finfo(torch.float64).eps
    noise = eps * sum((case.after[name] * (base[name].abs() + params[name].abs())).abs().sum() for name in params)
    found = extrapolated(values, h, noise)
    size = sum(counts)
    sizes = [size] * len(hypers)
    parts = zip(hypers, *(torch.split(each, sizes) for each in (found.value, found.error, ok)), strict=True)
    results = {name: (Difference(value, error), smooth) for name, value, error, smooth in parts}
    return {name: pair[0] for name, pair in results.items()}, {name: pair[1] for name, pair in results.items()}


def _shape(param: Tensor, per: Per) -> torch.Size:
    """Shape of a hyper's value beside a parameter."""
    if per in ("model", "tensor"):
        return torch.Size(())
    if per == "element":
        return param.shape
    return torch.Size([*param.shape[:1], *(1 for _ in param.shape[1:])] if param.ndim > 1 else [1] * param.ndim)


def room(hyper: Hyper, value: float) -> float:
    """How far a value can be moved both ways inside its domain."""
    room = min(value - hyper.lower, hyper.upper - value)
    return room if room < float("inf") else max(abs(value), 0.1)


def _shown(values: Tensor) -> str:
    return f"{values.item():.10g}" if values.numel() == 1 else str([float(f"{value:.10g}") for value in values.tolist()])
