"""IR functions as Python: one short function each in ``model.py``, and in ``kernels/`` what they call.

State values become the Python object that was passed in: a kernel that is ``in_place`` changes it, so its
successor in the IR is the same name in Python and functions don't return it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from textwrap import wrap
from typing import Any

from moec.codegen.kernel_files import Kernels
from moec.codegen.kernels import Inline, Templated, select
from moec.codegen.kernels.cuda import CudaKernel
from moec.codegen.kernels.record import emits_nothing
from moec.codegen.kernels.triton import TritonKernel
from moec.codegen.parameters import VIEWS
from moec.codegen.render import Names, prose, quote, quote_format, render_python
from moec.errors import IRError
from moec.ir.graph import ENTRIES, Function, Module
from moec.ir.memory import is_planned, plan_memory
from moec.ir.op import Op, Param, Value
from moec.ir.ops.control import Loop
from moec.ir.ops.weights import Bind, Stack
from moec.ir.records import kernel_records
from moec.ir.types import STATE_TYPES, TensorType
from moec.ir.weights import WEIGHTS

WIDTH = 110
# What generated functions use beside their own names.
PYTHON = {"params", "take", "bind", "torch", "F", "range", "map", "zip", "Scaled"}
Drops = Mapping[int, list[Value]]


@dataclass
class PythonFunction:
    """What ``model.py.jinja`` needs of one function."""

    name: str
    signature: list[str]
    doc: list[str]
    lines: list[str] = field(default_factory=list)
    returns: list[str] = field(default_factory=list)


class FunctionEmitter:
    """Writes one IR function; its parameters are the mapping ``params``, or what ``take`` reads at load time.

    ``functions`` are the Python names of the module's functions; no value may hide these or a kernel.
    ``drops`` are the values that a memory plan lets go of, by number of the op before which it does.
    """

    def __init__(
        self,
        function: Function,
        module: Module,
        kernels: Kernels,
        functions: dict[str, str],
        drops: Drops | None = None,
    ) -> None:
        self.function, self.module, self.kernels, self.functions = function, module, kernels, functions
        self.drops = drops or {}
        self.load_time = function.name.split(".")[0] == WEIGHTS
        self.names = Names(PYTHON | {*functions.values(), *kernels.names})
        self.placed: dict[Value, str] = {}  # of load-time values, the parameters that they have become
        self.used: set[str] = set()  # kernels called
        self.dropped: set[str] = set()  # names let go of
        self.carried: set[str] = set()  # names that loops give new values, and so never let go of
        self.lines: list[str] = []

    def emit(self) -> PythonFunction:
        args = [self.names.add(a, a.name) for a in self.function.args]
        args += ["take", "bind"] if self.load_time else ["params"]
        for number, op in enumerate(self.function.ops):
            self._drop(self.drops.get(number, []))
            self._op(op)
            if self.load_time and not isinstance(op, Bind):
                self._free(op)
        returns = [str(self._text(v)) for v in self.function.outputs if not isinstance(v.type, STATE_TYPES)]
        doc = describe(self.function, self.module, args[: len(self.function.args)])
        name = self.functions[self.function.name]
        signature = wrap_call(f"def {name}", args)
        signature[-1] += ":"
        return PythonFunction(name, signature, doc, self.lines, returns)

    def _text(self, value: Value | None, op: Op | None = None) -> str | None:
        if value is None:
            return None
        if value in self.placed and op is not None and self._only_views(op):
            return self.placed[value]
        if not isinstance(value, Param) or value in self.names:
            return self.names[value]
        if self.load_time and not isinstance(op, Stack) and len(self.function.uses(value)) > 1:
            name = self.names.add(value, value.name.rpartition(".weight")[0] or value.name)
            self.lines.append(f"{name} = {self._read(quote(value.name))}")  # read once
            return name
        if isinstance(op, Stack):
            experts = op.attrs["experts"]
            member = self._read(quote_format(value.name, "e"))
            return f"[{member} for e in range({experts.first}, {experts.last + 1})]"
        return self._read(quote(value.name))

    def _read(self, name: str) -> str:
        return f"take({name})" if self.load_time else f"params[{name}]"

    def _op(self, op: Op) -> None:
        operands = [self._text(v, op) for v in op.operands]
        if isinstance(op, Loop):
            self._loop(op, operands)
        elif isinstance(op, Bind):
            if not self.load_time:
                raise IRError(f"@{self.function.name}: bind stands outside @{WEIGHTS}", loc=op.loc)
            self._bind(op, str(operands[0]))
        else:
            self._assign(op, *self._expression(op, operands))

    def _drop(self, values: list[Value]) -> None:
        """Lets go of memory that the plan gives to what follows: every name of it has to go.

        What may lie in either of two memories, as merged rows do, is a name of both and goes once.
        """
        names = dict.fromkeys(self.names[v] for v in values)
        names = dict.fromkeys(n for n in names if n not in self.carried and n not in self.dropped)
        self.dropped |= names.keys()
        for line in wrap(", ".join(names), WIDTH - 8):
            self.lines.append(f"del {line.removesuffix(',')}")

    def _bind(self, op: Bind, value: str) -> None:
        """A parameter; later views are taken from where it has been put, so that all share one memory."""
        text = f"bind({quote(op.param)}, {value})"
        users = self.function.users(op.x)
        if any(self._only_views(user) for user in users[users.index(op) + 1 :]):
            self.placed[op.x] = self.names.add(op, f"{value}_placed")
            text = f"{self.placed[op.x]} = {text}"
        self.lines.append(text)

    def _only_views(self, op: Op) -> bool:
        """Whether ``op`` gives views and all that is made of them are further ones, or parameters."""
        users = [user for res in op.results for user in self.function.users(res)]
        return op.name in VIEWS and all(isinstance(u, Bind) or self._only_views(u) for u in users)

    def _free(self, op: Op) -> None:
        """Forgets what ``op`` was the last to use: stacked experts are large, two stages of them larger."""
        used = [v for v in op.operands if v is not None and v in self.names]
        last = {v for v in used if self.function.users(v)[-1] is op}
        if last:
            names = {self.names[v] for v in last} | {self.placed[v] for v in last if v in self.placed}
            self.lines.append(f"del {', '.join(sorted(names))}")

    def _expression(self, op: Op, operands: list[Any]) -> tuple[str, list[str] | None]:
        """An expression and None, or a kernel's name and its arguments."""
        record = select(op, self.kernels.target)
        if isinstance(record, Inline):
            return record.expression(op, operands), None
        name = self.kernels.function(op, record)
        self.used.add(name)
        if record.in_place is not None:
            self.names.alias(op.results[0], op.operands[record.in_place])
        return name, [
            part
            for value, text in zip(op.operands, operands, strict=True)
            if value is not None
            for part in ([f"{text}.q", f"{text}.scale"] if has_scales(value) else [str(text)])
        ]

    def _assign(self, op: Op, expression: str, args: list[str] | None) -> None:
        fresh = [r for r in op.results if r not in self.names]
        left = ", ".join(self.names.add(r, r.name) for r in fresh)
        head = f"{left} = {expression}" if fresh else expression
        code = [head] if args is None else wrap_call(head, args)
        note = ", ".join(str(r.type) for r in fresh)
        if op.loc is not None and op.loc.line:
            note += f"{'  ' if note else ''}src[{op.loc.short}]"
        self._line(code, prose(note))

    def _line(self, code: list[str], note: str) -> None:
        """A statement with a comment behind it, or before it where there is no room."""
        if note and len(code) == 1 and len(code[0]) + len(note) + 8 <= WIDTH:
            self.lines.append(f"{code[0]}  # {note}")
        else:
            self.lines += [*(f"# {part}" for part in wrap(note, WIDTH - 6)), *code]

    def _loop(self, op: Loop, operands: list[Any]) -> None:
        """The body once for each number; carried tensors are assigned anew, state is changed in place."""
        number = self._number(op)
        left = []
        operands = list(operands)
        for i, (before, after) in enumerate(zip(op.values[: op.carry], op.results, strict=True)):
            if isinstance(before.type, STATE_TYPES):
                self.names.alias(after, before)
                continue
            name = self._successor(op, before, after)
            if name != operands[i]:
                self.lines.append(f"{name} = {operands[i]}")
            operands[i] = name
            left.append(name)
        self.carried.update(self.names[r] for r in op.results)
        self.lines.append(f"for {number} in range({op.range.first}, {op.range.last + 1}):")
        within = f".at({quote_format(f'{op.scope}.', number)})" if op.scope else ""
        args = [number, *operands]
        args += [f"take{within}", f"bind{within}"] if self.load_time else [f"params{within}"]
        assigned = f"{', '.join(left)} = " if left else ""
        self.lines += wrap_call(f"    {assigned}{self.functions[op.callee]}", args)

    def _number(self, op: Loop) -> str:
        """The loop's variable. All loops of one kind share it: none needs it after its end."""
        key = op.range_name
        return (
            self.names[key] if key in self.names else self.names.add(key, self.module[op.callee].args[0].name)
        )

    def _successor(self, op: Op, before: Value, after: Value) -> str:
        """The name of a carried value: its old one, unless something else still needs the old value."""
        if not isinstance(before, Param) and [user for user, _ in self.function.uses(before)] == [op]:
            self.names.alias(after, before)
            return self.names[after]
        return self.names.add(after, after.name)


