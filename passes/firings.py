"""One row for each firing of a rule: what it replaced by what, and what that costs or saves.

A firing is priced by the ops that it made and removed alone, so that the log's time grows with the number of
firings, not with the module. Load-time functions run once: their ops are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moec.errors import BadOption, SourceLoc
from moec.ir import Function, Module, Op, Value
from moec.ir.devices import CPU, DEVICES
from moec.ir.ops.control import Loop
from moec.ir.roofline import Costs, Price
from moec.ir.weights import WEIGHTS

if TYPE_CHECKING:
    from moec.passes.pattern import Match


@dataclass(frozen=True)
class Delta:
    """More or fewer ops, launches, FLOPs, compulsory bytes, and seconds by the roofline."""

    ops: int = 0
    price: Price = field(default_factory=Price)

    def __add__(self, other: Delta) -> Delta:
        return Delta(self.ops + other.ops, self.price + other.price)

    def __sub__(self, other: Delta) -> Delta:
        return self + other.times(-1)

    def times(self, runs: int) -> Delta:
        return Delta(self.ops * runs, self.price.scaled(runs, runs))

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it; µs to three places."""
        price = self.price
        return {
            "ops": self.ops,
            "launches": price.launches,
            "bytes": round(price.bytes),
            "flops": round(price.flops),
            "us": round(price.seconds * 1e6, 3) + 0.0,
        }


class Prices:
    """Prices of ops on the module's target, at ``sizes`` of the symbols (its bounds where none is given).

    The price of equal ops on equal types is found once. A loop's is its body's, once for each run. What
    depends on a symbol without a number has no price but its launches.
    """

    def __init__(self, module: Module, sizes: Mapping[str, int] | None = None) -> None:
        self.sizes = dict(module.bounds) | dict(sizes or {})
        self.costs = Costs(module, DEVICES.get(module.target, CPU), self.sizes)
        self._known: dict[Any, Price] = {}

    def of(self, op: Op, costs: Costs | None = None) -> Price:
        """``costs`` are those of an expert's body, where ``op`` stands in one."""
        costs = costs or self.costs
        if isinstance(op, Loop):
            return self._loop(op, costs)
        types = tuple(None if v is None else v.type for v in (*op.operands, *op.results))
        attrs = tuple(item for item in op.attrs.items() if not isinstance(item[1], float))  # eps, scale: free
        key = (op.name, types, attrs, tuple(costs.sizes.values()))
        if key not in self._known:
            try:
                self._known[key] = costs.op(op)
            except BadOption:
                self._known[key] = Price(launches=op.launches)
        return self._known[key]

    def _loop(self, op: Loop, costs: Costs) -> Price:
        if op.callee not in costs.module:
            return Price()
        working, inner = self.inside(op, costs)
        total = Price()
        for each in costs.module[op.callee].ops:
            total += self.of(each, inner)
        return total.scaled(working, len(op.range))

    def costs_in(self, function: str) -> Costs:
        """What things cost in a run of ``function``: in an expert's, with the rows that it gets."""
        module = self.costs.module
        callers = module.callers(function) if function in module else []
        return self.inside(callers[0][1])[1] if callers and isinstance(callers[0][1], Loop) else self.costs

    def inside(self, op: Loop, costs: Costs | None = None) -> tuple[float, Costs]:
        """How many runs of a loop's body have something to do, and what things cost there."""
        costs = costs or self.costs
        try:
            return costs.runs(op)
        except BadOption:
            return len(op.range), costs


