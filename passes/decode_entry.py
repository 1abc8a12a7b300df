"""``@decode``: ``@step`` for at most ``max_new`` new tokens a sequence, where that makes it simpler.

::

    %q.short = take_rows(%q, %short.rows)
    ..absorbed..
    %q.long = take_rows(%q, %long.rows)
    ..expanded..
    %o = merge_rows(%o.absorbed, %short.rows, %o.expanded, %long.rows)

    ..absorbed, of %q..

Where no sequence has as many new tokens as ``split_batch`` asks of long ones, the short part is the batch:
its rows are all rows, its offsets, lengths and pages those of the batch, and the long part is gone, with all
that is made of it. Bodies that change are cloned as @decode.BODY; they run in the same scopes over the same
layers, so that parameters and their loading are shared (``moec.ir.weights``). Passes that change weights come
before this one: the manager sees to it, by its phase.

The bound of the symbol ``new`` says what @decode takes: ``sym={new<=8}``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import sympy

from moec.ir import Function, Module, Op, Value
from moec.ir.attrs import DIMS, SYMBOL
from moec.ir.graph import NEW_TOKENS
from moec.ir.op import Argument
from moec.ir.ops.control import Loop
from moec.ir.ops.segments import MergeRows, SplitBatch, TakeRows
from moec.ir.types import STATE_TYPES, as_dim, symbol
from moec.ir.weights import decode_name
from moec.passes.canonicalise import Canonicalise
from moec.passes.manager import Pass, register
from moec.passes.pattern import Miss


@dataclass(frozen=True)
class Options:
    max_new: int = 8  # new tokens of a sequence

    def __post_init__(self) -> None:
        if self.max_new < 1:
            raise ValueError("max_new must be at least 1")


class Known(Enum):
    """What a value is known to be, in place of a value."""

    ALL_ROWS = "0, 1, 2, ..."
    NOTHING = "no rows, or made of none"


Held = Value | Known


@register
class DecodeEntry(Pass):
    """``@decode``, for few new tokens a sequence: ``@step`` once more, its split of the batch folded away."""

    name = "decode-entry"
    phase = 1
    Options = Options

    def run(self, module: Module) -> bool:
        splits = [(f, op) for f in module for op in f.ops_named(SplitBatch.name)]
        reasons = [self._not_folded(module, op) for _, op in splits]
        before = set(module.functions)
        if "" in reasons:
            try:
                _Clones(module, self.options.max_new).entry()
            except _Unfit as unfit:
                module.remove(*(set(module.functions) - before))
                reasons = [reason or str(unfit) for reason in reasons]
        for (function, op), reason in zip(splits, reasons, strict=True):
            if reason:
                self.log.misses.append(Miss(reason, op, op.loc, "clone", function.name))
        if "" not in reasons:
            return False
        module.bounds[NEW_TOKENS] = self.options.max_new
        self.log.fired["clone"] += len(set(module.functions) - before)
        tidy = Canonicalise()
        tidy.log = self.log
        tidy.run(module)
        return True

    def _not_folded(self, module: Module, op: Op) -> str:
        """ "" or why @decode would be no simpler for this split."""
        if "step" not in module:
            return "there is no @step"
        if "decode" in module:
            return "there is a @decode"
        below, most = op.attrs["below"], self.options.max_new
        if below <= most:
            return f"of {most} new tokens a sequence may be long: that begins at {below}"
        return ""


class _Unfit(Exception):
    """Something is made of the long part that can't be left out."""


