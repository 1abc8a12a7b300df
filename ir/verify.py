"""What every module must satisfy. A pass that breaks it is wrong."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator

import networkx as nx

from moec.errors import IRError, MoecError, nearest
from moec.ir.attrs import SYMBOL
from moec.ir.blame import point_at
from moec.ir.graph import Function, Module, consumes
from moec.ir.op import Op, OpResult, Value
from moec.ir.ops.control import Call, ForEach, Loop
from moec.ir.ops.moe import ExpertSlots
from moec.ir.ops.route import Route
from moec.ir.types import STATE_TYPES, CacheType, IndexType, TensorType, Type, symbol

_NAME = re.compile(r"[A-Za-z_][\w.-]*")
_PARAM_NAME = re.compile(r"[\w.*-]+")
_SYMBOL_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def verify(module: Module) -> None:
    """Raises IRError, or the op's own TypeMismatch, at the first thing that is wrong."""
    for name in (module.name, *module.functions):
        if not _NAME.fullmatch(name):
            raise IRError(f"@{name!r} is no name")
    for symbol_name, bound in module.bounds.items():
        if not _SYMBOL_NAME.fullmatch(symbol_name) or bound < 1:
            raise IRError(f"{symbol_name!r} <= {bound} is no bound of a symbol")
    for function in module:
        for op in function.ops:
            if isinstance(op, Loop) and op.callee not in module:
                hint = nearest(op.callee, module.functions)
                error = IRError(f"@{function.name}: @{op.callee} is run but isn't there{hint}")
                raise point_at(error, op)
    graph = module.call_graph()
    if not nx.is_directed_acyclic_graph(graph):
        names = [edge[0] for edge in nx.find_cycle(graph)]
        circle = " -> ".join(f"@{name}" for name in [*names, names[0]])
        error = IRError(f"functions run each other in a circle: {circle}")
        raise point_at(error, module[names[0]])
    for function in module:
        try:
            _verify_function(function, module)
        except MoecError as error:
            if error.loc is None:
                point_at(error, function)
            raise


def _verify_function(function: Function, module: Module) -> None:
    if function.terminator is None:
        raise IRError(f"@{function.name} doesn't return")
    names: set[str] = set()
    for value in (*function.args, *(r for op in function.ops for r in op.results)):
        if not _NAME.fullmatch(value.name):
            raise IRError(f"@{function.name}: {value.name!r} is no name")
        if value.name in names:
            raise IRError(f"@{function.name}: {value.text} is defined twice")
        names.add(value.name)
    for param in function.params.values():
        if not _PARAM_NAME.fullmatch(param.name):
            raise IRError(f"@{function.name}: {param.name!r} is no parameter's name")
    known: set[object] = {s for arg in function.args for s in _symbols(arg.type)} | {
        symbol(n) for n in module.bounds
    }
    for op in function.ops:
        try:
            _verify_op(op, function, module, known)
        except MoecError as error:
            raise point_at(error, op) from None
    for value in function.values():
        if isinstance(value.type, STATE_TYPES):
            _verify_state(function, value)
    _verify_layers(function)


def _verify_op(op: Op, function: Function, module: Module, known: set[object]) -> None:
    """``known`` are the symbols that something above defines; those of ``op`` are added."""
    inferred = op.infer()
    types = inferred if isinstance(inferred, tuple) else (inferred,)
    for res, type in zip(op.results, types, strict=True):
        if res.type != type:
            raise op.mismatch(f"{res.text} is {res.type} but its operands make it {type}")
    known |= {symbol(op.attrs[key]) for key, spec in op.attr_specs.items() if spec.kind is SYMBOL}
    for res in op.results:
        for unknown in set(_symbols(res.type)) - known:
            raise IRError(f"@{function.name}: nothing defines the symbol {unknown} of {res!r}", loc=op.loc)
    if isinstance(op, Loop):
        _verify_loop(op, module)


def _symbols(type: Type) -> Iterator[object]:
    if isinstance(type, TensorType):
        for dim in type.shape:
            if not isinstance(dim, int):
                yield from dim.free_symbols


def _verify_loop(op: Loop, module: Module) -> None:
    body = module[op.callee]
    carried = [v.type for v in op.values[: op.carry]]
    want = [IndexType(), *(v.type for v in op.values)]
    have = [a.type for a in body.args]
    if want != have:
        raise op.mismatch(f"passes ({_list(want)}) to @{body.name}, which takes ({_list(have)})")
    if carried != [v.type for v in body.outputs]:
        raise op.mismatch(
            f"@{body.name} returns ({_list(v.type for v in body.outputs)}), not ({_list(carried)})"
        )
    if op.scope.count("*") > 1:
        raise op.mismatch(f"scope {op.scope} has more than one *")
    if len(op.range) == 0:
        raise _broken(op, f"{op.range_name} {op.range} is empty: the body never runs")
    # An empty scope says that the runs share their parameters; a written one promises parameters to each.
    if isinstance(op, Call) and op.scope and "*" not in op.scope and len(op.range) > 1:
        raise _broken(op, f"scope {op.scope} has no *: layers {op.range} would share their parameters")
    if isinstance(op, ForEach):
        _verify_experts(op, body)


def _verify_experts(op: Loop, body: Function) -> None:
    """An expert that no router names would have parameters that nothing reads."""
    for slots in body.ops:
        if not isinstance(slots, ExpertSlots) or slots.id not in body.args:
            continue
        routed = op.values[body.args.index(slots.id) - 1]
        route = routed.op if isinstance(routed, OpResult) else None
        if isinstance(route, Route):
            experts = route.logits.type.shape[1] + route.shared
            if op.range.last >= experts:
                raise _broken(
                    op, f"experts {op.range}, but {routed.text} comes of a route among {experts}, from 0"
                )


def _verify_layers(function: Function) -> None:
    """Calls that carry one cache run for different layers: else one would overwrite the other's entries."""
    cache_of: dict[Value, Value] = {}  # each version of a cache to the first
    seen: dict[Value, list[Loop]] = {}  # of each cache, by their layers, which don't overlap
    for op in function.ops:
        if not isinstance(op, Call):
            continue
        for before, after in zip(op.values, op.results, strict=False):  # the carried come first
            if not isinstance(after.type, CacheType):
                continue
            first = cache_of[after] = cache_of.get(before, before)
            others = seen.setdefault(first, [])
            place = bisect_left(others, op.range.first, key=lambda other: other.range.first)
            for other in others[max(place - 1, 0) : place + 1]:
                if op.range.first <= other.range.last and other.range.first <= op.range.last:
                    raise _broken(
                        op,
                        f"layers {op.range} carry {before.text}, which layers {other.range} of "
                        f"@{other.callee} have written: the two overlap",
                    )
            others.insert(place, op)


def _broken(op: Loop, message: str) -> MoecError:
    return point_at(IRError(f"{op.name} @{op.callee}: {message}", loc=op.loc), op)


def _list(types: Iterable[Type]) -> str:
    return ", ".join(map(str, types))


def _verify_state(function: Function, value: Value) -> None:
    """State has one successor, and whoever reads it does so before."""
    users = [op for op, _ in function.uses(value)]
    takers = [op for op in users if consumes(op, value)]
    if len(takers) > 1:
        message = f"{value.text} has two successors, by {takers[0]!r} and {takers[1]!r}"
        raise point_at(IRError(f"@{function.name}: {message}"), takers[1])
    if takers and users[-1] is not takers[0]:
        message = f"{value.text} is read by {users[-1]!r} after {takers[0]!r} has replaced it"
        raise point_at(IRError(f"@{function.name}: {message}"), users[-1])
