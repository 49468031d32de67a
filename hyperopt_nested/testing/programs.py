"""Backends against the engine: where a backend steps a rule, parameters, states and hypers are those of the reference."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor

from hyperopt_nested.backends.choice import Backend
from hyperopt_nested.engine.nested import Nested
from hyperopt_nested.optim.optimizer import HyperOptimizer
from hyperopt_nested.rule import Learn, Optimizer, Per, learn
from hyperopt_nested.rules.sgd import sgd
from hyperopt_nested.testing.gradients import PERS, room
from hyperopt_nested.testing.strategies import inside
from hyperopt_nested.testing.subject import Inapplicable, RuleError, Subject, start

SAME = 1e-9
"""A backend against the reference in float64, relative to the largest entry."""

_SHAPES: tuple[tuple[int, ...], ...] = ((4, 3), (5,), (2, 3, 2, 2), (260, 256))  # the last is more than what "foreach" does in one piece
_STEPS = 7

Shapes = dict[str, tuple[int, ...]]
_Try = tuple[str, Optimizer, Shapes]


@dataclass(frozen=True)
class Comparison:
    """How a backend does on a rule.

    Attributes:
        largest: relative difference from the reference, by what was compared, such as `lr, beta learned per row`.
        refused: what the backend says that it can not run, by the same.
    """

    largest: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = []
        if self.largest:
            lines = [
                f"agrees with 'reference' in {len(self.largest)} settings, largest relative difference {max(self.largest.values()):.0e}"
            ]
        by_reason: dict[str, list[str]] = {}
        for setting, reason in self.refused.items():
            by_reason.setdefault(reason.splitlines()[0], []).append(setting)
        for reason, settings in by_reason.items():
            which = "" if len(by_reason) == 1 and not self.largest else f" in {len(settings)} settings, such as {settings[0]!r}"
            lines.append(f"not served{which}: {reason}")
        return "; ".join(lines)


def check_names(backends: Sequence[str]) -> None:
    """Refuse what can not be compared with the reference.

    Raises:
        ValueError: a name is none of the backends, or one that chooses among the others.
    """
    choices = [name for name in get_args(Backend) if name not in ("auto", "reference")]
    for name in [backends] if isinstance(backends, str) else backends:
        if isinstance(backends, str) or name not in choices:
            raise ValueError(
                f"backends={backends!r} must be a sequence of {', '.join(map(repr, choices))}, which 'reference' is compared with"
            )


def check_backend(optimizer: Optimizer, backend: str, shapes: Mapping[str, tuple[int, ...]], steps: int = _STEPS) -> float:
    """Compare a backend with `backend="reference"` over some steps in float64: parameters, states and learned values.

    Args:
        optimizer: what is run.
        backend: "foreach", "compile" or "fused".
        shapes: shapes of the tensors, by name. Values and gradients are normally distributed, a tenth of the gradients' entries zero.
        steps: number of steps.

    Returns:
        The largest difference, relative to the largest entry of the tensor that it is in.

    Raises:
        RuleError: a difference is larger than 1e-9 of the largest entry, or the backend fails.
        ValueError: the backend says that it can not run this.

    Example:
        >>> import hyperopt_nested as hn
        >>> hn.testing.check_backend(hn.sgd(lr=0.1), "foreach", {"a": (4, 3)}) < 1e-15
        True
    """
    check_names([backend])
    generator = torch.Generator().manual_seed(0)

    def drawn() -> dict[str, Tensor]:
        return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}

    starts, largest = drawn(), 0.0
    names: tuple[Any, ...] = ("reference", backend)
    runs = {name: {key: torch.nn.Parameter(value.clone()) for key, value in starts.items()} for name in names}
    opts: dict[str, HyperOptimizer] = {}
    for step in range(steps + 1):
        grads = {key: torch.where(torch.rand(value.shape, generator=generator) < 0.1, 0, value) for key, value in drawn().items()}
        for name, params in runs.items():
            try:
                with warnings.catch_warnings(record=True) as told:
                    warnings.simplefilter("always")
                    if not step:
                        opts[name] = HyperOptimizer(list(params.items()), optimizer, backend=name)
                    else:
                        for key, param in params.items():
                            param.grad = grads[key].clone()
                        opts[name].step()
                failed = [str(each.message) for each in told if f"backend={name!r}" in str(each.message)]
                if failed:
                    raise RuntimeError(failed[0])
            except Exception as error:
                if name == "reference" or (isinstance(error, ValueError) and f"backend={name!r}" in str(error)):
                    raise
                what = str(error).strip().splitlines()
                raise RuleError(f"backend={name!r} fails in step {step}: {type(error).__name__}: {what[0] if what else ''}") from error
        expected, found = (_values(opts[name], runs[name]) for name in names)
        if expected.keys() != found.keys():
            odd = min(expected.keys() ^ found.keys())
            raise RuleError(f"after step {step}, {odd} is there with one of 'reference' and backend={backend!r} only")
        for path, value in expected.items():
            largest = max(largest, _difference(path, found[path], value, f"backend={backend!r} after step {step}"))
    return largest


def compare(subject: Subject, backend: str) -> Comparison:
    """Compare a backend with the reference: hypers not learned and learned at each granularity, options, shapes.

    Raises:
        RuleError: they differ.
    """
    accepted = [shape for shape in _SHAPES if subject.accepts(shape)]
    if not accepted:
        return Comparison()
    alone: Shapes = {"a": accepted[0]}
    every: Shapes = dict(zip("abcd", accepted, strict=False))
    found = Comparison()
    for setting, optimizer, simpler in _settings(subject, {"a": torch.zeros(accepted[0], dtype=torch.float64)}):
        for shapes in [alone] * (simpler is None) + [every] * (simpler is not None or not optimizer.learned) * (len(every) > 1):
            try:
                found.largest[setting] = max(found.largest.get(setting, 0.0), check_backend(optimizer, backend, shapes))
            except ValueError as error:
                found.largest.pop(setting, None)
                found.refused[setting] = str(error)
                break
            except RuleError as error:
                smaller: list[_Try] = [(*one, alone) for one in simpler or []]
                smaller += [(setting, optimizer, {"a": shape}) for shape in accepted if len(shapes) > 1]
                raise _smallest(subject, backend, error, (setting, optimizer, shapes), smaller) from None
    return found


def _smallest(subject: Subject, backend: str, error: RuleError, failed: _Try, tries: Sequence[_Try]) -> RuleError:
    """What the first of some smaller examples that fails too raises; else what the one that failed did."""
    for each in tries:
        try:
            check_backend(each[1], backend, each[2])
        except ValueError:
            continue
        except RuleError as other:
            error, failed = other, each
            break
    setting, optimizer, shapes = failed
    how = f"\n\nTo see it again:\n\nhn.testing.check_backend({_written(subject, optimizer)}, {backend!r}, {shapes!r})"
    return RuleError(f"{subject.name}: {error} ({setting}, tensors of shape {', '.join(map(str, shapes.values()))}){how}")


def _settings(subject: Subject, params: Mapping[str, Tensor]) -> Iterator[tuple[str, Optimizer, list[tuple[str, Optimizer]] | None]]:
    """What is compared: its name, an optimizer, and simpler ones to look at if it fails; None for what is simple itself."""
    template = subject.template
    values = {name: inside(template.rule.hypers[name]) for name in subject.own}
    yield "as declared", template, None
    if not template.learned:
        plain = template.replace(**values)
        if _runs(plain, params):
            yield "values inside the domain", plain, None
    for name, choices in subject.choices.items():
        other = subject.make(**{name: choices[1]})
        if _runs(other, params):
            yield f"{name}={choices[1]!r}", other, None
    names = [name for name in subject.own if name not in template.rule.nondifferentiable]
    for per in PERS:
        for tower in (False, True) if per == "row" else (False,):
            how = f"learned per {per}{', at a rate that is learned' if tower else ''}"
            singles = [(f"{name} {how}", _learning(template, values, [name], per, tower)) for name in names]
            singles = [(setting, each) for setting, each in singles if _runs(each, params)]
            together: list[str] = []
            for name in names:
                if _runs(_learning(template, values, [*together, name], per, tower), params):
                    together.append(name)
            if len(together) > 1:
                yield f"{', '.join(together)} {how}", _learning(template, values, together, per, tower), singles
            if len(together) == 1 or per == "element":
                for setting, each in singles:
                    yield setting, each, None


def _learning(template: Optimizer, values: Mapping[str, float], names: Sequence[str], per: Per, tower: bool) -> Optimizer:
    """The template with some hypers learned, at rates so low that they stay near their values; in a tower, the rate is learned too."""
    changed: dict[str, float | Learn] = {}
    for name in names:
        rate = float(f"{1e-4 * room(template.rule.hypers[name], values[name]) ** 2:.1g}")
        by = sgd(lr=learn(rate, by=sgd(lr=float(f"{1e-6 * rate:.1g}")))) if tower else sgd(lr=rate)
        changed[name] = learn(values[name], by=by, per=per)
    return template.replace(**changed)


def _runs(optimizer: Optimizer, params: Mapping[str, Tensor]) -> bool:
    """Whether the engine takes the optimizer."""
    try:
        start(optimizer, params)
        Nested(optimizer).init(dict(params))
    except (Inapplicable, ValueError):
        return False
    return True


def _values(opt: HyperOptimizer, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters, everything in the state, and learned values, by path."""
    found = {f"parameter {name!r}": param.detach() for name, param in params.items()}
    found |= {f"state {key!r} of {name!r}": leaf for name, param in params.items() for key, leaf in opt.state.get(param, {}).items()}
    return found | {f"learned {hyper} of {key!r}": leaf for hyper, by in opt.hypers().items() for key, leaf in by.items()}


