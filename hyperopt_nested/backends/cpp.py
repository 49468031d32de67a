"""Graphs as C++: one function for many tensors at once, which sweeps over their memory as seldom as can be."""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from hyperopt_nested.backends.graph import Kind, UnsupportedError, UpdateGraph, Value, reachable
from hyperopt_nested.backends.sweeps import Sweep, Sweeps, is_row_total, levels

HEADER, DRIVER = (Path(__file__).with_name(name).read_text() for name in ("kernel.h", "driver.h"))
_EXACT = {torch.float64: "double", torch.float32: "float", torch.bool: "bool", torch.int64: "int64_t", torch.int32: "int32_t"}
_STORED, _COMPUTED = {**_EXACT, torch.bfloat16: "uint16_t"}, {**_EXACT, torch.bfloat16: "float"}
_BITS = {"bitwise_and": "&", "bitwise_xor": "^", "bitwise_right_shift": ">>"}
_INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/", "gt": ">", "ge": ">=", "lt": "<", "le": "<=", "eq": "==", "ne": "!="}
_UNSIGNED = {torch.int64: "uint64_t", torch.int32: "uint32_t"}
_FUNCTIONS = {name: f"{{0}} {sign} {{1}}" for name, sign in {**_INFIX, **_BITS, "logical_and": "&&", "logical_or": "||"}.items()}
_FUNCTIONS |= {name: f"std::{name}({{0}})" for name in ["abs", "sqrt", "exp", "expm1", "log", "log1p", "tanh"]}
_FUNCTIONS |= {"pow": "std::pow({0}, {1})", "remainder": "modulo({0}, {1})", "neg": "-{0}", "logical_not": "!{0}", "bitwise_not": "~{0}"}
_FUNCTIONS |= {"reciprocal": "1 / {0}", "rsqrt": "1 / std::sqrt({0})", "sigmoid": "1 / (1 + std::exp(-{0}))"}
_FUNCTIONS["sign"] = "({0} > 0) - ({0} < 0)"
_FUNCTIONS |= {name: f"({{0}} {sign} {{1}} || {{0}} != {{0}}) ? {{0}} : {{1}}" for name, sign in (("maximum", ">"), ("minimum", "<"))}


def code(graph: UpdateGraph) -> str:
    """C++ of a graph, with a function `run(count, inputs, rows, columns, threads)`.

    `inputs` has, tensor by tensor, the address of each argument. Elements of all arguments of a tensor lie alike, dense, and row after row.
    """
    if unknown := {dtype for _, dtype in graph.inputs} - _STORED.keys():
        raise UnsupportedError(f"there is no {unknown.pop()} in C++ here")
    rounds = any(value.dtype == torch.bfloat16 for value in graph.values)
    return f"constexpr bool ROUNDS = {str(rounds).lower()};  // to bfloat16\n" + HEADER + "".join(_Code(graph).parts())