def has_scales(value: Value) -> bool:
    return isinstance(value.type, TensorType) and value.type.scale is not None


def wrap_call(head: str, args: list[str]) -> list[str]:
    """``head(args)``, on several lines where one would be too long."""
    line = f"{head}({', '.join(args)})"
    if len(line) + 4 <= WIDTH:
        return [line]
    indent = " " * (len(head) - len(head.lstrip()))
    lines = [f"{indent}   "]
    for arg in args:
        if len(lines[-1]) + len(arg) + 6 > WIDTH:
            lines.append(f"{indent}   ")
        lines[-1] += f" {arg},"
    return [f"{head}(", *lines, f"{indent})"]


def describe(function: Function, module: Module, names: list[str]) -> list[str]:
    """The docstring's lines: what runs the function, or what a caller passes (as ``names``) and gets."""
    if function.name == WEIGHTS:
        return ["Binds every parameter that isn't a checkpoint's tensor as it stands."]
    out = ", ".join(str(v.type) for v in function.outputs if not isinstance(v.type, STATE_TYPES))
    if function.name in ENTRIES:
        width = max((len(name) for name in names), default=0)
        given = [
            f"{name:<{width}}  {prose(str(a.type))}" for name, a in zip(names, function.args, strict=True)
        ]
        return [f"Returns {prose(out)}.", "", *given]
    runs = [f"{op.range_name} {op.range}" for _, op in module.callers(function.name) if isinstance(op, Loop)]
    return [f"Runs for {', '.join(runs)}." + (f" Returns {prose(out)}." if out else "")]


