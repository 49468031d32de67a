"""Parameter groups: which optimizer and which numbers each tensor has, and how that follows what others do to the groups."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping
from difflib import get_close_matches
from operator import is_
from typing import Any, cast
from warnings import warn

import torch
from torch import Tensor
from torch.utils._pytree import register_pytree_node

from hyperopt_nested.checks import PAIRS, caller_level, host_number, is_number, not_an_optimizer, packs
from hyperopt_nested.combinators.base import Combinator
from hyperopt_nested.engine.learned import LearnedHyper, number
from hyperopt_nested.engine.nested import Nested
from hyperopt_nested.optim.level import has_level, shape, with_level
from hyperopt_nested.optim.live_group import LiveGroup, numbers_of
from hyperopt_nested.optim.named_values import LearnedValue
from hyperopt_nested.optim.outside_dynamo import add_param_group
from hyperopt_nested.optim.param_state import ParamState
from hyperopt_nested.optim.roster import Group, Roster, free_name
from hyperopt_nested.optim.sharding import localized
from hyperopt_nested.rule import FunctionRule, Learn, Optimizer, Rule

Choice = Optimizer | Callable[[str, Tensor], Optimizer]

NO_CHOICES = type, torch.nn.Module, FunctionRule, Combinator
"""What can be called, and is no function from a tensor's name and the tensor to an optimizer."""


NO_STORE = cast(ParamState, None)
"""The state of an optimizer whose construction has not ended."""


