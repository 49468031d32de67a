"""Graphs as C++: one function for many tensors at once, which sweeps over their memory as seldom as can be."""

import math
from collections.abc import Callable, Iterator, Mapping

import torch

from hyperopt_nested.backends.cpp_text import DRIVER, HEADER
from hyperopt_nested.backends.graph import Kind, UnsupportedError, UpdateGraph, Value
from hyperopt_nested.backends.sweeps import Sweep, Sweeps, is_row_total, levels

_STORED = {
    torch.float64: "double",
    torch.float32: "float",
    torch.bfloat16: "uint16_t",
    torch.bool: "bool",
    torch.int64: "int64_t",
    torch.int32: "int32_t",
}
_COMPUTED = {**_STORED, torch.bfloat16: "float"}

_FUNCTIONS: dict[str, str] = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "div": "{0} / {1}",
    "neg": "-{0}",
    "abs": "std::abs({0})",
    "sqrt": "std::sqrt({0})",
    "rsqrt": "1 / std::sqrt({0})",
    "reciprocal": "1 / {0}",
    "pow": "std::pow({0}, {1})",
    "exp": "std::exp({0})",
    "expm1": "std::expm1({0})",
    "log": "std::log({0})",
    "log1p": "std::log1p({0})",
    "tanh": "std::tanh({0})",
    "sigmoid": "1 / (1 + std::exp(-{0}))",
    "sign": "({0} > 0) - ({0} < 0)",
    "maximum": "({0} > {1} || {0} != {0}) ? {0} : {1}",
    "minimum": "({0} < {1} || {0} != {0}) ? {0} : {1}",
    "remainder": "modulo({0}, {1})",
    "gt": "{0} > {1}",
    "ge": "{0} >= {1}",
    "lt": "{0} < {1}",
    "le": "{0} <= {1}",
    "eq": "{0} == {1}",
    "ne": "{0} != {1}",
    "logical_and": "{0} && {1}",
    "logical_or": "{0} || {1}",
    "logical_not": "!{0}",
}


def code(graph: UpdateGraph) -> str:
    """C++ of a graph, with a function `run(count, inputs, rows, columns, threads)`.

    `inputs` has, tensor by tensor, the address of each argument. Elements of all arguments of a tensor lie alike, dense, and row after row.

    Raises:
        UnsupportedError: a dtype is not one of those that C++ has here.
    """
    for _, dtype in graph.inputs:
        if dtype not in _STORED:
            raise UnsupportedError(f"there is no {dtype} in C++ here")
    rounds = any(value.dtype == torch.bfloat16 for value in graph.values)
    return f"constexpr bool ROUNDS = {str(rounds).lower()};  // to bfloat16\n" + HEADER + "".join(_Code(graph).parts())


