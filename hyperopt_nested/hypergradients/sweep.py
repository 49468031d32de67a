"""Many runs of training as one batched program."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from hyperopt_nested.engine.nested import Nested
from hyperopt_nested.hypergradients.carried import Carried, no_recomputation
from hyperopt_nested.hypergradients.losses import TrainLoss, detached, evaluate, gradients, is_tensor, parted
from hyperopt_nested.hypergradients.unrolled import check_values
from hyperopt_nested.rule import Optimizer

Randomness = Literal["different", "same", "error"]
"""What random numbers, such as dropout's masks, the runs of a sweep draw: as `torch.func.vmap` calls them."""


@dataclass(frozen=True)
class Sweep:
    """What n runs did in some steps; made by `sweep`.

    Attributes:
        losses: the loss before each step, (steps, n).
        hypers: every learned hyper after each step, by hyper ("lr", its learner's "lr.lr", and so on) and key, (steps, n, ...).
        params: the tensors at the end, by name, (n, ...).
        buffers: the buffers at the end that the steps have changed, such as running statistics, by name, (n, ...).
        aux: with `has_aux`: what `train_loss` returned beside the loss in each step, tensors (n, ...). Else None for each.
    """

    losses: Tensor
    hypers: dict[str, dict[str, Tensor]]
    params: dict[str, Tensor]
    buffers: dict[str, Tensor] = field(default_factory=dict)
    aux: list[Any] = field(default_factory=list)


@no_recomputation()
def sweep(
    optimizer: Optimizer | Mapping[str, Optimizer],
    params: Mapping[str, Tensor],
    batches: Iterable[Any],
    train_loss: TrainLoss,
    *,
    starts: Mapping[str, Tensor] | None = None,
    batched_params: bool = False,
    randomness: Randomness = "different",
    has_aux: bool = False,
) -> Sweep:
    """Train from many starts at once: hypers, initial tensors, or both, under `torch.func.vmap`.

    Every run sees the same batches, and learns its own hypers as `Nested` does.

    Args:
        optimizer: one for all tensors, or a mapping from each tensor's name to its optimizer.
        params: the tensors before the first step, by name; with `batched_params`, each with a leading dimension of n.
        batches: one a step; anything that `train_loss` takes.
        train_loss: pure function of tensors and a batch to a loss of shape (). Tensors that do not enter it in a step are left alone.
        starts: start values of learned hypers, in their domains, by key, (n,) each; the others start as declared.
        batched_params: whether `params` differ from run to run.
        randomness: "different": each run draws random numbers, such as dropout's masks, of its own; "same": all runs draw the same, so that
            they differ by their starts alone; "error": drawing them is an error.
        has_aux: whether `train_loss` may return a pair of the loss and anything else, such as metrics, which the result then has.

    Returns:
        Losses, learned values and tensors of all runs, `losses` and `hypers` after every step.

    Raises:
        ValueError: neither `starts` nor `params` is batched, they disagree about n, a start is outside its hyper's domain, or `randomness`
            is none of its choices.

    Example:
        >>> import torch, hyperopt_nested as hn
        >>> optimizer = hn.sgd(lr=hn.learn(0.1, by=hn.sgd(lr=0.01)))
        >>> loss = lambda params, batch: params["w"].square().sum()
        >>> starts = {"lr": torch.tensor([0.01, 0.1, 0.3])}
        >>> params = {"w": torch.ones(2)}
        >>> runs = hn.sweep(optimizer, params, range(3), loss, starts=starts)
        >>> runs.losses.shape, runs.hypers["lr"]["model"].shape, runs.params["w"].shape
        (torch.Size([3, 3]), torch.Size([3, 3]), torch.Size([3, 2]))
    """
    if randomness not in get_args(Randomness):
        raise ValueError(f"randomness={randomness!r} must be one of {', '.join(map(repr, get_args(Randomness)))}")
    nested = Nested(optimizer)
    starts = {key: torch.as_tensor(value) for key, value in (starts or {}).items()}
    for key, value in starts.items():
        if value.ndim != 1:
            raise ValueError(f"starts[{key!r}] has shape {tuple(value.shape)}; it must be (n,), a number a run")
    sizes = {f"starts[{key!r}]": len(value) for key, value in starts.items()}
    if batched_params:
        sizes |= {f"params[{name!r}]": len(value) for name, value in params.items()}
    if not sizes:
        raise ValueError(
            "nothing differs between runs: give starts, such as starts={'lr': torch.tensor([0.1, 0.2])}, or batched_params=True"
        )
    if len(set(sizes.values())) != 1:
        raise ValueError(f"the number of runs must be one and the same in all that is batched: {sizes}")
    runs = next(iter(sizes.values()))
    for key in starts.keys() & nested.learned.keys():
        check_values(f"starts[{key!r}]", starts[key], nested.learned[key].hyper, nested.learned[key].via)
    now = {name: p.detach() if batched_params else p.detach().expand(runs, *p.shape) for name, p in params.items()}
    st = torch.func.vmap(nested.init)(now, starts) if starts else torch.func.vmap(nested.init)(now)

    def loss_of(params: dict[str, Tensor], buffers: dict[str, Tensor], zero: Tensor, batch: Any) -> Any:
        carried = Carried(params, buffers, lift=lambda own: own + zero.to(own.dtype) if own.dtype != torch.bool else own ^ zero.bool())
        found, rebuilt = parted(evaluate("train_loss", train_loss, carried, batch, has_aux=has_aux), is_tensor)
        loss_and_aux.append(rebuilt)
        return found, carried.buffers

    readers = {name: nested.bindings[name].optimizer.rule.loss_names for name in params}

    def update(params: dict[str, Tensor], grads: dict[str, Tensor], st: Any, loss: Tensor) -> Any:
        params, st = nested.step(params, grads, st, {name: dict.fromkeys(names, loss) for name, names in readers.items() if names})
        return params, st, nested.hypers(st)

    losses, hypers, aux = [], [], []
    buffers: dict[str, Tensor] = {}
    loss_and_aux: list[Any] = []
    zeros = torch.zeros(runs, device=next(iter(now.values())).device)
    for batch in batches:
        leaves = {name: p.detach().requires_grad_() for name, p in now.items()}
        with torch.enable_grad():
            evaluated = torch.func.vmap(loss_of, in_dims=(0, 0, 0, None), randomness=randomness)
            found, buffers = evaluated(leaves, buffers, zeros, batch)
            grads = gradients(found[0].sum(), leaves, graph=False)
        loss, more = detached(loss_and_aux.pop()(list(found)))
        buffers = detached(buffers)
        now, st, values = torch.func.vmap(update)(now, grads, st, loss)
        losses.append(loss)
        aux.append(more)
        hypers.append(values)
    paths = {path: list(by_key) for path, by_key in hypers[0].items()} if hypers else {}
    traces = {path: {key: torch.stack([each[path][key] for each in hypers]) for key in keys} for path, keys in paths.items()}
    return Sweep(torch.stack(losses) if losses else torch.zeros(0, runs), traces, now, buffers, aux)
