"""Modules as pure functions of their parameters."""

import copy
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from hyperopt_nested.hypergradients.carried import CARRIED, Carried, no_recomputation
from hyperopt_nested.hypergradients.draws import Draws, devices_of, drawn_again
from hyperopt_nested.hypergradients.layers import FOLLOWING, prepare, statistics_read

Buffers = Literal["carried", "fixed"]
"""What becomes of the buffers that a module changes: "carried" hands them from step to step where `hypergradient`, `audit` or `sweep` call
the losses; "fixed" does not."""


class Functional:
    """A module as a pure function; made by `functional`.

    Attributes:
        params: its parameters that train, by name: detached copies.
    """

    def __init__(self, module: nn.Module, buffers: Buffers = "carried") -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"module={module!r} ({type(module).__name__}) must be a torch.nn.Module")
        if buffers not in get_args(Buffers):
            raise ValueError(f"buffers={buffers!r} must be one of {', '.join(map(repr, get_args(Buffers)))}")
        self._carried = buffers == "carried"
        self._module = copy.deepcopy(module, _without_graphs(module))
        self._known = prepare(self._module)
        self._statistics = statistics_read(self._module)
        self._trains = any(each.training for each in self._module.modules())
        self.params = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
        self._fixed = {name: p.detach().clone() for name, p in module.named_parameters() if not p.requires_grad}
        self._buffers = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}

    def __call__(self, params: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """What the module returns with these parameters; frozen parameters and buffers stay as they were."""
        carried = CARRIED.get() if self._carried and self._buffers else None
        prefix = carried.prefix(params, bool(self._statistics)) if carried else None
        if carried is None or prefix is None:
            return self._called(params, self._buffers, args, kwargs)[0]
        for name in self._statistics:
            carried.check_read(prefix + name)
        known = {name: carried.read(prefix + name, own) for name, own in self._buffers.items()}
        lift = carried.lift if carried.lift and self._trains else lambda own: own
        before = {name: lift(own) if (found := known[name]) is None else found for name, own in self._buffers.items()}
        draws = Draws.now(devices_of(self._buffers.values())) if carried.checked is not None else None
        returned, after = self._called(params, before, args, kwargs, follow=True)
        if draws is not None:
            with drawn_again(draws):
                self._check(carried, prefix, params, before, after, args, kwargs)
        for name, buffer in after.items():
            carried.buffers[prefix + name] = buffer
            carried.changed.add(prefix + name)
        return returned

    def _called(
        self, params: dict[str, Tensor], buffers: dict[str, Tensor], args: Any, kwargs: Any, *, follow: bool = False
    ) -> tuple[Any, dict[str, Tensor]]:
        """What the module returns, and the buffers that it has changed."""
        fresh = {name: buffer.clone() for name, buffer in buffers.items()}
        values = {**params, **self._fixed, **fresh}
        given = dict(values)
        versions = {name: _version(tensor) for name, tensor in given.items()}
        token = FOLLOWING.set(follow)
        try:
            with no_recomputation():
                returned = torch.func.functional_call(self._module, values, args, kwargs)
        finally:
            FOLLOWING.reset(token)
        changed = [name for name, tensor in given.items() if values[name] is not tensor or _version(tensor) != versions[name]]
        for name in changed:
            if name not in fresh:
                raise NotImplementedError(
                    f"the module changes its parameter {name!r} in place when it is called, outside of the optimizer: let it compute "
                    "another tensor instead, or put the change into the rule, as hn.project does"
                )
        return returned, {name: values[name] for name in changed if values[name].shape == buffers[name].shape}

    def _check(
        self,
        carried: Carried,
        prefix: str,
        params: dict[str, Tensor],
        before: dict[str, Tensor],
        after: dict[str, Tensor],
        args: Any,
        kwargs: Any,
    ) -> None:
        """Refuse buffers that depend on the parameters without autograd's knowledge: tried with other parameters, once.

        Raises:
            NotImplementedError: there is one; the message names it.
        """
        checked = carried.checked if carried.checked is not None else set()
        hidden = [name for name, new in after.items() if new.is_floating_point() and not new.requires_grad]
        hidden = [name for name in hidden if name not in self._known and prefix + name not in checked]
        if not hidden:
            return
        with torch.no_grad():
            moved = {name: p + 0.01 * (1 + p.abs()) for name, p in params.items()}
            _, other = self._called(moved, before, args, kwargs, follow=True)
        for name in hidden:
            if name not in other or not torch.allclose(other[name], after[name], rtol=1e-6, atol=0, equal_nan=True):
                layer, _, buffer = name.rpartition(".")
                raise NotImplementedError(
                    f"module {layer!r} ({type(self._module.get_submodule(layer)).__name__}) changes its buffer {buffer!r} outside of "
                    "autograd, by what depends on its parameters: a hypergradient in reverse would miss that. Use method='forward', put "
                    "the module into evaluation mode, or, if no output depends on it, use hn.functional(module, buffers='fixed')"
                )
        checked.update(prefix + name for name in hidden)


def _version(tensor: Tensor) -> int:
    """A number that changes when a tensor is changed in place; under torch.inference_mode there is none."""
    return 0 if tensor.is_inference() else tensor._version


def _without_graphs(module: nn.Module) -> dict[int, Any]:
    """For `copy.deepcopy`: copies of the tensors that layers have left in attributes, as weight_norm does, with a graph."""
    left = [value for each in module.modules() for value in vars(each).values() if isinstance(value, Tensor) and not value.is_leaf]
    return {id(value): value.detach().clone() for value in left}


def functional(module: nn.Module, *, buffers: Buffers = "carried") -> Functional:
    """Make a pure function of a module's parameters; call the result with these and the module's inputs.

    It keeps copies: the module stays as it is, and each call starts from the same buffers. Activation checkpointing has no effect.

    Args:
        module: any module; its mode, frozen parameters and buffers are taken as they are now.
        buffers: "carried": where `hypergradient`, `audit` or `sweep` call the losses, buffers that the module changes, such as the running
            statistics of batch normalization in training mode, go from step to step, and are differentiated. They reach every function
            of that kind which is called with the same tensors: a copy of the module in evaluation mode normalizes with the statistics
            of training. "fixed": every call starts from the buffers that the module has now.

    Returns:
        The function; `params` are the module's parameters by name.

    Raises:
        TypeError: `module` is no module.
        ValueError: `buffers` is none of its choices.
        NotImplementedError: a layer changes its parameters in place (an embedding with `max_norm`).

    Example:
        >>> import torch, hyperopt_nested as hn
        >>> f = hn.functional(torch.nn.Linear(2, 1))
        >>> total = lambda params: f(params, torch.ones(3, 2)).sum()
        >>> grads = torch.func.grad(total)(f.params)
        >>> grads["weight"]
        tensor([[3., 3.]])
    """
    return Functional(module, buffers)