class _Code:
    """The pieces of the code of one graph."""

    def __init__(self, graph: UpdateGraph) -> None:
        self.graph, self._sweeps = graph, Sweeps(graph)
        self.types = [_STORED[dtype] for _, dtype in graph.inputs]
        self.name = {value: f"v{i}" for i, value in enumerate(graph.values)}

    def parts(self) -> Iterator[str]:
        width = sum(dtype.itemsize for kind, dtype in self.graph.inputs if kind == Kind.ELEMENT)
        batch = "CACHE / 2 / WIDTH" if len(self._sweeps.sweeps) > 1 else "INT64_MAX"
        yield f"constexpr int64_t WIDTH = {max(width, 1)}, BATCH = {batch};  // bytes an element; elements\n"
        numbers = [value for value in self.graph.values if value.kind == Kind.NUMBER and value.op not in ("input", "constant")]
        yield "struct Numbers {" + " ".join(f"{_type(value)} {self.name[value]};" for value in numbers) + "};\n"
        for at, values in enumerate(self._sweeps.numbers):
            yield f"static void numbers{at}(void* const* inputs, Numbers& n) {{\n"
            yield from (f"  n.{self.name[value]} = {self.expression(value, self.number)};\n" for value in values)
            yield "}\n"
        for at, sweep in enumerate(self._sweeps.sweeps):
            names = [(total, self.name[total]) for total in sweep.totals]
            yield f"struct Part{at} {{\n" + "".join(f"  double {name} = {_start(total)};\n" for total, name in names)
            grown = " ".join(f"{name} = {_grown(total, name, f'other.{name}')};" for total, name in names)
            yield f"  void add(const Part{at}& other) {{{grown}}}\n}};\n"
            given = f"void* const* inputs, const Numbers& n, int64_t first, int64_t rows, int64_t columns, bool past, Part{at}& part"
            yield f"static void sweep{at}({given}) {{\n"
            yield from _SweepCode(self, sweep).text()
            yield "}\n"
        yield "static void finish(void* const* inputs, const Numbers& n) {\n"
        yield from (f"  const auto w{i} = {self.number(value, value.dtype)};\n" for i, value in self._sweeps.writes.items())
        yield from (f"  {self.at(i)}[0] = {self.stored(i, f'w{i}')};\n" for i in self._sweeps.writes)
        yield "}\n"
        yield DRIVER.replace("@SWEEPS@", "".join(self._steps()))

    def _steps(self) -> Iterator[str]:
        """What the driver does with a batch of tensors."""
        given = f"inputs + t * {len(self.graph.inputs)}"
        each = "    for (int64_t t = begin; t < end; t++)"
        for at, sweep in enumerate(self._sweeps.sweeps):
            blocks = "by_row" if sweep.by_row else "flat"
            yield f"""\
{each} numbers{at}({given}, numbers[t]);
    Array<Part{at}> parts{at};
    parts{at}.resize({blocks}.size);
    #pragma omp parallel for schedule(static) num_threads(team)
    for (int64_t i = 0; i < {blocks}.size; i++) {{
      auto b = {blocks}[i]; int64_t t = b.tensor;
      sweep{at}({given}, numbers[t], b.first, b.rows, b.columns, past, parts{at}[i]);
    }}
    for (int64_t t = begin, i = 0; t < end; t++) {{
      Part{at} all;
      for (; i < {blocks}.size && {blocks}[i].tensor == t; i++) all.add(parts{at}[i]);
"""
            for total in sweep.totals:
                count = " / (double(rows[t]) * columns[t])" if total.op == "mean" else ""
                yield f"      numbers[t].{self.name[total]} = all.{self.name[total]}{count};\n"
            yield "    }\n"
        last = len(self._sweeps.sweeps)
        yield f"{each} {{ numbers{last}({given}, numbers[t]); finish({given}, numbers[t]); }}\n"

    def expression(self, value: Value, operand: Callable[[Value, torch.dtype], str]) -> str:
        """C++ of one value, of its dtype, given how to write an operand in a dtype."""
        if value.op == "index":
            found = "index"
        elif value.op == "bitcast":
            found = f"__builtin_bit_cast({_type(value)}, {operand(value.operands[0], value.computed)})"
        elif value.op in ("cast", "expand"):
            found = operand(value.operands[0], value.dtype)
        elif value.op == "clamp":
            found, low, high = (each and operand(each, value.computed) for each in value.args)
            for end, sign in ((low, "<"), (high, ">")):  # an end that is NaN makes the value NaN
                if end:
                    found = f"({found} {sign} {end} || {end} != {end} ? {end} : {found})"
        elif value.op == "where":
            condition, yes, no = value.args
            chosen = "choose({0}, {1}, {2})" if condition.kind < value.kind and value.dtype.is_floating_point else "{0} ? {1} : {2}"
            found = chosen.format(operand(condition, torch.bool), operand(yes, value.dtype), operand(no, value.dtype))
        elif value.op == "div" and value.args[1].kind < value.kind:  # a product is faster
            one, other = (operand(each, value.computed) for each in value.args)
            found = f"{one} * ({_COMPUTED[value.computed]}(1) / {other})"
        elif value.op == "eq" and value.computed.is_floating_point and any(each.source.op == "amax" for each in value.args):
            # what the maximum is of is computed again, and may be rounded otherwise: sums are of doubles, so by a few units
            one, other = (operand(each, value.computed) for each in value.args)
            slack = f"{4 * torch.finfo(value.computed).eps} * std::abs({one})"
            found = f"{one} == {other} || std::abs({one} - {other}) <= {slack}"
        elif value.op in ("add", "sub", "mul") and value.dtype in _UNSIGNED:  # which keep the lower half
            one, other = (f"{_UNSIGNED[value.dtype]}({operand(each, value.computed)})" for each in value.args)
            found = f"{one} {_INFIX[value.op]} {other}"
        else:
            found = _FUNCTIONS[value.op].format(*(f"({operand(each, value.computed)})" for each in value.args))
        return f"round16({found})" if value.dtype == torch.bfloat16 else f"{_type(value)}({found})"

    def number(self, value: Value, dtype: torch.dtype) -> str:
        """A single number, where it is kept."""
        if value.op == "constant":
            return _literal(value.args[0], dtype)
        found = f"load({self.at(value.args[0])}[0])" if value.op == "input" else f"n.{self.name[value]}"
        return found if dtype == value.dtype else f"{_COMPUTED[dtype]}({found})"

    def at(self, index: int) -> str:
        return f"(({self.types[index]}*)inputs[{index}])"

    def stored(self, index: int, value: str) -> str:
        return f"upper({value})" if self.types[index] == "uint16_t" else value


