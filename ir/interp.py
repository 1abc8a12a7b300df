"""The reference interpreter: runs a module op by op through each op's ``reference``.

It is slow and plain on purpose: it judges the code generators and the rewrites, and shares nothing with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch

from moec.errors import BadInput, WeightsMissing, WeightsMisshapen
from moec.ir.graph import Function, Module
from moec.ir.op import Op, Param, Value
from moec.ir.ops.attention import PagedCache
from moec.ir.ops.control import Loop
from moec.ir.ops.weights import Bind, Stack
from moec.ir.types import CacheType, Dim, TensorType, Type

Observer = Callable[[str, Op, str, tuple[Any, ...]], None]


class Interpreter:
    """``weights`` are the checkpoint's tensors by name; what ``@weights`` makes of them is computed here.

    ``observe(function, op, scope, results)`` is called after every op.
    """

    def __init__(
        self, module: Module, weights: Mapping[str, torch.Tensor], observe: Observer | None = None
    ) -> None:
        self.module, self.observe = module, observe
        self._checkpoint = weights
        self._bound: dict[str, torch.Tensor] = {}
        if "weights" in module:
            self._run(module["weights"], (), "", {})

    def run(self, function: str, *args: Any) -> tuple[Any, ...]:
        """The function's outputs. Raises BadInput where an argument doesn't fit its type."""
        body = self.module[function]
        if len(args) != len(body.args):
            raise BadInput(f"@{function} takes {len(body.args)} arguments, got {len(args)}")
        with torch.no_grad():
            return self._run(body, args, "", {})

    def new_cache(self, type: CacheType, layers: int, pages: int) -> PagedCache:
        """An empty cache, filled with NaN: what isn't written must not be read."""
        shape = (pages * type.page, *type.entry)
        empty = torch.full(shape, torch.nan, dtype=type.dtype.torch)
        return PagedCache(type.page, {layer: empty for layer in range(layers)})

    def _run(
        self, function: Function, args: tuple[Any, ...], scope: str, symbols: dict[Any, int]
    ) -> tuple[Any, ...]:
        values: dict[Value, Any] = {}
        symbols = dict(symbols)
        for formal, actual in zip(function.args, args):
            _unify(formal, actual, symbols)
            values[formal] = actual
        for op in function.ops:
            operands = [None if v is None else self._value(v, op, values, scope) for v in op.operands]
            results = self._step(op, operands, scope, symbols)
            for res, got in zip(op.results, results, strict=True):
                _unify(res, got, symbols)
                values[res] = got
            if self.observe is not None:
                self.observe(function.name, op, scope, results)
        return tuple(self._value(v, None, values, scope) for v in function.outputs)

    def _step(self, op: Op, operands: list[Any], scope: str, symbols: dict[Any, int]) -> tuple[Any, ...]:
        if isinstance(op, Loop):
            carried, invariants = tuple(operands[: op.carry]), tuple(operands[op.carry :])
            body = self.module[op.callee]
            for number in op.range:
                inner = scope + op.scope.replace("*", str(number), 1) + "."
                carried = self._run(body, (number, *carried, *invariants), inner, {})
            return carried
        if isinstance(op, Bind):
            self._bound[scope + op.param] = operands[0]
            return ()
        attrs = {key: _resolve(value, symbols) for key, value in op.attrs.items()}
        results = type(op).reference(*operands, **attrs)
        return results if isinstance(results, tuple) else (results,)

    def _value(self, value: Value, op: Op | None, values: dict[Value, Any], scope: str) -> Any:
        if not isinstance(value, Param):
            return values[value]
        if isinstance(op, Stack):
            return [self._param(scope + value.name.replace("*", str(n)), value.type) for n in op.experts]
        return self._param(scope + value.name, value.type)

    def _param(self, name: str, type: Type) -> torch.Tensor:
        tensor = self._bound.get(name)
        if tensor is None:
            if name not in self._checkpoint:
                raise WeightsMissing(f"no weight is called {name}")
            tensor = self._checkpoint[name]
        wanted = _tensor_type(type)
        if tuple(tensor.shape) != wanted.shape:
            raise WeightsMisshapen(f"{name} is {list(tensor.shape)} but {type} is wanted")
        return tensor.to(wanted.dtype.torch)


def _tensor_type(type: Type) -> TensorType:
    if not isinstance(type, TensorType):
        raise BadInput(f"a parameter is a tensor, not {type}")
    return type


def _resolve(value: Any, symbols: dict[Any, int]) -> Any:
    """A shape with its symbols replaced; anything else as it is."""
    if isinstance(value, tuple) and any(isinstance(v, sympy.Expr) for v in value):
        return tuple(v if isinstance(v, int) else int(v.subs(symbols)) for v in value)
    return value


def _unify(value: Value, actual: Any, symbols: dict[Any, int]) -> None:
    """Checks a run-time value against its type, learning the symbols it's the first to show."""
    type = value.type
    if not isinstance(type, TensorType):
        return
    if not isinstance(actual, torch.Tensor) or actual.dtype != type.dtype.torch or actual.dim() != type.rank:
        found = f"{actual.dtype} {list(actual.shape)}" if isinstance(actual, torch.Tensor) else repr(actual)
        raise BadInput(f"{value.text} is {type} but got {found}")
    for dim, size in zip(type.shape, actual.shape):
        if _size(dim, size, symbols) != size:
            raise BadInput(f"{value.text} is {type} but got {list(actual.shape)}, with {symbols}")


def _size(dim: Dim, size: int, symbols: dict[Any, int]) -> int:
    if isinstance(dim, int):
        return dim
    if isinstance(dim, sympy.Symbol):
        return symbols.setdefault(dim, size)
    left = dim.subs(symbols)
    free = left.free_symbols
    if len(free) == 1:  # B+1 met before B
        unknown = free.pop()
        solved = sympy.solve(left - size, unknown)
        if solved:
            symbols[unknown] = int(solved[0])
            return size
    return int(left)
