"""The tensors that the groups of a torch optimizer hold, by name, and how names follow changes of the groups."""

from __future__ import annotations

from collections.abc import Sequence, Set
from operator import is_
from typing import Any

from torch import Tensor

Group = dict[str, Any]


class Roster:
    """The tensors of parameter groups, each once, by name.

    Args:
        groups: the groups.
        names: the names of each group's tensors, one a position; a tensor that is listed again has its first name there.

    Attributes:
        names: as given.
        tensors: the tensors, by name, in the order of the groups.
        group_of: the index of each tensor's group, by name.
    """

    def __init__(self, groups: Sequence[Group], names: list[list[str]]) -> None:
        self.names = names
        self.tensors: dict[str, Tensor] = {}
        self.group_of: dict[str, int] = {}
        self._seen = [(group, list(group["params"])) for group in groups]
        for index, (_, params) in enumerate(self._seen):
            for name, param in zip(names[index], params, strict=True):
                if self.tensors.setdefault(name, param) is param:
                    self.group_of.setdefault(name, index)

    @property
    def home(self) -> str:
        """The tensor with which all shared state is kept: the first; "" if there is none."""
        return next(iter(self.tensors), "")

    def names_of(self, group: Group) -> list[str]:
        """The names of a group's tensors; none of a group that is not known."""
        return next((names for (seen, _), names in zip(self._seen, self.names, strict=True) if seen is group), [])

    def is_current(self, groups: Sequence[Group]) -> bool:
        """Whether the groups hold what they held."""
        if len(groups) != len(self._seen):
            return False
        for group, (seen, params) in zip(groups, self._seen, strict=True):
            now = group["params"]
            if group is not seen or len(now) != len(params) or not all(map(is_, now, params)):
                return False
        return True

    def followed(self, groups: Sequence[Group]) -> tuple[Roster, list[int | None]]:
        """The roster of changed groups; and for each group, which of the old ones it was.

        A tensor that is still there keeps its name. One that is new gets the name that its group's `param_names` gives it, or that the
        tensor had which was in its place; or else `<group>.<index>`.
        """
        names = {id(param): name for name, param in self.tensors.items()}
        present = {id(param) for group in groups for param in group["params"]}
        taken = {name for name, param in self.tensors.items() if id(param) in present}
        old = {id(seen): index for index, (seen, _) in enumerate(self._seen)}
        still = {id(group) for group in groups}
        result: list[list[str]] = []
        origins: list[int | None] = []
        for index, group in enumerate(groups):
            origin = old.get(id(group))
            if origin is None and index < len(self._seen) and id(self._seen[index][0]) not in still:
                origin = index  # another dict in the place of one that is gone
            origins.append(origin)
            params, labels = group["params"], group.get("param_names") or []
            fits = len(labels) == len(params)
            for i, param in enumerate(params):
                if id(param) not in names:
                    former = [] if origin is None else self.names[origin][i : i + 1]
                    name = free_name([*(labels[i : i + 1] if fits else []), *former, f"{index}.{i}"], taken)
                    names[id(param)] = name
                    taken.add(name)
            result.append([names[id(param)] for param in params])
        return Roster(groups, result), origins

    def label(self, groups: Sequence[Group]) -> None:
        """Write names to groups that hold names, where these are not the tensors' any more."""
        for group, names in zip(groups, self.names, strict=True):
            labels = group.get("param_names")
            if labels is None:
                continue
            wrong = [i for i, name in enumerate(names) if labels[i : i + 1] != [name] and name not in names[:i]]  # a second one may differ
            if wrong or len(labels) != len(names):
                group["param_names"] = list(names)


def free_name(candidates: list[str], taken: Set[str]) -> str:
    """The first of these names that is not taken, or the last with a number."""
    free = [name for name in candidates if name not in taken]
    number = 2
    while not free:
        name = f"{candidates[-1]}#{number}"
        free, number = [] if name in taken else [name], number + 1
    return free[0]
