"""Weights in fp8, as load-time IR: quantised when they are loaded, or a native checkpoint's own bytes.

A native checkpoint's weight is ``dequant(scaled(q, scale_inv))``, perhaps joined, cut or stacked by earlier
passes. Its scaled form is the same ops on the scaled values: no value is rounded a second time. Where one of
them would cut through a block, the scales are first repeated for smaller blocks (``refine``): exact."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from moec.ir import Function, Module, Op, TensorType, Value
from moec.ir.builder import stem
from moec.ir.op import OpResult
from moec.ir.ops.scaled import scaled_tensor
from moec.ir.types import Dim
from moec.passes.loading import emit

# Load-time ops that scaled values pass through.
MOVES = ("concat", "split", "reshape")


def parts(value: Value) -> list[Value]:
    """What ``value`` is put together from: native values (results of dequant) and plain ones."""
    if not isinstance(value, OpResult):
        return [value]
    if value.op.name in MOVES or (value.op.name == "cast" and is_native(value.op.operands[0])):
        return [p for v in value.op.operands if v is not None for p in parts(v)]
    return [value]


def is_native(value: Value | None) -> bool:
    """Whether anything of ``value`` was stored in fp8 with scales."""
    return value is not None and any(_native(p) for p in parts(value))


def all_native(value: Value) -> bool:
    return all(map(_native, parts(value)))


def stored_formats(value: Value) -> set[str]:
    """The formats of the scales that the native parts of ``value`` were stored with."""
    return {_format(part) for part in parts(value) if _native(part)}


def _format(value: Value) -> str:
    """Of the scales that ``value`` was stored with: the op that reads them says it."""
    while isinstance(value, OpResult) and value.op.name != "scaled":
        value = _first(value.op)
    return str(value.op.attrs["scale_fmt"]) if isinstance(value, OpResult) else "fp32"


def _native(value: Value) -> bool:
    return isinstance(value, OpResult) and value.op.name == "dequant"


def _first(op: Op) -> Value:
    (value,) = (v for v in op.operands if v is not None)
    return value


def _stored(value: Value) -> Any:
    """The scaled value that a native one was read from."""
    if not isinstance(value, OpResult):
        raise TypeError(f"{value.text} was not stored in fp8")
    return _first(value.op)


class Quantiser:
    """Writes the scaled form of values of one holder's load-time function."""

    def __init__(self, module: Module, holder: Function, block: tuple[int, ...], scale: str) -> None:
        self.module, self.holder, self.block, self.scale = module, holder, block, scale

    def scaled(self, value: Value) -> Value:
        """``value`` with scales: native parts as they are stored, others quantised (in a native neighbour's
        blocks, where it has one)."""
        if not is_native(value):
            return self._quant(value, self.block)
        native = next(p for p in parts(value) if _native(p))
        return self._scaled(value, _stored(native).type.scale or ())

    def _scaled(self, value: Value, block: tuple[int, ...]) -> Value:
        if not isinstance(value, OpResult) or not is_native(value):
            return self._quant(value, block)
        op = value.op
        if op.name == "dequant":
            return _stored(value)
        if op.name == "cast":
            return self._scaled(_first(op), block)
        operands = [self._scaled(v, block) for v in op.operands if v is not None]
        return self._emit(op.name, self._fitting(op, operands), op, f"{value.name}.q")[value.index]

    def _quant(self, value: Value, block: tuple[int, ...]) -> Value:
        attrs = {"block": block, "scale": self.scale}
        name = stem(value.name).removesuffix(".weight").rpartition(".")[2].lstrip("*0123456789") or "w"
        return emit(self.module, self.holder, "quant", [value], attrs, f"{name}.q").results[0]

    def _emit(self, name: str, operands: Sequence[Value], like: Op, out: str) -> tuple[OpResult, ...]:
        return emit(self.module, self.holder, name, list(operands), dict(like.attrs), out).results

    def _fitting(self, op: Op, operands: list[Value]) -> list[Value]:
        """``operands`` in the largest blocks in which ``op`` cuts and joins scaled values between blocks."""
        types = [scaled_tensor(op, v) for v in operands]
        block = _between_cuts(op, types, tuple(map(math.gcd, *(t.scale or () for t in types))))
        return [
            v if t.scale == block else self._refine(v, block) for v, t in zip(operands, types, strict=True)
        ]

    def _refine(self, value: Value, block: tuple[int, ...]) -> Value:
        return emit(self.module, self.holder, "refine", [value], {"block": block}, value.name).results[0]


def _between_cuts(op: Op, types: list[TensorType], block: tuple[int, ...]) -> tuple[int, ...]:
    """``block``, smaller where ``op`` would cut or join within one; 0, a whole axis, is divided by all."""
    x, sizes = types[0], list(block)
    first = x.rank - len(block)  # the first axis that has blocks
    if op.name == "reshape":
        axis = x.rank - 1 - _kept(x.shape, op.attrs["shape"])
        if axis >= first:
            new = op.attrs["shape"][axis - x.rank]
            sizes[axis - first] = math.gcd(block[axis - first], int(x.shape[axis]), int(new))
            sizes[: axis - first] = [1] * (axis - first)
        return tuple(sizes)
    axis = op.attrs["axis"] % x.rank
    if axis >= first and op.name == "split" and block[axis - first]:
        sizes[axis - first] = math.gcd(block[axis - first], *op.attrs["sizes"][:-1])
    elif axis >= first and op.name == "concat" and len(types) > 1:
        sizes[axis - first] = math.gcd(block[axis - first], *(int(t.shape[axis]) for t in types[:-1]))
    return tuple(sizes)


def _kept(old: Sequence[Dim], new: Sequence[Dim]) -> int:
    """How many axes from the end stay as they are."""
    pairs = zip(reversed(old), reversed(new), strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(old), len(new)))
