"""Modules: functions by name, and which runs which."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import networkx as nx

from moec.errors import IRError
from moec.ir.function import Function as Function
from moec.ir.function import Listener as Listener
from moec.ir.function import consumes as consumes
from moec.ir.op import Op, Value
from moec.ir.ops.control import Loop
from moec.ir.ops.segments import SplitBatch
from moec.ir.types import Dim, as_dim, symbol

# Functions that a package calls by name; any other is the body of a loop.
ENTRIES = ("step", "decode", "head", "forward", "weights")
# The symbol whose bound says how many new tokens of each sequence @decode takes.
NEW_TOKENS = "new"


class _Callers:
    """A listener of all functions of a module: which ops run which function."""

    def __init__(self) -> None:
        self.of: dict[str, dict[Function, dict[Op, None]]] = {}

    def created(self, function: Function, op: Op) -> None:
        if isinstance(op, Loop):
            self.of.setdefault(op.callee, {}).setdefault(function, {})[op] = None

    def erased(self, function: Function, op: Op) -> None:
        if isinstance(op, Loop):
            del self.of[op.callee][function][op]
            if not self.of[op.callee][function]:
                del self.of[op.callee][function]

    def replaced(self, function: Function, old: Value, new: Value) -> None: ...


class Module:
    """Functions by name. ``bounds`` holds the largest value of each symbol, where there is one.

    ``ran`` and ``to_run`` are the passes behind and before it, as a pipeline's text; dumps carry them.
    """

    def __init__(self, name: str, target: str = "", bounds: Mapping[str, int] | None = None) -> None:
        self.name, self.target = name, target
        self.ran = self.to_run = ""
        self.bounds: dict[str, int] = dict(bounds or {})
        self._functions: dict[str, Function] = {}
        self._callers = _Callers()
        self._added: dict[Function, int] = {}  # in this order

    @property
    def functions(self) -> Mapping[str, Function]:
        """The functions by name, in the order in which they were added."""
        return MappingProxyType(self._functions)

    def add(self, function: Function) -> Function:
        if function.name in self._functions:
            raise IRError(f"two functions are called @{function.name}")
        self._added[function] = len(self._added) and next(reversed(self._added.values())) + 1
        self._functions[function.name] = function
        for loop in function.loops():
            self._callers.created(function, loop)
        function.listeners.append(self._callers)
        return function

    def remove(self, *names: str) -> None:
        """Forgets functions that nothing but themselves runs."""
        for name in names:
            for function, op in self.callers(name):
                if function.name not in names:
                    raise IRError(f"@{name} is still run by {op!r}")
        for name in names:
            function = self._functions.pop(name)
            del self._added[function]
            function.listeners.remove(self._callers)
            for loop in function.loops():
                self._callers.erased(function, loop)

    def __getitem__(self, name: str) -> Function:
        if name not in self._functions:
            raise IRError(
                f"no function is called @{name}; there are {', '.join('@' + f for f in self._functions)}"
            )
        return self._functions[name]

    def __contains__(self, name: str) -> bool:
        return name in self._functions

    def __iter__(self) -> Iterator[Function]:
        return iter(self._functions.values())

    def callers(self, name: str) -> list[tuple[Function, Op]]:
        """Each op that runs function ``name`` as its body, with the function that holds the op."""
        found = self._callers.of.get(name, {})
        functions = sorted(found, key=self._added.__getitem__)
        return [(f, op) for f in functions for op in sorted(found[f], key=f.position)]

    def call_graph(self) -> nx.DiGraph:
        """An edge from each function to each one that it runs."""
        graph = nx.DiGraph()
        graph.add_nodes_from(self._functions)
        graph.add_edges_from((f.name, op.callee) for f in self for op in f.loops())
        return graph

    def clone(self) -> Module:
        new = Module(self.name, self.target, self.bounds)
        new.ran, new.to_run = self.ran, self.to_run
        for function in self:
            new.add(function.clone())
        return new

    def bound_values(self) -> dict[Any, Dim]:
        """Symbols to their bounds, for substituting into costs; a split batch is in that part which it is in
        where all sequences are of one length.
        """
        bounds: dict[Any, Dim] = {symbol(name): as_dim(value) for name, value in self.bounds.items()}
        for function in self:
            for op in function.ops_named(SplitBatch.name):
                bounds |= op.shares(bounds)  # type: ignore[attr-defined]
        return bounds