class _Code:
    """The pieces of the code of one graph."""

    def __init__(self, graph: UpdateGraph) -> None:
        self._graph, self._sweeps = graph, Sweeps(graph)
        self._name = {value: f"v{i}" for i, value in enumerate(graph.values)}
        self._numbers = [value for value in graph.values if value.kind == Kind.NUMBER and value.op not in ("input", "constant")]

    def parts(self) -> Iterator[str]:
        width = sum(dtype.itemsize for kind, dtype in self._graph.inputs if kind == Kind.ELEMENT)
        yield f"constexpr int64_t WIDTH = {max(width, 1)};  // bytes an element\n"
        batch = "CACHE / 2 / WIDTH" if len(self._sweeps.sweeps) > 1 else "INT64_MAX"
        yield f"constexpr int64_t BATCH = {batch};  // elements\n"
        yield "struct Numbers {" + " ".join(f"{_type(value)} {self._name[value]};" for value in self._numbers) + "};\n"
        for at, values in enumerate(self._sweeps.numbers):
            yield f"static void numbers{at}(void* const* inputs, Numbers& n) {{\n"
            for value in values:
                yield f"  n.{self._name[value]} = {self._expression(value, self._number)};\n"
            yield "}\n"
        for at, sweep in enumerate(self._sweeps.sweeps):
            yield from self._sweep(at, sweep)
        yield "static void finish(void* const* inputs, const Numbers& n) {\n"
        for i, value in self._sweeps.writes.items():
            yield f"  const auto w{i} = {self._number(value, value.dtype)};\n"
        for i in self._sweeps.writes:
            yield f"  {self._at(i)}[0] = {self._stored(i, f'w{i}')};\n"
        yield "}\n"
        yield DRIVER.replace("@SWEEPS@", "".join(self._steps()))

    def _steps(self) -> Iterator[str]:
        """What the driver does with a batch of tensors."""
        given = f"inputs + t * {len(self._graph.inputs)}"
        each = "    for (int64_t t = begin; t < end; t++)"
        for at, sweep in enumerate(self._sweeps.sweeps):
            yield f"{each} numbers{at}({given}, numbers[t]);\n"
            blocks = "by_row" if sweep.by_row else "flat"
            yield f"    std::vector<Part{at}> parts{at}({blocks}.size());\n"
            yield "    #pragma omp parallel for schedule(static) num_threads(team)\n"
            yield f"    for (int64_t i = 0; i < (int64_t){blocks}.size(); i++) {{\n"
            yield f"      auto b = {blocks}[i]; int64_t t = b.tensor;\n"
            yield f"      sweep{at}({given}, numbers[t], b.first, b.rows, b.columns, past, parts{at}[i]);\n    }}\n"
            yield f"    for (int64_t t = begin, i = 0; t < end; t++) {{\n      Part{at} all;\n"
            yield f"      for (; i < (int64_t){blocks}.size() && {blocks}[i].tensor == t; i++) all.add(parts{at}[i]);\n"
            for total in sweep.totals:
                name = self._name[total]
                value = f"all.{name} / (double(rows[t]) * columns[t])" if total.op == "mean" else f"all.{name}"
                yield f"      numbers[t].{name} = {value};\n"
            yield "    }\n"
        last = len(self._sweeps.sweeps)
        yield f"{each} {{ numbers{last}({given}, numbers[t]); finish({given}, numbers[t]); }}\n"

    def _sweep(self, at: int, sweep: Sweep) -> Iterator[str]:
        """A function for some rows of one tensor."""
        names = [(self._name[total], total.op) for total in sweep.totals]
        start = {op: "-INFINITY" if op == "amax" else "0" for _, op in names}
        yield f"struct Part{at} {{\n" + "".join(f"  double {name} = {start[op]};\n" for name, op in names)
        yield f"  void add(const Part{at}& other) {{" + " ".join(
            f"{name} = std::isnan(other.{name}) || other.{name} > {name} ? other.{name} : {name};"
            if op == "amax"
            else f"{name} += other.{name};"
            for name, op in names
        )
        yield "}\n};\n"
        given = f"void* const* inputs, const Numbers& n, int64_t first, int64_t rows, int64_t columns, bool past, Part{at}& part"
        yield f"static void sweep{at}({given}) {{\n"
        yield from self._loops(sweep)
        yield "}\n"

    def _loops(self, sweep: Sweep) -> Iterator[str]:
        level = levels(sweep)
        rows = [value for value in sweep.computed if value.kind == Kind.ROW]
        elements = [value for value in sweep.computed if value.kind == Kind.ELEMENT]
        used: dict[Value, int] = {}  # the last loop that reads each element
        for value in [*rows, *elements]:
            for each in value.operands:
                used[each] = max(used.get(each, 0), level[value] - is_row_total(value))
        for value in elements:
            if _is_read(value, sweep):  # again, rather than kept
                used[value.operands[0]] = max(used.get(value.operands[0], 0), used.get(value, 0))
        writes = self._write_levels(sweep, level, used)
        for i, at in writes.items():
            used[sweep.writes[i]] = max(used.get(sweep.writes[i], 0), at)
        kept = [value for value in elements if used.get(value, 0) > level[value] and not _is_read(value, sweep)]
        # what is used of numbers, once, in the dtype that it is used in
        scope = _Scope(self)
        body = [f"    const {_type(v)} {self._name[v]} = {self._expression(v, scope.read)};\n" for v in rows if level[v] == 0]
        last = max([*level.values(), *writes.values(), 0])
        for k in range(last + 1):
            body += self._loop(k, sweep, level, writes, kept, scope)
            body += [
                f"    const {_type(v)} {self._name[v]} = {self._expression(v, scope.read)};\n"
                for v in rows
                if level[v] == k + 1 and not is_row_total(v)
            ]
        for total in sweep.totals:
            operand = total.operands[0]
            if operand.kind == Kind.ROW:
                name, given = self._name[total], scope.read(operand, operand.dtype)
                grown = (
                    f"({given} > part.{name} || {given} != {given}) ? {given} : part.{name}"
                    if total.op == "amax"
                    else f"part.{name} + {given}"
                )
                body.append(f"    part.{name} = {grown};\n")
        for i, value in sweep.writes.items():
            if self._graph.inputs[i][0] == Kind.ROW:
                body.append(f"    p{i}[row] = {self._stored(i, scope.read(value, value.dtype))};\n")
        yield from scope.numbers.values()
        touched = sorted({*sweep.sources.values(), *sweep.writes})
        for i in touched:
            qualifier = "" if i in sweep.writes else "const "
            yield f"  {qualifier}{_STORED[self._graph.inputs[i][1]]}* const base{i} = ({_STORED[self._graph.inputs[i][1]]}*)inputs[{i}];\n"
        rows_kept = {f"kept_{self._name[value]}": "uint8_t" if value.dtype == torch.bool else _type(value) for value in kept}
        rows_kept |= {f"out{i}": _STORED[self._graph.inputs[i][1]] for i in writes if i in self._only_written(sweep)}
        for name, type_ in rows_kept.items():
            yield f"  thread_local std::vector<{type_}> store_{name}; store_{name}.resize(columns);\n"
            yield f"  {type_}* __restrict__ const {name} = store_{name}.data();\n"
        yield "  for (int64_t row = first; row < first + rows; row++) {\n"
        for i in touched:
            kind, dtype = self._graph.inputs[i]
            qualifier = "" if i in sweep.writes else "const "
            if kind == Kind.ELEMENT:
                offset = "row * columns" if sweep.by_row else "first"
                yield f"    {qualifier}{_STORED[dtype]}* __restrict__ const p{i} = base{i} + {offset};\n"
            else:
                yield f"    {qualifier}{_STORED[dtype]}* const p{i} = base{i};\n"
        for value, i in sweep.sources.items():
            if value.kind == Kind.ROW:
                yield f"    const {_type(value)} {self._name[value]} = load(p{i}[row]);\n"
        yield from body
        yield "  }\n"

    def _only_written(self, sweep: Sweep) -> set[int]:
        """Arrays that a sweep writes, and does not read."""
        return {i for i in sweep.writes if self._graph.inputs[i][1] != torch.bool} - {*sweep.sources.values()}

    def _write_levels(self, sweep: Sweep, level: Mapping[Value, int], used: Mapping[Value, int]) -> dict[int, int]:
        """In which loop each array of elements is written: when its value is there, and nothing reads the old one any more."""
        inputs = {i: value for value, i in sweep.sources.items()}
        written = {i: value for i, value in sweep.writes.items() if self._graph.inputs[i][0] == Kind.ELEMENT}
        found = {i: max(level.get(value, 0), used.get(inputs[i], 0) if i in inputs else 0) for i, value in written.items()}
        for i in found:
            copies = [found[j] for j, value in written.items() if value is inputs.get(i)]
            found[i] = max([found[i], *copies])
        return found

    def _loop(
        self, k: int, sweep: Sweep, level: Mapping[Value, int], writes: Mapping[int, int], kept: list[Value], scope: "_Scope"
    ) -> Iterator[str]:
        """One loop over a row: what is computed in it, summed up, kept for later loops and written. It fetches what comes after the row."""
        here = [value for value in sweep.computed if value.kind == Kind.ELEMENT and level[value] == k]
        sums = [value for value in level if is_row_total(value) and level[value] == k + 1]
        totals = [value for value in sweep.totals if value.operands[0].kind == Kind.ELEMENT and level[value.operands[0]] == k]
        stores = [i for i, at in writes.items() if at == k]

        def stored(value: Value) -> Value:
            """What an argument holds of a value that is read from it."""
            return value.operands[0] if _is_read(value, sweep) else value

        wanted = {*[each for value in [*here, *sums, *totals] for each in value.operands], *[sweep.writes[i] for i in stores]}
        loads = [
            value
            for value in sweep.values
            if value in wanted and value.kind == Kind.ELEMENT and value not in here and value.op != "constant"
        ]
        paired = self._is_paired(sweep)
        pairs = sorted({sweep.sources[each] for each in map(stored, loads) if paired and each in sweep.sources})
        only_written = self._only_written(sweep)
        to = {i: f"out{i}" if i in only_written else f"p{i}" for i in stores}
        before, clauses, after = [], [], []

        def body(half: str = "") -> Iterator[str]:
            """What is done to an element, or to the first or second of two neighbours."""
            kept_at = "columns / 2 + j" if half == "second" else "j"
            for value in loads:
                i = sweep.sources.get(stored(value))
                source = f"kept_{self._name[value]}[{kept_at}]" if i is None else f"load(p{i}[j])"
                source = f"load_{half}(pair{i})" if half and i is not None else source
                yield f"      const {_type(value)} {self._name[value]} = {source};\n"
            for value in here:
                yield f"      const {_type(value)} {self._name[value]} = {self._expression(value, scope.read)};\n"
                if value in kept:
                    yield f"      kept_{self._name[value]}[{kept_at}] = {self._name[value]};\n"
            for total in [*sums, *totals]:
                name, given = f"s_{self._name[total]}", scope.read(total.operands[0], total.operands[0].dtype)
                if total.op == "amax":
                    yield f"      {name} = {given} > {name} ? {given} : {name}; nan_{name} |= {given} != {given};\n"
                else:
                    yield f"      {name} += {given};\n"
            for i in stores:
                given = scope.read(sweep.writes[i], sweep.writes[i].dtype)
                if half:
                    yield f"      {half}{i} = {given};\n"
                else:
                    yield f"      {to[i]}[j] = {self._stored(i, given)};\n"

        for total in [*sums, *totals]:
            name, kind = f"s_{self._name[total]}", _type(total.operands[0])
            if total.op == "amax":
                before.append(f"    {kind} {name} = -INFINITY;\n    int nan_{name} = 0;\n")
                clauses += [f"reduction(max: {name})", f"reduction(|: nan_{name})"]
                found = f"nan_{name} ? NAN : {name}"
            else:
                before.append(f"    {kind} {name} = 0;\n")
                clauses.append(f"reduction(+: {name})")
                found = f"{name} / columns" if total.op == "mean" and total in sums else name
            part = f"part.{self._name[total]}"
            if total in sums:
                after.append(f"    const {_type(total)} {self._name[total]} = {found};\n")
            elif total.op == "amax":
                after.append(f"    {part} = (nan_{name} || {name} > {part}) ? ({found}) : {part};\n")
            else:
                after.append(f"    {part} += {name};\n")
        after += [f"    put(p{i}, {to[i]}, columns, past);\n" for i in stores if i in only_written]
        if not (here or sums or totals or stores):
            return
        yield from before
        count, unit = ("columns / 2", 2) if paired else ("columns", 1)
        yield f"    for (int64_t begin = 0; begin < {count}; begin += CHUNK) {{\n"
        yield f"      const int64_t end = smaller(begin + CHUNK, {count});\n"
        for i in sorted({i for value, i in sweep.sources.items() if value.kind == Kind.ELEMENT}):
            ahead = "2 * columns" if sweep.by_row else f"4096 / sizeof(*p{i})"
            yield f"      fetch(p{i} + {ahead} + {unit} * begin, {unit} * (end - begin));\n"
        yield f"      #pragma omp simd {' '.join(clauses)}\n      for (int64_t j = begin; j < end; j++) {{\n"
        if paired:
            yield from (f"      const Pair pair{i} = ((const Pair*)p{i})[j];\n" for i in pairs)
            yield from (f"      float first{i}, second{i};\n" for i in stores)
            for half in ("first", "second"):
                yield from ["      {\n", *body(half), "      }\n"]
            yield from (f"      ((Pair*){to[i]})[j] = pair(first{i}, second{i});\n" for i in stores)
        else:
            yield from body()
        yield "      }\n    }\n"
        if paired:
            yield from ["    if (columns % 2) {\n      const int64_t j = columns - 1;\n", *body(), "    }\n"]
        yield from after

    def _is_paired(self, sweep: Sweep) -> bool:
        """Whether loops go two neighbours at a time: if all arrays of elements are bfloat16; where others are too, it takes shuffles."""
        touched = {self._graph.inputs[i] for i in (*sweep.sources.values(), *sweep.writes)}
        return {dtype for kind, dtype in touched if kind == Kind.ELEMENT} == {torch.bfloat16}

    def _expression(self, value: Value, operand: Callable[[Value, torch.dtype], str]) -> str:
        """C++ of one value, of its dtype, given how to write an operand in a dtype."""
        if value.op in ("cast", "expand"):
            found = operand(value.operands[0], value.dtype)
        elif value.op == "clamp":
            given, low, high = (each and operand(each, value.computed) for each in value.args)
            found = given
            for end, sign in ((low, "<"), (high, ">")):  # an end that is NaN makes the value NaN
                if end:
                    found = f"({found} {sign} {end} || {end} != {end} ? {end} : {found})"
        elif value.op == "where":
            condition, yes, no = value.args
            chosen = "choose({0}, {1}, {2})" if condition.kind < value.kind and value.dtype.is_floating_point else "{0} ? {1} : {2}"
            found = chosen.format(operand(condition, torch.bool), operand(yes, value.dtype), operand(no, value.dtype))
        elif value.op == "div" and value.args[1].kind < value.kind:  # a product is faster
            found = (
                f"{operand(value.args[0], value.computed)} * ({_COMPUTED[value.computed]}(1) / {operand(value.args[1], value.computed)})"
            )
        else:
            found = _FUNCTIONS[value.op].format(*(f"({operand(each, value.computed)})" for each in value.args))
        return f"round16({found})" if value.dtype == torch.bfloat16 else f"{_type(value)}({found})"

    def _number(self, value: Value, dtype: torch.dtype) -> str:
        """A single number, where it is kept."""
        if value.op == "constant":
            return literal(value.args[0], dtype)
        found = f"load({self._at(value.args[0])}[0])" if value.op == "input" else f"n.{self._name[value]}"
        return found if dtype == value.dtype else f"{_COMPUTED[dtype]}({found})"

    def _at(self, index: int) -> str:
        return f"(({_STORED[self._graph.inputs[index][1]]}*)inputs[{index}])"

    def _stored(self, index: int, value: str) -> str:
        return f"upper({value})" if self._graph.inputs[index][1] == torch.bfloat16 else value


