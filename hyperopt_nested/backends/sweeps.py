"""How to do a graph in as few sweeps over a tensor's memory as can be.

A total over a tensor is known after a sweep over all of it; what depends on it takes another. Within a sweep, what depends on a row's own
total takes a second loop over that row, which the cache still holds.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from hyperopt_nested.backends.graph import REDUCTIONS, Kind, UpdateGraph, Value, Values, reachable


@dataclass
class Sweep:
    """One pass over a tensor."""

    totals: list[Value] = field(default_factory=list)  # what is summed up over all of it
    writes: dict[int, Value] = field(default_factory=dict)  # by argument: what is written to it, row by row or element by element
    written: dict[int, Value] = field(default_factory=dict)  # by argument: what an earlier pass has written to it, which is read there

    @cached_property
    def values(self) -> list[Value]:
        """Rows and elements that are read or computed, each after those that it is made of; a total's operand is among them, it is not."""
        roots = [*(total.operands[0] for total in self.totals), *self.writes.values()]
        return [value for value in reachable(roots, _within(self.written)) if value.kind != Kind.NUMBER]

    @cached_property
    def sources(self) -> dict[Value, int]:
        """What is read, with the index of the argument that holds it."""
        known = {value: i for i, value in self.written.items()}
        return {each: known.get(each, each.args[0]) for each in self.values if each in known or each.op == "input"}

    @cached_property
    def computed(self) -> list[Value]:
        return [value for value in self.values if value not in self.sources and value.op != "constant"]

    @property
    def by_row(self) -> bool:
        """Whether there is anything that there is one a row of."""
        return any(value.kind == Kind.ROW for value in self.values)


class Sweeps:
    """A graph in the order in which to do it: `numbers[0]`, `sweeps[0]`, `numbers[1]`, ..., then `writes`; `numbers` has one more.

    Rows and elements are written in the last sweep, since what is read before has to be what it was; or, where that touches less memory,
    in the one before, and read from there then. Numbers are written at the end: `writes` has them by index of the argument.
    """

    def __init__(self, graph: UpdateGraph) -> None:
        values = graph.values
        large = {i: value for i, value in graph.outputs if graph.inputs[i][0] != Kind.NUMBER}
        at = _earliest(values, {})
        last = max([at[value] for value in values if value.is_total or value in large.values()], default=-1)
        latest = _latest(graph, last)
        at = _earliest(values, latest)
        totals = [[value for value in values if value.is_total and latest[value] == k] for k in range(last + 1)]
        self.sweeps = [Sweep(each) for each in totals]
        if large:
            self.sweeps[last].writes = large
        if large and last > 0:
            roots = [total.operands[0] for total in totals[last]]
            early = _read_back(large, [i for i, value in large.items() if at[value] < last], roots)
            late = {i: value for i, value in large.items() if i not in early}
            split = [*self.sweeps[: last - 1], Sweep(totals[last - 1], early), Sweep(totals[last], late, early)]
            self.sweeps = min(self.sweeps, split, key=lambda sweeps: _bytes_touched(graph, sweeps))
        self.numbers: list[list[Value]] = [[] for _ in range(last + 2)]
        for value in values:
            if value.kind == Kind.NUMBER and value.op not in ("input", "constant") and not value.is_total:
                self.numbers[at[value]].append(value)
        self.writes = {i: value for i, value in graph.outputs if graph.inputs[i][0] == Kind.NUMBER}


def with_early_writes(graphs: Sequence[UpdateGraph], changing: Collection[int]) -> list[UpdateGraph]:
    """Graphs that do the same, one after the other, with writes of the last done by the one before, where that touches less memory.

    A step whose learned values have to be known before the tensor is updated passes over it twice. What renews the state alone, as Adam's
    moments, waits for no total and no learned value, so it can happen in the first pass, which reads it for the hypergradient anyway; the
    second then reads it back, and needs no gradient. Arguments whose indices are in `changing` are written to between the graphs.
    """
    if len(graphs) != 2:
        return list(graphs)
    first, last = graphs
    known = {*changing, *(i for i, _ in first.outputs)}

    def waits(value: Value) -> bool:
        above = reachable([value])
        return value.kind == Kind.NUMBER or any(each.is_total or (each.op == "input" and each.args[0] in known) for each in above)

    movable = [i for i, value in last.outputs if i not in dict(first.outputs) and not waits(value)]
    early = _read_back(dict(last.outputs), movable, [total.operands[0] for total in last.values if total.is_total])
    if not early:
        return [first, last]
    moved = replace(first, outputs=(*first.outputs, *early.items()))
    rest = replace(last, outputs=tuple((i, value) for i, value in last.outputs if i not in early))
    found = [moved, _reading(rest, early)]
    return min([first, last], found, key=lambda pair: sum(_bytes_touched(graph, Sweeps(graph).sweeps) for graph in pair))


def _reading(graph: UpdateGraph, written: Mapping[int, Value]) -> UpdateGraph:
    """A graph that reads values from the arguments of these indices, where they have been written."""
    index, make = {value: i for i, value in written.items()}, Values()
    new: dict[Value, Value] = {}
    for value in graph.values:
        args = [new[arg] if isinstance(arg, Value) else arg for arg in value.args]
        read = value in index
        new[value] = make("input" if read else value.op, (index[value],) if read else args, value.kind, value.dtype, value.computed)
    return UpdateGraph(graph.inputs, tuple((i, new[value]) for i, value in graph.outputs))


def _read_back(outputs: Mapping[int, Value], movable: Iterable[int], roots: Iterable[Value]) -> dict[int, Value]:
    """Of `movable` writes, those that can be done early, since what is left, and `roots`, needs nothing of what they overwrite."""
    early = {i: outputs[i] for i in movable}
    while True:
        late = [*(value for i, value in outputs.items() if i not in early), *roots]
        needed = reachable(late, _within(early))
        lost = {value.args[0] for value in needed if value.op == "input" and value not in early.values()} & early.keys()
        if not lost:
            return early
        early = {i: value for i, value in early.items() if i not in lost}


def _within(written: Mapping[int, Value]) -> Callable[[Value], Iterable[Value]]:
    """What a value is made of in a pass: nothing if it is a number, or `written` by an earlier pass."""
    known = set(written.values())
    return lambda value: value.operands if value.kind != Kind.NUMBER and value not in known else ()


def _bytes_touched(graph: UpdateGraph, sweeps: Iterable[Sweep]) -> int:
    """Bytes an element that are read and written."""
    touched = [graph.inputs[i] for sweep in sweeps for i in (*set(sweep.sources.values()), *sweep.writes)]
    return sum(dtype.itemsize for kind, dtype in touched if kind == Kind.ELEMENT)


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
    for value in reversed(graph.values):
        for each in value.operands:
            late = found[value] - 1 if each.is_total else found[value]
            found[each] = min(found.get(each, late), late)
    return found


def levels(sweep: Sweep) -> dict[Value, int]:
    """In which loop over a row each row or element is computed; what is one a row and made of elements, after that loop, in the next."""
    found: dict[Value, int] = {}
    for value in sweep.values:
        large = [] if value in sweep.sources else [each for each in value.operands if each.kind != Kind.NUMBER]
        found[value] = max((found[each] for each in large), default=0) + (is_row_total(value) and value not in sweep.sources)
    return found


def is_row_total(value: Value) -> bool:
    """Whether it is one a row, of what there is one an element."""
    return value.op in REDUCTIONS and value.kind == Kind.ROW and value.operands[0].kind == Kind.ELEMENT
