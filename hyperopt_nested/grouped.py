"""Parameter groups: which optimizer and which numbers each tensor has, and how that follows what others do to the groups."""

from collections.abc import Callable, Iterable, Mapping
from operator import is_
from typing import Any, cast

import torch
from torch import Tensor

from hyperopt_nested.checks import not_an_optimizer
from hyperopt_nested.combinator import Combinator
from hyperopt_nested.group import Numbers, check_betas, check_keys, check_numbers, pack, unpack, with_overrides
from hyperopt_nested.learned import number
from hyperopt_nested.nested import Nested
from hyperopt_nested.outside_dynamo import add_param_group
from hyperopt_nested.param_state import ParamState
from hyperopt_nested.roster import Group, Roster, free_name
from hyperopt_nested.rule import FunctionRule, Learn, Optimizer

Choice = Optimizer | Callable[[str, Tensor], Optimizer]

NO_CHOICES = type, torch.nn.Module, FunctionRule, Combinator
"""What can be called, and is no function from a tensor's name and the tensor to an optimizer."""


class GroupedOptimizer(torch.optim.Optimizer):
    """A torch optimizer whose tensors have optimizers of this library: what `HyperOptimizer` makes its state and its steps of."""

    _elsewhere: frozenset[str] = frozenset()  # entries of rules' states that stay on devices of their own
    _choice: Choice
    _optimizers: dict[str, Optimizer]  # also of tensors that are gone: keys of learned hypers go by their order
    _given: list[dict[str, Any]]  # values that groups were given
    _roster: Roster
    _kept: ParamState | None
    _shapes: dict[str, torch.Size]

    def _create_state(
        self, also: Iterable[str] = (), *, roster: Roster | None = None, optimizers: dict[str, Optimizer] | None = None
    ) -> None:
        """Create the state of all tensors that train, or are named in `also`; what is there already stays. If it raises, all stays."""
        raise NotImplementedError

    def add_param_group(self, param_group: Group) -> None:
        """Add a group, as in torch.optim; values that tensors share are the ones learned so far."""
        if self._kept is not None:
            self._follow()
        if not isinstance(param_group, dict) or "params" not in param_group:
            raise ValueError(f"a group must be a dict with 'params', such as {{'params': [...], 'lr': 1e-3}}; {param_group!r} is not")
        given = param_group["params"]
        entries = [given] if isinstance(given, Tensor) else list(given)
        index, present = len(self.param_groups), self._roster.tensors
        named: list[tuple[str, Tensor]] = []
        first, taken = dict[int, str](), set[str]()
        for i, entry in enumerate(entries):
            name, param = entry if isinstance(entry, tuple) else (free_name([f"{index}.{i}"], present.keys()), entry)
            if id(param) not in first and (name in present or name in taken):
                raise ValueError(f"params has two tensors named {name!r}; give each its own name")
            named.append((first.setdefault(id(param), name), param))  # of a tensor that is given again, torch warns
            taken.add(name)
        overrides = unpack({key: value for key, value in param_group.items() if key not in ("params", "param_names")})
        chosen = self._choose(dict(named), overrides)
        check_betas(param_group, chosen.values())
        declared: dict[str, float] = {}
        for name, optimizer in chosen.items():
            for hyper, value in self._declared(optimizer).items():
                if hyper not in overrides and declared.setdefault(hyper, value) != value:
                    raise ValueError(
                        f"group {index} has tensors with {hyper}={declared[hyper]!r} and {hyper}={value!r} (of {name!r}); "
                        "a group holds one number a hyper: put them into groups of their own"
                    )
        numbers = {key: value.value if isinstance(value, Learn) else value for key, value in overrides.items()}
        for group in self.param_groups:
            if not group["params"] and entries:  # torch wants all groups with names, or none
                group.pop("param_names", None)
                group |= {"param_names": []} if isinstance(entries[0], tuple) else {}
        names: dict[str, Any] = {} if entries or not any("param_names" in group for group in self.param_groups) else {"param_names": []}
        add_param_group(self, {"params": entries, **names, **pack({**declared, **numbers})})
        roster = Roster(self.param_groups, [*self._roster.names, [name for name, _ in named]])
        try:
            if self._kept is not None:
                self._create_state(roster=roster, optimizers={**self._optimizers, **chosen})
        except BaseException:
            self.param_groups.pop()
            raise
        self._roster, self._optimizers = roster, {**self._optimizers, **chosen}
        self._given.append(overrides)

    def _declared(self, optimizer: Optimizer) -> dict[str, float]:
        """What numbers of groups are relative to: the declared value of each hyper, or what the run declared whose state was loaded."""
        known = {id(learned.learn): learned.declared for learned in self._kept.nested.learned.values()} if self._kept else {}
        return {**optimizer.declared, **{hyper: known[id(learn)] for hyper, learn in optimizer.learned.items() if id(learn) in known}}

    def _numbers_of(self, names: list[str]) -> dict[str, Any]:
        """What a group with these tensors, or with any if there are none, holds for each hyper."""
        found: dict[str, Any] = {}
        for name in names or self._roster.tensors:
            found = {**self._declared(self._optimizers[name]), **found}
        return pack(found)

    def _fill(self, index: int, group: Group) -> None:
        for key, value in self._numbers_of(self._roster.names[index]).items():
            group.setdefault(key, value)

    def _choose(self, named: Mapping[str, Tensor], overrides: Mapping[str, Any]) -> dict[str, Optimizer]:
        """The optimizer of each tensor of a group, with the group's values."""
        replaced: dict[int, tuple[Optimizer, Optimizer]] = {}  # keeps what was replaced, so that its id stays its own
        chosen: dict[str, Optimizer] = {}
        for name, param in named.items():
            base = self._choice if isinstance(self._choice, Optimizer) else self._choice(name, param)
            if not isinstance(base, Optimizer):
                raise not_an_optimizer(f"optimizer({name!r}, tensor) returned", base)
            if id(base) not in replaced:
                replaced[id(base)] = base, with_overrides(base, overrides)
            chosen[name] = replaced[id(base)][1]
        check_keys(overrides, chosen.values())
        return chosen

    def _follow(self) -> None:
        """Follow what others have done to groups, to entries of the state, and to tensors; see `roster` and `param_state`."""
        kept = cast(ParamState, self._kept)
        if not self._roster.is_current(self.param_groups):
            roster, origins = self._roster.followed(self.param_groups)
            given = [
                unpack({k: v for k, v in group.items() if k not in ("params", "param_names")}) if origin is None else self._given[origin]
                for group, origin in zip(self.param_groups, origins, strict=True)
            ]
            optimizers = dict(self._optimizers)
            for index, names in enumerate(roster.names):
                new = {name: roster.tensors[name] for name in names if not self._is_known(name, roster.tensors[name])}
                optimizers |= self._choose(new, given[index])
            self._create_state(roster=roster, optimizers=optimizers)
            self._given = given
            roster.label(self.param_groups)
            for index, group in enumerate(self.param_groups):
                self._fill(index, group)
        elif kept.is_current(self.state):
            return
        elif kept.adopted(self.state, self._elsewhere):
            self._renumber()
        else:
            again = {name: p for name, p in self._roster.tensors.items() if not self._is_known(name, p)}
            chosen = [self._choose({name: p}, self._given[self._roster.group_of[name]]) for name, p in again.items()]
            self._create_state(optimizers={name: each for found in [self._optimizers, *chosen] for name, each in found.items()})

    def _is_known(self, name: str, param: Tensor) -> bool:
        """Whether a tensor of that name and shape has an optimizer."""
        return name in self._optimizers and self._shapes.get(name, param.shape) == param.shape

    def _switched(self, groups: list[Group]) -> dict[str, Optimizer]:
        """The optimizer of each tensor, with what schedules have made of hypers that were zero: some rules need more state then."""
        found = dict(self._optimizers)
        for index, (names, group) in enumerate(zip(self._roster.names, groups, strict=True)):
            numbers, switched = unpack(group), dict[int, Optimizer]()
            for name in names:
                old = self._optimizers[name]
                if id(old) not in switched:
                    check_numbers(index, group, old)
                    off = [hyper for hyper, setting in old.settings.items() if not isinstance(setting, Learn) and setting == 0]
                    on = {hyper: float(numbers[hyper]) for hyper in off if not isinstance(numbers[hyper], Tensor) and numbers[hyper] != 0}
                    switched[id(old)] = old.replace(**on) if on else old
                found[name] = switched[id(old)]
        return found

    def _renumber(self) -> None:
        """Forget numbers of groups, and note which tensors share them: those of one group, optimizer and device."""
        self._numbers, self._snapshots, self._lists = Numbers(), list[list[Any]](), dict[str, Any]()
        users: dict[tuple[int, int, torch.device], list[str]] = {}
        for name, param in cast(ParamState, self._kept).params.items():
            users.setdefault((self._roster.group_of[name], id(self._optimizers[name]), param.device), []).append(name)
        self._users = list(users.items())

    def _values(self, *, as_tensors: bool = False) -> dict[str, Any]:
        """By tensor: the numbers that its group holds now, as tensors where they are not learned; or all of them as tensors that stay."""
        if as_tensors and self._lists:
            return self._lists
        found: dict[str, Any] = {}
        for key, names in self._users:
            index, _, device = key
            optimizer, learned = self._optimizers[names[0]], self._nested.learned_of(names[0])
            numbers = unpack(self.param_groups[index])
            if as_tensors:
                of_group: Any = self._numbers.of(key, {hyper: numbers[hyper] for hyper in optimizer.settings}, device, learned)
            else:
                of_group = {hyper: numbers[hyper] if hyper in learned else number(numbers[hyper], device) for hyper in optimizer.settings}
            found |= dict.fromkeys(names, of_group)
        if as_tensors:
            self._lists = found
        return found

    def _have_numbers_changed(self) -> bool:
        """Whether groups may hold other numbers than when this was asked last; tensors may always."""
        before, self._snapshots = self._snapshots, [[*group.values()] for group in self.param_groups]
        return not (
            len(before) == len(self._snapshots)
            and all(len(one) == len(other) and all(map(is_, one, other)) for one, other in zip(before, self._snapshots, strict=True))
            and not any(isinstance(value, Tensor) for values in before for value in values)
        )

    @property
    def _nested(self) -> Nested:
        return cast(ParamState, self._kept).nested
