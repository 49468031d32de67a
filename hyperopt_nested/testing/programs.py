"""Backends against the engine: where a backend steps a rule, parameters, states and hypers are those of the reference."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from hyperopt_nested.backends.choice import Backend
from hyperopt_nested.engine.nested import Nested
from hyperopt_nested.optim.optimizer import HyperOptimizer
from hyperopt_nested.rule import Learn, Optimizer, Per, learn
from hyperopt_nested.rules.sgd import sgd
from hyperopt_nested.testing.comparison import SAME, RuleError, compare
from hyperopt_nested.testing.hypergradients import PERS
from hyperopt_nested.testing.strategies import Shape, inside, room
from hyperopt_nested.testing.subject import Inapplicable, Subject, start

_SHAPES: tuple[Shape, ...] = ((4, 3), (5,), (2, 3, 2, 2), (260, 256))  # the last is more than what "foreach" does in one piece
_STEPS = 7

Shapes = dict[str, Shape]


@dataclass(frozen=True)
class Comparison:
    """How a backend does on a rule.

    Attributes:
        largest: relative difference from the reference, by what was compared, such as `lr, beta learned per row`.
        refused: what the backend says that it cannot run, by the same.
    """

    largest: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        worst = max(self.largest.values(), default=0.0)
        lines = [f"agrees with 'reference' in {len(self.largest)} settings, largest relative difference {worst:.0e}"] * bool(self.largest)
        by_reason: dict[str, list[str]] = {}
        for setting, reason in self.refused.items():
            by_reason.setdefault(reason.splitlines()[0], []).append(setting)
        lines += [f"not served: {reason} ({len(each)} settings, such as {each[0]!r})" for reason, each in by_reason.items()]
        return "; ".join(lines)


class Setting(NamedTuple):
    """What is compared.

    Attributes:
        title: how reports call it.
        optimizer: what is run.
        options: those that are not the template's.
        parts: simpler settings to look at if it fails.
    """

    title: str
    optimizer: Optimizer
    options: Mapping[str, Any] = {}
    parts: "Sequence[Setting]" = ()


def check_names(backends: Sequence[str]) -> None:
    """Refuse what cannot be compared with the reference.

    Raises:
        ValueError: a name is none of the backends, or one that chooses among the others.
    """
    choices = [name for name in get_args(Backend) if name not in ("auto", "reference")]
    if isinstance(backends, str) or not set(backends) <= set(choices):
        raise ValueError(f"backends={backends!r} must be a sequence of {', '.join(map(repr, choices))}, which 'reference' is compared with")


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
        ValueError: the backend says that it cannot run this.

    Example:
        >>> import hyperopt_nested as hn
        >>> hn.testing.check_backend(hn.sgd(lr=0.1), "foreach", {"a": (4, 3)}) < 1e-15
        True
    """
    check_names([backend])
    reference, other = (_run(optimizer, name, shapes, steps) for name in ("reference", backend))
    worst = 0.0
    for step, expected in enumerate(reference):
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message=f"backend={backend!r}")
                found = next(other)
        except Exception as error:
            if isinstance(error, ValueError) and f"backend={backend!r}" in str(error):
                raise
            what = (str(error).strip().splitlines() or [""])[0]
            raise RuleError(f"backend={backend!r} fails in step {step}: {type(error).__name__}: {what}") from error
        worst = max(worst, compare(found, expected, f"backend={backend!r} after step {step}", "'reference'", SAME))
    return worst


def _run(optimizer: Optimizer, backend: Any, shapes: Mapping[str, tuple[int, ...]], steps: int) -> Iterator[dict[str, Any]]:
    """Parameters, everything in the state, and learned values, by path: at the start, and after each step."""
    generator = torch.Generator().manual_seed(0)

    def drawn() -> dict[str, Tensor]:
        return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}

    params = {name: torch.nn.Parameter(value) for name, value in drawn().items()}
    opt = HyperOptimizer(list(params.items()), optimizer, backend=backend)
    for step in range(steps + 1):
        if step:
            for name, value in drawn().items():
                params[name].grad = torch.where(torch.rand(value.shape, generator=generator) < 0.1, 0, value)
            opt.step(loss=(-1) ** step)
        found: dict[str, Any] = {f"parameter {name!r}": param.detach() for name, param in params.items()}
        found |= {f"state {key!r} of {name!r}": leaf for name, param in params.items() for key, leaf in opt.state.get(param, {}).items()}
        yield found | {f"learned {hyper} of {key!r}": leaf for hyper, by in opt.hypers().items() for key, leaf in by.items()}


