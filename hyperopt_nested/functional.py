"""Modules as pure functions of their parameters."""

import copy
from typing import Any

import torch
from torch import Tensor


class Functional:
    """A module as a pure function; made by `functional`.

    Attributes:
        params: its parameters that train, by name: detached copies.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = copy.deepcopy(module)
        for each in self._module.modules():
            if isinstance(each, torch.nn.modules.batchnorm._BatchNorm) and each.training:
                each.track_running_stats = False  # a batch is normalized by its own statistics; running ones would be changed in place
        self.params = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
        fixed = {name: p.detach().clone() for name, p in module.named_parameters() if not p.requires_grad}
        self._fixed = {**fixed, **{name: buffer.detach().clone() for name, buffer in module.named_buffers()}}

    def __call__(self, params: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """What the module returns with these parameters; frozen parameters and buffers stay as they were."""
        return torch.func.functional_call(self._module, {**params, **self._fixed}, args, kwargs)


def functional(module: torch.nn.Module) -> Functional:
    """Make a pure function of a module's parameters; call the result with these and the module's inputs.

    It keeps copies: the module stays as it is. In training mode, batch normalization normalizes by the batch and its running statistics
    are left alone; in evaluation mode it uses those that the module has now.

    Args:
        module: any module; its mode, frozen parameters and buffers are taken as they are now.

    Example:
        >>> import torch, hyperopt_nested as hn
        >>> f = hn.functional(torch.nn.Linear(2, 1))
        >>> grads = torch.func.grad(lambda params: f(params, torch.ones(3, 2)).sum())(f.params)
        >>> grads["weight"]
        tensor([[3., 3.]])
    """
    return Functional(module)
