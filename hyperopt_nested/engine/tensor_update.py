"""The update of one tensor, seen as a function of the raw values of the learned hypers that it uses."""

from __future__ import annotations  # torch.compile does not evaluate annotations of inner functions

import functools
import operator
from collections.abc import Mapping

import torch
from torch import Tensor

from hyperopt_nested.engine.learned import LearnedHyper, number
from hyperopt_nested.engine.sensitivity import Raws
from hyperopt_nested.ops import finite, state_dtype
from hyperopt_nested.rule import Optimizer
from hyperopt_nested.trees import State, leaves, map_tree


class TensorUpdate:
    """The update of one tensor as a function of the raw values that it uses, by learned hyper, and of the sum over all tensors, if any.

    Args:
        optimizer: what steps the tensor.
        learned: its learned hypers, by the names that its rule gives them.
        param: the tensor.
        grad: its gradient.
        state: the rule's state.
        values: what a schedule has made of declared values.
        numbers: values of hypers that are not learned, as `fixed` gives them.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        learned: Mapping[str, LearnedHyper],
        param: Tensor,
        grad: Tensor,
        state: State,
        values: Mapping[str, float | Tensor],
        numbers: Raws,
    ) -> None:
        self._dtype = state_dtype(param)
        self._rule, self._settings = optimizer.rule, optimizer.settings
        self._learned, self._values, self._numbers = learned, values, numbers
        self._device = param.device
        self._param, self._grad, self._state = self._widened(param), self._widened(grad), map_tree(self._widened, state)
        self.reduction = optimizer.rule.reduction

    @staticmethod
    def fixed(
        optimizer: Optimizer, learned: Mapping[str, LearnedHyper], values: Mapping[str, float | Tensor], device: torch.device
    ) -> Raws:
        """Values of the hypers that are not learned, shape () each."""
        return {name: number(values.get(name, value), device) for name, value in optimizer.declared.items() if name not in learned}

    def _widened(self, tensor: Tensor) -> Tensor:
        if tensor.dtype == self._dtype or not tensor.is_floating_point():
            return tensor
        return tensor.to(torch.promote_types(tensor.dtype, self._dtype))

    def _hypers(self, raws: Raws) -> dict[str, Tensor]:
        return {name: self._numbers[name] if name in self._numbers else self._value(name, raws) for name in self._settings}

    def _value(self, name: str, raws: Raws) -> Tensor:
        learned = self._learned[name]
        return learned.value(raws[learned.key].to(self._device), self._values.get(name))

    def global_reduce(self, raws: Raws) -> Tensor:
        return self._rule.global_reduce(self._param, self._grad, self._state, self._hypers(raws))

    def __call__(self, raws: Raws, reduced: Tensor | None = None) -> tuple[Tensor, State]:
        reduced = None if reduced is None else reduced.to(self._device)
        new, state = self._rule.update(self._param, self._grad, self._state, self._hypers(raws), reduced)
        return new.to(self._dtype), state

    def param(self, raws: Raws, reduced: Tensor | None) -> Tensor:
        return self(raws, reduced)[0]

    def finish(self, param: Tensor, raws: Raws) -> Tensor:
        """The last part of the update, `Rule.finish`, given the new state."""
        return self._rule.finish(param, self._state, self._hypers(raws))

    def left(self, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        """The tensor, where it is what an update left, and the cotangent of it; both `cleaned`."""
        along = self.cleaned(cotangent)
        return self._param, along

    def cleaned(self, cotangent: Tensor) -> Tensor:
        """Leave out the elements that are not finite in the tensor, the gradient or the state, so that derivatives stay so elsewhere.

        Args:
            cotangent: of the update's result, of the tensor's shape.

        Returns:
            The cotangent, zero in these elements; but where it is not finite itself, NaN.
        """
        shape = self._param.shape
        kept = [leaf for leaf in leaves(self._state) if leaf.shape == shape and leaf.is_floating_point()] if shape else []
        good = torch.isfinite(functools.reduce(operator.add, [self._param, self._grad, *kept]))

        def clean(leaf: Tensor) -> Tensor:
            if not leaf.is_floating_point():
                return leaf
            return torch.where(good, leaf, 0) if leaf.shape == shape and shape else finite(leaf)

        self._param, self._grad, self._state = clean(self._param), clean(self._grad), map_tree(clean, self._state)
        return torch.where(good, cotangent, torch.where(torch.isfinite(cotangent), 0.0, torch.nan))
