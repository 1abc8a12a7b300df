"""A loop over experts, op by op, as ops on the rows of all experts at once.

``Grouping`` walks one loop's body from what it returns. Each value of the body is one of a few *kinds*, and
each op has a twin that takes operands of these kinds: the table at the end. An op without one, or operands
that its twin doesn't take, refuse the loop and say why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn, Union

from moec.ir import Function, Op, Value
from moec.ir.op import OpResult, Param
from moec.ir.ops.control import Loop
from moec.ir.ops.route import Route
from moec.ir.types import STATE_TYPES, f32, format_block, symbol
from moec.passes import loading
from moec.passes.pattern import Match, Refusal


# Kinds of values.
@dataclass(frozen=True)
class Number:
    """The expert's number."""


@dataclass(frozen=True)
class Same:
    """The same for every expert; ``value`` is it, outside the loop."""

    value: Value


@dataclass(frozen=True)
class Weight:
    """One expert's parameter."""

    param: Param


@dataclass(frozen=True)
class Carried:
    """The sum so far, in the body ``arg``; ``start`` is what it is before the first expert."""

    arg: Value
    start: Value


@dataclass(frozen=True)
class Slots:
    """One expert's slots. ``slot`` holds all, sorted by expert, ``off`` where each expert's begin.

    ``owned``: no slot belongs to an expert outside the loop's range.
    """

    slot: Value
    off: Value
    k: int
    rows: str  # the symbol that counts one expert's
    owned: bool


@dataclass(frozen=True)
class Rows:
    """One expert's rows; ``value`` holds those of all, in the order of ``slots``.

    ``zero``: the rows of slots that no expert owns are zeros.
    """

    value: Value
    slots: Slots
    zero: bool


@dataclass(frozen=True)
class Total:
    """The sum over all experts of what is added to ``arg``."""

    arg: Value
    value: Value


Kind = Union[Number, Same, Weight, Carried, Slots, Rows, Total]  # noqa: UP007

WHAT = {
    Number: "the expert's number",
    Same: "the same for every expert",
    Weight: "one expert's parameter",
    Carried: "the running sum",
    Slots: "the expert's slots",
    Rows: "the expert's rows",
    Total: "the new sum",
}


class Grouping:
    """Writes the body of ``loop``, once for all experts, in front of it."""

    def __init__(self, m: Match, loop: Loop, body: Function) -> None:
        self.m, self.loop, self.body = m, loop, body
        self.experts = len(loop.range)
        self.weights: dict[Param, Param] = {}  # one expert's: stacked
        self.slots: dict[tuple[Value, str], Slots] = {}  # of these ids, counted by this symbol
        self._kinds: dict[Value, Kind] = {}
        kinds: list[Kind] = [Number()]
        kinds += [Carried(a, v) for a, v in zip(body.args[1:], loop.values[: loop.carry], strict=False)]
        kinds += [Same(v) for v in loop.values[loop.carry :]]
        self._kinds.update(zip(body.args, kinds, strict=True))

    def total(self, number: int) -> Value:
        """What the ``number``-th carried value is after the last expert. Raises Refusal."""
        out, arg = self.body.outputs[number], self.body.args[1 + number]
        kind = self.kind(out)
        if out is arg:
            return self.loop.values[number]
        if not isinstance(kind, Total):
            raise Refusal(f"returns {out.text}, {WHAT[type(kind)]}, and no sum over experts")
        if kind.arg is not arg:
            raise Refusal(f"returns {out.text}, the sum that starts at {kind.arg.text}, as {arg.text}")
        return kind.value

    def kind(self, value: Value) -> Kind:
        if value not in self._kinds:
            if isinstance(value, Param):
                self._kinds[value] = Weight(value)
            elif isinstance(value, OpResult):
                self._kinds.update(zip(value.op.results, self._twins(value.op), strict=True))
        return self._kinds[value]

    def _twins(self, op: Op) -> list[Kind]:
        if op.effects or any(isinstance(r.type, STATE_TYPES) for r in op.results):
            raise Refusal(f"{op!r} has effects, in the order of the experts", op)
        kinds = [None if v is None else self.kind(v) for v in op.operands]
        if not isinstance(op, Loop) and all(k is None or isinstance(k, Same) for k in kinds):
            results = self.create(op, [k.value if isinstance(k, Same) else None for k in kinds])
            return [Same(r) for r in results]
        twin = TWINS.get(op.name)
        if twin is None:
            raise Refusal(f"{op.name} has no grouped twin: it isn't known to work row by row", op)
        return twin(self, op, kinds)

    def create(self, op: Op, operands: list[Value | None], name: str = "", **attrs: Any) -> tuple[Value, ...]:
        """``name``, or the same op, outside the loop: named as ``op``'s results, with its source line."""
        given = attrs if name else op.attrs | attrs
        out = [r.name for r in op.results]
        made = self.m.create(name or op.name, *operands, out=out, loc=op.loc, **given)
        return made if isinstance(made, tuple) else (made,)

    def stacked(self, param: Param, name: str, op: Op) -> Value:
        """All experts' parameter, called ``name`` in the loop's scope; ``finish`` says how it's loaded."""
        if param not in self.weights:
            holder = self.m.function
            if why := loading.why_unstackable(self.m.module, self.loop, param):
                raise Refusal(why, op)
            scope = self.loop.scope.replace("*", "").replace("..", ".").strip(".")
            base = ".".join(filter(None, (scope, name)))
            fresh = loading.fresh_name(self.m.module, holder, base)
            self.weights[param] = holder.param(fresh, loading.stacked_type(param, self.experts))
        return self.weights[param]

    def finish(self) -> None:
        """Writes how the stacked parameters are loaded."""
        module, holder = self.m.module, self.m.function
        for param, wanted in self.weights.items():
            value = loading.stack(module, holder, self.loop, param)
            bound = loading.bind(module, holder, value, wanted.name)
            if bound is not wanted:  # an entry that shares @weights stacks the same tensors
                holder.replace(wanted, bound)
                holder.drop_param(wanted.name)


