"""Laws that every rule obeys besides that of hypergradients: purity, structure, vmap, compile, devices, finiteness, descent."""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from hyperopt_nested.engine.nested import Nested
from hyperopt_nested.engine.one_step import OneStep
from hyperopt_nested.rule import Optimizer, Per
from hyperopt_nested.testing.comparison import RuleError, compare, difference
from hyperopt_nested.testing.strategies import MAX_STEPS, Case
from hyperopt_nested.testing.subject import Inapplicable, Subject, Tree, by_path, direct, losses, numbers, start
from hyperopt_nested.trees import map_tree

Law = Callable[[Subject, Case], None]
Reference = Callable[[list[Tensor], dict[str, float]], torch.optim.Optimizer]
"""Another program that should do the same: from tensors and values of hypers to an optimizer of them."""


def check_purity(subject: Subject, case: Case) -> None:
    """Inputs stay untouched and are not handed out again; the same inputs give the same outputs; no random numbers are drawn."""
    step = subject.step(case)
    step = replace(step, states=map_tree(torch.clone, step.states))  # which may share tensors with the parameters
    given = by_path({"param": step.params, "grad": step.grads, "state": step.states, "hyper": step.hypers})
    before = {path: (leaf.clone(), leaf._version) for path, leaf in given.items()}
    seed = torch.get_rng_state()
    first = step()
    for path, (value, version) in before.items():
        if given[path]._version != version or not _identical(given[path], value):
            raise RuleError(f"the update changes its input {path} in place: compute new tensors")
    outputs, again = (by_path({"param": new, "state": state}) for new, state in (first, step()))
    for path, leaf in outputs.items():
        if not _identical(leaf, again[path]):
            raise RuleError(f"the update gives another {path} when it is repeated with the same inputs: it depends on hidden state")
    if not torch.equal(seed, torch.get_rng_state()):
        raise RuleError("the update draws from the global random number generator: it must be a function of its inputs")
    for path, leaf in outputs.items():
        for source, tensor in given.items():
            kept = path.startswith("state.") and source.startswith("state.")
            if not kept and leaf.numel() and leaf.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr():
                raise RuleError(f"the new {path} is, or is a view of, the input {source}, which the caller may overwrite: clone it")


def check_structure(subject: Subject, case: Case) -> None:
    """Paths, shapes and dtypes of the state never change, the parameter keeps its shape and dtype, and everything stays finite."""
    for dtype in (torch.float64, torch.float32):
        optimizer = subject.fixed(case)
        params = case.to(dtype).params
        states = start(optimizer, params)
        expected = _forms({"param": params, "state": states})
        for grads in case.to(dtype).grads:
            params, states = direct(optimizer, params, grads, states, numbers(case, optimizer))
            forms = _forms({"param": params, "state": states})
            for path in sorted(expected.keys() | forms.keys()):
                if forms.get(path) != expected.get(path):
                    raise RuleError(f"{path} was {expected.get(path)} and became {forms.get(path)} in an update with {dtype}")
            _check_finite({"param": params, "state": states}, f"after an update with {dtype}")


def check_devices(subject: Subject, case: Case) -> None:
    """Everything is made on the parameter's device, and no tensor's value is read: shown on the device `meta`, which has no values."""
    optimizer = subject.fixed(case)
    meta = case.to("meta")
    try:
        states = start(optimizer, meta.params)
        hypers = {name: {hyper: value.to("meta") for hyper, value in values.items()} for name, values in numbers(case, optimizer).items()}
        params, states = direct(optimizer, meta.params, meta.grads[0], states, hypers)
    except ValueError as error:
        raise Inapplicable(str(error)) from error
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise RuleError(
            f"the update fails on tensors without values ({error}): it reads a value, as .item(), float() and `if` do, or "
            "makes a tensor on another device than the parameter's"
        ) from error
    for path, leaf in by_path({"param": params, "state": states}).items():
        if leaf.device.type != "meta":
            raise RuleError(f"{path} is on {leaf.device}, not on the parameter's device: use torch.zeros_like, or device=param.device")


def check_vmap(subject: Subject, case: Case) -> None:
    """A batch of runs under `torch.func.vmap` is the runs one by one."""
    step = subject.step(case)  # refuses what the rule refuses
    program = functools.partial(_run, step.optimizer)
    params, grads = tree_map(lambda x: torch.stack([x, -x, 0.5 * x]), (case.params, case.grads))
    batch = params, grads, tree_map(lambda x: x.expand(3), step.hypers)
    try:
        together = torch.func.vmap(program)(*batch)
    except RuntimeError as error:
        raise RuleError(f"the update does not run under torch.func.vmap: {str(error).splitlines()[0]}") from error
    for index in range(3):
        found, alone = tree_map(lambda x, i=index: x[i], (together, batch))
        compare(found, program(*alone), f"run {index} of a batch under torch.func.vmap", "the run alone")