def _difference(path: str, found: Any, expected: Any, where: str) -> float:
    """The largest difference of two tensors, relative to the largest entry."""
    if not isinstance(expected, Tensor):
        return 0.0
    if found.shape != expected.shape:
        raise RuleError(f"{where}: {path} has shape {tuple(found.shape)}, but {tuple(expected.shape)} with 'reference'")
    if not expected.numel():
        return 0.0
    wide, other = expected.to(torch.float64), found.to(torch.float64)
    off = torch.where((wide == other) | (wide.isnan() & other.isnan()), 0, (wide - other).abs())
    size, worst = float(wide.abs().nan_to_num(0, 0, 0).amax()), float(off.amax())
    if not worst <= SAME * size + 1e-12:
        at = int(off.nan_to_num(torch.inf).argmax())
        numbers = f"{other.flatten()[at].item():.10g} in the place of {wide.flatten()[at].item():.10g}"
        raise RuleError(f"{where}: {path} differs from 'reference' by up to {worst:.3g}: {numbers}")
    return worst / max(size, 1.0)


def _written(subject: Subject, optimizer: Optimizer) -> str:
    """An expression for the optimizer, as far as its rule can be named."""

    def one(setting: float | Learn) -> str:
        if not isinstance(setting, Learn):
            return repr(setting)
        rates = setting.by.settings["lr"]
        per = "" if setting.per == "model" else f", per={setting.per!r}"
        return f"hn.learn({setting.value!r}, by=hn.sgd(lr={one(rates)}){per})"

    template = subject.template
    changed = {name: one(setting) for name, setting in optimizer.settings.items() if setting is not template.settings[name]}
    options = {
        name: value
        for name, value in getattr(optimizer.rule, "options", {}).items()
        if value is not getattr(template.rule, "options", {})[name]
    }
    return subject.written({name: repr(value) for name, value in options.items()}, changed)