def pack(hypers: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers as a group holds them, under torch's names: beta1, beta2, ... become the tuple `betas`, which its schedulers know."""
    tuples = packs(hypers)
    parts = {part for each in tuples.values() for part in each}
    group = {name: value for name, value in hypers.items() if name not in parts}
    return {**group, **{name: tuple(hypers[part] for part in each) for name, each in tuples.items()}}


def unpack(group: Group) -> dict[str, Any]:
    """What a group holds, by the names of hypers."""
    hypers: dict[str, Any] = {}
    for key, value in numbers_of(group).items():
        if key == "betas":
            if not isinstance(value, (tuple, list)):
                raise TypeError(f"betas={value!r} ({type(value).__name__}) of a group must be a tuple of numbers")
            hypers |= {f"beta{i}": each for i, each in enumerate(value, start=1)}
        elif key in PAIRS and isinstance(value, (tuple, list)) and len(value) == len(PAIRS[key]):
            hypers |= dict(zip(PAIRS[key], value, strict=True))
        else:
            hypers[key] = value
    return hypers


def _values_of(group: Group) -> dict[str, Any]:
    """What a group holds but for its tensors, by the names of hypers."""
    return unpack({key: value for key, value in numbers_of(group).items() if key not in ("params", "param_names")})


def check_params(params: Any) -> None:
    """Refuse what holds no tensors, as far as torch's own message would not say what to do.

    Raises:
        TypeError: it does not.
    """
    if isinstance(params, torch.nn.Module):
        raise TypeError(f"params is a module ({type(params).__name__}): give its parameters, model.named_parameters()")
    if isinstance(params, Tensor):
        raise TypeError(f"params is a tensor ({type(params).__name__}): give a list, [tensor]")
    if isinstance(params, (Mapping, str)) or not isinstance(params, Iterable):
        remedy = "give a list of groups, [{'params': ...}]" if isinstance(params, Mapping) else "give model.named_parameters()"
        raise TypeError(f"params is a {type(params).__name__}: {remedy}")


def check_keys(overrides: Mapping[str, Any], optimizers: Iterable[Optimizer]) -> None:
    """Refuse values of a group that would have no effect. Keys that name a hyper with something more, such as initial_lr, are others'.

    Args:
        overrides: the group's values.
        optimizers: of its tensors.

    Raises:
        ValueError: a key is an option, no hyper, or `betas` has another length than there are betas.
    """
    own = list(optimizers)
    hypers = list(dict.fromkeys(hyper for optimizer in own for hyper in optimizer.settings))
    options = {option for optimizer in own for option in options_of(optimizer.rule)}
    for key, value in overrides.items():
        whole = key.startswith("beta") and key[4:].isdigit()
        if key in hypers or not own or (whole and "beta1" in hypers):
            continue
        if key in options or (key == "maximize" and value):
            raise ValueError(
                f"a group gives {key}={value!r}, which is an option and not a hyper; to vary it, pass a function from "
                "(name, tensor) to the optimizer as `optimizer`"
            )
        if close := get_close_matches(key, hypers, cutoff=0.8):
            raise ValueError(f"a group gives {key!r}; did you mean {close[0]!r}?")
        is_value = isinstance(value, Learn) or (is_number(value) and value != 0)  # trainers write weight_decay=0.0 to all groups
        if whole or (is_value and not any(hyper in key.split("_") or hyper in key for hyper in hypers)):
            raise ValueError(
                f"a group gives {key}={value!r}, but its tensors have no hyper {key!r}; they have {', '.join(hypers) or 'none'}"
            )


def check_betas(group: Mapping[str, Any], optimizers: Iterable[Optimizer]) -> None:
    """Refuse `betas` of a group, and other tuples, that are not as many numbers as its tensors' optimizers have.

    Raises:
        ValueError: they are more or fewer.
    """
    for optimizer in optimizers:
        for key, own in packs(optimizer.settings).items():
            if key in group and (not isinstance(group[key], (tuple, list)) or len(group[key]) != len(own)):
                raise ValueError(f"a group gives {key}={group[key]!r}, which must be {len(own)} numbers: {', '.join(own)}")


def check_numbers(index: int, group: Group, optimizer: Optimizer) -> None:
    """Refuse numbers of a group that are outside their domains, as a schedule may have made them.

    Args:
        index: of the group.
        group: the group.
        optimizer: of one of its tensors.

    Raises:
        TypeError: a value is no number.
        ValueError: a number is missing, not finite, or outside its domain.
    """
    numbers = unpack(group)
    for hyper in optimizer.settings:
        label = f"group {index}: {hyper}"
        if hyper not in numbers:
            needs = (
                f"betas={group['betas']!r} is too short for {hyper}"
                if "betas" in group and hyper.startswith("beta")
                else f"it has no {hyper!r}"
            )
            raise ValueError(f"group {index}: {needs}; {optimizer.rule.name} needs {', '.join(optimizer.settings)}")
        domain = optimizer.rule.hypers[hyper]
        domain.check_scheduled(label, host_number(label, numbers[hyper], domain.default))


def options_of(rule: Rule) -> set[str]:
    """Names of the options of a rule, and of those inside."""
    own = set(getattr(rule, "options", {}))
    return own | options_of(rule.base) if hasattr(rule, "base") else own


class ByName(dict[str, Any]):
    """A dict whose error for a missing key says which there are, and where shared values are."""

    def __init__(self, what: str, values: Mapping[str, Any] | None = None) -> None:
        super().__init__(values or {})
        self._what = what

    def __missing__(self, key: object) -> Any:
        shared = "; a value that tensors share goes by their group" if any(str(each).startswith("group ") for each in self) else ""
        raise KeyError(f"{self._what} has no {key!r}; it has {', '.join(map(repr, self)) or 'nothing'}{shared}")

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, (list(self.items()),)


def _named(values: Iterable[Any], context: Any) -> ByName:
    what, keys = context
    return ByName(what, dict(zip(keys, values, strict=True)))


register_pytree_node(ByName, lambda found: (list(found.values()), (found._what, list(found))), _named)


def with_overrides(optimizer: Optimizer, overrides: Mapping[str, Any]) -> Optimizer:
    """Values of a group: a number replaces a number, but scales what is learned; a `learn` without a start starts at the declared value."""
    settings: dict[str, Any] = {}
    for name, value in overrides.items():
        if name not in optimizer.settings:
            continue
        if isinstance(optimizer.settings[name], Learn) and not isinstance(value, Learn):
            optimizer.rule.hypers[name].check(f"{optimizer.rule.name}: {name}", value)
        else:
            settings[name] = value
    return optimizer.replace(**settings) if settings else optimizer


def _mind_new_learns(choose: Callable[[str, Tensor], Optimizer], named: Mapping[str, Tensor], chosen: Mapping[str, Optimizer]) -> None:
    """Warn if a function makes a `learn` for the model anew in each call, so that each tensor learns a value of its own."""
    by_hyper: dict[str, set[int]] = {}
    for optimizer in chosen.values():
        for hyper, learn in optimizer.learned.items():
            if learn.per == "model":
                by_hyper.setdefault(hyper, set()).add(learn.key)
    several = {hyper for hyper, keys in by_hyper.items() if len(keys) > 1}
    for name, optimizer in chosen.items():
        if shared := sorted(several & {hyper for hyper, learn in optimizer.learned.items() if learn.per == "model"}):
            again = choose(name, named[name]).learned
            if anew := [hyper for hyper in shared if hyper in again and again[hyper].key != optimizer.learned[hyper].key]:
                warn(
                    f"the function that is given as `optimizer` makes a new learn(...) for {anew[0]} in each call, so each tensor learns "
                    f"its own {anew[0]}: make it once, outside of the function, to share it, or say per='tensor'",
                    stacklevel=caller_level(),
                )
            return


def _of(value: Any) -> tuple[Any, ...]:
    """A value of a group, or, of a tuple such as `betas`, the values in it."""
    return value if isinstance(value, tuple) else (value,)


class Numbers:
    """Numbers that schedules change, as tensors: written to where they have changed, so that no step waits for a device."""

    def __init__(self) -> None:
        self._memo: dict[Hashable, tuple[list[Any], list[Tensor]]] = {}

    def of(
        self, key: Hashable, values: Mapping[str, float | Tensor], device: torch.device, learned: Mapping[str, LearnedHyper]
    ) -> list[Tensor]:
        """Tensors of shape () with these values, those of the last call with this key."""
        numbers = list(values.values())
        if key not in self._memo:
            self._memo[key] = [None] * len(numbers), [number(0.0, device) for _ in numbers]
        last, tensors = self._memo[key]
        for i, (name, value) in enumerate(values.items()):
            if isinstance(value, Tensor) or value != last[i]:
                if name in learned and not isinstance(value, Tensor):
                    learned[name].check_scheduled(value)
                tensors[i].copy_(value) if isinstance(value, Tensor) else tensors[i].fill_(value)
                last[i] = value
        return tensors


class GroupedOptimizer(torch.optim.Optimizer):
    """A torch optimizer whose tensors have optimizers of this library: what `HyperOptimizer` makes its state and its steps of."""

    _choice: Choice
    _optimizers: dict[str, Optimizer]  # also of tensors that are gone: keys of learned hypers go by their order
    _overrides: list[dict[str, Any]]  # values of groups that were arguments
    _roster: Roster
    _store: ParamState = NO_STORE
    _total_steps: int | None
    _how: dict[str, Any]  # further arguments of the engine
    _shapes: dict[str, torch.Size]
    _last_loss: Tensor | None = None  # of the last step, for what reads it

    def _create_state(
        self, also: Iterable[str] = (), *, roster: Roster | None = None, optimizers: dict[str, Optimizer] | None = None
    ) -> None:
        """Create the state of all tensors that train, or are named in `also`; what is there already stays. If it raises, all stays."""
        raise NotImplementedError

    def add_param_group(self, param_group: Group) -> None:
        """Add a group, as in torch.optim; values that tensors share are the ones learned so far."""
        if self._store is not None:
            self._follow()
        if not isinstance(param_group, dict) or "params" not in param_group:
            raise ValueError(f"a group must be a dict with 'params', such as {{'params': [...], 'lr': 1e-3}}; {param_group!r} is not")
        params = param_group["params"]
        entries = [params] if isinstance(params, Tensor) else list(params)
        index, present = len(self.param_groups), self._roster.tensors
        named: list[tuple[str, Tensor]] = []
        first, taken = dict[int, str](), set[str]()
        for i, entry in enumerate(entries):
            name, param = entry if isinstance(entry, tuple) else (free_name([f"{index}.{i}"], present.keys()), entry)
            if id(param) not in first and (name in present or name in taken):
                raise ValueError(f"params has two tensors named {name!r}; give each its own name")
            named.append((first.setdefault(id(param), name), param))  # of a tensor that is given again, torch warns
            taken.add(name)
        overrides = _values_of(param_group)
        chosen = self._choose(dict(named), overrides)
        check_betas(param_group, chosen.values())
        numbers = {key: value for key, value in overrides.items() if not isinstance(value, Learn)}
        declared: dict[str, float] = {}
        for name, optimizer in chosen.items():
            for hyper, value in self._declared(optimizer).items():
                other = value if hyper in numbers else declared.setdefault(hyper, value)
                if other is not value and other != value:
                    raise ValueError(
                        f"group {index} has tensors with {hyper}={other!r} and {hyper}={value!r} (of {name!r}); "
                        "a group holds one number a hyper: put them into groups of their own"
                    )
        for group in self.param_groups:
            if not group["params"] and entries:  # torch wants all groups with names, or none
                group.pop("param_names", None)
                group |= {"param_names": []} if isinstance(entries[0], tuple) else {}
        names: dict[str, Any] = {} if entries or not any("param_names" in group for group in self.param_groups) else {"param_names": []}
        add_param_group(self, {"params": entries, **names, **pack({**declared, **numbers})})
        self.param_groups[-1] = self._live(self.param_groups[-1])
        roster = Roster(self.param_groups, [*self._roster.names, [name for name, _ in named]])
        try:
            if self._store is not None:
                self._create_state(roster=roster, optimizers={**self._optimizers, **chosen})
        except BaseException:
            self.param_groups.pop()
            raise
        self._roster, self._optimizers = roster, {**self._optimizers, **chosen}
        self._overrides.append(overrides)

    def _declared(self, optimizer: Optimizer) -> dict[str, float]:
        """What numbers of groups are relative to: the declared value of each hyper, or what the run declared whose state was loaded."""
        known = {learned.learn.key: learned.declared for learned in self._store.nested.learned.values()} if self._store else {}
        return {**optimizer.declared, **{hyper: known[learn.key] for hyper, learn in optimizer.learned.items() if learn.key in known}}

    def _numbers_of(self, names: list[str]) -> dict[str, Any]:
        """What a group with these tensors, or with any if there are none, holds for each hyper."""
        numbers: dict[str, Any] = {}
        for name in names or self._roster.tensors:
            numbers = {**self._declared(self._optimizers[name]), **numbers}
        return pack(numbers)

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
                own = with_overrides(base, overrides)
                replaced[id(base)] = base, own if self._total_steps is None else with_level(own, self._total_steps)
            chosen[name] = localized(replaced[id(base)][1], param, self._how["horizon"])
        if not isinstance(self._choice, Optimizer):
            _mind_new_learns(self._choice, named, chosen)
        check_keys(overrides, chosen.values())
        return chosen

    def _follow(self) -> None:
        """Follow what others have done to groups, to entries of the state, and to tensors; see `roster` and `param_state`."""
        store = self._store
        if not self._roster.is_current(self.param_groups):
            roster, origins = self._roster.followed(self.param_groups)
            overrides = [
                _values_of(group) if origin is None else self._overrides[origin]
                for group, origin in zip(self.param_groups, origins, strict=True)
            ]
            optimizers = dict(self._optimizers)
            for index, names in enumerate(roster.names):
                new = {name: roster.tensors[name] for name in names if not self._is_known(name, roster.tensors[name])}
                optimizers |= self._choose(new, overrides[index])
            self._create_state(roster=roster, optimizers=optimizers)
            self._overrides = overrides
            roster.label(self.param_groups)
            for index, group in enumerate(self.param_groups):
                self._fill(index, group)
        elif store.is_current(self.state):
            return
        elif store.adopted(self.state):
            self._renumber()
        else:
            again = {name: p for name, p in self._roster.tensors.items() if not self._is_known(name, p)}
            chosen = [self._choose({name: p}, self._overrides[self._roster.group_of[name]]) for name, p in again.items()]
            self._create_state(optimizers={name: each for found in [self._optimizers, *chosen] for name, each in found.items()})

    def _is_known(self, name: str, param: Tensor) -> bool:
        """Whether a tensor of that name and shape has an optimizer."""
        return name in self._optimizers and self._shapes.get(name, param.shape) == param.shape

    def _switched(self, groups: list[Group]) -> dict[str, Optimizer]:
        """The optimizer of each tensor, with what schedules have made of hypers that were zero: some rules need more state then."""
        result = dict(self._optimizers)
        for index, (names, group) in enumerate(zip(self._roster.names, groups, strict=True)):
            numbers, switched = unpack(group), dict[int, Optimizer]()
            for name in names:
                old = self._optimizers[name]
                if id(old) not in switched:
                    check_numbers(index, group, old)
                    off = [hyper for hyper, setting in old.settings.items() if is_number(setting) and setting == 0]
                    on = {hyper: float(numbers[hyper]) for hyper in off if not isinstance(numbers[hyper], Tensor) and numbers[hyper] != 0}
                    switched[id(old)] = old.replace(**on) if on else old
                result[name] = switched[id(old)]
        return result

    def _renumber(self) -> None:
        """Forget numbers of groups, and note which tensors share them: those of one group, optimizer and device."""
        self._numbers, self._snapshots, self._lists = Numbers(), list[list[Any]](), dict[str, Any]()
        users: dict[tuple[int, int, torch.device], list[str]] = {}
        for name, param in self._store.params.items():
            users.setdefault((self._roster.group_of[name], id(self._optimizers[name]), param.device), []).append(name)
        self._users = list(users.items())

    def _live(self, group: Group) -> Group:
        """The group with its `effective_lr`, if it has an `lr`."""
        return LiveGroup(group, self._effective_lr) if "lr" in group else group

    def _effective_lr(self, group: Group) -> float:
        """The learning rate of the next step: the mean of the values that the group's tensors use, or else its number."""
        used: dict[tuple[str, str], Tensor] = {}
        for name in self._roster.names_of(group):
            if self._store is not None and name in self._store.params and "lr" in (found := self._nested.bindings[name].learned):
                learned, number = found["lr"], self._scheduled(group, self._optimizers[name])["lr"]
                path = "hypers", learned.key, learned.key_of(name)
                used[path[1:]] = LearnedValue(learned, path, number).mean(self._store.st)
        if not used:
            return float(group["lr"])
        means = [*used.values()]
        return float(torch.stack([each.to(means[0].device) for each in means]).mean())

    def _scheduled(self, group: Group, optimizer: Optimizer) -> dict[str, Any]:
        """The numbers that a group holds now, with the shape of the next step where an optimizer of the group has a level."""
        numbers = unpack(group)
        if self._last_loss is not None:
            numbers |= dict.fromkeys(optimizer.rule.loss_names, self._last_loss)
        if self._total_steps is None or not has_level(optimizer):
            return numbers
        return {**numbers, "lr": numbers["lr"] * shape(self._store.taken, self._total_steps)}

    def _values(self, *, as_tensors: bool = False) -> dict[str, Any]:
        """By tensor: the numbers that its group holds now, as tensors where they are not learned; or all of them as tensors that stay."""
        if as_tensors and self._lists and self._total_steps is None and not self._nested.reads_loss:
            return self._lists
        result: dict[str, Any] = {}
        for key, names in self._users:
            index, _, device = key
            optimizer, learned = self._optimizers[names[0]], self._nested.bindings[names[0]].learned
            numbers = self._scheduled(self.param_groups[index], optimizer)
            if as_tensors:
                of_group: Any = self._numbers.of(key, {hyper: numbers[hyper] for hyper in optimizer.settings}, device, learned)
            else:
                of_group = {hyper: numbers[hyper] if hyper in learned else number(numbers[hyper], device) for hyper in optimizer.settings}
            result |= dict.fromkeys(names, of_group)
        if as_tensors:
            self._lists = result
        return result

    def _have_numbers_changed(self) -> bool:
        """Whether groups may hold other numbers than when this was asked last; tensors may always."""
        before, self._snapshots = self._snapshots, [[*dict.values(group)] for group in self.param_groups]
        return not (
            len(before) == len(self._snapshots)
            and all(len(one) == len(other) and all(map(is_, one, other)) for one, other in zip(before, self._snapshots, strict=True))
            and not any(isinstance(each, Tensor) for values in before for value in values for each in _of(value))
        )

    @property
    def _nested(self) -> Nested:
        return self._store.nested
