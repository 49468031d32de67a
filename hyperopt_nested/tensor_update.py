"""The update of one tensor, seen as a function of the raw values of the learned hypers that it uses."""

from __future__ import annotations  # torch.compile does not evaluate annotations of inner functions

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hyperopt_nested.learned import LearnedHyper, number
from hyperopt_nested.ops import State, map_tree, state_dtype
from hyperopt_nested.rule import Optimizer
from hyperopt_nested.sensitivity import Raws, pull_reverse


class TensorUpdate:
    """The update of one tensor as a function of the raw values that it uses, by learned hyper, and of the total if it needs one."""

    def __init__(
        self,
        optimizer: Optimizer,
        learned: Mapping[str, LearnedHyper],
        param: Tensor,
        grad: Tensor,
        state: State,
        values: Mapping[str, float | Tensor],
    ) -> None:
        self._dtype = state_dtype(param)
        self._rule, self._declared, self._learned, self._values = optimizer.rule, optimizer.declared, learned, values
        self._device = param.device
        self._inputs = self._widened(param), self._widened(grad), map_tree(self._widened, state)
        self.measures = optimizer.rule.measures

    def _widened(self, tensor: Tensor) -> Tensor:
        return tensor.to(torch.promote_types(tensor.dtype, self._dtype)) if tensor.is_floating_point() else tensor

    def _hypers(self, raws: Raws) -> dict[str, Tensor]:
        hypers = {}
        for name, setting in self._declared.items():
            given = self._values.get(name, setting)
            if name in self._learned:
                hypers[name] = self._learned[name].value(raws[self._learned[name].key].to(self._device), given)
            else:
                hypers[name] = number(given, self._device)
        return hypers

    def measure(self, raws: Raws) -> Tensor:
        return self._rule.measure(*self._inputs, self._hypers(raws))

    def __call__(self, raws: Raws, total: Tensor | None = None) -> tuple[Tensor, State]:
        total = None if total is None else total.to(self._device)
        new, state = self._rule.update(*self._inputs, self._hypers(raws), total)
        return new.to(self._dtype), state

    def param(self, raws: Raws, total: Tensor | None) -> Tensor:
        return self(raws, total)[0]

    def pull_late(self, grad: Tensor, raws: Raws) -> Raws:
        """Pull a gradient back through the last part of an update, `Rule.finish`, given the tensor and the state that it left.

        The tensor before it is worked out: `finish` is affine in it.
        """
        after, _, state = self._inputs

        def finish(raws: Raws, param: Tensor) -> Tensor:
            return self._rule.finish(param, state, self._hypers(raws))

        linearized: Any = torch.func.vjp(functools.partial(finish, raws), torch.zeros_like(after))
        (slope,) = linearized[1](torch.ones_like(after))
        before = (after - linearized[0]) / slope
        return pull_reverse(grad, functools.partial(finish, param=before), raws)
