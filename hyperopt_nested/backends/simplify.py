"""Graphs with less to do for each element: the same up to rounding, and not finite where they were not."""

from collections.abc import Mapping, Sequence

from hyperopt_nested.backends.graph import REDUCTIONS, Kind, UpdateGraph, Value, Values


def simplified(graph: UpdateGraph, read: Mapping[int, Value] | None = None) -> UpdateGraph:
    """A graph that does the same, with fewer choices between values. The order of products stays, since they may overflow.

    The values in `read` are already in the arguments of these indices, and are read from there.
    """
    held, how = {value: i for i, value in (read or {}).items()}, _Simplification()
    new: dict[Value, Value] = {}
    for value in graph.values:
        if value in held:
            new[value] = how.value("input", (held[value],), value.kind, value.dtype)
        else:
            new[value] = how.made(value, [new[arg] if isinstance(arg, Value) else arg for arg in value.args])
    return UpdateGraph(graph.inputs, tuple((i, new[value]) for i, value in graph.outputs))


class _Simplification:
    def __init__(self) -> None:
        self.value = Values()
        self._assumed: dict[tuple[Value, Value], Value] = {}

    def made(self, value: Value, args: Sequence[Value]) -> Value:
        """A value of an operator, simpler if one of the methods that are named after operators makes it so."""
        rule = getattr(self, f"_{value.op}", None) if value.kind > Kind.NUMBER and value.dtype.is_floating_point else None
        found: Value | None = rule(value, *args) if rule else None
        return found or self.value(value.op, args, value.kind, value.dtype, value.computed)

    def _add(self, _: Value, one: Value, other: Value) -> Value | None:
        if one.op == other.op == "where" and one.args[0] is other.args[0] and one.args[1] is other.args[2]:
            found: Value = one.args[1]
            return found if one.args[2].is_constant(0) and other.args[1].is_constant(0) else None
        return None

    def _where(self, value: Value, condition: Value, yes: Value, no: Value) -> Value | None:
        """The root that has derivative zero at zero is the root of what is not negative; and what is chosen need not choose again."""
        if yes.op == "sqrt" and no.is_constant(0) and _keeps_positive(condition, yes.args[0]):
            return self.value("sqrt", (self._assuming(condition, yes.args[0]),), value.kind, value.dtype)
        assumed = self._assuming(condition, yes)
        return None if assumed is yes else self.value("where", (condition, assumed, no), value.kind, value.dtype)

    def _assuming(self, condition: Value, value: Value) -> Value:
        """A value where a condition is met; anywhere else, it may be another."""
        if value.op in ("input", "constant") or value.op in REDUCTIONS or value.kind < condition.kind:
            return value
        if (condition, value) not in self._assumed:
            self._assumed[condition, value] = self._assumed_anew(condition, value)
        return self._assumed[condition, value]

    def _assumed_anew(self, condition: Value, value: Value) -> Value:
        if _keeps_positive(condition, value):  # so that it is the same value whether the condition is met or not
            zero = self.value("constant", (0,), Kind.NUMBER, value.dtype)
            return self.value("where", (condition, value.args[1], zero), value.kind, value.dtype)
        if value.op == "where" and value.args[0] is condition:
            return self._assuming(condition, value.args[1])
        args = [self._assuming(condition, arg) if isinstance(arg, Value) else arg for arg in value.args]
        same = all(new is old for new, old in zip(args, value.args, strict=True))
        return value if same else self.made(value, args)


def _keeps_positive(condition: Value, value: Value) -> bool:
    """Whether a value is another one where that is positive, which is the condition."""
    chosen = value.op == "where" and value.args[0] is condition and condition.op == "gt"
    return chosen and condition.args[0] is value.args[1] and condition.args[1].is_constant(0)