class _Clones:
    """Functions as they are where every sequence has at most ``max_new`` new tokens."""

    def __init__(self, module: Module, max_new: int) -> None:
        self.module, self.max_new = module, max_new
        self.sizes: dict[Any, Any] = {}  # symbols of the short parts: those of the batch
        self.names: dict[str, str] = {}  # what costs call entries
        self._done: dict[tuple[str, tuple[Any, ...]], str] = {}

    def entry(self) -> None:
        step = self.module["step"]
        decode = self.module.add(Function("decode", [(a.name, a.type) for a in step.args]))
        self._fill(decode, step, dict(zip(step.args, decode.args, strict=True)))

    def body(self, name: str, given: tuple[Held, ...]) -> str:
        """The function that runs instead of ``name`` where it is given these operands."""
        body = self.module[name]
        kinds = tuple(v if isinstance(v, Known) else v.type for v in given)
        if kinds == tuple(a.type for a in body.args[1:]):
            return name
        if (name, kinds) not in self._done:
            clone_name = decode_name(name)
            if clone_name in self.module:
                raise _Unfit(f"@{name} would be needed in two forms")
            clone = self.module.add(Function(clone_name, [(body.args[0].name, body.args[0].type)]))
            held: dict[Value, Held] = {body.args[0]: clone.args[0]}
            for arg, value in zip(body.args[1:], given, strict=True):
                renamed = isinstance(value, Argument) and arg.type != value.type
                called = value.name if isinstance(value, Value) and renamed else arg.name
                held[arg] = value if isinstance(value, Known) else clone.add_argument(called, value.type)
            self._done[name, kinds] = clone_name
            self._fill(clone, body, held)
        return self._done[name, kinds]

    def _fill(self, clone: Function, function: Function, held: Mapping[Value, Held]) -> None:
        held = dict(held)
        for name, param in function.params.items():
            held[param] = clone.param(name, param.type)
        for op in function.ops:
            self._op(clone, op, held)
        clone.ret(*(_value(held[v]) for v in function.outputs))
        for param in list(clone.params.values()):
            if not clone.uses(param):
                clone.drop_param(param.name)

    def _op(self, clone: Function, op: Op, held: dict[Value, Held]) -> None:
        operands = [None if v is None else held[v] for v in op.operands]
        if isinstance(op, SplitBatch) and op.below > self.max_new:
            self._split(op, operands, held)
        elif isinstance(op, TakeRows) and isinstance(operands[1], Known):
            held[op.results[0]] = operands[0] if operands[1] is Known.ALL_ROWS else Known.NOTHING  # type: ignore[assignment]
        elif isinstance(op, MergeRows) and Known.ALL_ROWS in (operands[1], operands[3]):
            held[op.results[0]] = operands[0 if operands[1] is Known.ALL_ROWS else 2]  # type: ignore[assignment]
        elif isinstance(op, Loop):
            self._loop(clone, op, operands, held)
        elif Known.NOTHING in operands:
            if op.effects or any(isinstance(r.type, STATE_TYPES) for r in op.results):
                raise _Unfit(f"{op!r} changes state by what the long part has made")
            held.update(dict.fromkeys(op.results, Known.NOTHING))
        else:
            self._copy(clone, op, [None if v is None else _value(v) for v in operands], self._attrs(op), held)

    def _split(self, op: SplitBatch, operands: list[Held | None], held: dict[Value, Held]) -> None:
        _, cu_q, lens, table = (_value(v) for v in operands)
        short, long = op.results[:4], op.results[4:]
        held.update(zip(short, (Known.ALL_ROWS, cu_q, lens, table), strict=True))
        held.update(dict.fromkeys(long, Known.NOTHING))
        self.sizes |= {
            symbol(op.rows): op.like.type.shape[0],
            symbol(op.sequences): op.seq_lens.type.shape[0],
        }
        self.names[op.short_entries] = "S"

    def _loop(self, clone: Function, op: Loop, operands: list[Held | None], held: dict[Value, Held]) -> None:
        given = tuple(v for v in operands if v is not None)
        if any(isinstance(v, Known) for v in given[: op.carry]):
            raise _Unfit(f"{op!r} carries rows of one part from layer to layer")
        attrs = op.attrs | {"callee": self.body(op.callee, given)}
        self._copy(clone, op, [v for v in given if isinstance(v, Value)], attrs, held)

    def _attrs(self, op: Op) -> dict[str, Any]:
        attrs = dict(op.attrs)
        for key, spec in op.attr_specs.items():
            if spec.kind is DIMS:
                attrs[key] = tuple(as_dim(sympy.sympify(d).subs(self.sizes)) for d in attrs[key])
            elif spec.kind is SYMBOL:
                attrs[key] = self.names.get(attrs[key], attrs[key])
        return attrs

    def _copy(
        self,
        clone: Function,
        op: Op,
        operands: list[Value | None] | list[Value],
        attrs: Any,
        held: dict[Value, Held],
    ) -> None:
        new = type(op)(operands, attrs, op.loc)
        new.take_notes(op)
        clone.create(new, [r.name for r in op.results])
        held.update(zip(op.results, new.results, strict=True))


def _value(held: Held | None) -> Value:
    if not isinstance(held, Value):
        raise _Unfit("what the long part has made is needed elsewhere than in merge_rows")
    return held