class _Scope:
    """How values are written inside a sweep: numbers are read, and converted, once before it."""

    def __init__(self, code: _Code) -> None:
        self._code = code
        self.numbers: dict[tuple[Value, torch.dtype], str] = {}

    def read(self, value: Value, dtype: torch.dtype) -> str:
        """A value in a loop over rows, or over one row, in a dtype."""
        if value.op == "constant":
            return literal(value.args[0], dtype)
        name = self._code._name[value]
        if value.kind == Kind.NUMBER:
            key, name = (value, dtype), f"c_{name}_{str(dtype).split('.')[1]}"
            self.numbers.setdefault(key, f"  const {_COMPUTED[dtype]} {name} = {self._code._number(value, dtype)};\n")
            return name
        return name if _COMPUTED[dtype] == _type(value) else f"{_COMPUTED[dtype]}({name})"


def _is_read(value: Value, sweep: Sweep) -> bool:
    """Whether it is what an argument holds, in another dtype, to which C++ converts it."""
    cast = value.op == "cast" and value.dtype != torch.bfloat16
    return cast and value not in sweep.sources and value.operands[0] in sweep.sources


def _type(value: Value) -> str:
    return _COMPUTED[value.dtype]


def literal(number: float, dtype: torch.dtype) -> str:
    """A constant in C++."""
    kind = _COMPUTED[dtype]
    if isinstance(number, float) and not math.isfinite(number):
        return f"{kind}({'NAN' if math.isnan(number) else '-INFINITY' if number < 0 else 'INFINITY'})"
    if kind == "float" and abs(float(number)) > torch.finfo(torch.float32).max:
        return f"float({'-' if number < 0 else ''}INFINITY)"
    return f"{kind}({float(number)!r})" if kind in ("float", "double") else f"{kind}({int(number)})"
