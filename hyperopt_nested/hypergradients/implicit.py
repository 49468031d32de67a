"""Implicit differentiation: how the point where training comes to rest moves with the hypers."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from hyperopt_nested.engine.sensitivity import Named
from hyperopt_nested.trees import map_tree

Solver = Literal["cg", "neumann"]
"""How implicit differentiation solves its linear system: "cg", conjugate gradients, where the update's Jacobian is symmetric and the
fixed point a minimum, as with SGD; "neumann", the series, with as many terms as there are iterations, where the update contracts."""

Values = dict[str, dict[str, Tensor]]
Update = Callable[[Named, Values], Named]

_MOVES = 10.0  # times the update itself: a smaller derivative with respect to a hyper vanishes with it at the fixed point


def implicit(
    update: Update, slope: Named, direct: Values, params: Named, values: Values, solver: Solver, iterations: int
) -> tuple[Values, Tensor]:
    """Derivative of an outer loss, at the fixed point of an update, with respect to the values of hypers.

    With the update's derivatives J and B with respect to the tensors and the hypers, the fixed point moves by (I - J)^-1 B (Lorraine et
    al. 2020, arXiv 1911.02590). No matrix is formed: the transposed system is solved with products alone.

    Args:
        update: from tensors and values to new tensors; the same tensors at its fixed point.
        slope: the outer loss's derivative with respect to the tensors.
        direct: its derivative with respect to the values.
        params: the tensors, near the fixed point.
        values: the values of the hypers.
        solver: of the linear system.
        iterations: of the solver.

    Returns:
        The derivative, of the structure of `values`, and the norm of the system's residual relative to its right-hand side, shape ().

    Raises:
        ValueError: the update's derivative with respect to a hyper is no larger than the update itself.
    """
    _refuse_still(update, params, values)
    through: Any = torch.func.vjp(update, params, values)
    pull = through[1]

    def system(u: Named) -> Named:
        return map_tree(torch.sub, u, pull(u)[0])

    solution = (_conjugate_gradients if solver == "cg" else _neumann)(system, slope, iterations)
    left = map_tree(torch.sub, slope, system(solution))
    found: Values = map_tree(torch.add, direct, pull(solution)[1])
    size = _dot(slope, slope)
    return found, torch.where(size > 0, _dot(left, left) / torch.where(size > 0, size, 1), 0).sqrt()


def _conjugate_gradients(system: Callable[[Named], Named], right: Named, iterations: int) -> Named:
    """Solution of a symmetric positive definite system (Hestenes and Stiefel 1952); what is solved exactly stays as it is."""
    x, left, direction = map_tree(torch.zeros_like, right), right, right
    size = start = _dot(left, left)
    for _ in range(iterations):
        image = system(direction)
        goes_on = size > torch.finfo(size.dtype).eps ** 2 * start
        step = torch.where(goes_on, size / torch.where(goes_on, _dot(direction, image), 1), 0)
        x, left = _moved(x, step, direction), _moved(left, -step, image)
        size, before = _dot(left, left), size
        direction = _moved(left, torch.where(goes_on, size / torch.where(goes_on, before, 1), 0), direction)
    return x


def _neumann(system: Callable[[Named], Named], right: Named, iterations: int) -> Named:
    """Sum of the first terms of the Neumann series: each takes the residual that is left."""
    x = map_tree(torch.zeros_like, right)
    for _ in range(iterations):
        x = map_tree(torch.add, x, map_tree(torch.sub, right, system(x)))
    return x


def _refuse_still(update: Update, params: Named, values: Values) -> None:
    """Raise if the fixed point does not depend on a hyper, as on a learning rate, or if the tensors are not near it."""

    def move(scales: Values) -> Named:
        return update(params, map_tree(torch.mul, values, scales))

    ones = map_tree(torch.ones_like, values)
    rest = map_tree(torch.sub, move(ones), params)
    size = _dot(params, params).sqrt()
    still = _MOVES * (_dot(rest, rest).sqrt() + torch.finfo(size.dtype).eps * size)
    for key in values:
        along = {name: map_tree(torch.ones_like if name == key else torch.zeros_like, by_name) for name, by_name in values.items()}
        moved: Any = torch.func.jvp(move, (ones,), (along,))
        slope = moved[1]
        if bool(_dot(slope, slope).sqrt() <= still):
            raise ValueError(
                f"the point where training comes to rest does not depend on {key}, or the tensors are not near it: {key} times the "
                f"update's derivative with respect to it has norm {float(_dot(slope, slope).sqrt()):.3g}, the update itself "
                f"{float(_dot(rest, rest).sqrt()):.3g}. Of a learning rate, use method='reverse' or 'forward'; else train longer first"
            )


def _dot(a: Named, b: Named) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True)]).sum()


def _moved(a: Named, step: Tensor, b: Named) -> Named:
    return map_tree(lambda x, y: x + step * y, a, b)
