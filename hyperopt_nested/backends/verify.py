"""Whether programs do what the engine does, tried on small examples before they are used."""

import itertools
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from hyperopt_nested.backends.program import Batch, Engine, Program, Request, write_over
from hyperopt_nested.engine.learned import LearnedHyper

_TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
_NOISE = 100.0  # times what rounding of the arguments makes of a result, there or in half of it, is rounding, too

Row = Sequence[Tensor]

_SIZES = {0: (), 1: (37,), 2: (5, 19), 3: (4, 3, 7), 4: (3, 4, 3, 2)}
_SCALES = 1.0, 0.03, 30.0, 1.0, 0.1, 1.0, 3.0, 1.0  # of the gradients of successive examples


def deviation(programs: Sequence[Program], request: Request, *, whole: bool = False) -> str:
    """What deviates from the functions of a request, in words; nothing if programs agree with them on all examples, up to rounding."""
    if request.param.is_meta:  # nothing is computed there
        return ""
    tolerance = max(_TOLERANCE.get(argument.dtype, 0.0) for argument in request.arguments)
    by_engine = [Engine(function) for function in request.functions]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        others = iter(request.examples(whole=False, less=1))  # which are stepped in the same batch, and have other sizes
        for example in request.examples(whole=whole):
            rows = [*([next(others)] if programs[0].backend == "foreach" else []), example]
            (*beside, found), (wanted,) = _run(programs, rows, request), _run(by_engine, [example], request)
            wrong = [i for i in range(1, len(wanted)) if _differs(found[i], wanted[i], tolerance)]
            if wrong:
                moved = [_run(by_engine, [_moved(example, seed)], request)[0] for seed in range(8)]
                noise = {i: torch.stack([_distance(each[i], wanted[i]) for each in moved]).sum(0) for i in wrong}
                wrong = [i for i in wrong if _differs(found[i], wanted[i], tolerance, noise[i].clamp(min=noise[i].median()))]
            if wrong:
                value, off = wanted[wrong[0]].double(), found[wrong[0]].double() - wanted[wrong[0]].double()
                return f"a result of {float(value.abs().amax()):.3g} is off by {float(off.abs().amax()):.3g}"
            for row, new in zip(rows, (*beside, wanted), strict=True):
                write_over(row, [None if i in request.changing else value for i, value in enumerate(new)])
    return ""


def _run(programs: Sequence[Program], batch: Sequence[Row], request: Request) -> list[list[Tensor]]:
    """What the arguments in a batch are after programs, between which shared values change."""
    rows = [[argument.clone() for argument in row] for row in batch]
    for program in programs:
        program(Batch(rows))
        for row, i in itertools.product(rows, request.changing):
            row[i].mul_(1.01)
    return rows


def _moved(arguments: Row, seed: int) -> list[Tensor]:
    """Arguments that are changed by as little as rounding does."""
    generator = torch.Generator().manual_seed(seed)
    moved = []
    for each in arguments:
        change = torch.rand(each.shape, generator=generator, dtype=torch.float64).to(each.device) * 16 - 8
        eps = torch.finfo(each.dtype).eps if each.is_floating_point() else 0
        moved.append((each.double() * (1 + change * eps)).to(each.dtype))
    return moved


def examples(
    arguments: Row, param: Tensor, hypers: Mapping[int, LearnedHyper], point: int | None, *, whole: bool, less: int = 0
) -> Iterator[list[Tensor]]:
    """Make examples of the arguments of an update: cut from these, with random gradients; each goes on from what is written to the last.

    Learned values are moved on some of them, so that conditions that depend on them flip. The last has gradients that are not finite.
    The argument at `point` is the tensor, and those at the indices of `hypers` are unconstrained values. If `whole`, examples have the
    sizes and strides of the arguments; else they are small, and smaller by `less`.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = zip(param.shape, _SIZES.get(param.ndim, (3,) * param.ndim), strict=True)
    shape = tuple(1 if size == 1 else small - less for size, small in sizes)

    def drawn(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device, tensor.dtype)

    def small(tensor: Tensor) -> Tensor:
        """A tensor of this kind for the small shape, with values of this one, where these are finite."""
        found = tensor.detach()
        if not whole and tensor.numel() != 1:
            row = (*shape[:1], *(1 for _ in shape[1:])) if tensor.ndim == param.ndim else shape[: tensor.ndim]
            wanted = shape if tensor.shape == param.shape else row
            count = torch.Size(wanted).numel()
            flat = found.reshape(-1)[:count]
            found = flat.repeat(-(-count // flat.numel()))[:count].reshape(wanted)
        return torch.where(torch.isfinite(found), found, 1) if found.is_floating_point() else found.clone()

    now = [small(argument) for argument in arguments]
    if point is not None:
        now[point] += drawn(now[point])
    for at, scale in enumerate(_SCALES):
        now[0] = grad = drawn(now[0]) * scale
        if at == 3 and grad.ndim:
            grad[0] = 0
        if at == len(_SCALES) - 1:
            grad.view(-1)[:: max(grad.numel() // 2, 1)] = torch.inf
            grad.view(-1)[-1:] = torch.nan
        for i, learned in hypers.items() if at > 3 else ():
            factor = 0.25 + torch.rand(now[i].shape, generator=generator, dtype=torch.float64).to(now[i].device)
            now[i] = learned.hyper.confine((now[i] * factor).to(now[i].dtype), learned.via)
        yield now


def _differs(found: Tensor, wanted: Tensor, tolerance: float, noise: Tensor | float = 0.0) -> bool:
    """Whether a result differs from the engine's by more than rounding, or is finite where that is not."""
    if not wanted.is_floating_point():
        return not torch.equal(found, wanted)
    if not torch.equal(torch.isfinite(found), torch.isfinite(wanted)):
        return True
    size = torch.where(torch.isfinite(wanted), wanted.double().abs(), 0)
    allowed = tolerance * (size + 0.1 * size.amax() + 1e-3) + _NOISE * noise
    return bool((_distance(found, wanted) > allowed).any())


def _distance(found: Tensor, wanted: Tensor) -> Tensor:
    finite = torch.isfinite(found) & torch.isfinite(wanted)
    return torch.where(finite, (found.double() - wanted.double()).abs(), 0)