@dataclass
class Firing:
    """``matched`` and ``out`` are the results' names before and after, ``reads`` the values from outside.

    ``made`` and ``gone`` are the ops of running functions that it created and erased, ``delta`` what they
    cost more or less, in one of the ``runs`` of the function.
    """

    rule: str
    function: str
    loc: SourceLoc | None  # of the model
    rule_loc: SourceLoc | None = None
    runs: int = 1
    matched: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    out: tuple[str, ...] = ()
    made: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    delta: Delta = field(default_factory=Delta)

    def as_dict(self) -> dict[str, Any]:
        return {
            "rule": self.rule,
            "rule_line": self.rule_loc.short if self.rule_loc is not None else None,
            "function": self.function,
            "line": self.loc.short if self.loc is not None else None,
            "runs": self.runs,
            "matched": list(self.matched),
            "reads": list(self.reads),
            "out": list(self.out),
            "made": self.made,
            "gone": self.gone,
            "delta": self.delta.as_dict(),
        }


class Recorder:
    """Listens to all functions of a module while a pass runs, and tells each firing from the next."""

    def __init__(self, module: Module, prices: Prices) -> None:
        self.module, self.prices = module, prices
        self.firings: list[Firing] = []
        self._made: dict[Op, Function] = {}
        self._gone: list[Op] = []
        self._lost = Delta()
        self._heard: dict[str, Function] = {}
        self._callers: dict[str, list[tuple[str, Loop]]] = {}
        for function in module:
            for op in function.ops:
                if isinstance(op, Loop):
                    self._callers.setdefault(op.callee, []).append((function.name, op))
        self._runs: dict[str, int] = {}
        self._inside: dict[str, Costs] = {}
        self._listen()

    def _listen(self) -> None:
        """To functions that are new: they come last."""
        for name, function in reversed(list(self.module.functions.items())):
            if self._heard.get(name) is function:
                break
            self._heard[name] = function
            if name.split(".")[0] != WEIGHTS:
                function.listeners.append(self)

    # What the functions tell.
    def created(self, function: Function, op: Op) -> None:
        if op.name != "return":
            self._made[op] = function

    def erased(self, function: Function, op: Op) -> None:
        if op.name == "return" or self._made.pop(op, None) is not None:
            return
        self._gone.append(op)
        self._lost += Delta(1, self.prices.of(op, self._costs_in(function)))

    def replaced(self, function: Function, old: Value, new: Value) -> None: ...

    def _costs_in(self, function: Function) -> Costs:
        """What things cost in a run of ``function``: in an expert's, with the rows that it gets."""
        name = function.name
        if name not in self._inside:
            callers = self._callers.get(name, [])
            known = bool(callers) and name in self.module
            self._inside[name] = self.prices.inside(callers[0][1])[1] if known else self.prices.costs
        return self._inside[name]

    def runs(self, function: str) -> int:
        """How often the entries that reach ``function`` run it, all together."""
        if function not in self._runs:
            callers = self._callers.get(function, [])
            self._runs[function] = (
                sum(self.runs(name) * len(loop.range) for name, loop in callers) if callers else 1
            )
        return self._runs[function]

    # What the rewriter tells.
    def fire(self, module: Module, rule: str, m: Match) -> None:
        """``rule`` has just fired at ``m``."""
        name = m.function.name
        firing = Firing(rule, name, m.root.loc, m.rule_loc, self.runs(name), m.matched, m.reads, m.out)
        self._close(firing, m.names)
        self._listen()

    def _close(self, firing: Firing, names: Mapping[Op, str] | None = None) -> None:
        gained = Delta()
        for op, function in self._made.items():
            gained += Delta(1, self.prices.of(op, self._costs_in(function)))
        firing.made = [f"{op.name}({_names(op)})" for op in self._made]
        firing.gone = [f"{op.name}({(names or {}).get(op) or _names(op)})" for op in self._gone]
        firing.delta = gained - self._lost
        self.firings.append(firing)
        self._made, self._gone, self._lost = {}, [], Delta()

    def finish(self) -> None:
        """Ends listening. What no rule's firing explains is a firing of ``(clean-up)``."""
        if self._made or self._gone:
            self._close(Firing("(clean-up)", "", None))
        for function in self._heard.values():
            if self in function.listeners:
                function.listeners.remove(self)


def _names(op: Op) -> str:
    return ",".join(r.text for r in op.results)
