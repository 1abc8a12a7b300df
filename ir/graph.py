"""Functions and modules. A function is a networkx graph behind a typed API: the only way in.

Nodes are ops, arguments and parameters; an edge from producer to user carries the operand's number as its
key. The order of operands lives in the op. Ops keep the order in which they were made, repaired topologically
where a rewrite used a later value, so that rewrites need not care where they insert.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import networkx as nx

from moec.errors import IRError, MoecError, SourceLoc
from moec.ir.op import Argument, Op, OpResult, Param, Value
from moec.ir.ops.control import Loop, Return
from moec.ir.types import STATE_TYPES, Dim, Type, as_dim, symbol

Node = Any  # Op | Argument | Param

# Functions that a package calls by name; any other is the body of a loop.
ENTRIES = ("step", "decode", "head", "forward", "weights")


class Listener(Protocol):
    """Told of every change of a function, after it."""

    def created(self, function: Function, op: Op) -> None: ...
    def erased(self, function: Function, op: Op) -> None: ...
    def replaced(self, function: Function, old: Value, new: Value) -> None: ...


class Function:
    """Arguments, parameters and ops in order, closed by a return."""

    def __init__(self, name: str, arguments: Sequence[tuple[str, Type]] = ()) -> None:
        self.name = name
        self.listeners: list[Listener] = []
        self.params: dict[str, Param] = {}
        self._graph: nx.MultiDiGraph = nx.MultiDiGraph()
        self._order: list[Op] = []
        self._sorted = True
        self._names: set[str] = set()
        self.args: list[Argument] = []
        for arg_name, arg_type in arguments:
            self.add_argument(arg_name, arg_type)

    # Reading.
    @property
    def ops(self) -> list[Op]:
        """Every op but the return, producers before users."""
        if not self._sorted:
            rank = {op: i for i, op in enumerate(self._order)}
            graph = self._with_reads_first()
            order = nx.lexicographical_topological_sort(graph, key=lambda n: rank.get(n, -1))
            try:
                self._order = [n for n in order if isinstance(n, Op)]
            except nx.NetworkXUnfeasible:
                raise IRError(f"@{self.name}: an op depends on its own result") from None
            self._sorted = True
        return [op for op in self._order if not isinstance(op, Return)]

    def _with_reads_first(self) -> nx.MultiDiGraph:
        """The graph with an edge from each reader of a state to the op that replaces the state."""
        extra = []
        for value in self.values():
            if isinstance(value.type, STATE_TYPES):
                users = self.users(value)
                takers = [op for op in users if consumes(op, value)]
                extra += [(reader, taker) for taker in takers for reader in users if reader not in takers]
        if not extra:
            return self._graph
        graph = self._graph.copy()
        graph.add_edges_from(extra)
        return graph

    def values(self) -> Iterator[Value]:
        """Arguments and results, in no promised order."""
        yield from self.args
        for op in self._order:
            yield from op.results

    @property
    def terminator(self) -> Return | None:
        return next((op for op in reversed(self._order) if isinstance(op, Return)), None)

    @property
    def outputs(self) -> tuple[Value, ...]:
        end = self.terminator
        return () if end is None else tuple(v for v in end.operands if v is not None)

    def uses(self, value: Value) -> list[tuple[Op, int]]:
        """``(op, operand number)`` of each use, in the ops' order."""
        node = value.op if isinstance(value, OpResult) else value
        if node not in self._graph:
            return []
        found = [
            (user, number)
            for _, user, number, of in self._graph.out_edges(node, keys=True, data="value")
            if of is value
        ]
        if len(found) < 2:
            return found
        rank = {op: i for i, op in enumerate(self._order)}
        return sorted(found, key=lambda use: (rank[use[0]], use[1]))

    def users(self, value: Value) -> list[Op]:
        return list(dict.fromkeys(op for op, _ in self.uses(value)))

    def ancestors(self, ops: Iterable[Op]) -> set[Node]:
        """Everything that these ops depend on, themselves included."""
        seen: set[Node] = set(ops)
        for op in list(seen):
            seen |= nx.ancestors(self._graph, op)
        return seen

    def named(self, name: str) -> Value:
        """The value of that name. Raises KeyError."""
        for value in self.values():
            if value.name == name:
                return value
        raise KeyError(name)

    def __iter__(self) -> Iterator[Op]:
        return iter(self.ops)

    # Changing.
    def unique(self, name: str) -> str:
        """``name``, or ``name.1``, ``name.2`` where it's taken; the answer is then taken too."""
        candidate, number = name, 0
        while candidate in self._names:
            number += 1
            candidate = f"{name}.{number}"
        self._names.add(candidate)
        return candidate

    def add_argument(self, name: str, type: Type) -> Argument:
        arg = Argument(self.unique(name), type)
        self.args.append(arg)
        self._graph.add_node(arg)
        return arg

    def param(self, name: str, type: Type, loc: SourceLoc | None = None) -> Param:
        """The parameter of that name, made at its first use. Raises IRError where it has another type."""
        known = self.params.get(name)
        if known is None:
            known = self.params[name] = Param(name, type)
            self._graph.add_node(known)
        elif known.type != type:
            raise IRError(f"${name} is {known.type} here and {type} there", loc=loc)
        return known

    def drop_param(self, name: str) -> None:
        """Forgets a parameter that nothing uses."""
        param = self.params[name]
        if self.uses(param):
            raise IRError(f"@{self.name}: ${name} is still in use")
        del self.params[name]
        self._graph.remove_node(param)

    def drop_argument(self, arg: Argument) -> None:
        """Removes an argument that nothing uses; the callers are the caller's to repair."""
        if self.uses(arg):
            raise IRError(f"@{self.name}: {arg.text} is still in use")
        self.args.remove(arg)
        self._graph.remove_node(arg)
        self._names.discard(arg.name)

    def create(self, op: Op, names: Sequence[str] = (), before: Op | None = None) -> Op:
        """Adds ``op`` and infers its results. They are called ``names``, or what the op declares."""
        for value in op.operands:
            self._own(op, value)
        if before is not None and before not in self._graph:
            raise IRError(f"@{self.name}: {before!r} isn't in it", loc=op.loc)
        try:
            inferred = op.infer()
        except MoecError as error:
            raise error.at(op.loc) from None
        types = inferred if isinstance(inferred, tuple) else (inferred,)
        results = []
        for i, type in enumerate(types):
            given = names[i] if i < len(names) else None
            declared = op.result_specs[min(i, len(op.result_specs) - 1)].name if op.result_specs else "r"
            results.append(OpResult(self.unique(given or declared), type, op, i))
        op.results = tuple(results)
        self._insert(op, before)
        return op

    def _own(self, op: Op, value: Value | None) -> None:
        if value is not None and (value.op if isinstance(value, OpResult) else value) not in self._graph:
            raise IRError(f"{op.name}: {value.text} belongs to another function", loc=op.loc)

    def _insert(self, op: Op, before: Op | None) -> None:
        self._graph.add_node(op)
        self._connect(op)
        end = self.terminator
        anchor = before if before is not None else end
        if anchor is None or isinstance(op, Return):
            self._order.append(op)
        else:
            self._order.insert(self._order.index(anchor), op)
        self._sorted = self._sorted and (before is None or isinstance(before, Return))
        for listener in self.listeners:
            listener.created(self, op)

    def _connect(self, op: Op) -> None:
        for number, value in enumerate(op.operands):
            if value is not None:
                producer = value.op if isinstance(value, OpResult) else value
                self._graph.add_edge(producer, op, key=number, value=value)

    def ret(self, *values: Value) -> Return:
        """Closes the function, or changes what it returns."""
        op = Return(values)
        for value in values:
            self._own(op, value)
        if (old := self.terminator) is not None:
            self.erase(old)
        self._insert(op, None)
        return op

    def set_operand(self, op: Op, number: int, value: Value) -> None:
        """Gives one operand another value of its type. Listeners hear of ``replace`` only."""
        self._own(op, value)
        old = op.operands[number]
        if old is not None:
            self._graph.remove_edge(old.op if isinstance(old, OpResult) else old, op, key=number)
        op.operands = (*op.operands[:number], value, *op.operands[number + 1 :])
        self._graph.add_edge(value.op if isinstance(value, OpResult) else value, op, key=number, value=value)
        self._sorted = False

    def replace(self, old: Value, new: Value, keep_name: bool = True) -> None:
        """Every use of ``old`` becomes one of ``new``, which takes over its name where both are results."""
        if old.type != new.type:
            raise IRError(f"@{self.name}: {old.text} is {old.type} and can't become {new.text}, a {new.type}")
        for op, number in self.uses(old):
            self.set_operand(op, number, new)
        if keep_name and isinstance(old, OpResult) and isinstance(new, OpResult):
            old.name, new.name = new.name, old.name
        for listener in self.listeners:
            listener.replaced(self, old, new)

    def erase(self, op: Op) -> None:
        """Removes an op whose results nothing uses. Raises IRError otherwise."""
        for res in op.results:
            if self.uses(res):
                raise IRError(f"@{self.name}: {res.text} is still in use")
        self._graph.remove_node(op)
        self._order.remove(op)
        self._names.difference_update(r.name for r in op.results)
        for listener in self.listeners:
            listener.erased(self, op)

    def clone(self) -> Function:
        new = Function(self.name, [(a.name, a.type) for a in self.args])
        values: dict[Value, Value] = dict(zip(self.args, new.args, strict=True))
        for name, param in self.params.items():
            values[param] = new.param(name, param.type)
        for op in self.ops:
            copy = type(op)([None if v is None else values[v] for v in op.operands], op.attrs, op.loc)
            copy.take_notes(op)
            new.create(copy, [r.name for r in op.results])
            values.update(zip(op.results, copy.results, strict=True))
        if self.terminator is not None:
            new.ret(*(values[v] for v in self.outputs))
        return new


