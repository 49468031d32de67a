"""The update of all tensors, seen as one pure function of tensors, gradients, states and the raw values of learned hypers."""

from __future__ import annotations  # torch.compile does not evaluate annotations of inner functions

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from hyperopt_nested.engine.learned import LearnedHyper
from hyperopt_nested.engine.sensitivity import Raws
from hyperopt_nested.engine.tensor_update import TensorUpdate
from hyperopt_nested.rule import Optimizer
from hyperopt_nested.trees import State

Tensors = Mapping[str, Tensor]
Values = Mapping[str, Mapping[str, float | Tensor]]
_NONE: dict[str, float | Tensor] = {}

Hessian = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""Product of the Hessian of the loss that gradients are of with tensors, by name, of the shapes of those that have a gradient."""


class JointUpdate:
    """The update of all tensors.

    Args:
        optimizer: one for all tensors, or a mapping from each tensor's name to its optimizer.
        learned: the learned hypers, by the id of the `learn` that declares them.

    Attributes:
        optimizers: the optimizers, each once.
    """

    def __init__(self, optimizer: Optimizer | Mapping[str, Optimizer], learned: Mapping[int, LearnedHyper]) -> None:
        self._optimizer = optimizer
        self.optimizers = list({id(one): one for one in ([optimizer] if isinstance(optimizer, Optimizer) else optimizer.values())}.values())
        self._learned = {id(one): {name: learned[id(learn)] for name, learn in one.learned.items()} for one in self.optimizers}

    def optimizer_of(self, name: str) -> Optimizer:
        """The optimizer of the tensor called `name`."""
        return self._optimizer if isinstance(self._optimizer, Optimizer) else self._optimizer[name]

    def check_names(self, names: Iterable[str]) -> None:
        """Refuse tensors without an optimizer.

        Raises:
            ValueError: one has none.
        """
        if not isinstance(self._optimizer, Optimizer):
            for name in names:
                if name not in self._optimizer:
                    raise ValueError(
                        f"optimizer has no entry for the tensor {name!r}; it has {', '.join(map(repr, self._optimizer))}: add one"
                    )

    def learned_of(self, name: str) -> dict[str, LearnedHyper]:
        """The learned hypers of the tensor called `name`, by the names that its rule gives them."""
        return self.learned_by(self.optimizer_of(name))

    def learned_by(self, optimizer: Optimizer) -> dict[str, LearnedHyper]:
        """The learned hypers of an optimizer, by the names that its rule gives them."""
        return self._learned[id(optimizer)]

    def raws_of(self, name: str, hypers: Mapping[str, Raws]) -> Raws:
        """Raw values that a tensor uses, by learned hyper."""
        return {each.key: hypers[each.key][each.key_of(name)] for each in self.learned_of(name).values()}

    def used(self, names: Iterable[str], hypers: Mapping[str, Raws]) -> dict[str, Raws]:
        """Of all raw values, those that these tensors use."""
        found: dict[str, Raws] = {key: {} for key in hypers}
        for name in names:
            for each in self.learned_of(name).values():
                found[each.key][each.key_of(name)] = hypers[each.key][each.key_of(name)]
        return found

    def of(
        self, params: Tensors, grads: Tensors, states: Mapping[str, State], values: Values, names: Iterable[str]
    ) -> dict[str, TensorUpdate]:
        """The update of each tensor called so; arguments as of `Nested.step`, and the states of rules."""
        found, last = {}, None
        for name in names:
            optimizer, learned, given = self.optimizer_of(name), self.learned_of(name), values.get(name, _NONE)
            device = params[name].device
            if last is None or last[0] is not optimizer or last[1] is not given or last[2] != device:  # tensors of a group share numbers
                last = optimizer, given, device, TensorUpdate.fixed(optimizer, learned, given, device)
            found[name] = TensorUpdate(optimizer, learned, params[name], grads[name], states[name], given, last[3])
        return found

    def __call__(
        self, params: Tensors, grads: Tensors, rule: Mapping[str, State], raws: Mapping[str, Raws], values: Values
    ) -> tuple[Raws, tuple[dict[str, State], Raws]]:
        """New tensors; and new states of their rules, and the sums over all tensors. Arguments as of `Nested.step`."""
        updates = self.of(params, grads, rule, values, grads)
        used = {name: self.raws_of(name, raws) for name in grads}
        totals: Raws = {}
        for name, each in updates.items():
            if each.reduction:
                measured, before = each.global_reduce(used[name]), totals.get(each.reduction)
                totals[each.reduction] = measured if before is None else before + measured.to(before.device)
        updated = {name: each(used[name], totals.get(each.reduction)) for name, each in updates.items()}
        return {name: pair[0] for name, pair in updated.items()}, ({name: pair[1] for name, pair in updated.items()}, totals)
