"""`check_rule`: is a new optimizer right?"""

import functools
import logging
import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, reject, seed, settings

from hyperopt_nested.rule import Per
from hyperopt_nested.testing.comparison import RuleError
from hyperopt_nested.testing.derivatives import check_derivatives
from hyperopt_nested.testing.hypergradients import PERS, Record, check_granularities, learnable
from hyperopt_nested.testing.laws import LAWS, Law, Reference, check_compile, check_precision, check_purity, check_structure, same_as
from hyperopt_nested.testing.programs import Comparison, check_backends, check_names
from hyperopt_nested.testing.strategies import SHAPES, Case, Shape, cases, inside, normal_case
from hyperopt_nested.testing.subject import Checkable, Inapplicable, Subject, subject

_ROUNDS, _EXAMPLES = 20, 600  # at most, or at most so many examples, until every hyper is verified at every granularity
_SHRINKS = 200  # examples tried in search of a smaller one that fails

_LARGE = ((40, 64), (2560,), (16, 10, 4, 4))  # shapes; the first that the rule accepts is checked
_LATE, _LATER = 25, 101  # steps, of a large tensor and a small one, and of a small one

_log = logging.getLogger("hyperopt_nested")


@dataclass(frozen=True)
class Report:
    """What `check_rule` verified.

    Attributes:
        name: of the rule.
        verified: largest relative error of a hypergradient against finite differences, by hyper and granularity.
        nondifferentiable: hypers whose derivative was verified to be zero, so that learning them is refused.
        kinks: how many derivatives were left out because the update has a kink beside the example.
        backends: of each backend that was compared with the reference, what it serves and how well.
    """

    name: str
    verified: Mapping[tuple[str, Per], float]
    nondifferentiable: tuple[str, ...] = ()
    kinks: int = 0
    backends: Mapping[str, Comparison] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.name}: every law holds"]
        for name in dict.fromkeys(name for name, _ in self.verified):
            errors = ", ".join(f"{per} {self.verified[name, per]:.0e}" for per in PERS if (name, per) in self.verified)
            lines.append(f"  {name}: hypergradient verified, largest relative error per {errors}")
        lines += [f"  {name}: nondifferentiable (derivative zero); learning it is refused" for name in self.nondifferentiable]
        if self.kinks:
            lines.append(f"  {self.kinks} derivatives beside a kink were left out")
        lines += [f"  backend {name!r}: {found}" for name, found in self.backends.items()]
        return "\n".join(lines)


class _Enough(BaseException):
    """Ends a search: hypothesis catches every Exception, and would go on to draw examples that are not looked at."""


