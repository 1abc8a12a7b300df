"""What differs between two modules: functions aligned by name, and within them values by name.

An op is the same one where it makes a value of the same name (or binds the same parameter). Order, source
lines and the rules that made an op are no differences.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from moec.ir.graph import Function, Module
from moec.ir.op import ANNOTATIONS, Op
from moec.ir.ops.control import Loop
from moec.ir.ops.weights import Bind
from moec.ir.text import print_op

ADDED, REMOVED, CHANGED = "added", "removed", "changed"


@dataclass(frozen=True)
class Change:
    """One value, op, parameter, argument or heading.

    ``what`` is its name (``%h``, ``$w``; of an op with several results all names, with commas), ``details``
    say what changed, as ``k: 2 -> 3``. ``before`` and ``after`` are its text; ``ops`` the ops, if it is one.
    """

    kind: str
    what: str
    before: str = ""
    after: str = ""
    details: tuple[str, ...] = ()
    ops: tuple[Op | None, Op | None] = (None, None)

    def as_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "what": self.what,
            "before": self.before or None,
            "after": self.after or None,
            "details": list(self.details),
        }


@dataclass
class FunctionDiff:
    """``kind`` is added, removed or changed."""

    name: str
    kind: str
    changes: list[Change] = field(default_factory=list)


@dataclass
class ModuleDiff:
    """``header`` holds changes of the name, target and symbols' bounds."""

    header: list[Change] = field(default_factory=list)
    functions: list[FunctionDiff] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.header or self.functions)


def diff_modules(a: Module, b: Module) -> ModuleDiff:
    """What must be done to ``a`` to get ``b``."""
    found = ModuleDiff()
    for what, before, after in (
        ("name", a.name, b.name),
        ("target", a.target, b.target),
        *((f"bound of {s}", _bound(a, s), _bound(b, s)) for s in sorted(a.bounds.keys() | b.bounds.keys())),
    ):
        if before != after:
            detail = f"{what}: {before or 'none'} -> {after or 'none'}"
            found.header.append(Change(CHANGED, what, before, after, (detail,)))
    for name in dict.fromkeys([*a.functions, *b.functions]):
        if name not in b:
            found.functions.append(FunctionDiff(name, REMOVED, [_gone(op) for op in a[name].ops]))
        elif name not in a:
            found.functions.append(FunctionDiff(name, ADDED, [_new(op) for op in b[name].ops]))
        elif changes := list(_changes(a[name], b[name])):
            found.functions.append(FunctionDiff(name, CHANGED, changes))
    return found


def _bound(module: Module, symbol: str) -> str:
    return str(module.bounds.get(symbol, ""))


def _gone(op: Op) -> Change:
    return Change(REMOVED, label_of(op), print_op(op), "", ops=(op, None))


def _new(op: Op) -> Change:
    return Change(ADDED, label_of(op), "", print_op(op), ops=(None, op))


def label_of(op: Op) -> str:
    """What a change of ``op`` is about: the values that it makes, or what it does without any."""
    if isinstance(op, Bind):
        return f"bind ${op.param}"
    if isinstance(op, Loop) and not op.results:
        return f"{op.name} @{op.callee}"
    return op.users_label


def _changes(a: Function, b: Function) -> Iterator[Change]:
    values = {v.text: str(v.type) for v in (*a.args, *a.params.values())}
    others = {v.text: str(v.type) for v in (*b.args, *b.params.values())}
    yield from _declared(values, others)
    order = [v.name for v in a.args], [v.name for v in b.args]
    if sorted(order[0]) == sorted(order[1]) and order[0] != order[1]:
        before, after = (", ".join(f"%{n}" for n in names) for names in order)
        yield Change(CHANGED, "arguments", before, after, (f"order: ({before}) -> ({after})",))
    yield from _ops(a, b)
    before, after = (", ".join(v.text for v in f.outputs) for f in (a, b))
    if before != after:
        yield Change(CHANGED, "return", before, after, (f"return: ({before}) -> ({after})",))


def _declared(a: dict[str, str], b: dict[str, str]) -> Iterator[Change]:
    for name in dict.fromkeys([*a, *b]):
        before, after = a.get(name, ""), b.get(name, "")
        if before == after:
            continue
        kind = ADDED if not before else REMOVED if not after else CHANGED
        details = (f"type: {before} -> {after}",) if kind == CHANGED else ()
        old, new = (f"{name}: {type}" if type else "" for type in (before, after))
        yield Change(kind, name, old, new, details)


def _ops(a: Function, b: Function) -> Iterator[Change]:
    """In the order of ``a``; what is new stands where its neighbours in ``b`` do, as near as that goes."""
    made_in_b = {key: op for op in b.ops for key in _keys(op)}
    partner: dict[Op, Op] = {}
    taken: set[Op] = set()
    for op in a.ops:
        match = next((made_in_b[k] for k in _keys(op) if k in made_in_b and made_in_b[k] not in taken), None)
        if match is not None:
            partner[op] = match
            taken.add(match)
    new_before: dict[Op | None, list[Op]] = {}
    waiting: list[Op] = []
    for op in b.ops:
        if op not in taken:
            waiting.append(op)
        else:
            new_before[op], waiting = waiting, []
    for op in a.ops:
        if op not in partner:
            yield _gone(op)
            continue
        yield from map(_new, new_before.pop(partner[op], []))
        if details := tuple(_details(op, partner[op])):
            texts = print_op(op), print_op(partner[op])
            yield Change(CHANGED, label_of(op), *texts, details, (op, partner[op]))
    yield from map(_new, waiting)


def _keys(op: Op) -> list[str]:
    return [r.text for r in op.results] or [label_of(op)]


def _details(a: Op, b: Op) -> Iterator[str]:
    if a.name != b.name:
        yield f"- {print_op(a)}"
        yield f"+ {print_op(b)}"
        return
    results = [[r.text for r in op.results] for op in (a, b)]
    if results[0] != results[1]:
        yield f"results: {', '.join(results[0])} -> {', '.join(results[1])}"
    yield from _operands(a, b)
    for key in sorted(a.attrs):
        before, after = (_attribute(op, key) for op in (a, b))
        if before != after and not a.attr_specs[key].hidden:
            yield f"{key}: {before} -> {after}"
    for key in sorted(a.annotations.keys() | b.annotations.keys()):
        before, after = (_annotation(op, key) for op in (a, b))
        if before != after:
            yield f"{key}: {before} -> {after}"
    types = {r.text: str(r.type) for r in b.results}
    for res in a.results:
        if types.get(res.text, str(res.type)) != str(res.type):
            yield f"type of {res.text}: {res.type} -> {types[res.text]}"


def _operands(a: Op, b: Op) -> Iterator[str]:
    """Of two ops of one name."""
    before, after = (["_" if v is None else v.text for v in op.operands] for op in (a, b))
    for texts in (before, after):
        while texts and texts[-1] == "_":
            texts.pop()
    if len(before) == len(after):
        for number, (old, new) in enumerate(zip(before, after, strict=True)):
            if old != new:
                spec = a.operand_specs[min(number, len(a.operand_specs) - 1)]
                name = spec.name if not spec.variadic else f"operand {number}"
                yield f"{name}: {old} -> {new}"
    elif before != after:
        yield f"operands: ({', '.join(before)}) -> ({', '.join(after)})"


def _attribute(op: Op, key: str) -> str:
    value = op.attrs[key]
    return "none" if value is None else op.attr_specs[key].kind.print(value)


def _annotation(op: Op, key: str) -> str:
    return ANNOTATIONS[key].kind.print(op.annotations[key]) if key in op.annotations else "none"
