"""What leaves every result as it is: merging equal ops, dropping dead ones, trimming calls and functions.

Each function rewrites a module in place and says whether it changed anything.
"""

from __future__ import annotations

from typing import Any

from moec.ir import Function, Module, Op, Value
from moec.ir.graph import ENTRIES
from moec.ir.ops.control import Loop
from moec.ir.types import STATE_TYPES
from moec.ir.weights import WEIGHTS


def roots(module: Module) -> set[str]:
    """Functions that are run by name: the entries, or in a module without any those that no other runs."""
    entries = {name for name in module.functions if name in ENTRIES}
    if entries - {WEIGHTS}:
        return entries
    graph = module.call_graph()
    return entries | {f for f in graph if not graph.in_degree(f) and not f.startswith(f"{WEIGHTS}.")}


def effectful(module: Module) -> set[str]:
    """Functions that do more than compute their results: they hold an op with effects, or run one."""
    todo = [f.name for f in module if any(op.effects for op in f.ops)]
    found = set(todo)
    while todo:
        callers = {f.name for f, _ in module.callers(todo.pop())} - found
        found |= callers
        todo += callers
    return found


def _runs(op: Op, functions: set[str]) -> bool:
    return isinstance(op, Loop) and op.callee in functions


def merge_equal_ops(module: Module) -> bool:
    """Common subexpressions: of two ops with the same operands and attributes the first serves for both.

    Never an op with effects, or one that makes a new state: a cache has one successor. Reads of the same
    state are equal: SSA names the version that they read."""
    changed = False
    acting = effectful(module)
    for function in module:
        seen: dict[Any, Op] = {}
        for op in function.ops:
            if op.effects or _runs(op, acting) or any(isinstance(r.type, STATE_TYPES) for r in op.results):
                continue
            first = seen.setdefault((op.name, op.operands, tuple(sorted(op.attrs.items()))), op)
            if first is op:
                continue
            for old, new in zip(op.results, first.results, strict=True):
                function.replace(old, new, keep_name=False)
            function.erase(op)
            changed = True
    return changed


def drop_dead_ops(module: Module) -> bool:
    """Ops that no output and no effect depends on, then parameters that nothing uses."""
    changed = False
    acting = effectful(module)
    for function in module:
        for op in reversed(function.ops):
            used = any(function.uses(r) for r in op.results)
            if not (used or op.effects or _runs(op, acting)):
                function.erase(op)
                changed = True
        for param in list(function.params.values()):
            if not function.uses(param):
                function.drop_param(param.name)
                changed = True
    return changed


def drop_unrun_functions(module: Module) -> bool:
    """Functions that no root reaches."""
    graph = module.call_graph()
    reached, todo = set[str](), list(roots(module))
    while todo:
        name = todo.pop()
        if name not in reached:
            reached.add(name)
            todo += graph.successors(name)
    unrun = [name for name in module.functions if name not in reached]
    module.remove(*unrun)  # whatever runs one of them is unrun as well
    return bool(unrun)


def trim_calls(module: Module) -> bool:
    """Invariants that a body doesn't use go from the body and from every op that runs it."""
    changed = False
    for body in module:
        callers = module.callers(body.name)
        if not callers or body.name in ENTRIES:
            continue
        fixed = 1 + callers[0][1].attrs["carry"]  # the loop's number, and what is carried
        unused = [i for i, a in enumerate(body.args) if i >= fixed and not body.uses(a)]
        for caller, loop in callers if unused else []:
            kept = [v for i, v in enumerate(loop.operands, start=1) if i not in unused]
            with_operands(caller, loop, kept)
        for arg in [body.args[i] for i in unused]:
            body.drop_argument(arg)
            changed = True
    return changed


def with_operands(function: Function, op: Op, operands: list[Value | None]) -> None:
    """``op`` with other operands, in its place."""
    new = type(op)(operands, op.attrs, op.loc)
    new.take_notes(op)
    function.create(new, before=op)
    for old, res in zip(op.results, new.results, strict=True):
        function.replace(old, res)
    function.erase(op)
