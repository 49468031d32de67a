"""The engine's state where a torch optimizer keeps it: in `optimizer.state`, by tensor, where others may change, replace or clear it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, MutableMapping, Set
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor

from hyperopt_nested.engine.binding import Reduce
from hyperopt_nested.engine.learned import COUNTED, Learner
from hyperopt_nested.engine.nested import Nested
from hyperopt_nested.optim.level import first_values
from hyperopt_nested.optim.refs import PER_TENSOR, Ref, pairs, refs
from hyperopt_nested.optim.roster import Roster
from hyperopt_nested.optim.sharding import Sharding
from hyperopt_nested.optim.weights import Weights
from hyperopt_nested.trees import State, flatten, in_dtype, map_tree

STEPS = "steps"
"""The entry of a tensor's state that counts its steps: float64, shape (), always on the CPU."""

DECLARED = "declared."
"""Prefix of entries that hold what learned hypers were declared as, by the run that began: float64, shape (), always on the CPU."""

COORDINATES = "coordinates."
"""Prefix of entries that say which bijection's coordinates learned values are in, where there is one: its number, kept as above."""

_PARTS = (*(f"{part}." for part in (*PER_TENSOR, "hypers", "learners", *COUNTED)), DECLARED, COORDINATES)
_NONE: dict[str, Tensor] = {}
_ONE = torch.ones((), dtype=torch.float64)

Path = tuple[str, ...]
States = MutableMapping[Tensor, dict[str, Any]]


