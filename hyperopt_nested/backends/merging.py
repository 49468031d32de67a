"""Several nodes of a graph that one of torch's operators computes, for nodes that nothing else needs."""

import math
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hyperopt_nested.backends.graph import Kind, Value, uncast

Number = Any
"""Of Python, or a tensor of one number, or of one a row."""


@dataclass
class Merged:
    """One operator of torch for several of a graph.

    Attributes:
        run: it.
        operands: of what; None is one that is left out.
        gone: what is not computed by itself then.
        also: what else it computes, in place: by value, the index of the argument.
    """

    run: Callable[..., Any]
    operands: tuple[Value | None, ...]
    gone: set[Value]
    also: Mapping[Value, int] = field(default_factory=dict)


@dataclass
class _Sum:
    """`one + sign * factor * x * y`, or with x / y; without a factor, or with it instead of y, where that is None.

    Attributes:
        gone: what is computed on the way.
    """

    one: Value
    sign: int
    x: Value
    y: Value | None
    factor: Value | None
    divides: bool
    gone: set[Value]


def merge(value: Value, uses: Mapping[Value, int], done: Container[Value], written: Mapping[Value, int]) -> Merged | None:
    """What computes a value together with others.

    Args:
        value: it.
        uses: how often each value is needed.
        done: what is computed before.
        written: what is to be written to arguments, with their indices, where that may be done now; empty where numbers are not Python's.
    """
    found = _sum(value, uses, done)
    if found is None:
        return None
    adam = _adam(found, uses, done, written) if found.divides and written else None
    run = _plus_quotient if found.divides else _plus_product
    return adam or Merged(partial(run, found.sign), (found.one, found.x, found.y, found.factor), found.gone)


def _sum(value: Value, uses: Mapping[Value, int], done: Container[Value]) -> _Sum | None:
    """A sum with a product, or a quotient, that nothing else needs."""
    if value.kind != Kind.ELEMENT or value.op not in ("add", "sub") or not value.dtype.is_floating_point:
        return None

    def inner(each: Value, op: str, kind: Kind = Kind.ELEMENT) -> bool:
        """Whether it is computed by an operator, in the same dtype, for nothing else."""
        return each.op == op and each.kind == kind and each.dtype == value.dtype and uses[each] == 1 and each not in done

    sign = 1 if value.op == "add" else -1
    for one, other in (value.args, value.args[::-1])[: 2 if value.op == "add" else 1]:
        if one.kind != Kind.ELEMENT or one.op == "constant":
            continue
        gone, factor = {other}, None
        if inner(other, "mul") and other.args[1].kind == Kind.NUMBER and (inner(other.args[0], "mul") or inner(other.args[0], "div")):
            other, factor = other.args
            gone.add(other)
        if inner(other, "div") and all(each.kind == Kind.ELEMENT for each in other.args):
            x, y = other.args
            return _Sum(one, sign, x, y, factor, True, gone)
        if not inner(other, "mul"):
            continue
        x, y = other.args
        if y.kind == Kind.NUMBER and factor is None:
            return _Sum(one, sign, x, None, y, False, gone)
        if factor is None and inner(x, "mul") and x.args[1].kind == Kind.NUMBER:
            gone.add(x)
            x, factor = x.args
        elif factor is None and inner(y, "mul", Kind.ROW) and y.args[1].kind == Kind.NUMBER:
            gone.add(y)
            y, factor = y.args
        return _Sum(one, sign, x, y, factor, False, gone)
    return None


def _plus_product(sign: int, one: Tensor, x: Tensor, y: Tensor | None, factor: Number, out: Tensor) -> Tensor:
    if y is None and not isinstance(factor, Tensor):
        return torch.add(one, x, alpha=sign * factor, out=out)
    if y is None:
        y, factor = factor, None
    if isinstance(factor, Tensor):
        x, factor = x * factor, None
    return torch.addcmul(one, x, y, value=sign if factor is None else sign * factor, out=out)


def _plus_quotient(sign: int, one: Tensor, x: Tensor, y: Tensor, factor: Number, out: Tensor) -> Tensor:
    if isinstance(factor, Tensor):
        x, factor = x * factor, None
    return torch.addcdiv(one, x, y, value=sign if factor is None else sign * factor, out=out)


