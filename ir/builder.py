"""How a block writes IR: ``b.rms_norm(x, b.param("norm.weight", (H,)), eps=1e-6, out="x")``.

There is a method for each op of the registry: operands by position, attributes by keyword, ``out`` names the results.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moec.errors import SourceLoc, SpecError
from moec.ir.attrs import Range
from moec.ir.graph import Function, Module
from moec.ir.op import Param, Value, op_class
from moec.ir.types import Dim, DType, IndexType, TensorType, Type

_HERE = str(Path(__file__).parent)


def caller() -> SourceLoc:
    """The nearest line outside this folder: the one in the block that asked for an op."""
    frame = sys._getframe(1)
    while frame.f_back is not None and (
        str(Path(frame.f_code.co_filename).parent).startswith(_HERE)
        or frame.f_code.co_filename.startswith("<")
        or frame.f_code.co_filename.endswith("contextlib.py")
    ):
        frame = frame.f_back
    owner = frame.f_locals.get("self")
    where = frame.f_code.co_name if owner is None else f"{type(owner).__name__}.{frame.f_code.co_name}"
    return SourceLoc(frame.f_code.co_filename, frame.f_lineno, where)


class Builder:
    """Appends ops to one function.

    ``dtype`` is the model's: what parameters get unless another is asked for. ``module`` receives loop bodies.
    """

    def __init__(self, module: Module, function: Function, dtype: DType, scope: str = "") -> None:
        self.module, self.function, self.dtype = module, function, dtype
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
        """Within it, parameter names start with ``prefix.``"""
        before = self._scope
        self._scope = f"{before}{prefix}."
        try:
            yield self
        finally:
            self._scope = before

    def param(self, name: str, shape: Sequence[Dim], dtype: DType | None = None) -> Param:
        """The parameter ``$scope.name``, the same each time it is asked for."""
        return self.function.param(
            self._scope + name, TensorType(dtype or self.dtype, tuple(shape)), caller()
        )

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
        types: list[tuple[str, Type]] = [(f"{op_class(kind).range_name[:-1]}", IndexType())]  # type: ignore[attr-defined]
        types += [(v.name, v.type) for v in operands]
        inner = Function(name, types)
        self.module.add(inner)
        outputs = tuple(body(Builder(self.module, inner, self.dtype), *inner.args))
        for before, after in zip(carried, outputs, strict=True):
            if before.type != after.type:
                raise SpecError(
                    f"{name}: takes {before.name} as {before.type} but returns it as {after.type}",
                    loc=caller(),
                )
        inner.ret(*outputs)
        return self.run(kind, inner, numbers, scope, carried, invariants, out)

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
        attrs = {"callee": body.name, "carry": len(carried), "scope": self._scope + scope}
        attrs[cls.range_name] = numbers  # type: ignore[attr-defined]
        op = cls((*carried, *invariants), attrs, caller())
        return self.function.create(op, out or [v.name for v in carried]).results
