"""Hypothesis strategies: tensors with the values that break optimizers, parameter trees, values of hypers, and whole cases."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from hyperopt_nested.domains import Hyper
from hyperopt_nested.rule import Per

Shape = tuple[int, ...]

SHAPES: tuple[Shape, ...] = ((1,), (), (3,), (2, 3), (1, 2), (3, 1), (2, 2, 1, 2), (0, 2))
"""Shapes that are drawn from: scalars, vectors, matrices, kernels, with sides of one, and empty."""

MAX_STEPS = 9
"""Most updates before the one that is checked: some rules begin to act after a few, such as RAdam's rectification."""


def tensors(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> st.SearchStrategy[Tensor]:
    """Tensors of a shape: ordinary values with exact zeros among them, one value repeated, all zeros, tiny or huge ones.

    Returns:
        A strategy of tensors.

    Example:
        >>> import hyperopt_nested as hn
        >>> strategy = hn.testing.tensors((2, 3))
    """
    size = math.prod(shape)
    ordinary = st.one_of(st.floats(-3, 3, width=32, allow_subnormal=False), st.just(0.0))
    lists = st.lists(ordinary, min_size=size, max_size=size)
    values = st.one_of(
        lists,
        st.floats(0.125, 3, width=32).map(lambda value: [value] * size),
        st.just([0.0] * size),
        lists.map(lambda found: [1e-6 * value for value in found]),
        lists.map(lambda found: [1e4 * value for value in found]),
    )
    return st.one_of(lists, values).map(lambda found: torch.tensor(found, dtype=dtype).reshape(shape))


def trees(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype = torch.float64) -> st.SearchStrategy[dict[str, Tensor]]:
    """Dicts of tensors of these shapes: parameters, or gradients.

    Returns:
        A strategy of dicts.

    Example:
        >>> import hyperopt_nested as hn
        >>> strategy = hn.testing.trees({"w": (2, 3)})
    """
    return st.fixed_dictionaries({name: tensors(shape, dtype) for name, shape in shapes.items()})


def shape_trees(shapes: Sequence[tuple[int, ...]] = SHAPES) -> st.SearchStrategy[dict[str, tuple[int, ...]]]:
    """One or two shapes, by name.

    Returns:
        A strategy of dicts of shapes.

    Example:
        >>> import hyperopt_nested as hn
        >>> strategy = hn.testing.shape_trees([(2, 3)])
    """
    return st.lists(st.sampled_from(list(shapes)), min_size=1, max_size=2).map(lambda found: dict(zip("ab", found, strict=False)))


def hyper_values(hyper: Hyper) -> st.SearchStrategy[float]:
    """Values of a hyper inside its domain: around its default, and far enough from the ends to be moved both ways.

    Returns:
        A strategy of numbers.

    Example:
        >>> import hyperopt_nested as hn
        >>> strategy = hn.testing.hyper_values(hn.Positive(1e-3))
    """
    low, high, default = hyper.lower, hyper.upper, hyper.default
    parts = st.integers(1, 19).map(lambda part: part / 20)  # evenly spread, which floats would not be
    if math.isfinite(low) and math.isfinite(high):
        return parts.map(lambda part: low + part * (high - low))
    if not math.isfinite(low) and not math.isfinite(high):
        return parts.map(lambda part: default - 1 + 2 * part)
    end, sign = (low, 1.0) if math.isfinite(low) else (high, -1.0)
    size = abs(default - end) or 0.01
    smallest, largest = math.log10(min(size, 0.01)), math.log10(max(size, 1))
    return parts.map(lambda part: end + sign * 10 ** (smallest + part * (largest - smallest)))


@dataclass(frozen=True)
class Case:
    """One drawn example; its `repr` can be pasted into a test.

    Attributes:
        hypers: values of the hypers.
        params: the tensors, by name.
        grads: their gradients in each step; the last step is the one that is checked.
        after: the gradients after that step.
        per: granularity of the learned hypers.
        options: the rule's options.
    """

    hypers: dict[str, float]
    params: dict[str, Tensor]
    grads: list[dict[str, Tensor]]
    after: dict[str, Tensor]
    per: Per = "model"
    options: dict[str, Any] = field(default_factory=dict)
    _recipe: str = field(default="", init=False)

    def __repr__(self) -> str:
        if self._recipe:
            return self._recipe
        grads = "".join(f"        {_written(each)},\n" for each in self.grads)
        return (
            f"hn.testing.Case(\n    hypers={self.hypers!r},\n    params={_written(self.params)},\n    grads=[\n{grads}    ],\n"
            f"    after={_written(self.after)},\n    per={self.per!r},\n    options={self.options!r},\n)"
        )

    @property
    def where(self) -> str:
        """How messages call the step that is checked."""
        return f"tensors of shape {', '.join(str(tuple(param.shape)) for param in self.params.values())}, step {len(self.grads)}"

    def to(self, to: torch.dtype | torch.device | str) -> "Case":
        """The same case in another dtype, or on another device."""

        def moved(tree: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor.to(to) for name, tensor in tree.items()}

        return replace(self, params=moved(self.params), grads=[moved(grads) for grads in self.grads], after=moved(self.after))


@st.composite
def cases(
    draw: st.DrawFn,
    hypers: Mapping[str, Hyper],
    *,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    pers: Sequence[Per] = ("model", "tensor", "row", "element"),
    options: Mapping[str, Sequence[Any]] | None = None,
) -> Case:
    """Cases in float64, for a rule with these hypers.

    Args:
        draw: hypothesis supplies it.
        hypers: the hypers, by name.
        shapes: shapes of tensors to draw from.
        pers: granularities to draw from.
        options: choices of each option to draw.

    Returns:
        The case.

    Example:
        >>> import hyperopt_nested as hn
        >>> strategy = hn.testing.cases(hn.sgd().rule.hypers)
    """
    tree = draw(shape_trees(shapes))
    count = draw(st.sampled_from((1, 2, 3, 4, MAX_STEPS + 1)))
    different = draw(st.lists(trees(tree), min_size=1, max_size=min(count, 3)))
    return Case(
        hypers={name: draw(hyper_values(hyper)) for name, hyper in hypers.items()},
        params=draw(trees(tree)),
        grads=[different[step % len(different)] for step in range(count)],
        after=draw(trees(tree)),
        per=draw(st.sampled_from(list(pers))),
        options={name: draw(st.sampled_from(list(choices))) for name, choices in (options or {}).items()},
    )


def normal_case(
    hypers: Mapping[str, float], shapes: Mapping[str, tuple[int, ...]], steps: int, options: Mapping[str, Any] | None = None
) -> Case:
    """Make a case of normally distributed numbers, the same in every call: for tensors and runs that are too long to be written out.

    Args:
        hypers: values of all hypers.
        shapes: shapes of the tensors, by name.
        steps: number of updates, >= 1; the last one is checked.
        options: the rule's options.

    Returns:
        The case, in float64.

    Raises:
        ValueError: `steps` is less than 1.

    Example:
        >>> import hyperopt_nested as hn
        >>> hn.testing.normal_case({"lr": 0.1}, {"a": (40, 64)}, 25)
        hn.testing.normal_case({'lr': 0.1}, {'a': (40, 64)}, 25)
    """
    if steps < 1:
        raise ValueError(f"steps={steps!r} must be at least 1")
    generator = torch.Generator().manual_seed(0)

    def tree() -> dict[str, Tensor]:
        return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}

    case = Case(dict(hypers), tree(), [tree() for _ in range(steps)], tree(), options=dict(options or {}))
    more = f", {case.options!r}" if case.options else ""
    object.__setattr__(case, "_recipe", f"hn.testing.normal_case({case.hypers!r}, {dict(shapes)!r}, {steps}{more})")
    return case


def inside(hyper: Hyper) -> float:
    """The default, or, where that is an end of the domain, a value near it."""
    if hyper.lower < hyper.default < hyper.upper:
        return hyper.default
    other = hyper.upper if hyper.default == hyper.lower else hyper.lower
    return hyper.default + (math.copysign(0.1, other - hyper.default) if math.isinf(other) else 0.1 * (other - hyper.default))


def room(hyper: Hyper, value: float) -> float:
    """How far a value can be moved both ways inside its domain."""
    room = min(value - hyper.lower, hyper.upper - value)
    return room if room < math.inf else max(abs(value), 0.1)


def _written(tree: Mapping[str, Tensor]) -> str:
    def one(tensor: Tensor) -> str:
        values, empty = tensor.tolist(), tensor.numel() == 0
        return f"torch.zeros({tuple(tensor.shape)}, dtype={tensor.dtype})" if empty else f"torch.tensor({values}, dtype={tensor.dtype})"

    return "{" + ", ".join(f"{name!r}: {one(tensor)}" for name, tensor in tree.items()) + "}"