@dataclass(frozen=True)
class _Loop:
    """What one loop over a row does."""

    here: Sequence[Value]  # elements that are computed
    sums: Sequence[Value]  # what is summed up: for a row, or for the tensor
    stores: Mapping[int, str]  # by argument that is written: the array to write to
    kept: Sequence[Value]  # elements that are kept for later loops
    loads: Mapping[Value, int | None]  # what is read: from an argument, or what an earlier loop has kept
    roots: Sequence[Value]  # elements that all this is made of
    sure: Mapping[Value, Value] = field(default_factory=dict)  # see `_sure`; such a loop writes nothing that it reads


class _SweepCode:
    """A function for some rows of one tensor: loops over each row, between which are what there is one of."""

    def __init__(self, code: _Code, sweep: Sweep) -> None:
        self._code, self._sweep, self._name, self._level = code, sweep, code.name, levels(sweep)
        self._numbers: dict[tuple[Value, torch.dtype], str] = {}  # what is used of numbers, once, in the dtype that it is used in
        self._elements = [value for value in sweep.computed if value.kind == Kind.ELEMENT]
        used: dict[Value, int] = {}  # the last loop that reads each element
        for value in sweep.computed:
            for each in value.operands:
                used[each] = max(used.get(each, 0), self._level[value] - is_row_total(value))
        for value in self._elements:
            if self._is_read(value):  # again, rather than kept
                used[value.operands[0]] = max(used.get(value.operands[0], 0), used.get(value, 0))
        # in which loop each array of elements is written: when its value is there, and nothing reads the old one any more
        written = {i: value for i, value in sweep.writes.items() if code.graph.inputs[i][0] == Kind.ELEMENT}
        held = {i: value for value, i in sweep.sources.items()}
        free = {i: used.get(value, 0) for i, value in held.items()}
        self._writes = {i: max(self._level.get(value, 0), free.get(i, 0)) for i, value in written.items()}
        for i in written:
            copies = [self._writes[j] for j, value in written.items() if value is held.get(i)]
            self._writes[i] = max([self._writes[i], *copies])
        for i, value in written.items():
            used[value] = max(used.get(value, 0), self._writes[i])
        self._kept = {value for value in self._elements if used.get(value, 0) > self._level[value] and not self._is_read(value)}
        # arrays that are written, and not read
        self._only_written = {i for i in sweep.writes if code.types[i] != "bool"} - {*sweep.sources.values()}
        # loops go two neighbours at a time if all arrays of elements are bfloat16; where others are too, it takes shuffles
        touched = {code.graph.inputs[i] for i in (*sweep.sources.values(), *sweep.writes)}
        self._paired = {dtype for kind, dtype in touched if kind == Kind.ELEMENT} == {torch.bfloat16}

    def text(self) -> Iterator[str]:
        sweep, types = self._sweep, self._code.types
        loops = list(self._loops())
        yield from self._numbers.values()
        touched = sorted({*sweep.sources.values(), *sweep.writes})
        pointer = {i: f"{types[i]}*" if i in sweep.writes else f"const {types[i]}*" for i in touched}
        yield from (f"  {pointer[i]} const base{i} = ({types[i]}*)inputs[{i}];\n" for i in touched)
        rows = {f"kept_{self._name[v]}": "uint8_t" if v.dtype == torch.bool else _type(v) for v in self._elements if v in self._kept}
        rows |= {f"out{i}": types[i] for i in self._writes if i in self._only_written}
        for name, kind in rows.items():
            yield f"  thread_local Array<{kind}> store_{name}; store_{name}.resize(columns);\n"
            yield f"  {kind}* __restrict__ const {name} = store_{name}.data;\n"
        yield "  for (int64_t row = first; row < first + rows; row++) {\n"
        if any(value.op == "index" for value in self._elements):
            yield f"    const int32_t start = {'row * columns' if sweep.by_row else 'first'};\n"
        for i in touched:
            offset = (" + row * columns" if sweep.by_row else " + first") if self._code.graph.inputs[i][0] == Kind.ELEMENT else ""
            yield f"    {pointer[i]} {'__restrict__ ' if offset else ''}const p{i} = base{i}{offset};\n"
        for value, i in sweep.sources.items():
            if value.kind == Kind.ROW:
                yield f"    const {_type(value)} {self._name[value]} = load(p{i}[row]);\n"
        yield from loops
        yield "  }\n"

    def _loops(self) -> Iterator[str]:
        """What is done to a row."""
        for k in range(max([*self._level.values(), *self._writes.values(), 0]) + 1):
            for value in self._sweep.computed:
                if value.kind == Kind.ROW and self._level[value] == k and not is_row_total(value):
                    yield f"    {self._declared(value)}"
            yield from self._loop(k)
        for total in self._sweep.totals:
            if total.operands[0].kind == Kind.ROW:
                part = f"part.{self._name[total]}"
                yield f"    {part} = {_grown(total, part, self._read(total.operands[0]))};\n"
        for i, value in self._sweep.writes.items():
            if self._code.graph.inputs[i][0] == Kind.ROW:
                yield f"    p{i}[row] = {self._code.stored(i, self._read(value))};\n"

    def _loop(self, k: int) -> Iterator[str]:
        """One loop over a row: what is computed in it, summed up, kept for later loops and written. It fetches what comes after the row."""
        loop = self._planned(k)
        if not (loop.here or loop.sums or loop.stores):
            return
        after = list[str]()
        for total in loop.sums:
            found, part = f"s_{self._name[total]}", f"part.{self._name[total]}"
            yield f"    {_type(total.operands[0])} {found} = {_start(total)};\n"
            if total.op == "amax":
                yield f"    int nan_{found} = 0;\n"
                found = f"(nan_{found} ? NAN : {found})"
            if is_row_total(total):
                after.append(f"    const {_type(total)} {self._name[total]} = {found}{' / columns' if total.op == 'mean' else ''};\n")
            else:
                after.append(f"    {part} = {_grown(total, part, found)};\n")
        after += [f"    put(p{i}, {to}, columns, past);\n" for i, to in loop.stores.items() if i in self._only_written]
        count, unit = ("columns / 2", 2) if self._paired else ("columns", 1)
        yield f"    for (int64_t begin = 0; begin < {count}; begin += CHUNK) {{\n"
        yield f"      const int64_t end = smaller(begin + CHUNK, {count});\n"
        for i in sorted({i for value, i in self._sweep.sources.items() if value.kind == Kind.ELEMENT}):
            ahead = "2 * columns" if self._sweep.by_row else f"2048 / sizeof(*p{i})"
            yield f"      fetch<{unit} * CHUNK>(p{i} + {ahead} + {unit} * begin, {unit} * (end - begin));\n"
        if self._paired:
            yield from self._pairs(loop)
        else:
            for each in self._parts(loop):
                yield from self._chunk(each)
            yield "    }\n"
        yield from after

    def _accumulators(self, loop: "_Loop") -> dict[str, str]:
        """What a loop sums up in, and by which operation; of a maximum, also whether anything was NaN."""
        found: dict[str, str] = {}
        for total in loop.sums:
            name = f"s_{self._name[total]}"
            found |= {name: "max", f"nan_{name}": "|"} if total.op == "amax" else {name: "+"}
        return found

    def _chunk(self, loop: "_Loop") -> Iterator[str]:
        """What is done to some elements of a row."""
        accumulators, elements = self._accumulators(loop), "      for (int64_t j = begin; j < end; j++) {\n"
        clauses = [f"reduction({sign}: {name})" for name, sign in accumulators.items()]
        if loop.sure:
            kind = "double" if "double" in map(_type, loop.sure.values()) else "float"
            yield f"      {kind} check = 0;\n"
            yield from (f"      const auto before_{each} = {each};\n" for each in accumulators)
            yield f"      #pragma omp simd {' '.join([*clauses, 'reduction(+: check)'])}\n{elements}"
            yield from self._body(loop, checked=True)
            yield "      }\n      if (!(std::abs(check) < INFINITY)) {\n"
            yield from (f"      {each} = before_{each};\n" for each in accumulators)
        yield f"      #pragma omp simd {' '.join(clauses)}\n{elements}"
        yield from self._body(loop)
        yield "      }\n" * (1 + bool(loop.sure))

    def _pairs(self, loop: "_Loop") -> Iterator[str]:
        """What is done to some elements of a row, two neighbours at a time, and to the last of an odd number of columns."""
        clauses = [f"reduction({sign}: {name})" for name, sign in self._accumulators(loop).items()]
        yield f"      #pragma omp simd {' '.join(clauses)}\n      for (int64_t j = begin; j < end; j++) {{\n"
        pairs = sorted({i for i in loop.loads.values() if i is not None})
        yield from (f"      const Pair pair{i} = ((const Pair*)p{i})[j];\n" for i in pairs)
        yield from (f"      float first{i}, second{i};\n" for i in loop.stores)
        for half in ("first", "second"):
            yield from ["      {\n", *self._body(loop, half), "      }\n"]
        yield from (f"      ((Pair*){to})[j] = pair(first{i}, second{i});\n" for i, to in loop.stores.items())
        yield "      }\n    }\n    if (columns % 2) {\n      const int64_t j = columns - 1;\n"
        yield from self._body(loop)
        yield "    }\n"

    def _planned(self, k: int) -> "_Loop":
        """What a loop does."""
        sweep, level = self._sweep, self._level
        here = [value for value in self._elements if level[value] == k]
        sums = [value for value in level if is_row_total(value) and level[value] == k + 1]
        sums += [value for value in sweep.totals if value.operands[0].kind == Kind.ELEMENT and level[value.operands[0]] == k]
        stores = {i: f"out{i}" if i in self._only_written else f"p{i}" for i, at in self._writes.items() if at == k}
        return self._part(here, sums, stores, [value for value in here if value in self._kept])

    def _parts(self, loop: "_Loop") -> list["_Loop"]:
        """A loop, which may be shorter if something is finite; or two, of sums and of what is written, if it writes what it reads."""
        if loop.stores.keys().isdisjoint(loop.loads.values()):
            return [replace(loop, sure=_sure(loop.roots, loop.here))]
        sums = self._part(loop.here, loop.sums, {}, [])
        rest = self._part(loop.here, [], loop.stores, loop.kept)
        sure, again = _sure(sums.roots, sums.here), len(sums.here) + len(rest.here) - len(loop.here)
        return [replace(sums, sure=sure), rest] if sure and again <= len(loop.stores) else [loop]

    def _part(self, inside: Collection[Value], sums: Sequence[Value], stores: Mapping[int, str], kept: Sequence[Value]) -> "_Loop":
        """A loop for some of these ends, with what it takes of `inside`."""
        sweep, stored = self._sweep, [self._sweep.writes[i] for i in stores]
        roots = [*(total.operands[0] for total in sums), *kept, *stored]
        needed = {*reachable(roots, lambda value: value.operands if value in inside else ())}
        here = [value for value in inside if value in needed]
        wanted = {*[each for value in [*here, *sums] for each in value.operands], *stored} - {*here}
        wanted = {value for value in wanted if value.kind == Kind.ELEMENT and value.op != "constant"}
        loads = {v: sweep.sources.get(v.operands[0] if self._is_read(v) else v) for v in sweep.values if v in wanted}
        return _Loop(here, sums, stores, kept, loads, roots)

    def _body(self, loop: "_Loop", half: str = "", *, checked: bool = False) -> Iterator[str]:
        """What is done to an element, or to the first or second of two neighbours.

        Args:
            loop: the loop.
            half: "first" or "second"; else "".
            checked: whether what `loop.sure` has is taken to be finite, which `check` tells afterwards.
        """
        name, kept_at = self._name, "columns / 2 + j" if half == "second" else "j"
        if any(value.op == "index" for value in loop.here):
            yield f"      const int32_t index = start + int32_t({ {'': 'j', 'first': '2 * j', 'second': '2 * j + 1'}[half] });\n"
        for value, i in loop.loads.items():
            source = f"load_{half}(pair{i})" if half else f"load(p{i}[j])"
            yield f"      const {_type(value)} {name[value]} = {f'kept_{name[value]}[{kept_at}]' if i is None else source};\n"
        for value in loop.here:
            yield f"      {self._declared(value, loop.sure if checked else ())}"
            if value in loop.kept:
                yield f"      kept_{name[value]}[{kept_at}] = {name[value]};\n"
        if checked:
            yield from (f"      check += {self._read(size)};\n" for size in loop.sure.values())
        for total in loop.sums:
            into, given = f"s_{name[total]}", self._read(total.operands[0])
            if total.op == "amax":
                yield f"      {into} = {given} > {into} ? {given} : {into}; nan_{into} |= {given} != {given};\n"
            else:
                yield f"      {into} += {given};\n"
        for i, to in loop.stores.items():
            given = self._read(self._sweep.writes[i])
            yield f"      {half}{i} = {given};\n" if half else f"      {to}[j] = {self._code.stored(i, given)};\n"

    def _declared(self, value: Value, sure: Collection[Value] = ()) -> str:
        if value.op == "where" and value.args[0] in sure:
            expression = self._read(value.args[1], value.dtype)
        else:
            expression = self._code.expression(value, self._read)
        return f"const {_type(value)} {self._name[value]} = {expression};\n"

    def _read(self, value: Value, dtype: torch.dtype | None = None) -> str:
        """A value in a loop over rows, or over one row, in a dtype; numbers are read, and converted, once before these."""
        dtype = dtype or value.dtype
        if value.op == "constant":
            return _literal(value.args[0], dtype)
        name = self._name[value]
        if value.kind == Kind.NUMBER:
            key, name = (value, dtype), f"c_{name}_{str(dtype).split('.')[1]}"
            self._numbers.setdefault(key, f"  const {_COMPUTED[dtype]} {name} = {self._code.number(value, dtype)};\n")
            return name
        return name if _COMPUTED[dtype] == _type(value) else f"{_COMPUTED[dtype]}({name})"

    def _is_read(self, value: Value) -> bool:
        """Whether it is what an argument holds, in another dtype, to which C++ converts it."""
        cast, sources = value.op == "cast" and value.dtype != torch.bfloat16, self._sweep.sources
        return cast and value not in sources and value.operands[0] in sources


