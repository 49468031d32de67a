"""How to do a graph in as few sweeps over a tensor's memory as can be.

A total over a tensor is known after a sweep over all of it; what depends on it takes another. Within a sweep, what depends on a row's own
total takes a second loop over that row, which the cache still holds.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from hyperopt_nested.backends.graph import REDUCTIONS, Kind, UpdateGraph, Value, reachable


@dataclass
class Sweep:
    """One pass over a tensor.

    Attributes:
        totals: what is summed up over all of it.
        writes: by index of an argument: what is written to it, row by row or element by element.
    """

    totals: list[Value] = field(default_factory=list)
    writes: dict[int, Value] = field(default_factory=dict)

    @cached_property
    def values(self) -> list[Value]:
        """Rows and elements that are computed, each after those that it is made of; a total's operand is among them, it itself is not."""
        roots = [*(total.operands[0] for total in self.totals), *self.writes.values()]
        return [value for value in _above(roots) if value.kind != Kind.NUMBER]


class Sweeps:
    """A graph in the order in which to do it: `numbers[0]`, `sweeps[0]`, `numbers[1]`, ..., then `writes`; `numbers` has one more.

    All writes to rows and elements happen in the last sweep, and to numbers at the end: what is read before has to be what it was.

    Attributes:
        numbers: single numbers that are computed before each sweep and after the last, each after those that it is made of.
        sweeps: passes over a tensor.
        writes: by index of an argument: the number that is written to it.
    """

    def __init__(self, graph: UpdateGraph) -> None:
        values = graph.values()
        large = {i: value for i, value in graph.outputs if graph.inputs[i][0] != Kind.NUMBER}
        at = _earliest(values, {})
        last = max([at[value] for value in values if value.is_total or value in large.values()], default=-1)
        latest = _latest(graph, last)
        at = _earliest(values, latest)
        self.sweeps = [Sweep([value for value in values if value.is_total and latest[value] == k]) for k in range(last + 1)]
        if large:
            self.sweeps[last].writes = large
        self.numbers: list[list[Value]] = [[] for _ in range(last + 2)]
        for value in values:
            if value.kind == Kind.NUMBER and value.op not in ("input", "constant") and not value.is_total:
                self.numbers[at[value]].append(value)
        self.writes = {i: value for i, value in graph.outputs if graph.inputs[i][0] == Kind.NUMBER}


def _earliest(values: Iterable[Value], totals: Mapping[Value, int]) -> dict[Value, int]:
    """The first sweep in which, or before which, each value can be computed, with totals in given sweeps, or in the first that they can."""
    found: dict[Value, int] = {}
    for value in values:
        after = (totals.get(each, found[each]) + 1 if each.is_total else found[each] for each in value.operands)
        found[value] = max(after, default=0)
    return found


def _latest(graph: UpdateGraph, last: int) -> dict[Value, int]:
    """The last sweep in which, or before which, each value can be computed: late, totals share sweeps with writes."""
    found = {value: last if graph.inputs[i][0] != Kind.NUMBER or value.is_total else last + 1 for i, value in graph.outputs}
    for value in reversed(graph.values()):
        for each in value.operands:
            late = found[value] - 1 if each.is_total else found[value]
            found[each] = min(found.get(each, late), late)
    return found


def _above(roots: Iterable[Value]) -> list[Value]:
    """Rows and elements that some are made of, as `reachable`, but not looking through numbers."""
    return reachable(roots, through=lambda value: value.kind != Kind.NUMBER)


def levels(values: Iterable[Value]) -> dict[Value, int]:
    """In which loop over a row each row or element is computed; what is one a row and made of elements, after that loop, in the next."""
    found: dict[Value, int] = {}
    for value in values:
        large = [each for each in value.operands if each.kind != Kind.NUMBER]
        found[value] = max((found[each] for each in large), default=0) + is_row_total(value)
    return found


def is_row_total(value: Value) -> bool:
    """Whether it is one a row, of what there is one an element."""
    return value.op in REDUCTIONS and value.kind == Kind.ROW and value.operands[0].kind == Kind.ELEMENT
