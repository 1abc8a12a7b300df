"""Costs in numbers: what each op and function takes on a device, at given sizes, with routers as assumed.

An op takes max(bytes / bandwidth, FLOPs / the rate of their dtype); a function the sum of its ops: nothing is
taken to hide behind anything else. It is a floor, launches aside, which are counted beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from moec.errors import BadOption
from moec.ir.cost import expert_slots
from moec.ir.devices import Device
from moec.ir.graph import Module
from moec.ir.op import Op
from moec.ir.ops.control import Loop
from moec.ir.routing import Routing, Uniform
from moec.ir.types import TensorType, f32


@dataclass(frozen=True)
class Price:
    """FLOPs, bytes, launches, and seconds by the roofline."""

    flops: float = 0.0
    bytes: float = 0.0
    launches: int = 0
    seconds: float = 0.0

    def __add__(self, other: Price) -> Price:
        return Price(
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.launches + other.launches,
            self.seconds + other.seconds,
        )

    def scaled(self, times: float, launches: int) -> Price:
        """That of ``times`` runs, of which each of ``launches`` launches its kernels, if only for no rows."""
        return Price(self.flops * times, self.bytes * times, self.launches * launches, self.seconds * times)


@dataclass
class Costs:
    """What the ops and functions of a module cost with ``sizes``, numbers by symbol, under ``routing``."""

    module: Module
    device: Device
    sizes: Mapping[str, float]
    routing: Routing = field(default_factory=Uniform)
    _functions: dict[str, Price] = field(default_factory=dict)
    _ops: dict[Op, Price] = field(default_factory=dict)

    def op(self, op: Op) -> Price:
        """An op's own, or all runs of a loop's body. Raises BadOption where a symbol has no number."""
        if op not in self._ops:
            self._ops[op] = self._loop(op) if isinstance(op, Loop) else self._own(op)
        return self._ops[op]

    def _own(self, op: Op) -> Price:
        if self._idle(op):
            return Price(launches=op.launches)
        cost = op.cost()
        flops, moved = self.number(cost.flops), self.number(cost.bytes)
        return Price(flops, moved, op.launches, self.seconds(op, flops, moved))

    def _idle(self, op: Op) -> bool:
        """Whether nothing comes of ``op``, as of a part of the batch that is empty: nothing need move."""
        types = [r.type for r in op.results]
        tensors = [t for t in types if isinstance(t, TensorType)]
        empty = all(any(self.number(d) == 0 for d in t.shape) for t in tensors)
        return bool(types) and len(tensors) == len(types) and empty

    def seconds(self, op: Op, flops: float, moved: float) -> float:
        return max(moved / self.device.bandwidth, flops / self.device.flops_of(dtype_of(op)))

    def function(self, name: str) -> Price:
        """One run of a function, with all that it runs."""
        if name not in self._functions:
            total = Price()
            for op in self.module[name].ops:
                total += self.op(op)
            self._functions[name] = total
        return self._functions[name]

    def _loop(self, op: Loop) -> Price:
        if op.callee not in self.module:
            return Price()
        running, inner = self.runs(op)
        return inner.function(op.callee).scaled(running, len(op.range))

    def runs(self, op: Loop) -> tuple[float, Costs]:
        """How often a loop's body has something to do, and what it costs then: experts share the rows."""
        chosen = expert_slots(self.module[op.callee])
        if chosen is None:
            return len(op.range), self
        tokens, k = (self.number(d) for d in chosen.id.type.shape)
        running = self.routing.active(len(op.range), int(k), tokens)
        rows = tokens * k / running if running else 0.0
        return running, replace(self, sizes={**self.sizes, chosen.rows: rows}, _functions={}, _ops={})

    def number(self, expr: Any) -> float:
        """The value of a size or cost."""
        if isinstance(expr, int | float):
            return expr
        if expr.is_Number:
            return int(expr) if expr.is_Integer else float(expr)
        if expr.is_Symbol:
            if expr.name not in self.sizes:
                raise BadOption(f"no number is given for {expr.name}: --at {expr.name}=...")
            return self.sizes[expr.name]
        args = [self.number(a) for a in expr.args]
        if expr.func.__name__ == "active":
            return self.routing.active(int(args[0]), int(args[1]), args[2])
        return float(_FUNCTIONS[expr.func.__name__](args))


_FUNCTIONS: dict[str, Any] = {
    "Add": sum,
    "Mul": math.prod,
    "Pow": lambda args: 0.0 if args[0] == 0 and args[1] < 0 else args[0] ** args[1],  # of no sequences
    "floor": lambda args: math.floor(args[0]),
    "ceiling": lambda args: math.ceil(args[0]),
    "Min": min,
    "Max": max,
}


def dtype_of(op: Op) -> str:
    """The dtype at whose rate an op computes: a product's that of its first operand, all others fp32."""
    first = op.operands[0] if op.products else None
    return str(first.type.dtype) if first is not None and isinstance(first.type, TensorType) else str(f32)


@dataclass(frozen=True)
class Runs:
    """A function within a run of an entry.

    ``working`` is how often it has something to do (not an expert without rows), ``launched`` how often it
    runs at all; ``costs`` has the sizes of one such run.
    """

    name: str
    working: float
    launched: int
    costs: Costs

    @property
    def own(self) -> Price:
        """What its own ops take in all of these runs, without the bodies that it runs."""
        total = Price()
        for op in self.costs.module[self.name].ops:
            if not isinstance(op, Loop):
                total += self.costs.op(op)
        return total.scaled(self.working, self.launched)


def functions_run(costs: Costs, entry: str) -> dict[str, Runs]:
    """The functions that a run of ``entry`` runs, by name, itself first."""
    found: dict[str, Runs] = {}

    def walk(costs: Costs, name: str, working: float, launched: int) -> None:
        before = found.get(name) or Runs(name, 0.0, 0, costs)
        found[name] = Runs(name, before.working + working, before.launched + launched, costs)
        for op in costs.module[name].ops:
            if isinstance(op, Loop) and op.callee in costs.module:
                working_each, inner = costs.runs(op)
                walk(inner, op.callee, working * working_each, launched * len(op.range))

    walk(costs, entry, 1.0, 1)
    return found
