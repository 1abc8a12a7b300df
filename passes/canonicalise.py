"""Clean-ups that leave every result as it is: equal ops merged, dead ones dropped, idle ops folded away.

Folds match an op whose result is there already, ``cast(x)`` to x's own dtype or ``concat`` of all parts of
a ``split``, or one that its producer can do by itself: a ``cast`` or ``add`` behind ``combine``. They are
right bit for bit, but for two, which say so below."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from moec.ir import Module, Value
from moec.ir.types import f32
from moec.passes import cleanup
from moec.passes.loading import drop_dead_bindings
from moec.passes.manager import Pass, register
from moec.passes.pattern import ANY, Match, P, Rules, maybe

# Each value of the first is one of the second: casting there and back changes nothing.
WIDER = {
    "f8e4m3": ("bf16", "f16", "f32", "f64"),
    "f8e5m2": ("bf16", "f16", "f32", "f64"),
    "bf16": ("f32", "f64"),
    "f16": ("f32", "f64"),
    "f32": ("f64",),
}


# Conditions: "" or why not.
def keeps_type(m: Match) -> str:
    x, y = m["x"].type, m.root.results[0].type
    return "" if x == y else f"it changes {x} to {y}"


def widens_first(m: Match) -> str:
    x, middle = m["x"].type.dtype, m["inner"].attrs["to"]
    return (
        ""
        if middle.name in WIDER.get(x.name, ())
        else f"{middle} can't hold every {x}: the first cast rounds"
    )


def one_part(m: Match) -> str:
    return "" if len(m.root.results) == 1 else f"there are {len(m.root.results)} parts"


def all_parts_in_order(m: Match) -> str:
    split = m["split"]
    if m.root.operands != split.results:
        return f"the operands are not all parts of {m['x'].text} in order"
    return keeps_type(m)


def same_cuts(m: Match) -> str:
    concat, split = m["concat"], m.root
    have, want = [v.type for v in concat.operands], [r.type for r in split.results]
    return "" if have == want else "it is cut elsewhere than it was joined"


def reshapes_alike(m: Match) -> str:
    direct, y = type(m.root)([m["x"]], m.root.attrs).infer(), m.root.results[0].type
    return "" if direct == y else f"in one step it would be {direct}, not {y}"


def in_f32(m: Match) -> str:
    dtype = m["c"].results[0].type.dtype
    if not m.root.attrs["to"].is_float:
        return f"{m.root.attrs['to']} is no float"
    return "" if dtype == f32 else f"combine rounds to {dtype} first"


def says_its_own_dtype(m: Match) -> str:
    to, own = m["c"].attrs["to"], m["rows"].type.dtype
    return "" if to == own else f"to is {to or 'not given'}, the rows are {own}"


def not_broadcast(m: Match) -> str:
    sizes = m["s"].type.shape, m["c"].results[0].type.shape
    return "" if sizes[0] == sizes[1] else f"{m['s'].text} is broadcast from {sizes[0]} to {sizes[1]}"


def clamped_to_limit(m: Match) -> str:
    gate, up = m["gate.clamp"].attrs, m["up.clamp"].attrs
    limit, dtype = gate["hi"], m["gate"].type.dtype
    if gate["lo"] != -math.inf or (up["lo"], up["hi"]) != (-limit, limit):
        return f"gate is clamped to {gate['lo']} … {limit}, up to {up['lo']} … {up['hi']}: that is no limit"
    if not torch.finfo(torch.float32).tiny <= limit <= torch.finfo(torch.float32).max:
        return f"{limit} is no positive number in float32"
    if torch.tensor(limit, dtype=torch.float32).to(dtype.torch).item() != limit:
        return f"{dtype} has no {limit}: clamp rounds it"
    return ""


# Rewrites.
def operand(name: str) -> Callable[[Match], Value]:
    return lambda m: m[name]


def swiglu_limit(m: Match) -> Value:
    how = m.root.attrs | {"limit": m["gate.clamp"].attrs["hi"]}
    (h,) = m.create("swiglu", m["gate"], m["up"], **how).op.results
    return h


def cast_once(m: Match) -> Value:
    return m.create("cast", m["x"], to=m.root.attrs["to"])


def reshape_once(m: Match) -> Value:
    return m.create("reshape", m["x"], shape=m.root.attrs["shape"])


def zeros(m: Match) -> Value:
    return m.create("zeros_like", m["x"], dtype=m.root.tensor(m.root.results[0]).dtype)


def combine_to(m: Match, plus: str = "plus") -> Value:
    """The captured combine, adding ``plus`` and rounding to the root's dtype."""
    rows, dtype = m["rows"], m.root.tensor(m.root.results[0]).dtype
    to = None if dtype == rows.type.dtype else dtype
    return m.create("combine", rows, m["slot"], m["w"], m[plus], to=to, order=m["c"].attrs["order"])


