"""What a `state_dict` has to be to be loaded: checked on a copy, before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hyperopt_nested.combinators.base import Combined
from hyperopt_nested.domains import BIJECTIONS
from hyperopt_nested.optim.param_groups import pack, unpack
from hyperopt_nested.optim.param_state import COORDINATES, STEPS, ParamState, is_declaration, is_entry
from hyperopt_nested.optim.refs import pairs
from hyperopt_nested.rule import Optimizer

Group = dict[str, Any]

_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_RULE = "rule."
_ROUNDING = "rounding."
_REMEDY = "build the optimizer with the same arguments as the one that was saved"


def matched(state_dict: Mapping[str, Any], groups: Sequence[Group], hypers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The `state_dict`, with its groups and tensors in the order of this optimizer's: by name, where both have names, else by position.

    Args:
        state_dict: what was given.
        groups: this optimizer's groups.
        hypers: a number of each group for each hyper that it holds.

    Raises:
        ValueError: it is no state of an optimizer, it names other tensors, or a group lacks a number.
    """
    if not isinstance(state_dict.get("state"), Mapping) or not isinstance(state_dict.get("param_groups"), Sequence):
        keys = ", ".join(map(repr, state_dict)) or "nothing"
        raise ValueError(f"state_dict must have 'state' and 'param_groups', as state_dict() of an optimizer returns them; it has {keys}")
    saved = [dict(group) for group in state_dict["param_groups"]]
    if any("params" not in group for group in saved):
        raise ValueError("state_dict has a group without 'params': give what state_dict() of an optimizer returned")
    if len(saved) != len(groups):
        return {**state_dict}  # torch says so itself
    if all(map(_is_named, [*saved, *groups])):
        saved = _by_name(saved, groups)
    for index, (group, own, needed) in enumerate(zip(saved, groups, hypers, strict=True)):
        if "param_names" in own:
            group["param_names"] = list(own["param_names"])
        for key, value in needed.items():
            if key not in group:
                raise ValueError(f"state_dict does not fit group {index}: {key!r} is only in this optimizer; {_REMEDY}")
            if isinstance(value, tuple) and len(group[key]) != len(value):
                raise ValueError(f"state_dict does not fit group {index}: {key}={group[key]!r} must have {len(value)} numbers; {_REMEDY}")
    return {**state_dict, "param_groups": saved}


def _is_named(group: Group) -> bool:
    names = group.get("param_names", [] if not group["params"] else None)
    by_name = any(isinstance(index, str) for index in group["params"])  # distributed checkpoints have matched them already
    return names is not None and len(names) == len(group["params"]) == len({*map(_plain, names)}) and not by_name


