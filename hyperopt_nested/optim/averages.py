"""Averaged weights in the place of the parameters, while a model is evaluated or saved."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hyperopt_nested.optim.param_state import ParamState, States

TRAINED = "train_params"
"""The entry of a tensor's state that keeps what training goes on from, while an average is in its place."""


def averages(store: ParamState, skipped: frozenset[str]) -> dict[str, Tensor]:
    """The tensors that rules keep an average of, by name: these averages. They are not copies."""
    params = {name: tensor.detach() for name, tensor in store.tensors.items() if name not in skipped}
    found = store.nested.eval_params(params, store.st)
    return {name: store.sharding.like_param(name, average) for name, average in found.items() if average is not params[name]}


def put_in(store: ParamState, state: States, new: Mapping[str, Tensor]) -> None:
    """Put averages in the place of parameters, whose values are kept in the state."""
    for name, average in new.items():
        param = store.params[name]
        state[param][TRAINED] = param.detach().clone()
        param.copy_(average)
    store.write(state)


def take_out(store: ParamState, state: States) -> None:
    """Put back the parameters that averages have replaced."""
    back = {name: state[param].pop(TRAINED) for name, param in store.params.items() if TRAINED in state.get(param, ())}
    for name, trained in back.items():
        store.params[name].copy_(trained)
    store.weights.note(back.keys())
    store.write(state)


def are_in(state: States) -> bool:
    """Whether averages are in the place of parameters."""
    return any(TRAINED in entries for entries in state.values())


def parted(saved: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
    """Entries that are loaded, by name of a tensor; apart, what training goes on from where averages were in the place of parameters."""
    trained = {name: value for name, entries in saved.items() if isinstance(value := entries.get(TRAINED), Tensor)}
    return {name: {key: value for key, value in entries.items() if key != TRAINED} for name, entries in saved.items()}, trained


def moved(trained: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies as the parameters are, of those that there are."""
    return {name: value.to(params[name].device, params[name].dtype, copy=True) for name, value in trained.items() if name in params}


def keep(state: States, param: Tensor, trained: Tensor | None) -> None:
    """Keep what training of a parameter goes on from; None is the parameter itself."""
    state[param].pop(TRAINED, None)
    if trained is not None:
        state[param][TRAINED] = trained


def with_averages(model: torch.nn.Module, new: Mapping[Tensor, Tensor]) -> dict[str, Tensor]:
    """The state dict of a model, with averages in the place of parameters, also under further names of tied ones."""
    state: dict[str, Any] = model.state_dict(keep_vars=True)
    found = {key: value.detach() if isinstance(value, Tensor) else value for key, value in state.items()}
    return found | {key: new[value].detach() for key, value in state.items() if isinstance(value, Tensor) and value in new}
