"""Updates of one tensor, and of all, as functions of tensors, gradients, states and unconstrained values of learned hypers."""

from __future__ import annotations  # torch.compile does not evaluate annotations of inner functions

import functools
import operator
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from hyperopt_nested.engine.learned import LearnedHyper, number
from hyperopt_nested.engine.sensitivity import Named
from hyperopt_nested.ops import finite, state_dtype
from hyperopt_nested.rule import Optimizer, Per
from hyperopt_nested.trees import State, leaves, map_tree, same

Tensors = Mapping[str, Tensor]
Values = Mapping[str, Mapping[str, float | Tensor]]

Hessian = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""Product of the Hessian of the loss that gradients are of with tensors, by name, of the shapes of those that have a gradient."""

Kind = Literal["late", "forward", "reverse"]
"""How the last update's dependence on one hyper is remembered."""

Key = tuple[str, ...]
"""What a number belongs to: first the name of a tensor."""

SUMS = "sums"
"""What follows a tensor's name in the key of the sums that updates of its parts need."""

Reduce = Callable[[Mapping[Key, Tensor], Literal["sum", "max"]], dict[Key, Tensor]]
"""Of numbers that were computed for the tensors, or parts of tensors, that this process steps: what they are for the whole tensors."""

KindOf = Callable[[Optimizer, str, Per], Kind | None]
"""That of a hyper of an optimizer, given its name and granularity; None if it is not."""


class Binding:
    """An optimizer, bound to its learned hypers. One serves all tensors of the optimizer.

    Attributes:
        optimizer: the optimizer.
        learned: its learned hypers, by the names that its rule gives them.
        memory: the keys of those whose effect on the last update is remembered, by the way in which it is.
    """

    def __init__(self, optimizer: Optimizer, learned: dict[str, LearnedHyper], kind_of: KindOf) -> None:
        self.optimizer, self.learned = optimizer, learned
        self.memory: dict[Kind, list[str]] = {kind: [] for kind in get_args(Kind)}
        for name, each in learned.items():
            if kind := kind_of(optimizer, name, each.learn.per):
                self.memory[kind].append(each.key)

    @functools.cached_property
    def signature(self) -> Hashable:
        """What is equal for bindings whose updates are one function of tensors and of learned values."""
        settings = {hyper: None if hyper in self.learned else value for hyper, value in self.optimizer.settings.items()}
        return self.optimizer.rule.signature, self.optimizer.maximize, *settings.items()

    def unconstrained(self, name: str, hypers: Mapping[str, Named]) -> Named:
        """Unconstrained values that the tensor called `name` uses, by learned hyper."""
        return {each.key: hypers[each.key][each.key_of(name)] for each in self.learned.values()}

    def factor(self, name: str, values: Mapping[str, float | Tensor]) -> float | Tensor:
        """What a schedule has multiplied the declared value of a hyper by; 1 if that is zero."""
        declared = self.learned[name].declared if name in self.learned else self.optimizer.declared[name]
        return values[name] / declared if name in values and declared else 1.0

    def numbers(self, values: Mapping[str, float | Tensor], device: torch.device) -> Named:
        """Values of the hypers that are not learned, shape () each, given what a schedule has made of declared values."""
        return {
            name: number(values.get(name, value), device) for name, value in self.optimizer.declared.items() if name not in self.learned
        }

    def update(
        self, param: Tensor, grad: Tensor, state: State, values: Mapping[str, float | Tensor], numbers: Named | None = None
    ) -> TensorUpdate:
        """The update of one tensor; `numbers`, if they are known, are those of `values`."""
        return TensorUpdate(self, param, grad, state, values, self.numbers(values, param.device) if numbers is None else numbers)


class TensorUpdate:
    """The update of one tensor as a function of the unconstrained values that it uses, by learned hyper, and of the total if it needs one.

    Args:
        binding: what steps the tensor.
        param: the tensor.
        grad: its gradient.
        state: the rule's state.
        values: what a schedule has made of declared values.
        numbers: values of hypers that are not learned, as `Binding.numbers` gives them.
    """

    def __init__(
        self, binding: Binding, param: Tensor, grad: Tensor, state: State, values: Mapping[str, float | Tensor], numbers: Named
    ) -> None:
        self._binding, self._rule = binding, binding.optimizer.rule
        self._values, self._numbers, self._device, self._dtype = values, numbers, param.device, state_dtype(param)
        self._param, self._grad, self._state = self._widened(param), self._widened(grad), map_tree(self._widened, state)

    def _widened(self, tensor: Tensor) -> Tensor:
        if tensor.dtype == self._dtype or not tensor.is_floating_point():
            return tensor
        return tensor.to(torch.promote_types(tensor.dtype, self._dtype))

    def _hypers(self, raws: Named) -> dict[str, Tensor]:
        learned = self._binding.learned
        return {
            name: learned[name].value(raws[learned[name].key].to(self._device), self._values.get(name))
            if name in learned
            else self._numbers[name]
            for name in self._binding.optimizer.settings
        }

    def reduced(self, raws: Named) -> Tensor:
        """What the tensor adds to the total over all tensors."""
        return self._rule.global_reduce(self._param, self._grad, self._state, self._hypers(raws))

    def sums(self, raws: Named, total: Tensor | None = None) -> Tensor:
        """What a part of a tensor adds to the sums that its update needs."""
        total = None if total is None else total.to(self._device)
        return self._rule.sums(self._param, self._grad, self._state, self._hypers(raws), total)

    def __call__(self, raws: Named, total: Tensor | None = None, sums: Tensor | None = None) -> tuple[Tensor, State]:
        total = None if total is None else total.to(self._device)
        new, state = self._rule.update(self._param, self._grad, self._state, self._hypers(raws), total, sums)
        return new.to(self._dtype), state

    def param(self, raws: Named, total: Tensor | None) -> Tensor:
        """The new tensor."""
        return self(raws, total)[0]

    def finish(self, param: Tensor, raws: Named) -> Tensor:
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
        same = [leaf for leaf in leaves(self._state) if leaf.shape == shape and leaf.is_floating_point()] if shape else []
        good = torch.isfinite(functools.reduce(operator.add, [self._param, self._grad, *same]))

        def clean(leaf: Tensor) -> Tensor:
            if not leaf.is_floating_point():
                return leaf
            return torch.where(good, leaf, 0) if leaf.shape == shape and shape else finite(leaf)

        self._param, self._grad, self._state = clean(self._param), clean(self._grad), map_tree(clean, self._state)
        return torch.where(good, cotangent, torch.where(torch.isfinite(cotangent), 0.0, torch.nan))


