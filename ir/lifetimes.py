"""Which values of a function hold memory, and from where to where.

A view (``split``, ``broadcast``, most ``reshape``) holds none: it keeps what it looks at. State is the
caller's, and so are arguments; parameters are the model's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from moec.ir.amount import Amount, bytes_of, total
from moec.ir.graph import Function
from moec.ir.op import Op, OpResult, Value
from moec.ir.ops.control import Loop
from moec.ir.ops.moe import ExpertSlots
from moec.ir.ops.shape import Broadcast, Reshape, Split
from moec.ir.types import STATE_TYPES, as_dim, product, symbol


@dataclass(eq=False)
class Held:
    """Memory that one value needs from op ``first`` to op ``last``, by the function's order.

    ``names`` are the value and its views. ``last`` is the number of ops where the function returns one of
    them. ``size`` is the value's, or more where a loop's body hands out a view of something larger.
    ``after``: it is there once op ``first`` is done; until then it is counted with what that op's body needs.
    ``end``: the op before which generated code lets go of it.
    """

    value: OpResult
    size: Amount
    first: int
    last: int
    names: list[Value] = field(default_factory=list)
    after: bool = False
    end: int = 0

    def at(self, i: int) -> bool:
        """Whether it is held while op ``i`` runs."""
        return self.first + self.after <= i < self.end

    def overlaps(self, other: Held) -> bool:
        return self.first <= other.last and other.first <= self.last


def view_of(op: Op) -> Value | None:
    """The value that the results of ``op`` share memory with; None where it makes its own."""
    if isinstance(op, Reshape | Split | Broadcast):
        return op.operands[0]
    if op.name == "cast" and op.operands[0] is not None and op.operands[0].type == op.results[0].type:
        return op.operands[0]
    return None


class Layout:
    """Where a value's axes stop being contiguous: whether a reshape is a view, as in PyTorch.

    A break before axis a says that the elements of axes a and on don't follow those of the axes before it.
    """

    def __init__(self) -> None:
        self.breaks: dict[Value, frozenset[int]] = {}

    def __getitem__(self, value: Value) -> frozenset[int]:
        return self.breaks.get(value, frozenset())

    def see(self, op: Op) -> bool:
        """Notes the layout of a view's results; whether it has to copy after all."""
        if isinstance(op, Split):
            axis = op.axis % op.x.type.rank
            for part in op.results if len(op.results) > 1 else ():
                self.breaks[part] = self[op.x] | ({axis} if axis else set())
            if len(op.results) == 1:
                self.breaks[op.results[0]] = self[op.x]
        elif isinstance(op, Broadcast):
            axis = op.axis % (op.x.type.rank + 1)
            moved = {b if b <= axis else b + 1 for b in self[op.x]}
            self.breaks[op.results[0]] = frozenset(moved | {axis, axis + 1}) - {0}
        elif isinstance(op, Reshape):
            return self._reshape(op)
        elif op.name in PERMUTED:
            self.breaks |= dict.fromkeys(op.results, PERMUTED[op.name])
        return False

    def _reshape(self, op: Reshape) -> bool:
        found = set()
        old, new = op.x.type.shape, op.results[0].type.shape  # type: ignore[union-attr]
        for at in self[op.x]:
            before = product(old[:at])
            ends = [i for i in range(len(new) + 1) if as_dim(product(new[:i])) == before]
            if not ends:
                return True
            found.add(ends[-1])
        self.breaks[op.results[0]] = frozenset(found - {0})
        return False


@dataclass(frozen=True)
class Escape:
    """What an output of a body keeps: memory of the body's own, and its argument of number ``argument``."""

    size: Amount
    argument: int | None = None


# Results that may be one of these operands, where all rows are asked for.
MAY_VIEW = {"take_rows": (0,), "merge_rows": (0, 2)}
# Results whose axes lie in another order: breaks as in ``Layout``.
PERMUTED = {"head_linear": frozenset({1, 2})}


def rows_at_most(function: Function) -> dict[Any, Any]:
    """The sizes that a function's own ops define, at most: an expert may get every slot."""
    return {symbol(op.rows): op.id.type.numel for op in function.ops if isinstance(op, ExpertSlots)}


def lifetimes(function: Function, bodies: dict[str, list[Escape]] | None = None) -> list[Held]:
    """What holds memory in a function, in order, each until its last use.

    ``bodies`` gives by name what the outputs of a loop's body keep.
    """
    bounds = rows_at_most(function)
    ops = function.ops
    place = {op: i for i, op in enumerate(ops)}
    layout, holders = Layout(), dict[Value, list[Held]]()
    found: list[Held] = []
    for i, op in enumerate(ops):
        seen = view_of(op)
        copies = layout.see(op)
        kept = [op.operands[n] for n in MAY_VIEW.get(op.name, ())]
        escapes = (bodies or {}).get(op.callee) if isinstance(op, Loop) else None
        for number, result in enumerate(op.results):
            if isinstance(result.type, STATE_TYPES):
                continue
            size, looks_at = bytes_of(result.type).subs(bounds), seen
            if escapes is not None:
                size = escapes[number].size
                argument = escapes[number].argument
                looks_at = op.operands[argument - 1] if argument else None  # the first is the loop's number
            holders[result] = list(holders.get(looks_at, ())) if looks_at is not None else []
            holders[result] += (h for v in kept if v is not None for h in holders.get(v, ()))
            if seen is None or copies:  # a copy may yet be a view: what it looks at stays as well
                own = Held(result, size, i, i)
                found.append(own)
                holders[result].append(own)
            for held in holders[result]:
                held.names.append(result)
    for value, held_by in holders.items():
        last = max((place.get(user, len(ops)) for user in function.users(value)), default=0)
        for held in held_by:
            held.last = max(held.last, last)
    alone = without_views(found)
    for held in found:
        held.after = _counted_in_body(held, alone, function)
        held.end = held.last + 1
    return found


def _counted_in_body(result: Held, alone: dict[Value, Held], function: Function) -> bool:
    """Whether a loop's result lies beside nothing while the loop runs.

    Of one run it is the body's own. Of several each takes the place of the one before, and the first that of
    what went in, if nothing else needs that.
    """
    op = result.value.op
    if not isinstance(op, Loop):
        return False
    taken = taken_over(op, result.value.index, alone, function)
    return len(op.range) == 1 or (taken is not None and taken.size == result.size)


def without_views(found: list[Held]) -> dict[Value, Held]:
    """What is held for one value alone, by that value."""
    return {h.names[0]: h for h in found if len(h.names) == 1}


def taken_over(op: Loop, number: int, alone: dict[Value, Held], function: Function) -> Held | None:
    """The memory of a loop's carried operand, where only the loop holds it: gone after the first run."""
    value = op.operands[number]
    held = alone.get(value) if value is not None else None
    return held if held is not None and len(function.uses(held.value)) == 1 else None


def escapes(function: Function, held: list[Held]) -> list[Escape]:
    """What each output of a body keeps: a view keeps all of what it is a view of."""
    found = []
    for value in function.outputs:
        base: Value | None = value
        while isinstance(base, OpResult):
            base = view_of(base.op)
        argument = function.args.index(base) if base in function.args else None
        sizes = [h.size for h in held if value in h.names]
        found.append(Escape(total(sizes) if sizes else bytes_of(value.type), argument))
    return found