# Twins: the op on one expert, with its operands' kinds -> the kinds of its results on all experts.
Operands = list[Union[Kind, None]]  # noqa: UP007


def refuse(op: Op, number: int, kind: Kind | None, wanted: str) -> NoReturn:
    value, spec = op.operands[number], op.operand_specs[min(number, len(op.operand_specs) - 1)]
    found = "nothing" if value is None or kind is None else f"{value.text}, {WHAT[type(kind)]}"
    raise Refusal(f"{op.name}: {spec.name} is {found}, not {wanted}", op)


def expert_slots(g: Grouping, op: Op, kinds: Operands) -> list[Kind]:
    """expert_slots(id, expert) -> sort_by_expert(id)."""
    id, expert = kinds
    if not isinstance(id, Same):
        refuse(op, 0, id, WHAT[Same])
    if not isinstance(expert, Number):
        refuse(op, 1, expert, WHAT[Number])
    experts, k = g.experts, op.tensor(id.value).shape[1]
    if not isinstance(k, int):
        raise Refusal(f"expert_slots: how many experts {id.value.text} has a token isn't known", op)
    known = (id.value, op.attrs["rows"])
    if known not in g.slots:
        out = (op.results[0].name, "off")
        slot, off = g.m.create("sort_by_expert", id.value, experts=experts, out=out, loc=op.loc)
        g.slots[known] = Slots(slot, off, k, op.attrs["rows"], _ids_below(id.value, experts))
    return [g.slots[known]]


def _ids_below(id: Value, experts: int) -> bool:
    """Whether every id is that of an expert of the loop: sure of a router's over no more experts."""
    if not isinstance(id, OpResult) or not isinstance(id.op, Route):
        return False
    scored = id.op.tensor(id.op.logits).shape[1]
    return isinstance(scored, int) and scored + id.op.shared <= experts


def gather_rows(g: Grouping, op: Op, kinds: Operands) -> list[Kind]:
    """gather_rows(x, slots of one) -> gather_rows(x, all slots)."""
    x, slots = kinds
    if not isinstance(x, Same):
        refuse(op, 0, x, WHAT[Same])
    if not isinstance(slots, Slots):
        refuse(op, 1, slots, WHAT[Slots])
    if op.attrs["per_row"] != slots.k:
        raise Refusal(f"per_row is {op.attrs['per_row']}, but a token chooses {slots.k} experts", op)
    (rows,) = g.create(op, [x.value, slots.slot])
    return [Rows(rows, slots, zero=False)]


def linear(g: Grouping, op: Op, kinds: Operands) -> list[Kind]:
    """linear(rows, $w) -> grouped_linear(rows, $w of all, off); with a shared weight, the same linear."""
    x, w, bias = kinds
    if not isinstance(x, Rows):
        refuse(op, 0, x, WHAT[Rows])
    if isinstance(w, Same) and (bias is None or isinstance(bias, Same)):
        (y,) = g.create(op, [x.value, w.value, bias.value if isinstance(bias, Same) else None])
        return [Rows(y, x.slots, zero=x.zero and bias is None)]
    if not isinstance(w, Weight):
        refuse(op, 1, w, WHAT[Weight])
    if op.operands[2] is not None:
        raise Refusal(f"linear adds the bias {op.operands[2].text}: grouped_linear takes none", op)
    scaled = op.tensor(x.value, scaled=True).scale is not None
    if not scaled and op.tensor(op.results[0]).dtype != op.tensor(x.value).dtype:
        raise Refusal(
            f"linear keeps its result in {op.attrs['acc']}: grouped_linear rounds it to x's dtype", op
        )
    scattered = any(user.name == "scatter_add" for user in g.body.users(op.results[0]))
    weight = g.stacked(w.param, "w2" if scattered else w.param.name, op)
    to = {"to": op.attrs["acc"]} if scaled else {}
    (y,) = g.create(op, [x.value, weight, x.slots.off], "grouped_linear", **to)
    return [Rows(y, x.slots, zero=True)]


