"""Whether programs do what the engine does, tried on small examples before they are used."""

import torch
from torch import Tensor

from hyperopt_nested.backends.program import Batch, Program, Request, write_over

_TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
_NOISE = 100.0
"""A difference is rounding if it is no larger than so many times what rounding-size changes of the arguments make of the engine's result."""


def deviation(programs: list[Program], request: Request, *, whole: bool = False) -> str:
    """Compare programs with the functions that they are made of.

    Args:
        programs: one for each function of the request.
        request: what they were made for.
        whole: whether they take tensors of no other size.

    Returns:
        What deviates, in words; nothing if the programs agree with the engine on all examples, up to rounding.
    """
    coarsest = max((_TOLERANCE.get(argument.dtype, 0.0) for argument in request.arguments), default=0.0)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for example in request.examples(whole=whole):
            start = [argument.clone() for argument in example]
            found = [argument.clone() for argument in example]
            for program in programs:
                program(Batch([found]))
                _change(found, request)
            wanted = _by_engine(start, request)
            wrong = [i for i in range(1, len(start)) if _differs(found[i], wanted[i], coarsest)]
            if wrong:
                noise = [_noise(start, wanted, seed, request) for seed in range(8)]
                wrong = [i for i in wrong if _differs(found[i], wanted[i], coarsest, sum(each[i] for each in noise))]
            if wrong:
                off = (found[wrong[0]].double() - wanted[wrong[0]].double()).abs().amax()
                return f"a result of {float(wanted[wrong[0]].double().abs().amax()):.3g} is off by {float(off):.3g}"
    return ""


def _by_engine(arguments: list[Tensor], request: Request) -> list[Tensor]:
    now = [argument.clone() for argument in arguments]
    for function in request.functions:
        write_over(now, function(*now))
        _change(now, request)
    return now


def _change(arguments: list[Tensor], request: Request) -> None:
    """What happens to shared values between programs."""
    for i in request.changing:
        arguments[i].mul_(1.01)


def _noise(arguments: list[Tensor], wanted: list[Tensor], seed: int, request: Request) -> list[Tensor]:
    """How far the engine's results move if its arguments change by as little as rounding does, entry by entry."""
    generator = torch.Generator().manual_seed(seed)
    moved = []
    for each in arguments:
        if each.is_floating_point():
            change = torch.rand(each.shape, generator=generator, dtype=torch.float64).to(each.device) * 16 - 8
            each = (each.double() * (1 + change * torch.finfo(each.dtype).eps)).to(each.dtype)
        moved.append(each)
    return [_distance(new, old) for new, old in zip(_by_engine(moved, request), wanted, strict=True)]


def _differs(found: Tensor, wanted: Tensor, tolerance: float, noise: Tensor | float = 0.0) -> bool:
    """Whether a result differs from the engine's by more than rounding, or is finite where that is not."""
    if not wanted.is_floating_point():
        return not torch.equal(found, wanted)
    if not torch.equal(torch.isfinite(found), torch.isfinite(wanted)):
        return True
    size = torch.where(torch.isfinite(wanted), wanted.double().abs(), 0)
    allowed = tolerance * (size + 0.1 * size.amax() + 1e-4) + _NOISE * noise
    return bool((_distance(found, wanted) > allowed).any())


def _distance(found: Tensor, wanted: Tensor) -> Tensor:
    finite = torch.isfinite(found) & torch.isfinite(wanted)
    return torch.where(finite, (found.double() - wanted.double()).abs(), 0)
