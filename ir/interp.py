"""The reference interpreter: runs a module op by op through each op's ``reference``.

It is slow and plain on purpose: it judges the code generators and the rewrites, and shares nothing with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch

from moec.errors import BadInput, WeightsMisshapen, WeightsMissing
from moec.ir.graph import Function, Module
from moec.ir.op import Op, Param, Value
from moec.ir.ops.attention import PagedCache
from moec.ir.ops.control import Loop
from moec.ir.ops.weights import Bind, Stack
from moec.ir.scaled import Scaled
from moec.ir.types import CacheType, Dim, TensorType, Type, as_dim, format_block, format_dim

Observer = Callable[[str, Op, str, tuple[Any, ...]], None]
Alter = Callable[[Op, str, list[Any], tuple[Any, ...]], tuple[Any, ...]]


class Interpreter:
    """``weights`` are the checkpoint's tensors by name; what ``@weights`` makes of them is computed here.

    ``observe(function, op, scope, results)`` is called after every op. Before it,
    ``alter(op, scope, operands, results)`` may give an op other results: the routing of another run, say.
    """

    def __init__(
        self,
        module: Module,
        weights: Mapping[str, torch.Tensor],
        observe: Observer | None = None,
        alter: Alter | None = None,
    ) -> None:
        self.module, self.observe, self.alter = module, observe, alter
        self._checkpoint = weights
        # Load-time functions read the checkpoint only, whatever has been bound before them.
        self._bound: dict[str, torch.Tensor | Scaled] = {}
        self._made: dict[str, torch.Tensor | Scaled] = {}
        if "weights" in module:
            with torch.no_grad():
                self._run(module["weights"], (), "", {})
        self._bound = self._made

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
        if type.rank:  # of these bytes e4m3, fp32 and bf16 are all NaN
            empty = torch.full(shape, 0xFF, dtype=type.dtype.torch)
        else:
            empty = torch.full(shape, torch.nan, dtype=type.dtype.torch)
        return PagedCache(type.page, dict.fromkeys(range(layers), empty), type)

    def _run(
        self, function: Function, args: tuple[Any, ...], scope: str, symbols: dict[Any, int]
    ) -> tuple[Any, ...]:
        values: dict[Value, Any] = {}
        symbols = dict(symbols)
        for formal, actual in zip(function.args, args, strict=True):
            _learn(formal, actual, symbols)
        for formal, actual in zip(function.args, args, strict=True):
            _unify(formal, actual, symbols)
            values[formal] = actual
        for op in function.ops:
            operands = [None if v is None else self._value(v, op, values, scope) for v in op.operands]
            results = self._step(op, operands, scope, symbols)
            if self.alter is not None:
                results = self.alter(op, scope, operands, results)
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
                carried = self._run(body, (number, *carried, *invariants), scope + op.prefix(number), {})
            return carried
        if isinstance(op, Bind):
            self._made[scope + op.param] = operands[0]
            return ()
        attrs = {key: _resolve(value, symbols) for key, value in op.attrs.items()}
        results = type(op).reference(*operands, **attrs)
        return results if type(results) is tuple else (results,)

    def _value(self, value: Value, op: Op | None, values: dict[Value, Any], scope: str) -> Any:
        if not isinstance(value, Param):
            return values[value]
        if isinstance(op, Stack):
            return [self._param(scope + value.name.replace("*", str(n)), value.type) for n in op.experts]
        return self._param(scope + value.name, value.type)

    def _param(self, name: str, type: Type) -> torch.Tensor | Scaled:
        tensor = self._bound.get(name)
        if tensor is None:
            if name not in self._checkpoint:
                raise WeightsMissing(f"no weight is called {name}")
            tensor = self._checkpoint[name]
        wanted = _tensor_type(type)
        if isinstance(tensor, Scaled) or wanted.scale:
            if not _is_scaled(tensor, wanted) or tuple(tensor.q.shape) != wanted.shape:  # type: ignore[union-attr]
                raise WeightsMisshapen(f"{name} is {_found(tensor)} but {type} is wanted")
            return tensor
        if tuple(tensor.shape) != wanted.shape:
            raise WeightsMisshapen(f"{name} is {list(tensor.shape)} but {type} is wanted")
        if tensor.dtype != wanted.dtype.torch and not (
            _is_plain(tensor.dtype) and _is_plain(wanted.dtype.torch)
        ):
            raise WeightsMisshapen(f"{name} is {tensor.dtype}, which can't be read as {type}")
        return tensor.to(wanted.dtype.torch)


def _is_plain(dtype: torch.dtype) -> bool:
    """Whether numbers of it mean themselves: quantised ones mean nothing without their scales."""
    return dtype.is_floating_point and dtype.itemsize > 1


def _tensor_type(type: Type) -> TensorType:
    if not isinstance(type, TensorType):
        raise BadInput(f"a parameter is a tensor, not {type}")
    return type


def _resolve(value: Any, symbols: dict[Any, int]) -> Any:
    """A shape with its symbols replaced; anything else as it is."""
    if isinstance(value, tuple) and any(isinstance(v, sympy.Expr) for v in value):
        sizes = tuple(as_dim(sympy.sympify(v).subs(symbols)) for v in value)
        for size in sizes:
            if not isinstance(size, int):
                raise BadInput(f"nothing says how large {size} is")
        return sizes
    return value


def _learn(value: Value, actual: Any, symbols: dict[Any, int]) -> None:
    """Takes what an argument's axes of one bare symbol say, so that ``B+1`` can come before ``B``."""
    actual = actual.q if isinstance(actual, Scaled) else actual
    if isinstance(value.type, TensorType) and isinstance(actual, torch.Tensor):
        for dim, size in zip(value.type.shape, actual.shape, strict=False):
            if isinstance(dim, sympy.Symbol):
                symbols.setdefault(dim, size)