def consumes(op: Op, value: Value) -> bool:
    """Whether ``op`` ends this version of the state ``value``: it returns it or makes its successor."""
    if isinstance(op, Loop):
        return any(v is value for v in op.operands[: op.carry])
    return isinstance(op, Return) or any(res.type == value.type for res in op.results)


class Module:
    """Functions by name. ``bounds`` holds the largest value of each symbol, where there is one."""

    def __init__(self, name: str, target: str = "", bounds: Mapping[str, int] | None = None) -> None:
        self.name, self.target = name, target
        self.bounds: dict[str, int] = dict(bounds or {})
        self.functions: dict[str, Function] = {}

    def add(self, function: Function) -> Function:
        if function.name in self.functions:
            raise IRError(f"two functions are called @{function.name}")
        self.functions[function.name] = function
        return function

    def remove(self, name: str) -> None:
        """Forgets a function that nothing runs."""
        if self.callers(name):
            raise IRError(f"@{name} is still run by {self.callers(name)[0][1]!r}")
        del self.functions[name]

    def __getitem__(self, name: str) -> Function:
        if name not in self.functions:
            raise IRError(
                f"no function is called @{name}; there are {', '.join('@' + f for f in self.functions)}"
            )
        return self.functions[name]

    def __contains__(self, name: str) -> bool:
        return name in self.functions

    def __iter__(self) -> Iterator[Function]:
        return iter(self.functions.values())

    def callers(self, name: str) -> list[tuple[Function, Op]]:
        """Each op that runs function ``name`` as its body, with the function that holds the op."""
        return [(f, op) for f in self for op in f.ops if op.attrs.get("callee") == name]

    def call_graph(self) -> nx.DiGraph:
        """An edge from each function to each one that it runs."""
        graph = nx.DiGraph()
        graph.add_nodes_from(self.functions)
        graph.add_edges_from(
            (f.name, op.attrs["callee"]) for f in self for op in f.ops if "callee" in op.attrs
        )
        return graph

    def clone(self) -> Module:
        new = Module(self.name, self.target, self.bounds)
        for function in self:
            new.add(function.clone())
        return new

    def bound_values(self) -> dict[Any, Dim]:
        """Symbols to their bounds, for substituting into costs."""
        return {symbol(name): as_dim(value) for name, value in self.bounds.items()}