def scatter_add(g: Grouping, op: Op, kinds: Operands) -> list[Kind]:
    """scatter_add(sum, rows, slots, w) -> combine(rows, slots, w), plus where the sum starts, if not at 0."""
    total, rows, slots, w = kinds
    if not isinstance(total, Carried):
        refuse(op, 0, total, WHAT[Carried])
    if not isinstance(rows, Rows):
        refuse(op, 1, rows, WHAT[Rows])
    if slots != rows.slots:
        refuse(op, 2, slots, "those that the rows were gathered by")
    if not isinstance(w, Same):
        refuse(op, 3, w, WHAT[Same])
    if op.tensor(w.value, 2).shape[1] != rows.slots.k:
        raise Refusal(f"scatter_add: w is {op.operands[3]!r}, but a token chooses {rows.slots.k} experts", op)
    if not (rows.zero or rows.slots.owned):
        raise Refusal("ids may name experts outside the loop, whose rows would be added", op)
    start = total.start
    zeros = isinstance(start, OpResult) and start.op.name == "zeros_like"
    operands = [rows.value, rows.slots.slot, w.value, None if zeros else start]
    (y,) = g.create(op, operands, "combine", to=f32)
    return [Total(total.arg, y)]


def row_by_row(g: Grouping, op: Op, kinds: Operands) -> list[Kind]:
    """A pointwise op, or one along a later axis -> the same op on all rows."""
    rows = [k for k in kinds if isinstance(k, Rows)]
    for number, kind in enumerate(kinds):
        if kind is not None and not isinstance(kind, Rows | Same):
            refuse(op, number, kind, f"{WHAT[Rows]} or {WHAT[Same]}")
    slots = rows[0].slots
    if any(r.slots != slots for r in rows):
        raise Refusal(f"{op.name} mixes rows in the order of two lists of slots", op)
    rank = op.tensor(op.results[0], scaled=True).rank
    if any(op.tensor(r.value, scaled=True).rank != rank for r in rows):
        raise Refusal(f"{op.name} adds an axis in front of the rows", op)
    if op.attrs.get("axis", -1) % rank == 0:
        raise Refusal(f"{op.name} works along the rows", op)
    made = g.create(op, [None if k is None else k.value for k in kinds])  # type: ignore[union-attr]
    stays = ZEROS_STAY.get(op.name, lambda _op, _kinds: False)(op, kinds)
    return [Rows(r, slots, zero=stays) for r in made]


def quant(g: Grouping, op: Op, kinds: Operands) -> list[Kind]:
    """quant of one's rows -> quant of all, where no two rows share a scale. Zeros stay zeros."""
    (x,) = kinds
    if not isinstance(x, Rows):
        refuse(op, 0, x, WHAT[Rows])
    block = op.attrs["block"]
    if len(block) == op.tensor(x.value).rank and block[0] != 1:
        raise Refusal(f"quant: rows of one expert share a scale, in blocks of {format_block(block)}", op)
    (y,) = g.create(op, [x.value])
    return [Rows(y, x.slots, x.zero)]


def reshape(g: Grouping, op: Op, kinds: Operands) -> list[Kind]:
    """reshape that keeps the axis of rows -> the same on all rows."""
    (x,) = kinds
    if not isinstance(x, Rows):
        refuse(op, 0, x, WHAT[Rows])
    first, *rest = op.attrs["shape"]
    if first != symbol(x.slots.rows):
        raise Refusal(f"reshape to {list(op.attrs['shape'])} doesn't keep the rows", op)
    everyone = op.tensor(x.value).shape[0]
    (y,) = g.create(op, [x.value], shape=(everyone, *rest))
    return [Rows(y, x.slots, x.zero)]


def _all_zero(op: Op, kinds: Operands) -> bool:
    return all(k is None or (isinstance(k, Rows) and k.zero) for k in kinds)


def _clamps_to_zero(op: Op, kinds: Operands) -> bool:
    return bool(op.attrs["lo"] <= 0 <= op.attrs["hi"]) and _all_zero(op, kinds)


# Ops that turn rows of zeros into rows of zeros. (0 · x isn't 0 for every x: mul wants both.)
ZEROS_STAY: dict[str, Callable[[Op, Operands], bool]] = {
    **dict.fromkeys(("add", "mul", "cast", "swiglu", "split", "concat"), _all_zero),
    "clamp": _clamps_to_zero,
    "zeros_like": lambda _op, _kinds: True,
}

TWINS: dict[str, Callable[[Grouping, Op, Operands], list[Kind]]] = {
    "expert_slots": expert_slots,
    "gather_rows": gather_rows,
    "linear": linear,
    "scatter_add": scatter_add,
    "reshape": reshape,
    "quant": quant,
    **dict.fromkeys(
        ("add", "mul", "sigmoid", "clamp", "cast", "zeros_like", "swiglu", "split", "concat"), row_by_row
    ),
}