def check_backends(subject: Subject, backend: str) -> Comparison:
    """Compare a backend with the reference: hypers not learned and learned at each granularity, options, shapes.

    Raises:
        RuleError: they differ.
    """
    accepted = [shape for shape in _SHAPES if subject.accepts(shape)]
    alone, every = dict(zip("a", accepted, strict=False)), dict(zip("abcd", accepted, strict=False))
    found = Comparison()
    for setting in _settings(subject, alone) if accepted else ():
        for shapes in (every,) if setting.parts else (alone,) if setting.optimizer.learned else (alone, every):
            tries = [(setting, shapes), *((part, alone) for part in setting.parts), *((setting, {"a": shape}) for shape in accepted)]
            try:
                worst = check_backend(setting.optimizer, backend, shapes)
                found.largest[setting.title] = max(found.largest.get(setting.title, 0.0), worst)
            except ValueError as error:
                found.largest.pop(setting.title, None)
                found.refused[setting.title] = str(error)
                break
            except RuleError as error:
                raise _smallest(subject, backend, error, tries if len(shapes) > 1 else tries[:1]) from None
    return found


def _smallest(subject: Subject, backend: str, error: RuleError, tries: Sequence[tuple[Setting, Shapes]]) -> RuleError:
    """The error of the first of smaller settings that fails too; else that of the first, which is known."""
    setting, shapes = tries[0]
    for smaller in tries[1:]:
        try:
            check_backend(smaller[0].optimizer, backend, smaller[1])
        except ValueError:
            continue
        except RuleError as other:
            error, (setting, shapes) = other, smaller
            break
    how = f"\n\nTo see it again:\n\nhn.testing.check_backend({_written(subject, setting)}, {backend!r}, {shapes!r})"
    return RuleError(f"{subject.name}: {error} ({setting.title}, tensors of shape {', '.join(map(str, shapes.values()))}){how}")


def _settings(subject: Subject, shapes: Shapes) -> Iterator[Setting]:
    """Settings that the engine takes, for tensors of these shapes."""
    template = subject.template
    values = {name: inside(template.rule.hypers[name]) for name in subject.own}
    params = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}

    def runs(setting: Setting) -> bool:
        try:
            start(setting.optimizer, params)
            Nested(setting.optimizer).init(params)
        except (Inapplicable, ValueError):
            return False
        return True

    def learning(names: Sequence[str], per: Per, tower: bool, parts: Sequence[Setting] = ()) -> Setting:
        """Hypers learned at rates so low that they stay near their values; in a tower, the rates are learned too."""
        changed: dict[str, float | Learn] = {}
        for name in names:
            rate = float(f"{1e-4 * room(template.rule.hypers[name], values[name]) ** 2:.1g}")
            by = sgd(lr=learn(rate, by=sgd(lr=float(f"{1e-6 * rate:.1g}")))) if tower else sgd(lr=rate)
            changed[name] = learn(values[name], by=by, per=per)
        how = f"learned per {per}{', at a rate that is learned' if tower else ''}"
        return Setting(f"{', '.join(names)} {how}", template.replace(**changed), parts=parts)

    yield Setting("as declared", template)
    flipped = [Setting("".join(f"{name}={value!r}" for name, value in flip.items()), subject.make(**flip), flip) for flip in subject.flips]
    inner = [] if template.learned else [Setting("values inside the domain", template.replace(**values))]
    yield from filter(runs, inner + flipped)
    names = [name for name in subject.own if name not in template.rule.nondifferentiable]
    for per, tower in (*((per, False) for per in PERS), ("row", True)):
        singles = list(filter(runs, (learning([name], per, tower) for name in names)))
        together: list[str] = []
        for name in names:
            if runs(learning([*together, name], per, tower)):
                together.append(name)
        if len(together) > 1:
            yield learning(together, per, tower, singles)
        if len(together) == 1 or per == "element":
            yield from singles


def _written(subject: Subject, setting: Setting) -> str:
    """An expression for the optimizer, as far as its rule can be named."""

    def one(value: float | Learn) -> str:
        if not isinstance(value, Learn):
            return repr(value)
        per = "" if value.per == "model" else f", per={value.per!r}"
        return f"hn.learn({value.value!r}, by=hn.sgd(lr={one(value.by.settings['lr'])}){per})"

    options = ", ".join(f"{name}={value!r}" for name, value in setting.options.items())
    before = subject.template.settings
    changed = [f"{name}={one(value)}" for name, value in setting.optimizer.settings.items() if value is not before[name]]
    return subject.code.format(options) + (f".replace({', '.join(changed)})" if changed else "")