def _plain(name: str) -> str:
    """A tensor's name without what wraps its module."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name.removeprefix("module.")


def _by_name(saved: list[Group], groups: Sequence[Group]) -> list[Group]:
    """Saved groups in the order of the groups that have the same tensors, and tensors in theirs."""
    own = [[_plain(name) for name in group.get("param_names", ())] for group in groups]
    theirs = [dict(zip(map(_plain, group.get("param_names", ())), group["params"], strict=True)) for group in saved]
    here, there = {name for names in own for name in names}, {name for names in theirs for name in names}
    if here != there:
        sides = [
            f"{sorted(names)[0]!r} is only in {where}" for names, where in ((there - here, "it"), (here - there, "this optimizer")) if names
        ]
        raise ValueError(f"state_dict has other tensors than this optimizer: {', and '.join(sides)}; name them as those that were saved")
    result, left = [], list(range(len(saved)))
    for index, names in enumerate(own):
        same = next((each for each in sorted(left, key=lambda i: i != index) if theirs[each].keys() == set(names)), None)
        if same is None:
            odd = sorted(set(names) ^ theirs[index].keys())[0]
            raise ValueError(
                f"state_dict has {odd!r} in another group than this optimizer: build the same groups as the one that was saved"
            )
        left.remove(same)
        result.append({**saved[same], "params": [theirs[same][name] for name in names]})
    return result


def loaded(store: ParamState, saved: Mapping[str, Mapping[str, Any]]) -> dict[Tensor, dict[str, Tensor]]:
    """Entries by tensor, from a saved state, where it fits.

    Args:
        kept: the state that this optimizer would have before its first step.
        saved: entries by the tensor's name; what tensors share may be with any.

    Returns:
        Copies, in the dtypes that were saved. A tensor that was saved without entries of its own has none.

    Raises:
        ValueError: the saved state is not of this structure, or of other shapes. The message names the tensor and the entry.
    """
    common, home = store.shared(), store.roster.home
    part = store.sharding.part
    saved = {
        name: {key: part(name, key, entry) if isinstance(entry, Tensor) else entry for key, entry in entries.items()}
        for name, entries in saved.items()
    }
    expected: dict[str, dict[str, Tensor]] = {name: {STEPS: count} for name, count in store.steps.items()}
    for ref, leaf in pairs(store.refs, store.st):
        expected.setdefault(ref.name, {})[ref.key] = leaf
    pool = {key: entry for entries in saved.values() for key, entry in entries.items() if _is_shared(key, common)}
    own = {name: {key: entry for key, entry in entries.items() if not _is_shared(key, common)} for name, entries in saved.items()}
    keys = {key: None for entries in own.values() for key in entries}
    if keys and not any(map(is_entry, keys)):
        own, pool = _from_torch(own, expected, common), {key: leaf for key, leaf in expected.get(home, {}).items() if key in common}
    if not keys and not pool and any(expected.values()):
        raise ValueError(f"state_dict has no entries for any tensor, so it is not of an optimizer of this library; {_REMEDY}")
    result: dict[Tensor, dict[str, Tensor]] = {}
    for name, param in store.roster.tensors.items():
        wanted = {key: leaf for key, leaf in expected.get(name, {}).items() if key not in common}
        entries = own.get(name, {})
        if entries:  # rounding at random may begin, or end, here
            entries = {key: entry for key, entry in entries.items() if key in wanted or not key.startswith(_ROUNDING)}
            counts = {key: leaf for key, leaf in wanted.items() if key.startswith(_ROUNDING)}
            result[param] = _fitting(name, {STEPS: torch.ones(()), **counts, **entries}, wanted)
        if name == home:
            shared = _fitting(name, pool, {key: leaf for key, leaf in expected.get(home, {}).items() if key in common})
            result[param] = {**result.get(param, {}), **shared}
    _check_coordinates(store, pool)
    return result


def for_torch(
    state_dict: Mapping[str, Any], hypers: Mapping[str, Mapping[str, Tensor]], optimizers: Sequence[Sequence[Optimizer]]
) -> dict[str, Any]:
    """A state of torch.optim, in copies.

    Args:
        state_dict: of this optimizer.
        hypers: effective learned values.
        optimizers: of the tensors of each group.

    Raises:
        ValueError: torch.optim has no such state.
    """
    groups = [dict(group) for group in state_dict["param_groups"]]
    for index, (group, own) in enumerate(zip(groups, optimizers, strict=True)):
        if inside := [each.rule.name for each in own if isinstance(each.rule, Combined)]:
            raise ValueError(f"torch.optim has no {inside[0]}: there is no state for it")
        numbers = unpack(group)
        for hyper in {hyper for each in own for hyper in each.learned}:
            found = [by_name for path, by_name in hypers.items() if path.split("#")[0] == hyper]
            values = {float(by_name[f"group {index}"]) for by_name in found if f"group {index}" in by_name}
            if len(values) != 1:
                raise ValueError(f"{hyper} is learned by tensor, row or element, but torch.optim has one number in group {index}")
            numbers[hyper] = values.pop()
        options = {name: value for each in own for name, value in getattr(each.rule, "options", {}).items()}
        groups[index] = {**options, **pack(numbers)}
    state = {}
    for index, entries in state_dict["state"].items():
        rule = {key.removeprefix(_RULE): leaf.clone() for key, leaf in entries.items() if key.startswith(_RULE)}
        if rule:
            state[index] = {**rule, "step": rule.get("step", entries[STEPS]).float()}
    return {"state": state, "param_groups": groups}


def _from_torch(
    saved: Mapping[str, Mapping[str, Any]], expected: Mapping[str, Mapping[str, Tensor]], common: frozenset[str]
) -> dict[str, dict[str, Any]]:
    """Entries of the same rule in torch.optim as entries of this optimizer; what only this one has is as before the first step.

    Raises:
        ValueError: the rule keeps other entries.
    """
    result: dict[str, dict[str, Any]] = {}
    for name, entries in saved.items():
        wanted = {key: leaf for key, leaf in expected.get(name, {}).items() if key not in common}
        rule = {key.removeprefix(_RULE): key for key in wanted if key.startswith(_RULE)}
        entries = {key: leaf for key, leaf in entries.items() if leaf is not None}
        if entries and (odd := sorted((rule.keys() ^ entries.keys()) - {"step"})):
            some, ours = (", ".join(map(repr, keys)) or "none" for keys in (entries, rule))
            raise ValueError(
                f"state_dict is of another optimizer, such as one of torch.optim: its entries for {name!r} are {some}, and those of this "
                f"rule {ours} ({odd[0]!r} is on one side only); {_REMEDY}"
            )
        if entries:
            entries = {"step": torch.ones(()), **entries}  # SGD's does not count steps: it has taken some
            count = torch.as_tensor(entries["step"], dtype=torch.float64)
            result[name] = {**wanted, STEPS: count, **{own: entries[key] for key, own in rule.items()}}
    return result


def _is_shared(key: str, common: frozenset[str]) -> bool:
    return key in common or is_declaration(key)


def _check_coordinates(store: ParamState, pool: Mapping[str, Any]) -> None:
    """Refuse learned values that are in other coordinates."""
    names = {0: "'projection'", **{each.number: repr(each.name) for each in BIJECTIONS.values()}}
    if not any(map(is_declaration, pool)):
        return
    for key in {*store.coordinates, *(key.removeprefix(COORDINATES) for key in pool if key.startswith(COORDINATES))}:
        here, there = (int(numbers.get(at, 0)) for numbers, at in ((store.coordinates, key), (pool, COORDINATES + key)))
        if here != there:
            raise ValueError(
                f"state_dict has {key!r} learned with via={names.get(there, there)}, and this optimizer with via={names.get(here, here)}: "
                "their unconstrained values mean other things; declare it as the run that was saved"
            )


def _fitting(name: str, entries: Mapping[str, Any], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of entries, which must be those that are wanted, and may have what was declared."""
    odd = sorted({key for key in entries if not is_declaration(key)} ^ wanted.keys())
    if odd:
        where = "it" if odd[0] in entries else "this optimizer"
        raise ValueError(f"state_dict does not fit {name!r}: {odd[0]!r} is only in {where}; {_REMEDY}")
    result = {}
    for key, entry in entries.items():
        if not isinstance(entry, (Tensor, int, float)):
            raise ValueError(f"state_dict does not fit {name!r}: {key} is {entry!r}, which must be a tensor")
        leaf = torch.as_tensor(entry).detach().clone()
        shape = wanted[key].shape if key in wanted else torch.Size()
        if leaf.shape != shape:
            raise ValueError(f"state_dict does not fit {name!r}: {key} has shape {tuple(leaf.shape)}, not {tuple(shape)}")
        result[key] = leaf
    return result