def planned_drops(module: Module, target: str) -> dict[str, Drops]:
    """By function, what the memory plan lets go of; nothing for a module that has none."""
    if not is_planned(module):
        return {}
    plans = plan_memory(module, kernel_records(), target).functions
    return {
        name: {i: [v for held in dropped for v in held.names] for i, dropped in plan.drops.items()}
        for name, plan in plans.items()
    }


def emit_python(module: Module, target: str, version: str) -> dict[str, str]:
    """The Python sources of a package, by path."""
    compute = [f for f in module if f.name.split(".")[0] != WEIGHTS]
    loading = [f for f in module if f.name.split(".")[0] == WEIGHTS]
    compute_names, load_names = function_names(compute), function_names(loading)
    model_kernels, load_kernels = (
        Kernels(target, set(compute_names.values())),
        Kernels("cpu", set(load_names.values())),
    )
    sources = {
        "__init__.py": f'"""{prose(module.name)} for {target}, by moec {version}: see model.py."""\n',
        "model.py": _module_source(
            "python/model.py.jinja", module, compute, compute_names, model_kernels, target, version
        ),
        "weights.py": _module_source(
            "python/weights.py.jinja", module, loading, load_names, load_kernels, target, version
        ),
        "kernels/__init__.py": render_python(
            "python/kernels_init.py.jinja",
            files={
                stem: [n for n in model_kernels.names if _defines(parts, n)]
                for stem, parts in model_kernels.files.items()
            },
        ),
    }
    return sources | model_kernels.sources()


def _defines(parts: list[str], name: str) -> bool:
    return any(f"def {name}(" in part for part in parts)


def _module_source(
    template: str,
    module: Module,
    functions: list[Function],
    names: dict[str, str],
    kernels: Kernels,
    target: str,
    version: str,
) -> str:
    # Callees first, so that the file reads from the parts to the whole.
    order = sorted(functions, key=lambda f: f.name in ENTRIES)
    inner_first = [f for f in order if f.name not in ENTRIES][::-1] + [f for f in order if f.name in ENTRIES]
    for function in inner_first:  # all kernels get their names before any value does
        for op in function.ops:
            if isinstance(op, Loop | Bind):
                emits_nothing(op)
                continue
            record = select(op, kernels.target)
            if isinstance(record, Templated | TritonKernel | CudaKernel):
                kernels.function(op, record)
    drops = planned_drops(module, target) if kernels.target == target else {}
    emitters = [FunctionEmitter(f, module, kernels, names, drops.get(f.name)) for f in inner_first]
    emitted = [e.emit() for e in emitters]
    used = sorted(set().union(*(e.used for e in emitters)) if emitters else [])
    parts = [part for file in kernels.files.values() for part in file]
    return render_python(
        template,
        name=prose(module.name),
        target=target,
        version=version,
        functions=emitted,
        kernels=used,
        parts=parts,
    )


def emitted_by(module: Module, target: str) -> dict[str, list[str]]:
    """By family of kernels (``triton``, ``torch``, ...), the names of the ops that they emit in a step."""
    found: dict[str, set[str]] = {}
    for function in module:
        if function.name.split(".")[0] != WEIGHTS:
            for op in function.ops:
                if not isinstance(op, Loop | Bind):
                    found.setdefault(select(op, target).family, set()).add(op.name)
    return {family: sorted(ops) for family, ops in sorted(found.items())}


def function_names(functions: list[Function]) -> dict[str, str]:
    """Each IR function's name in Python; what callers call keeps its own."""
    names = Names(PYTHON)
    entries_first = sorted(functions, key=lambda f: f.name not in ENTRIES)
    return {f.name: names.add(f, f.name.removeprefix(f"{WEIGHTS}.")) for f in entries_first}
