"""How greedy are online hypergradients? The exact ones, through all steps, say it."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from hyperopt_nested.checks import extra
from hyperopt_nested.engine.checks import Horizon
from hyperopt_nested.engine.discounted import Discounted
from hyperopt_nested.engine.nested import Nested
from hyperopt_nested.engine.one_step import OneStep
from hyperopt_nested.hypergradients.carried import Carried, no_recomputation
from hyperopt_nested.hypergradients.double_backward import loss_with_hessian
from hyperopt_nested.hypergradients.draws import Draws, devices_of, drawn_again
from hyperopt_nested.hypergradients.losses import OuterLoss, Tensors, TrainLoss, detached, evaluate, gradients, refuse_constant
from hyperopt_nested.hypergradients.training import Values, refuse_other
from hyperopt_nested.hypergradients.unrolled import Hypergradients, hypergradient, in_values
from hyperopt_nested.rule import Optimizer
from hyperopt_nested.trees import State, map_tree

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

Evaluate = Callable[..., tuple[Tensor, Any]]


@dataclass(frozen=True)
class Bias:
    """How far an online hypergradient is from the exact one, of one hyper, at one time.

    Attributes:
        hyper: the hyper's key.
        steps: how many steps had been done, all of which the exact one looks through.
        horizon: of the online one.
        cosine: of the angle between the two, over the entries of the hyper; of a single number it is 1 or -1.
        magnitude: norm of the online one, over that of the exact one.
        sign: share of entries that have the same sign in both.
    """

    hyper: str
    steps: int
    horizon: Horizon
    cosine: float
    magnitude: float
    sign: float

    @property
    def estimate(self) -> str:
        """The online hypergradient, in words."""
        return str(self.horizon)


@dataclass(frozen=True)
class Audit:
    """What `audit` found.

    Attributes:
        rows: by estimate, number of steps and hyper.
    """

    rows: list[Bias]

    def table(self) -> "Table":
        """The rows, to be printed with rich: `rich.print(found.table())`."""
        with extra("cli"):
            from rich.table import Table

        made = Table("hyper", "steps", "estimate", "cosine", "magnitude", "same sign", title="Online against exact hypergradients")
        for row in sorted(self.rows, key=lambda row: (row.hyper, row.steps)):
            made.add_row(row.hyper, str(row.steps), row.estimate, f"{row.cosine:.3f}", f"{row.magnitude:.3g}", f"{row.sign:.0%}")
        return made

    def figure(self) -> "Figure":
        """For each hyper, cosine and magnitude against the number of steps; needs matplotlib."""
        with extra("demo"):
            from matplotlib.figure import Figure

        hypers = list(dict.fromkeys(row.hyper for row in self.rows))
        discounts = list(dict.fromkeys(row.horizon.discount for row in self.rows))
        made = Figure(figsize=(10, 1 + 2.6 * len(hypers)), layout="constrained")
        grid = made.subplots(len(hypers), 2, squeeze=False, sharex=True)
        for (left, right), hyper in zip(grid, hypers, strict=True):
            for estimate in dict.fromkeys(row.estimate for row in self.rows):
                rows = [row for row in self.rows if (row.hyper, row.estimate) == (hyper, estimate)]
                horizon = rows[0].horizon
                line = {"linestyle": "--" if horizon.curvature == "exact" else "-", "marker": ".", "label": estimate}
                style = {"color": f"C{discounts.index(horizon.discount)}", **line}
                left.plot([row.steps for row in rows], [row.cosine for row in rows], **style)
                right.plot([row.steps for row in rows], [row.magnitude for row in rows], **style)
            left.set(title=f"{hyper}: cosine with exact", ylim=(-1.05, 1.05), xscale="log")
            left.grid(axis="y", color="0.9")
            right.set(title=f"{hyper}: magnitude / exact", xscale="log", yscale="log")
            right.axhline(1, color="0.7", zorder=0)
        for axes in grid[-1]:
            axes.set_xlabel("steps that the exact hypergradient looks through")
        made.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
        return made


@no_recomputation()
def audit(
    optimizer: Optimizer | Mapping[str, Optimizer],
    params: Mapping[str, Tensor],
    batches: Iterable[Any],
    train_loss: TrainLoss,
    outer_loss: OuterLoss,
    *,
    outer_batch: Any = None,
    horizons: Sequence[Horizon] = (OneStep(), Discounted(0.9), Discounted(0.99), Discounted(1.0)),
    steps: Sequence[int] | None = None,
    has_aux: bool = False,
) -> Audit:
    """Measure, on your own model and data, how far online hypergradients are from the exact ones.

    The tensors are trained with hypers that stay as declared. After some numbers of steps, the hypergradients that `HyperOptimizer` would
    learn from, with each horizon, are compared with the exact one through all steps so far: the short-horizon bias (Wu et al. 2018,
    arXiv 1803.02021). All of them draw the same random numbers, such as dropout's masks, at the same step.

    Args:
        optimizer: as for `hypergradient`, as the next five.
        params: the tensors before the first step, by name.
        batches: one a step.
        train_loss: function of tensors and a batch to a loss of shape ().
        outer_loss: function of the trained tensors, `outer_batch` and the values of hypers to a loss of shape ().
        outer_batch: handed to `outer_loss`.
        horizons: those of the online hypergradients.
        steps: after which numbers of steps to compare; None: 1, 2, 5, 10, 20, 50, ..., and all.
        has_aux: whether the losses may return a pair of the loss and anything else, which is left out here.

    Returns:
        The comparison: a row for each horizon and number of steps.

    Raises:
        ValueError: `steps` are not between 1 and the number of batches, or as `Nested` and `hypergradient`.
        RuntimeError: `train_loss` returns another loss when it is called again with the same arguments and random numbers.

    Example:
        >>> import torch, hyperopt_nested as hn
        >>> def loss(params, batch, hypers=None):
        ...     return (params["w"] * torch.tensor([1.0, 3.0])).square().sum()
        >>> optimizer = hn.sgd(lr=hn.learn(0.01, by=hn.sgd()), momentum=0.9)
        >>> params, steps = {"w": torch.ones(2)}, [hn.OneStep()]
        >>> found = hn.audit(optimizer, params, range(10), loss, loss, horizons=steps)
        >>> [(row.steps, row.cosine) for row in found.rows]
        [(1, 1.0), (2, 1.0), (5, 1.0), (10, 1.0)]
        >>> found.rows[0].magnitude, found.rows[-1].magnitude < 0.3
        (1.0, True)
    """
    batches = list(batches)
    marks = _marks(len(batches)) if steps is None else sorted(set(steps))
    if not marks or marks[0] < 1 or marks[-1] > len(batches):
        raise ValueError(f"steps={steps!r} must be between 1 and {len(batches)}, the number of batches")
    draws = Draws.now(devices_of(params.values()))

    def through(mark: int) -> Hypergradients:
        how: dict[str, Any] = {"outer_batch": outer_batch, "memory": "sqrt", "has_aux": has_aux}
        with drawn_again(draws):
            return hypergradient(optimizer, params, batches[:mark], train_loss, outer_loss, **how)

    exact = [through(mark) for mark in marks]
    train = functools.partial(evaluate, "train_loss", train_loss, has_aux=has_aux)
    outer = functools.partial(evaluate, "outer_loss", lambda params, hypers: outer_loss(params, outer_batch, hypers), has_aux=has_aux)
    rows = []
    for horizon in dict.fromkeys(horizons):
        nested = Nested(in_values(optimizer), horizon=horizon)
        with drawn_again(draws):
            online, first = _online(nested, params, batches[: marks[-1]], train, outer, marks)
        for mark, each in zip(marks, exact, strict=True):
            refuse_other([first], each.train_losses[:1], 0)
            rows += [_bias(hyper, mark, horizon, online[mark][hyper], each[hyper]) for hyper in each]
    return Audit(rows)


def _marks(steps: int) -> list[int]:
    rounds = [digit * 10**power for power in range(len(str(steps))) for digit in (1, 2, 5)]
    return sorted({mark for mark in rounds if mark < steps} | {steps})


def _online(
    nested: Nested,
    params: Mapping[str, Tensor],
    batches: Sequence[Any],
    train: Evaluate,
    outer: Evaluate,
    marks: Sequence[int],
) -> tuple[dict[int, Values], Tensor]:
    """Online hypergradients, by the number of steps after which they are taken, and the first loss."""
    st, now, found = nested.init(params), {name: p.detach() for name, p in params.items()}, {}
    buffers: Tensors = {}
    losses: list[Tensor] = []
    for step, batch in enumerate(batches, start=1):
        leaves = map_tree(_leaf, now)
        carried = Carried(leaves, buffers)

        def loss(carried: Carried = carried, batch: Any = batch) -> Tensor:
            return train(carried, batch)[0]

        bent = None
        with torch.enable_grad():
            if nested.horizon.curvature == "exact":
                value, grads, bent = loss_with_hessian(loss, leaves)
            else:
                value = loss()
                grads = gradients(value, leaves, graph=False)
        losses.append(value.detach())
        now, st = nested.step(now, grads, st, learn=False, hessian=bent)
        buffers = detached(carried.buffers)
        if step in marks:
            with drawn_again(Draws.now(devices_of(now.values()))):
                found[step] = _slopes(nested, now, st, buffers, outer)
    return found, losses[0]


def _slopes(nested: Nested, params: Tensors, st: State, buffers: Tensors, outer: Evaluate) -> Values:
    """Online hypergradients of the outer loss, after a step."""
    leaves, hypers = map_tree(_leaf, params), map_tree(_leaf, st["hypers"])
    with torch.enable_grad():
        loss, _ = outer(Carried(leaves, buffers), hypers)
        if not loss.requires_grad:
            raise refuse_constant("outer_loss", "params or hypers")
        inputs, structure = tree_flatten((leaves, hypers))
        slopes, direct = tree_unflatten(torch.autograd.grad(loss, inputs, allow_unused=True), structure)
    reached = {name: slope for name, slope in slopes.items() if slope is not None}
    through = nested.hypergradients(params, reached, st)
    return {
        key: {
            name: sum((part for part in (direct[key][name], through.get(key, {}).get(name)) if part is not None), torch.zeros_like(value))
            for name, value in by_name.items()
        }
        for key, by_name in st["hypers"].items()
    }


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def _bias(hyper: str, steps: int, horizon: Horizon, online: dict[str, Tensor], exact: dict[str, Tensor]) -> Bias:
    a, b = (torch.cat([value.flatten().double() for value in values.values()]) for values in (online, exact))
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=0, eps=0)
    same = (a.sign() == b.sign()).double().mean()
    return Bias(hyper, steps, horizon, float(cosine), float(a.norm() / b.norm()), float(same))