def _unify(value: Value, actual: Any, symbols: dict[Any, int]) -> None:
    """Checks a run-time value against its type, learning the symbols it's the first to show."""
    type = value.type
    if isinstance(type, CacheType):
        _check_cache(value, type, actual)
    if not isinstance(type, TensorType):
        return
    if type.scale:
        if not _is_scaled(actual, type):
            raise BadInput(f"{value.text} is {type} but got {_found(actual)}")
        actual = actual.q
    if not isinstance(actual, torch.Tensor) or actual.dtype != type.dtype.torch or actual.dim() != type.rank:
        raise BadInput(f"{value.text} is {type} but got {_found(actual)}")
    for dim, size in zip(type.shape, actual.shape, strict=True):
        if not _fits(dim, size, symbols):
            known = ", ".join(f"{s} = {symbols[s]}" for s in sorted(symbols, key=str))
            raise BadInput(
                f"{value.text} is {type} but got {list(actual.shape)}" + (f"; {known}" if known else "")
            )


def _is_scaled(actual: Any, type: TensorType) -> bool:
    """Whether a run-time value is a pair as ``type`` says; its sizes decide how many scales there are."""
    if not isinstance(actual, Scaled) or actual.block != type.scale or actual.scale.dtype != torch.float32:
        return False
    if actual.q.dtype != type.dtype.torch or actual.q.dim() != type.rank:
        return False
    return tuple(actual.scale.shape) == type.with_(shape=tuple(actual.q.shape), groups=None).scale_shape


def _found(actual: Any) -> str:
    if isinstance(actual, Scaled):
        scales = f"scales {list(actual.scale.shape)} of {format_block(actual.block)}"
        return f"{_found(actual.q)} with {scales}"
    return f"{actual.dtype} {list(actual.shape)}" if isinstance(actual, torch.Tensor) else repr(actual)


def _check_cache(value: Value, type: CacheType, actual: Any) -> None:
    if not isinstance(actual, PagedCache):
        raise BadInput(f"{value.text} is {type} but got {actual!r}")
    if type != actual.type and (type.quantised or (actual.type is not None and actual.type.quantised)):
        raise BadInput(f"{value.text} is {type} but got a {actual.type or 'cache of plain entries'}")
    for layer in actual.layers.values():
        if (actual.page, tuple(layer.shape[1:]), layer.dtype) != (type.page, type.entry, type.dtype.torch):
            found = f"pages of {actual.page} entries {layer.dtype} {list(layer.shape[1:])}"
            raise BadInput(f"{value.text} is {type} but got {found}")


def _fits(dim: Dim, size: int, symbols: dict[Any, int]) -> bool:
    """Whether ``dim`` may be ``size``; if one symbol of it is still unknown, that is learned from it."""
    if isinstance(dim, int):
        return dim == size
    if isinstance(dim, sympy.Symbol):  # most are; sympy would take its time to say so
        return symbols.setdefault(dim, size) == size
    left = dim.subs({s: symbols[s] for s in dim.free_symbols if s in symbols})
    if left.free_symbols:
        if len(left.free_symbols) > 1:
            raise BadInput(f"{format_dim(dim)} has more than one size that nothing says")
        (unknown,) = left.free_symbols
        if left.has(sympy.floor):
            raise BadInput(f"{format_dim(dim)} alone doesn't say how large {unknown} is")
        solved = sympy.solve(left - size, unknown)  # whole and not negative, as all symbols are
        if not solved:
            return False
        symbols[unknown] = int(solved[0])
        left = left.subs(symbols)
    return int(left) == size
