"""What can be written before the last pass over a tensor, and read back in it: state that waits for no total and no learned value.

A step whose learned values have to be known before the tensor is updated passes over it twice. What renews the state alone, as Adam's
moments, can happen in the first pass, which reads it for the hypergradient anyway; the second then needs no gradient.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace

from hyperopt_nested.backends.graph import Kind, UpdateGraph, Value, reachable
from hyperopt_nested.backends.simplify import simplified
from hyperopt_nested.backends.sweeps import Sweeps, read_back


def with_early_writes(graphs: Sequence[UpdateGraph], changing: Collection[int]) -> list[UpdateGraph]:
    """Graphs that do the same, one after the other, with writes of the last done by the one before, where that touches less memory.

    Args:
        graphs: of the same arguments.
        changing: indices of arguments that are written to between them.
    """
    if len(graphs) != 2:
        return list(graphs)
    first, last = graphs
    written = {i for i, _ in first.outputs}
    movable = [i for i, value in last.outputs if i not in written and _waits_for_nothing(value, {*changing, *written})]
    early = read_back(dict(last.outputs), movable, [total.operands[0] for total in last.values if total.is_total])
    if not early:
        return [first, last]
    moved = replace(first, outputs=(*first.outputs, *early.items()))
    rest = replace(last, outputs=tuple((i, value) for i, value in last.outputs if i not in early))
    found = [simplified(moved), simplified(rest, early)]
    return min([first, last], found, key=lambda pair: sum(Sweeps(graph).bytes_touched for graph in pair))


def _waits_for_nothing(value: Value, changing: Collection[int]) -> bool:
    above = reachable([value])
    return value.kind != Kind.NUMBER and not any(each.is_total or (each.op == "input" and each.args[0] in changing) for each in above)