def _sure(roots: Iterable[Value], here: Collection[Value]) -> dict[Value, Value]:
    """Conditions that something is finite, by which a loop chooses, and what that is; none where the loop is hardly shorter without.

    Such a loop takes them to hold, computes less, and sums up what has to be finite. Where the sum of a chunk is not, it does the chunk
    again, with the conditions.

    Args:
        roots: what the loop is for.
        here: what it computes.
    """
    found, inside = dict[Value, Value](), {*here}

    def operands(value: Value) -> Iterable[Value]:
        """What a value is made of in the loop if the conditions hold."""
        if value in inside and value.op == "where" and (size := _finite(value.args[0])):
            found[value.args[0]] = size
            return size, value.args[1]
        return value.operands if value in inside else ()

    left = inside.intersection(reachable(roots, operands))
    return found if len(inside) - len(left) > len(found) else {}


def _finite(condition: Value) -> Value | None:
    """What a condition says is finite, if it says that of elements."""
    match condition:
        case Value(op="lt", kind=Kind.ELEMENT, args=(Value(op="abs", args=(size,)), end)) if end.is_constant(math.inf):
            found: Value = size
            return found
    return None


def _start(total: Value) -> str:
    return "-INFINITY" if total.op == "amax" else "0"


def _grown(total: Value, before: str, given: str) -> str:
    """A total to which something is added."""
    return f"({given} > {before} || {given} != {given}) ? {given} : {before}" if total.op == "amax" else f"{before} + {given}"


def _type(value: Value) -> str:
    return _COMPUTED[value.dtype]


def _literal(number: float, dtype: torch.dtype) -> str:
    """A constant in C++."""
    kind, size = _COMPUTED[dtype], abs(float(number))
    if math.isnan(size):
        return f"{kind}(NAN)"
    if size == math.inf or (kind == "float" and size > torch.finfo(torch.float32).max):
        return f"{kind}({'-' if number < 0 else ''}INFINITY)"
    return f"{kind}({float(number)!r})" if kind in ("float", "double") else f"{kind}({int(number)})"