class ParamState:
    """State of an engine, and where each leaf is kept.

    Args:
        nested: the engine.
        roster: the tensors.
        tracked: names of those that have state.
        leaves: leaves of the engine's state, by path.
        places: where each is kept.
        steps: how many steps each tensor has taken.
        declared: the declared value of each learned hyper.
        before: notes of the weights until now.
        sharding: how sharded tensors are stepped.

    Attributes:
        params: the tensors that have state, by name.
        refs: tree of the state's structure that says where each leaf is kept.
        st: the engine's state.
        states: the optimizer's entries of each tensor that has any, by name.
        taken: how many steps the tensor has taken that has taken most.
        fresh: names of tensors that have taken none.
        weights: notes of the tensors whose memory needs that they stay what a step has left.
    """

    def __init__(
        self,
        nested: Nested,
        roster: Roster,
        tracked: Collection[str],
        leaves: dict[Path, Tensor],
        places: State,
        steps: dict[str, Tensor],
        declared: dict[str, Tensor],
        before: Weights | None,
        sharding: Sharding,
    ) -> None:
        self.nested, self.roster, self.refs, self.steps, self.declared = nested, roster, places, steps, declared
        self.sharding, nested.shards, nested.bindings.in_parts = sharding, sharding.indices(), sharding.in_parts
        self.params = {name: roster.tensors[name] for name in roster.tensors if name in tracked}
        by_ref = {ref: leaves[path] for path, ref in flatten(places).items()}
        self.st = map_tree(by_ref.__getitem__, places)
        self._owners = {name: param for name, param in roster.tensors.items() if name in tracked or name == roster.home}
        watched = {name: p for name, p in self.params.items() if any(map(places["memory"][name].get, ("numbers", "carried")))}
        self.weights = Weights(watched, before)
        self.coordinates = _coordinates(nested, "")
        for key, learned in nested.learned.items():
            learned.declared = float(declared[key])
        self._count()
        self._look()

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """What is stepped: the tensors that have state, or the parts of sharded ones that this process steps."""
        return self.sharding.tensors(self.params)

    @property
    def reduce(self) -> Reduce | None:
        """Completes numbers that were computed for parts of sharded tensors, as `Nested.step` takes it; None where there are none."""
        return self.sharding.reduce if self.sharding else None

    def _count(self) -> None:
        self._counts = {name: int(count) for name, count in self.steps.items()}
        self.taken = max(self._counts.values(), default=0)
        self.fresh = {name for name, count in self._counts.items() if not count}

    def _look(self) -> None:
        self._shapes = [param.shape for param in self.params.values()]
        self._dtypes = {name: param.dtype for name, param in self.params.items()}
        self._devices = [param.device for param in self._owners.values()]

    # What is kept, and whether it still is what it was

    def write(self, state: States) -> None:
        """Write all entries, and take out those of the engine that do not belong there."""
        expected: dict[str, dict[str, Tensor]] = {name: {} for name in self._owners}
        for ref, leaf in pairs(self.refs, self.st):
            expected[ref.name][ref.key] = self._kept(ref, leaf)
        for name, count in self.steps.items():
            expected[name][STEPS] = count
        if self.roster.home:
            for prefix, numbers in ((DECLARED, self.declared), (COORDINATES, self.coordinates)):
                expected[self.roster.home] |= {prefix + key: value for key, value in numbers.items()}
        for name, param in self.roster.tensors.items():
            entries = state.get(param, _NONE)
            wanted = expected.get(name, _NONE)
            for key in [key for key in entries if key not in wanted and is_entry(key)]:
                del entries[key]
            if wanted:
                state.setdefault(param, {}).update(wanted)
        self._snapshot(state)

    def _snapshot(self, state: States) -> None:
        self.states = {name: state[param] for name, param in self._owners.items() if param in state}
        self._keys, self._entries = [*state], _entries(state)

    def is_current(self, state: States) -> bool:
        """Whether entries, and the tensors' shapes and devices, are what they were."""
        keys, entries = [*state], _entries(state)
        return (
            len(keys) == len(self._keys)
            and len(entries) == len(self._entries)
            and all(map(is_, keys, self._keys))
            and all(map(is_, entries, self._entries))
            and [param.device for param in self._owners.values()] == self._devices
            and [param.shape for param in self.params.values()] == self._shapes
        )

    def adopted(self, state: States) -> bool:
        """Take over entries that were replaced by others of the same shape, and move them to where they are kept.

        Returns:
            Whether that is all that has changed.
        """
        if [param.shape for param in self.params.values()] != self._shapes:
            return False
        if [param.device for param in self._owners.values()] != self._devices:
            return False
        entries: dict[Ref, Tensor] = {}
        for ref, last in pairs(self.refs, self.st):
            entry = self.entry(state, ref.name, ref.key)
            if entry is None or entry.shape != last.shape:
                return False
            entries[ref] = entry.to(last.device, last.dtype)
        steps = {name: self.entry(state, name, STEPS) for name in self.steps}
        declared = {key: self.entry(state, self.roster.home, DECLARED + key) for key in self.declared}
        if any(entry is None for entry in chain(steps.values(), declared.values() if self.roster.home else ())):
            return False
        self.steps = {name: counted(count) for name, count in steps.items()}
        self.st = map_tree(entries.__getitem__, self.refs)
        self._count()
        self._look()
        self.write(state)
        return True

    def entry(self, state: Mapping[Tensor, Mapping[str, Any]], name: str, key: str) -> Tensor | None:
        """What is kept there; None if it is no tensor."""
        return _entry(self.roster, self.sharding, state, name, key)

    def _kept(self, ref: Ref, leaf: Tensor) -> Tensor:
        """An entry of the state: of a sharded tensor, a DTensor that shares the memory of the leaf."""
        return self.sharding.joined(ref.name, ref.key, leaf)

    def rule_states(self) -> dict[str, State]:
        """The states of rules, by tensor, as they are kept."""
        if not self.sharding:
            return dict(self.st["rule"])
        return map_tree(lambda ref, leaf: self._kept(ref, leaf), self.refs["rule"], self.st["rule"])

    def shared(self) -> frozenset[str]:
        """Keys of the entries that tensors share, which are kept with the first."""
        return frozenset(ref.key for ref, _ in pairs(refs(self.nested, self.st, ""), self.st) if not ref.name)

    # Steps

    def take(self, st: State, state: States) -> None:
        """Take a new state."""
        for ref, leaf in pairs(self.refs, st):
            state[self.roster.tensors[ref.name]][ref.key] = self._kept(ref, leaf)
        self.st = st
        self._snapshot(state)

    def is_converted(self, names: Iterable[str]) -> bool:
        """Whether one of these tensors has another dtype than when its state was made."""
        return any(self.params[name].dtype != self._dtypes[name] for name in names)

    def begin(self, names: Collection[str]) -> None:
        """Set the states of rules, in place, to what they are before the first step from the values that the tensors have now.

        Copies of tensors that were given as options, such as anchors, stay.
        """
        self.sharding.gather(names)
        tensors = self.tensors
        for name in names:
            optimizer, param = self.nested.bindings[name].optimizer, tensors[name].detach()
            copies = _option_copies(optimizer.rule)
            new = flatten(in_dtype(optimizer.rule.init(param, optimizer.settings), param, self.nested.state_dtype))
            for path, old in flatten(self.st["rule"][name]).items():
                if path not in copies:
                    old.copy_(new[path])
        if self.sharding:
            rule = {name: self.st["rule"][name] for name in names}
            found = self.nested.maximized(rule, self.sharding.reduce)
            map_tree(lambda old, new: old if old is new else old.copy_(new), rule, found)

    def stepped(self, names: Set[str]) -> None:
        """Count a step that these tensors have taken, and note what they are now, where its memory needs that they stay so."""
        torch._foreach_add_([self.steps[name] for name in names], _ONE, alpha=1)  # with a number it is much slower
        counts = self._counts
        for name in names:
            counts[name] += 1
        self.taken = max(self.taken, *map(counts.__getitem__, names))
        if self.fresh:
            self.fresh.difference_update(names)
        self.weights.note(names)

    def forget(self, names: Iterable[str], state: States) -> None:
        """Forget the last updates of these tensors, as far as their memory needs the weights that they left."""
        memory = dict(self.st["memory"])
        for name in names:
            part = "taken" if "taken" in memory[name] else "carried"
            memory[name] = {**memory[name], **map_tree(torch.zeros_like, {part: memory[name][part]})}
        self.take({**self.st, "memory": memory}, state)