class Bindings:
    """The binding of each tensor, and the update of all tensors as one function.

    Args:
        optimizer: one for all tensors, or a mapping from each tensor's name to its optimizer.
        learned: the learned hypers, by the key of the `learn` that declares them.
        kind_of: how last updates are remembered.
    """

    def __init__(self, optimizer: Optimizer | Mapping[str, Optimizer], learned: Mapping[int, LearnedHyper], kind_of: KindOf) -> None:
        def bind(one: Optimizer) -> Binding:
            return Binding(one, {name: learned[learn.key] for name, learn in one.learned.items()}, kind_of)

        if isinstance(optimizer, Optimizer):
            self._all, self._by_name = bind(optimizer), None
        else:
            each = {id(one): bind(one) for one in optimizer.values()}
            self._by_name = {name: each[id(one)] for name, one in optimizer.items()}

        self.in_parts: set[str] = set()  # names of tensors that are parts of larger ones, whose updates need sums over all parts

    def __getitem__(self, name: str) -> Binding:
        return self._all if self._by_name is None else self._by_name[name]

    def check_names(self, names: Iterable[str]) -> None:
        """Refuse tensors without an optimizer.

        Raises:
            ValueError: one has none.
        """
        if (known := self._by_name) is None:
            return
        for name in names:
            if name not in known:
                raise ValueError(f"optimizer has no entry for the tensor {name!r}; it has {', '.join(map(repr, known))}: add one")

    def used(self, names: Iterable[str], hypers: Mapping[str, Named]) -> dict[str, Named]:
        """Of all unconstrained values, those that these tensors use."""
        result: dict[str, Named] = {key: {} for key in hypers}
        for name in names:
            for each in self[name].learned.values():
                result[each.key][each.key_of(name)] = hypers[each.key][each.key_of(name)]
        return result

    def updates(self, params: Tensors, grads: Tensors, states: Mapping[str, State], values: Values) -> dict[str, TensorUpdate]:
        """The update of each tensor in `states`; arguments as of `Nested.step`, and the states of rules."""
        result, last = {}, None
        for name, state in states.items():
            binding, scheduled, device = self[name], values.get(name, _NONE), params[name].device
            if last is None or last[0] is not binding or not same(last[1], scheduled) or last[2] != device:  # a group shares numbers
                last = binding, scheduled, device, binding.numbers(scheduled, device)
            result[name] = binding.update(params[name], grads[name], state, scheduled, last[3])
        return result

    def __call__(
        self,
        params: Tensors,
        grads: Tensors,
        rule: Mapping[str, State],
        raws: Mapping[str, Named],
        values: Values,
        reduce: Reduce | None = None,
    ) -> tuple[Named, tuple[dict[str, State], Named]]:
        """New tensors; and new states of their rules, and the totals of what is measured. Arguments as of `Nested.step`."""
        updates = self.updates(params, grads, {name: rule[name] for name in grads}, values)
        used = {name: self[name].unconstrained(name, raws) for name in grads}
        totals: Named = {}
        parts: dict[Key, Tensor] = {}
        for name, each in updates.items():
            if reduction := self[name].optimizer.rule.reduction:
                parts[name, reduction] = each.reduced(used[name])
        for (_, reduction), part in (reduce(parts, "sum") if reduce else parts).items():
            before = totals.get(reduction)
            totals[reduction] = part if before is None else before + part.to(before.device)
        of = {name: totals.get(self[name].optimizer.rule.reduction) for name in updates}
        sums: dict[Key, Tensor] = {}
        if reduce and self.in_parts:
            sums = reduce({(name, SUMS): updates[name].sums(used[name], of[name]) for name in updates if name in self.in_parts}, "sum")
        new = {name: each(used[name], of[name], sums.get((name, SUMS))) for name, each in updates.items()}
        return {name: param for name, (param, _) in new.items()}, ({name: state for name, (_, state) in new.items()}, totals)


_NONE: dict[str, float | Tensor] = {}
