"""Many runs of training as one batched program."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hyperopt_nested.nested import Nested
from hyperopt_nested.rule import Optimizer


@dataclass(frozen=True)
class Sweep:
    """What n runs did in some steps; made by `sweep`.

    Attributes:
        losses: the loss before each step, (steps, n).
        hypers: every learned hyper after each step, by hyper ("lr", its learner's "lr.lr", and so on) and key, (steps, n, ...).
        params: the tensors at the end, by name, (n, ...).
    """

    losses: Tensor
    hypers: dict[str, dict[str, Tensor]]
    params: dict[str, Tensor]


def sweep(
    optimizer: Optimizer | Mapping[str, Optimizer],
    params: Mapping[str, Tensor],
    batches: Iterable[Any],
    train_loss: Callable[[dict[str, Tensor], Any], Tensor],
    *,
    starts: Mapping[str, Tensor] | None = None,
    batched_params: bool = False,
) -> Sweep:
    """Train from many starts at once: hypers, initial tensors, or both, under `torch.func.vmap`.

    Every run sees the same batches, and learns its own hypers as `Nested` does.

    Args:
        optimizer: one for all tensors, or a mapping from each tensor's name to its optimizer.
        params: the tensors before the first step, by name; with `batched_params`, each with a leading dimension of n.
        batches: one a step; anything that `train_loss` takes.
        train_loss: pure function of tensors and a batch to a loss of shape ().
        starts: start values of learned hypers, by key, (n,) each; the others start as declared.
        batched_params: whether `params` differ from run to run.

    Raises:
        ValueError: neither `starts` nor `params` is batched, or they disagree about n.

    Example:
        >>> import torch, hyperopt_nested as hn
        >>> optimizer = hn.sgd(lr=hn.learn(0.1, by=hn.sgd(lr=0.01)))
        >>> loss = lambda params, batch: params["w"].square().sum()
        >>> found = hn.sweep(optimizer, {"w": torch.ones(2)}, range(3), loss, starts={"lr": torch.tensor([0.01, 0.1, 0.3])})
        >>> found.losses.shape, found.hypers["lr"]["model"].shape, found.params["w"].shape
        (torch.Size([3, 3]), torch.Size([3, 3]), torch.Size([3, 2]))
    """
    starts = dict(starts or {})
    sizes = {f"starts[{key!r}]": len(value) for key, value in starts.items()}
    if batched_params:
        sizes |= {f"params[{name!r}]": len(value) for name, value in params.items()}
    if len(set(sizes.values())) != 1:
        raise ValueError(f"the number of runs must be one and the same in all that is batched: {sizes or 'nothing is: give starts'}")
    runs = next(iter(sizes.values()))
    nested = Nested(optimizer)
    now = {name: p.detach() if batched_params else p.detach().expand(runs, *p.shape) for name, p in params.items()}
    st = torch.func.vmap(nested.init)(now, starts) if starts else torch.func.vmap(nested.init)(now)

    def step(params: dict[str, Tensor], st: Any, batch: Any) -> Any:
        grads, loss = torch.func.grad_and_value(train_loss)(params, batch)
        params, st = nested.step(params, grads, st)
        return params, st, loss, nested.hypers(st)

    losses, hypers = [], []
    for batch in batches:
        now, st, loss, values = torch.func.vmap(step, in_dims=(0, 0, None))(now, st, batch)
        losses.append(loss)
        hypers.append(values)
    paths = {path: list(by_key) for path, by_key in hypers[0].items()} if hypers else {}
    traces = {path: {key: torch.stack([each[path][key] for each in hypers]) for key in keys} for path, keys in paths.items()}
    return Sweep(torch.stack(losses) if losses else torch.zeros(0, runs), traces, now)