def check_rule(rule: Checkable, *, examples: int = 30, reference: Reference | None = None, backends: Sequence[str] = ()) -> Report:
    """Check a rule's derivatives against finite differences, and the laws that it must obey.

    Hypothesis draws shapes, values (exact zeros, repeated, tiny, huge), options that are booleans, values of hypers across their domains,
    granularities, and how many updates come before. Of each example:

    * forward memory, reverse memory and finite differences give the same hypergradient, of every hyper;
    * every hyper has one, but those declared nondifferentiable, whose derivative must be zero; those that enter a sum over all tensors are
      learned per model;
    * the derivatives of the new parameter and of the new state with respect to parameter, gradient, state and hypers, on which
      hypergradients through several steps rely, are those of finite differences, in late steps and for a large tensor too;
    * the update is pure, keeps structure, dtype and device, computes in float64 if it is given float64, and stays finite, at closed
      ends of domains too;
    * `torch.func.vmap` and `torch.compile` change nothing; the first step goes downhill.

    Where `kink` declares one beside an example, that derivative is left out, and counted. Examples are the same in every run.

    Args:
        rule: a rule, a combinator (checked around `sgd`), an optimizer (whose options are kept), or a registered name.
        examples: how many examples of each law.
        reference: another program of the same optimizer, to compare values with.
        backends: backends of `HyperOptimizer` to compare with `backend="reference"`: "foreach", "compile", "fused". Hypers are learned
            and not learned, at every granularity. It takes seconds with "foreach", and minutes where programs are compiled. What a
            backend does not serve is in the report.

    Returns:
        What was verified.

    Raises:
        RuleError: a law is broken (an AssertionError). The message names the rule, the hyper, the shapes and both numbers, and ends with
            the smallest example found, to be pasted into a test.
        TypeError: `rule` is nothing that can be checked, or `examples` is no integer.
        ValueError: `backends` has other names, or `examples` is less than 1.

    Example:
        >>> import hyperopt_nested as hn
        >>> report = hn.testing.check_rule(hn.centralize(hn.sgd()), examples=5)
        >>> sorted({hyper for hyper, _ in report.verified})
        ['dampening', 'lr', 'momentum', 'weight_decay']
    """
    check_names(backends)
    if not isinstance(examples, int) or isinstance(examples, bool):
        raise TypeError(f"examples={examples!r} ({type(examples).__name__}) must be an integer >= 1")
    if examples < 1:
        raise ValueError(f"examples={examples!r} must be an integer >= 1")
    checked = subject(rule)
    if reference is not None:
        _search(checked, same_as(reference), examples)
    for law in LAWS:
        _say(checked, law.__name__.removeprefix("check_"))
        _search(checked, law, examples // 2 + 1)
    _say(checked, "compile")
    _search(checked, check_compile, 1)
    _say(checked, "hypergradients")
    report = verify(checked, examples=examples)
    _say(checked, "derivatives")
    _search(checked, check_derivatives, examples // 2 + 1)
    _search_long(checked)
    compared = {}
    for name in backends:
        _say(checked, f"backend {name}")
        compared[name] = check_backends(checked, name)
    return replace(report, backends=compared)


def _say(checked: Subject, what: str) -> None:
    """Log what is checked next."""
    _log.info("checking %s: %s", checked.name, what)


def verify(checked: Subject, *, examples: int = 30) -> Report:
    """The law of hypergradients alone, as in `check_rule`."""
    rule = checked.template.rule
    record = Record(list(_to_verify(checked)))
    law = functools.partial(check_granularities, record=record)
    rounds = max(_ROUNDS, _EXAMPLES // examples)
    for turn in range(rounds if checked.own else 0):
        _search(checked, law, examples, turn, sorted({per for _, per in record.missing}, key=PERS.index) or PERS)
        if not record.missing:
            break
    for name, per in record.missing:
        raise RuleError(
            f"{checked.name}: the hypergradient of {name} per {per} could not be verified: in none of {rounds * examples} examples was it "
            f"large enough for finite differences to resolve ({record.kinks} were left out at kinks). Is its derivative always zero? "
            "Then declare it nondifferentiable. Does it matter only with other options? Then check an optimizer that has them"
        )
    zero = tuple(name for name in checked.own if name in rule.nondifferentiable)
    return Report(checked.name, {pair: record.worst[pair] for pair in record.wanted}, zero, record.kinks)


def _to_verify(checked: Subject) -> Iterator[tuple[str, Per]]:
    """Hypers and granularities that the engine learns."""
    values = {name: inside(checked.template.rule.hypers[name]) for name in checked.own}
    case = normal_case(values, {"a": next(iter(checked.shapes()), ())}, 1)
    for name in checked.own:
        yield from ((name, per) for per in PERS if learnable(checked, replace(case, per=per), name))


def check_case(rule: Checkable, case: Case) -> None:
    """All laws, on one example: what a failure of `check_rule` prints can be pasted as an argument.

    Raises:
        RuleError: a law is broken.

    Example:
        >>> import hyperopt_nested as hn
        >>> hypers = {"lr": 0.1, "momentum": 0.5, "dampening": 0.1, "weight_decay": 0.1}
        >>> hn.testing.check_case("sgd", hn.testing.normal_case(hypers, {"w": (2,)}, 1))
    """
    checked = subject(rule)
    laws: list[Law] = [*LAWS, functools.partial(check_granularities, record=Record()), check_derivatives, check_compile]
    if error := _broken(checked, case, laws):
        raise RuleError(f"{checked.name}: {error}") from None


def _search(checked: Subject, law: Law, examples: int, turn: int = 0, pers: Sequence[Per] = PERS) -> None:
    """Look for a case that breaks a law, and raise what the smallest one found raises."""
    hypers = {name: checked.template.rule.hypers[name] for name in checked.own}
    options = checked.choices or {}
    broken: dict[str, str] = {}
    tries = 0

    @seed(turn)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases(hypers, shapes=checked.shapes(), pers=pers, options=options))
    def look(case: Case) -> None:
        nonlocal tries
        written = repr(case)
        tries += bool(broken)
        if tries > _SHRINKS:
            raise _Enough
        if written not in broken:
            try:
                law(checked, case)
            except Inapplicable:
                reject()
            except RuleError as error:
                broken[written] = _message(checked, error, error.case or case)
        if written in broken:
            raise RuleError(broken[written])

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are tiny
    try:
        look()
    except RuleError as error:
        raise RuleError(str(error)) from None  # without hypothesis's own notes
    except _Enough:
        raise RuleError([*broken.values()][-1]) from None  # what is tried is smaller than what has failed before
    finally:
        torch.set_num_threads(threads)


def _search_long(checked: Subject) -> None:
    """Check late steps, and a tensor larger than those that are drawn; raise what the smallest case that fails raises."""
    shapes = [shape for shape in (*_LARGE, *SHAPES) if checked.accepts(shape) and 0 not in shape]
    if not shapes:
        return
    large, small = shapes[0], next((shape for shape in shapes if 1 < math.prod(shape) < 10), shapes[0])
    rule = checked.template.rule
    values = {name: inside(rule.hypers[name]) for name in checked.own}
    parts = [shape for rows in (1, 2, 4, 8, 16, 32) if checked.accepts(shape := (rows, *large[1:]))]
    runs: list[tuple[tuple[Shape, ...], int, dict[str, Any]]] = [((large, small), _LATE, {}), ((small,), _LATER, {})]
    runs += [((small,), _LATE, flip) for flip in checked.flips]

    def example(tree: Iterable[Shape], steps: int, options: dict[str, Any]) -> Case:
        return normal_case(values, dict(zip("ab", tree, strict=False)), steps, options)

    def broken(tree: Iterable[Shape], steps: int, options: dict[str, Any]) -> RuleError | None:
        return _broken(checked, example(tree, steps, options), (check_structure, check_purity, check_precision, check_derivatives))

    if failed := next((run for run in runs if broken(*run)), None):
        tree, steps, options = failed
        tree = next(((shape,) for shape in (small, *parts, large) if broken((shape,), steps, options)), tree)
        steps = 1 + bisect_left(range(1, steps), True, key=lambda fewer: broken(tree, fewer, options) is not None)
        raise RuleError(_message(checked, broken(tree, steps, options), example(tree, steps, options)))


def _broken(checked: Subject, case: Case, laws: Iterable[Law]) -> RuleError | None:
    """What breaks the first of the laws that a case breaks, if it breaks one."""
    for law in laws:
        try:
            law(checked, case)
        except Inapplicable:
            continue
        except RuleError as error:
            return error
    return None


def _message(checked: Subject, error: RuleError | None, case: Case) -> str:
    """The first line says what is broken, and the rest how to see it again."""
    name = checked.name if checked.name.isidentifier() else "rule"
    return (
        f"{checked.name}: {error}\n\nTo see it again:\n\nimport torch\nimport hyperopt_nested as hn\n\n"
        f"case = {case!r}\nhn.testing.check_case({name}, case)"
    )