def combine_plus(m: Match) -> Value:
    return combine_to(m, "s")


COMBINE = P.combine("rows", maybe("slot"), "w", maybe("plus"), to=ANY).named("c")
BARE_COMBINE = P.combine("rows", maybe("slot"), "w", None, to=ANY).named("c")

FOLDS: Rules = {
    "cast-identity": (P.cast("x", to=ANY).where(keeps_type), operand("x")),  # cast(x) -> x
    "cast-cast": (
        P.cast(P.cast("x", to=ANY).named("inner").where(widens_first), to=ANY),
        cast_once,
    ),  # cast(cast(x)) -> cast(x)
    "reshape-identity": (P.reshape("x", shape=ANY).where(keeps_type), operand("x")),  # reshape(x) -> x
    "reshape-reshape": (
        P.reshape(P.reshape("x", shape=ANY), shape=ANY).where(reshapes_alike),
        reshape_once,
    ),  # reshape(reshape(x)) -> reshape(x)
    "split-one": (
        P.split("x", sizes=ANY, axis=ANY).where(one_part),
        operand("x"),
    ),  # split(x) in one part -> x
    "concat-one": (P.concat("x", axis=ANY), operand("x")),  # concat(x) -> x
    "concat-split": (
        P.concat(P.split("x", sizes=ANY, axis=ANY).named("split"), ..., axis=ANY).where(all_parts_in_order),
        operand("x"),
    ),  # a, b = split(x); concat(a, b) -> x
    "split-concat": (
        P.split(P.concat(..., axis=ANY).named("concat"), sizes=ANY, axis=ANY).where(same_cuts),
        lambda m: m["concat"].operands,
    ),  # split(concat(a, b)) -> a, b
    "zeros-cast": (
        P.zeros_like(P.cast("x", to=ANY), dtype=ANY),
        zeros,
    ),  # zeros_like(cast(x)) -> zeros_like(x)
    "zeros-zeros": (
        P.zeros_like(P.zeros_like("x", dtype=ANY), dtype=ANY),
        zeros,
    ),  # zeros_like(zeros_like(x)) -> zeros_like(x)
    "cast-zeros": (
        P.cast(P.zeros_like("x", dtype=ANY), to=ANY),
        zeros,
    ),  # cast(zeros_like(x)) -> zeros_like(x)
    "swiglu-clamp": (
        P.swiglu(
            P.clamp("gate", lo=ANY, hi=ANY).named("gate.clamp"),
            P.clamp("up", lo=ANY, hi=ANY).named("up.clamp"),
            act=ANY,
        ).where(clamped_to_limit),
        swiglu_limit,
    ),  # swiglu(clamp(g), clamp(u)) -> swiglu(g, u) {limit=..}
    # Not bit for bit: -0.0 + 0.0 is 0.0, and x keeps its sign here.
    "add-zeros": (
        P.add("x", P.zeros_like(..., dtype=ANY)).commutes().where(keeps_type),
        operand("x"),
    ),  # add(x, zeros_like(_)) -> x
    "combine-dtype": (
        COMBINE.where(says_its_own_dtype),
        combine_to,
    ),  # combine(..){to=dtype of rows} -> combine(..)
    "cast-combine": (
        P.cast(COMBINE.once(), to=ANY).where(in_f32),
        combine_to,
    ),  # cast(combine(..){to=f32}) -> combine(..){to=..}
    # Not bit for bit below f32: round(round(sum) + s) becomes round(sum + s), nearer to the exact value.
    "combine-plus": (
        P.add(BARE_COMBINE.once(), "s").commutes().where(not_broadcast),
        combine_plus,
    ),  # add(combine(..), s) -> combine(.., s)
}


@register
class Canonicalise(Pass):
    """Common subexpressions, dead code, folding, call-site clean-up."""

    name = "canonicalise"

    def run(self, module: Module) -> bool:
        changed = False
        while self._once(module):
            changed = True
        return changed

    def _once(self, module: Module) -> bool:
        self.log.misses.clear()  # those of the last round count
        steps: dict[str, Callable[[Module], bool]] = {
            "fold": lambda module: self.apply(module, FOLDS),
            "merge-equal-ops": cleanup.merge_equal_ops,
            "trim-calls": cleanup.trim_calls,
            "drop-dead-bindings": drop_dead_bindings,
            "drop-dead-ops": cleanup.drop_dead_ops,
            "drop-unrun-functions": cleanup.drop_unrun_functions,
        }
        done = [name for name, step in steps.items() if step(module)]
        self.log.fired.update(name for name in done if name != "fold")
        return bool(done)