def check_compile(subject: Subject, case: Case) -> None:
    """`torch.compile` takes the update as one graph, and gives the same. Code generation is left out, for it takes long."""
    step = subject.step(case)  # refuses what the rule refuses
    program = functools.partial(_run, step.optimizer)
    inputs = case.params, case.grads[: MAX_STEPS + 1], step.hypers  # more steps are one long program
    torch._dynamo.reset()
    try:
        compiled = torch.compile(program, fullgraph=True, backend="aot_eager")(*inputs)
    except Exception as error:
        raise RuleError(f"torch.compile(fullgraph=True) does not take the update: {str(error).strip().splitlines()[0]}") from error
    finally:
        torch._dynamo.reset()
    compare(compiled, program(*inputs), "under torch.compile", "the update without it")


def check_ends(subject: Subject, case: Case) -> None:
    """With a hyper at an end that belongs to its domain, and gradients with exact zeros, values and hypergradients stay finite."""
    for name in subject.own:
        hyper = subject.template.rule.hypers[name]
        for end, is_open in ((hyper.lower, hyper.open_lower), (hyper.upper, hyper.open_upper)):
            if is_open or math.isinf(end):
                continue
            at_end = replace(case, hypers={**case.hypers, name: end})
            learned: dict[str, Per] = {} if name in subject.template.rule.nondifferentiable else {name: "tensor"}
            nested = Nested(subject.learning(at_end, learned), horizon=OneStep(memory="reverse"))  # which hides nothing that is not finite
            try:
                params, st = case.params, nested.init(case.params)
            except ValueError:  # at zero it switches something off that another hyper needs, or that it acts on itself
                continue
            for grads in case.grads:
                params, st = nested.step(params, grads, st, losses(subject.template, grads))
            _check_finite({"param": params, "hypergradient": nested.hypergradients(params, case.after, st)}, f"with {name}={end!r}")


def check_precision(subject: Subject, case: Case) -> None:
    """In float64, nothing is rounded to fewer digits: no cast to a narrower dtype, and no number in one that is not exact there."""
    step = subject.step(case)
    with _Widths():  # type: ignore[no-untyped-call]
        step()


class _Widths(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises RuleError in an operation that mixes float64 with what was rounded to a narrower dtype."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given, made = _floating((args, kwargs)), _floating(found)
        if any(each.dtype == torch.float64 for each in (*given, *made)):
            for each in made:
                if each.dtype != torch.float64:
                    raise RuleError(f"the update casts float64 to {each.dtype} in {func}: compute in the parameter's dtype")
            for each in given:
                if each.dtype != torch.float64 and not _exact(each.to(torch.float64)):
                    raise RuleError(
                        f"the update uses a number in {each.dtype}, {each.flatten()[0].item():.10g}, with others in float64 in {func}: "
                        "give torch.tensor and the like dtype=param.dtype, and cast a counter before it is divided or rooted"
                    )
        return found


def _floating(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _exact(values: Tensor) -> bool:
    """Whether these are multiples of 2^-12, as counters, masks and halves are: they have been rounded nowhere."""
    return bool(((values * 4096).round() == values * 4096).all())


def check_descent(subject: Subject, case: Case) -> None:
    """The first update, from zero, does not go up the gradient."""
    optimizer = subject.fixed(case)
    zero = map_tree(torch.zeros_like, case.params)
    new, _ = direct(optimizer, zero, case.grads[0], start(optimizer, zero), numbers(case, optimizer))
    for name, grad in case.grads[0].items():
        along = (grad * new[name]).sum()
        if float(along) > 1e-9 * float((grad * new[name]).abs().sum()):
            raise RuleError(f"the first update goes up the gradient: their inner product is {float(along):.6g}, not negative")


def same_as(reference: Reference) -> Law:
    """The law that values equal those of another program."""

    def check_reference(subject: Subject, case: Case) -> None:
        optimizer = subject.step(case).optimizer  # refuses what the rule refuses
        params, states = dict(case.params), start(optimizer, case.params)
        theirs = {name: torch.nn.Parameter(param.clone()) for name, param in params.items()}
        other = reference(list(theirs.values()), optimizer.declared)
        for step, grads in enumerate(case.grads, start=1):
            params, states = direct(optimizer, params, grads, states, numbers(case, optimizer))
            for name, param in theirs.items():
                param.grad = grads[name].clone()
            other.step()
            expected = {f"tensor {name!r}": param.detach() for name, param in theirs.items()}
            compare({f"tensor {name!r}": param for name, param in params.items()}, expected, f"after step {step}", "the reference")

    return check_reference


LAWS: tuple[Law, ...] = (check_structure, check_purity, check_precision, check_devices, check_vmap, check_ends, check_descent)


def _run(optimizer: Optimizer, params: Tree, grads: list[Tree], hypers: Mapping[str, Tree]) -> dict[str, Any]:
    states = start(optimizer, params)
    for each in grads:
        params, states = direct(optimizer, params, each, states, hypers)
    return by_path({"param": params, "state": states})


def _check_finite(tree: Mapping[str, Any], where: str) -> None:
    for path, leaf in by_path(tree).items():
        if not bool(torch.isfinite(leaf).all()):
            raise RuleError(f"{where}, {path} is not finite: {leaf}")


def _identical(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and not bool(difference(a, b).any())


def _forms(tree: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], torch.dtype | str]]:
    """Shapes and dtypes; a tensor of shape () may take part in float64 for a while, as the hypers do."""
    return {path: (tuple(x.shape), x.dtype if x.ndim or not x.is_floating_point() else "floating") for path, x in by_path(tree).items()}
