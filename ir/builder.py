"""How a block writes IR: ``b.rms_norm(x, b.param("norm.weight", (H,)), eps=1e-6, out="x")``.

There is a method for each op of the registry: operands by position, attributes by keyword, ``out`` names the
results.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moec.errors import SourceLoc, SpecError, nearest
from moec.ir.attrs import Range
from moec.ir.graph import Function, Module
from moec.ir.op import Param, Value, op_class
from moec.ir.types import STATE_TYPES, Dim, DType, IndexType, TensorType, Type

_HERE = str(Path(__file__).parent) + os.sep


def caller() -> SourceLoc:
    """The nearest line outside this folder: the one in the block that asked for an op."""
    frame = sys._getframe(1)
    while frame.f_back is not None and (
        frame.f_code.co_filename.startswith(_HERE)
        or frame.f_code.co_filename.startswith("<")
        or frame.f_code.co_filename.endswith("contextlib.py")
    ):
        frame = frame.f_back
    owner = frame.f_locals.get("self")
    where = frame.f_code.co_name if owner is None else f"{type(owner).__name__}.{frame.f_code.co_name}"
    return SourceLoc(frame.f_code.co_filename, frame.f_lineno, where)


def stem(name: str) -> str:
    """A value's name without the numbers that made it unique in its function: ``h`` of ``h.2``."""
    return re.sub(r"(?:\.\d+)+$", "", name)


class Context:
    """Values that blocks share without handing them on: rotary tables, offsets, the cache, the layer's
    number.

    A body that asks for a value of the function around it receives it as one more invariant. ``inputs`` are
    arguments that the outermost function takes once they are asked for.
    """

    def __init__(self, builder: Builder, outer: Context | None, inputs: Mapping[str, Type]) -> None:
        self.builder, self.outer, self.inputs = builder, outer, inputs
        self.captured: list[Value] = []
        self._values: dict[str, Value] = {}

    @property
    def root(self) -> Context:
        """The outermost function's."""
        return self if self.outer is None else self.outer.root

    def __contains__(self, name: str) -> bool:
        return name in self._values or name in self.inputs or (self.outer is not None and name in self.outer)

    def __getitem__(self, name: str) -> Value:
        if name not in self._values:
            self._values[name] = self._from_outside(name)
        return self._values[name]

    def __setitem__(self, name: str, value: Value) -> None:
        self._values[name] = value

    def _from_outside(self, name: str) -> Value:
        if name in self.inputs:
            return self.builder.function.add_argument(name, self.inputs[name])
        if self.outer is None:
            known = [*self._values, *self.inputs]
            raise SpecError(f"the context has no {name}{nearest(name, known)}", loc=caller())
        value = self.outer[name]
        if isinstance(value.type, STATE_TYPES):
            raise SpecError(f"{name} is state: a loop must carry it into its body", loc=caller())
        self.captured.append(value)
        return self.builder.function.add_argument(stem(value.name), value.type)

    def succeed(self, before: Sequence[Value], after: Sequence[Value]) -> None:
        """From now on a name of ``before[i]`` stands for ``after[i]``."""
        successor = dict(zip(before, after, strict=True))
        self._values = {name: successor.get(value, value) for name, value in self._values.items()}

    def enter(self, operands: Sequence[Value], arguments: Sequence[Value], outer: Context) -> None:
        """What a loop passes by hand keeps its name inside."""
        inside = dict(zip(operands, arguments, strict=False))
        for name, value in outer._values.items():
            if value in inside:
                self._values[name] = inside[value]


