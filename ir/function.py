"""A function: a networkx graph behind a typed API, the only way in.

Nodes are ops, arguments and parameters; an edge from producer to user carries the operand's number as its
key. The order of operands lives in the op. Ops keep the order in which they were made, repaired topologically
where a rewrite used a later value, so that rewrites need not care where they insert.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import networkx as nx

from moec.errors import IRError, MoecError, SourceLoc
from moec.ir.op import Argument, Op, OpResult, Param, Value
from moec.ir.ops.control import Loop, Return
from moec.ir.order import Order
from moec.ir.types import STATE_TYPES, Type

Node = Any  # Op | Argument | Param


class Listener(Protocol):
    """Told of every change of a function, after it."""

    def created(self, function: Function, op: Op) -> None: ...
    def erased(self, function: Function, op: Op) -> None: ...
    def replaced(self, function: Function, old: Value, new: Value) -> None: ...


class Function:
    """Arguments, parameters and ops in order, closed by a return."""

    def __init__(self, name: str, arguments: Sequence[tuple[str, Type]] = ()) -> None:
        self.name = name
        self.written: SourceLoc | None = None  # where it begins in IR text, if it was read from such
        self.listeners: list[Listener] = []
        self.params: dict[str, Param] = {}
        self._graph: nx.MultiDiGraph = nx.MultiDiGraph()
        self._order = Order()  # all ops but the return
        self._end: Return | None = None
        self._sorted = True
        self._by_name: dict[str, dict[Op, None]] = {}  # the ops of each kind
        self._loops: dict[Loop, None] = {}
        self._names: set[str] = set()
        self._next: dict[str, int] = {}  # by name: no smaller number behind it is free
        self.args: list[Argument] = []
        for arg_name, arg_type in arguments:
            self.add_argument(arg_name, arg_type)

    # Reading.
    @property
    def ops(self) -> list[Op]:
        """Every op but the return, producers before users."""
        self._sort()
        return list(self._order)

    def ops_named(self, op_name: str) -> list[Op]:
        """The ops called so, in order; without looking at any other."""
        return sorted(self._by_name.get(op_name, ()), key=self.position)

    def loops(self) -> list[Loop]:
        """The ops that run another function, in order."""
        return sorted(self._loops, key=self.position)

    def position(self, op: Op) -> float:
        """What ops compare by for their order. It holds until the next change."""
        self._sort()
        return self._rank(op)

    def _rank(self, op: Op) -> float:
        return math.inf if op is self._end else self._order.number(op)

    def _sort(self) -> None:
        if self._sorted:
            return
        graph = self._with_reads_first()
        order = nx.lexicographical_topological_sort(
            graph, key=lambda n: self._rank(n) if isinstance(n, Op) else -math.inf
        )
        try:
            self._order.reset([n for n in order if isinstance(n, Op) and n is not self._end])
        except nx.NetworkXUnfeasible:
            raise IRError(f"@{self.name}: an op depends on its own result") from None
        self._sorted = True

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
        return self._end

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
        return sorted(found, key=lambda use: (self._rank(use[0]), use[1]))

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
        candidate = name
        if name in self._names:
            number = self._next.get(name, 1)
            while (candidate := f"{name}.{number}") in self._names:
                number += 1
            self._next[name] = number + 1
        self._names.add(candidate)
        return candidate

    def _free_name(self, name: str) -> None:
        self._names.discard(name)
        base, _, number = name.rpartition(".")
        if base in self._next and number.isdecimal():
            self._next[base] = min(self._next[base], int(number))

    def add_argument(self, name: str, type: Type) -> Argument:
        arg = Argument(self.unique(name), type)
        self.args.append(arg)
        self._graph.add_node(arg)
        return arg

    def retype(self, arg: Argument, type: Type) -> None:
        """Gives an argument another type, and results those that follow; what runs the function, and what it
        runs, is the caller's to change alike. Raises TypeMismatch, where an op doesn't take it, and changes
        nothing then.
        """
        before: dict[Argument | OpResult, Type] = {arg: arg.type}
        arg.type = type
        try:
            for op in self.ops:
                if any(v in before for v in op.operands):
                    inferred = op.infer()
                    types = inferred if isinstance(inferred, tuple) else (inferred,)
                    for res, new in zip(op.results, types, strict=True):
                        if res.type != new:
                            before[res], res.type = res.type, new
        except MoecError:
            for value, old in before.items():
                value.type = old
            raise

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
        self._free_name(arg.name)

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
        self._by_name.setdefault(op.name, {})[op] = None
        if isinstance(op, Loop):
            self._loops[op] = None
        if isinstance(op, Return):
            self._end = op
        elif before is None or before is self._end:
            self._order.append(op)
        else:
            self._order.insert(op, before)
            self._sorted = self._sorted and all(self._in_order(op, v) for v in op.operands)
        for listener in self.listeners:
            listener.created(self, op)

    def _connect(self, op: Op) -> None:
        for number, value in enumerate(op.operands):
            if value is not None:
                producer = value.op if isinstance(value, OpResult) else value
                self._graph.add_edge(producer, op, key=number, value=value)

    def _in_order(self, op: Op, value: Value | None) -> bool:
        """Whether ``op`` stands behind what makes ``value``, and every reader of a state before its taker."""
        if isinstance(value, OpResult) and self._rank(value.op) >= self._rank(op):
            return False
        if value is None or not isinstance(value.type, STATE_TYPES):
            return True
        users = self.users(value)
        takers = [user for user in users if consumes(user, value)]
        return all(self._rank(user) < self._rank(t) for t in takers for user in users if user not in takers)

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
        self._sorted = self._sorted and self._in_order(op, value)

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
        del self._by_name[op.name][op]
        if isinstance(op, Loop):
            del self._loops[op]
        if op is self._end:
            self._end = None
        else:
            self._order.remove(op)
        for res in op.results:
            self._free_name(res.name)
        for listener in self.listeners:
            listener.erased(self, op)

    def clone(self) -> Function:
        new = Function(self.name, [(a.name, a.type) for a in self.args])
        new.written = self.written
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