def _adam(step: _Sum, uses: Mapping[Value, int], done: Container[Value], written: Mapping[Value, int]) -> Merged | None:
    """A step of Adam or AdamW, with both of its moments: torch has one operator for it.

    Second moments are taken not to be negative.
    """
    mean, denominator, gone = step.x, step.y, {*step.gone}

    def inner(each: Value, op: str) -> bool:
        gone.add(each)
        return each.op == op and each.kind == Kind.ELEMENT and uses[each] == 1 and each not in done

    def scaled(each: Value) -> tuple[Value, Value | None]:
        """Of what a product with a number is, and that number; or it, and None."""
        if each.op == "mul" and each.args[1].kind == Kind.NUMBER and inner(each, "mul"):
            return each.args
        return each, None

    def average(each: Value) -> tuple[Value, Value, tuple[Value, Value | None]] | None:
        """Of a moment, which becomes `decay * old + (1 - decay) * x * y`: old, decay, and x and y, if there is y."""
        found = _sum(each, uses, done) if each in written and uses[each] == 2 else None
        if found is None or found.sign < 0 or found.divides or found.factor is None:
            return None
        old, decay = scaled(found.one)
        if decay is None or old.op != "input" or old.args[0] != written[each] or uses[old] != 1 or not _complement(found.factor, decay):
            return None
        gone.update(found.gone, {each})
        return old, decay, (found.x, found.y)

    if denominator is None or not inner(denominator, "add") or denominator.args[1].kind != Kind.NUMBER:
        return None
    root, eps = denominator.args
    if not inner(root, "sqrt") or not inner(root.args[0], "clamp"):
        return None
    clamped, low, high = root.args[0].args
    square, correction = scaled(clamped)
    first, second = average(mean), average(square)
    if not first or not second or high is not None or low is None or not low.is_constant(0):
        return None
    grad = first[2][0]
    if first[2] != (grad, None) or second[2] != (grad, grad) or grad.kind != Kind.ELEMENT or grad.op == "constant":
        return None
    param, keep = scaled(step.one)
    if param.op == "cast" and param.args[0].op == "input" and inner(param, "cast"):
        param = param.args[0]
    operands = (param, keep, grad, first[0], second[0], first[1], second[1], correction, eps, step.factor)
    return Merged(partial(_adam_step, step.sign), operands, gone, {each: written[each] for each in (mean, square)})


def _complement(one: Value, other: Value) -> bool:
    """Whether a number is made as 1 minus another one."""
    one, other = uncast(one), uncast(other)
    if one.op == "sub" and one.args[0].is_constant(1):
        return one.args[1] is other or (other.op == "constant" and bool(one.args[1].is_constant(other.args[0])))
    return other.op == "constant" and one.is_constant(1 - other.args[0])


_LATE = torch.tensor(1e30, dtype=torch.float32, device="cpu")
"""A step for which torch's corrections of moments are 1."""


def _adam_step(
    sign: int,
    param: Tensor,
    keep: float | None,
    grad: Tensor,
    mean: Tensor,
    square: Tensor,
    beta1: float,
    beta2: float,
    correction: float | None,
    eps: float,
    rate: float | None,
    out: Tensor,
) -> Tensor:
    """Moments in place, and `keep * param + sign * rate * mean / (sqrt(correction * square) + eps)`."""
    if param is not out:
        out.copy_(param)
    root = 1.0 if correction is None else math.sqrt(correction) if correction >= 0 else math.nan
    lr = -sign * (1 if rate is None else rate) / root
    if keep is not None and not lr:
        out.mul_(keep)
    torch._fused_adamw_(
        [out],
        [grad],
        [mean],
        [square],
        [],
        [_LATE],
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=(1 - keep) / lr if keep is not None and lr else 0.0,
        eps=eps / root,
        amsgrad=False,
        maximize=False,
    )
    return out


def is_dot(total: Value, operand: Value, uses: Mapping[Value, int]) -> bool:
    """Whether a total is of a product that nothing else needs."""
    same = operand.op == "mul" and uses[operand] == 1 and len({each.dtype for each in (operand, *operand.args)}) == 1
    return total.op == "sum" and same and all(each.kind == Kind.ELEMENT and each.op != "constant" for each in operand.args)