def built(
    nested: Nested,
    roster: Roster,
    tracked: Collection[str],
    state: Mapping[Tensor, Mapping[str, Any]],
    before: ParamState | None,
    *,
    gather: bool = False,
) -> ParamState:
    """The state of tensors: what is kept, and, where there is nothing, what it is before the first step.

    Where an entry of a tensor's rule is missing that was there, all of its rule and memory begins anew; where one of its memory is
    missing, the memory. Learned values, and the state of what learns them, stay what they were last.

    Args:
        nested: the engine.
        roster: the tensors.
        tracked: names of those that have state.
        state: what the optimizer keeps now; it is not changed.
        before: the state until now.
        gather: whether rules copy values from the weights now, so that those of whole tensors are needed.

    Raises:
        ValueError: an entry, or a tensor, has another shape than it had. The message names both, and the remedy.
    """
    params = {name: param.detach() for name, param in roster.tensors.items() if name in tracked}
    sharding = Sharding(nested, {name: roster.tensors[name] for name in params}, before.sharding if before else None)
    if gather:
        sharding.gather(params)
    params = dict(sharding.tensors(params))
    fresh = nested.init(params, first_values(nested))
    tree = refs(nested, fresh, roster.home)
    places, leaves = flatten(tree), flatten(fresh)
    last: dict[Path, Tensor] = flatten(before.st) if before else {}
    known: Collection[str] = before.params if before else ()

    def entry(name: str, key: str) -> Tensor | None:
        return _entry(roster, sharding, state, name, key)

    anew, forgotten = set[str](), set[str]()
    if before:
        for (name, param), shape in zip(before.params.items(), before._shapes, strict=True):
            dtype = before._dtypes[name]
            if roster.tensors.get(name) is param and (param.shape != shape or (name in before.fresh and param.dtype != dtype)):
                has_state = any(entry(name, ref.key) is not None for path, ref in places.items() if path[0] == "rule" and path[1] == name)
                if name not in before.fresh and (has_state or entry(name, STEPS) is not None):
                    raise _resized(name, param.shape, shape)
                anew.add(name)
    anew |= {name for name in params if entry(name, STEPS) is None}
    for path, ref in places.items():
        if path[0] in PER_TENSOR and (path in last or path[1] not in known) and entry(ref.name, ref.key) is None:
            (anew if path[0] == "rule" else forgotten).add(path[1])
    lost: set[tuple[str, str]] = set()  # learned values that do not fit their tensors any more
    for path, ref in places.items():
        like, leaf = leaves[path], entry(ref.name, ref.key)
        if path[0] in PER_TENSOR:
            begins = path[1] in anew or (path[0] == "memory" and path[1] in forgotten)
            leaf = None if begins else leaf
        elif leaf is None or (leaf.shape != like.shape and ref.name in anew):
            leaf = last.get(path)
            leaf = None if leaf is None or leaf.shape != like.shape else leaf
            if leaf is None and path[0] == "hypers" and path in last:
                lost.add((path[1], path[2]))
            if path[0] == "learners" and any((path[1], value) in lost for value in path[2:]):
                leaf = None
        if leaf is None:
            continue
        if leaf.shape != like.shape:
            raise _misfit(ref, leaf.shape, like.shape)
        leaves[path] = leaf.to(like.device, last[path].dtype if path in last else leaf.dtype)
    steps = {name: torch.zeros((), dtype=torch.float64) if name in anew else counted(entry(name, STEPS)) for name in params}
    declared = {}
    for key, learned in nested.learned.items():
        leaf = entry(roster.home, DECLARED + key)
        leaf = before.declared.get(key) if leaf is None and before else leaf
        declared[key] = torch.tensor(learned.learn.value, dtype=torch.float64) if leaf is None else counted(leaf)
    return ParamState(nested, roster, params, leaves, tree, steps, declared, before.weights if before else None, sharding)