class Builder:
    """Appends ops to one function.

    ``dtype`` is the model's: what parameters get unless another is asked for. ``module`` receives loop
    bodies.
    """

    def __init__(
        self,
        module: Module,
        function: Function,
        dtype: DType,
        scope: str = "",
        outer: Context | None = None,
        inputs: Mapping[str, Type] | None = None,
    ) -> None:
        self.module, self.function, self.dtype = module, function, dtype
        self.context = Context(self, outer, inputs or {})
        self._scope = scope

    def __getattr__(self, op_name: str) -> Callable[..., Any]:
        if op_name.startswith("_"):
            raise AttributeError(op_name)
        cls = op_class(op_name)

        def build(*operands: Value | None, out: str | Sequence[str] = (), **attrs: Any) -> Any:
            op = cls(operands, attrs, caller())
            names = (out,) if isinstance(out, str) else tuple(out)
            results = self.function.create(op, names).results
            return results[0] if len(results) == 1 else results

        return build

    @contextmanager
    def scope(self, prefix: str) -> Iterator[Builder]:
        """Within it, parameter names start with ``prefix.``; an empty one changes nothing."""
        before = self._scope
        self._scope = f"{before}{prefix}." if prefix else before
        try:
            yield self
        finally:
            self._scope = before

    def param(self, name: str, shape: Sequence[Dim], dtype: DType | None = None) -> Param:
        """The parameter ``$scope.name``, the same each time it is asked for."""
        return self.function.param(
            self._scope + name, TensorType(dtype or self.dtype, tuple(shape)), caller()
        )

    def project(self, x: Value, name: str, rows: Dim, *, bias: bool = False, out: str = "") -> Value:
        """x [..., K] to [..., rows] by the parameters ``{name}.weight`` [rows, K] and ``{name}.bias``."""
        if not isinstance(x.type, TensorType):
            raise SpecError(f"{x.text} is {x.type}, not a tensor", loc=caller())
        weight = self.param(f"{name}.weight", (rows, x.type.shape[-1]))
        y: Value = self.linear(x, weight, self.param(f"{name}.bias", (rows,)) if bias else None, out=out)
        return y

    def cast(self, x: Value, to: DType, out: str = "") -> Value:
        """x in dtype ``to``; x itself where it has it already."""
        if isinstance(x.type, TensorType) and x.type.dtype == to:
            return x
        value: Value = self.__getattr__("cast")(x, to=to, out=out or x.name)
        return value

    def loop(
        self,
        kind: str,
        numbers: Range,
        scope: str,
        name: str,
        carried: Sequence[Value],
        invariants: Sequence[Value],
        body: Callable[..., Sequence[Value]],
        out: Sequence[str] = (),
    ) -> tuple[Value, ...]:
        """A ``call`` or ``for_each`` of a new function @``name``.

        ``body(b, index, *carried, *invariants)`` writes it, once, and returns the carried values' successors.
        """
        operands = (*carried, *invariants)
        index = op_class(kind).range_name[:-1]  # type: ignore[attr-defined]
        types: list[tuple[str, Type]] = [(index, IndexType()), *((stem(v.name), v.type) for v in operands)]
        inner = Function(name, types)
        self.module.add(inner)
        b = Builder(self.module, inner, self.dtype, outer=self.context)
        b.context.enter(operands, inner.args[1:], self.context)
        outputs = tuple(body(b, *inner.args))
        for before, after in zip(carried, outputs, strict=True):
            if before.type != after.type:
                raise SpecError(
                    f"{name}: takes {before.name} as {before.type} but returns it as {after.type}",
                    loc=caller(),
                )
        inner.ret(*outputs)
        return self.run(kind, inner, numbers, scope, carried, (*invariants, *b.context.captured), out)

    def run(
        self,
        kind: str,
        body: Function,
        numbers: Range,
        scope: str,
        carried: Sequence[Value],
        invariants: Sequence[Value],
        out: Sequence[str] = (),
    ) -> tuple[Value, ...]:
        """A ``call`` or ``for_each`` of a body that exists."""
        cls = op_class(kind)
        attrs = {"callee": body.name, "carry": len(carried), "scope": (self._scope + scope).rstrip(".")}
        attrs[cls.range_name] = numbers  # type: ignore[attr-defined]
        op = cls((*carried, *invariants), attrs, caller())
        results = self.function.create(op, out or [stem(v.name) for v in carried]).results
        self.context.succeed(carried, results)
        return results