def is_entry(key: Any) -> bool:
    """Whether that is the key of an entry of the engine's, and not of one that others have put there."""
    return isinstance(key, str) and (key == STEPS or key.startswith(_PARTS))


def is_declaration(key: Any) -> bool:
    """Whether that is the key of an entry that says how learned hypers were declared."""
    return isinstance(key, str) and key.startswith((DECLARED, COORDINATES))


def is_own(key: Any) -> bool:
    """Whether that is the key of an entry that each tensor that trains has of its own."""
    return isinstance(key, str) and (key == STEPS or key.startswith(tuple(f"{part}." for part in PER_TENSOR)))


def counted(entry: Any) -> Tensor:
    """A count, or another number that is never cast, as it is kept."""
    return torch.as_tensor(entry).detach().to("cpu", torch.float64)


def _entry(roster: Roster, sharding: Sharding, state: Mapping[Tensor, Mapping[str, Any]], name: str, key: str) -> Tensor | None:
    entries = state.get(roster.tensors[name], _NONE) if name else _NONE
    leaf = entries.get(key)
    if not isinstance(leaf, Tensor):
        return None
    return sharding.part(name, key, leaf)


def _option_copies(rule: Any) -> set[Path]:
    """Paths, in a rule's state, of copies of options."""
    paths: set[Path] = {(key,) for key, option in getattr(rule, "options", {}).items() if isinstance(option, Tensor)}
    return paths | {("base", *path) for path in _option_copies(rule.base)} if hasattr(rule, "base") else paths


def _entries(state: States) -> list[Any]:
    return [*chain.from_iterable([entries.values() for entries in state.values()])]


def _coordinates(nested: Learner, prefix: str) -> dict[str, Tensor]:
    """The number of the bijection of each learned hyper that has one, at all heights."""
    numbers = {}
    for key, learned in nested.learned.items():
        if learned.via is not None:
            numbers[prefix + key] = torch.tensor(learned.via.number, dtype=torch.float64)
        numbers |= _coordinates(learned.learner, f"{prefix}{key}.")
    return numbers


def _resized(name: str, shape: torch.Size, before: torch.Size) -> ValueError:
    return ValueError(
        f"{name!r} has shape {tuple(shape)}, but its state is of shape {tuple(before)}: its data was replaced. Put a new parameter in its "
        f"place in param_groups, or begin its state anew by removing it (optimizer.state.pop(parameter))"
    )


def _misfit(ref: Ref, shape: torch.Size, expected: torch.Size) -> ValueError:
    return ValueError(
        f"the state of {ref.name!r} has {ref.key!r} of shape {tuple(shape)}, which must be {tuple(expected)}: replace it by one of that "
        "shape, or begin the state of the tensor anew by removing it (optimizer.state.pop(parameter))"
    )
