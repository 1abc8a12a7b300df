"""A loop over experts becomes one sort of the slots by expert, one gather, and grouped products.

::

    %y0 = zeros_like(%x) {dtype=f32}
    %y = for_each @expert(%y0, %x, %w, %id) {experts=0..255, scope=experts.*}
    func @expert(%expert: index, %y, %x, %w, %id):
      %slot = expert_slots(%id, %expert)
      %xe = gather_rows(%x, %slot) {per_row=8}
      %g = linear(%xe, $gate_proj.weight)
      %u = linear(%xe, $up_proj.weight)
      %h = swiglu(%g, %u)
      %d = linear(%h, $down_proj.weight)
      %y.1 = scatter_add(%y, %d, %slot, %w) {per_row=8}

    %slot, %off = sort_by_expert(%id) {experts=256}
    %xe = gather_rows(%x, %slot) {per_row=8}
    %gu = grouped_linear(%xe, $experts.w13, %off)
    %h = swiglu(%gu)
    %d = grouped_linear(%h, $experts.w2, %off)
    %y = combine(%d, %slot, %w) {to=f32}

The body may be any mix of ops that have a twin on all rows (``grouping.py``). How the stacked weights are
loaded is written into the load-time functions, an expert's own load-time work (the dequantisation of FP8)
included. Gate and up projections that meet in a ``swiglu`` become one product, of shared experts and dense
layers too.

Sums over a token's experts are taken in the order of its choices, in fp32, where the loop took them in the
order of the experts: the results differ by the rounding of fp32 sums. Slots of experts outside the loop's
range must have finite weights: their rows count as zeros."""

from __future__ import annotations

from dataclasses import dataclass

from moec.ir import Module, TensorType, Value
from moec.ir.op import OpResult
from moec.ir.ops.control import Loop
from moec.ir.types import STATE_TYPES
from moec.ir.weights import unmirror
from moec.passes import fold_shared
from moec.passes.grouping import Grouping
from moec.passes.loading import bind, bound_outside, drop_dead_bindings, emit, fresh_name, loaded
from moec.passes.manager import Pass, register
from moec.passes.pattern import ANY, Match, P, Refusal, Rules, param


@dataclass(frozen=True)
class Options:
    fold_shared: bool = False  # shared experts become experts that every token takes (fold_shared.py)


def over_all_experts(m: Match) -> str:
    loop = m.root
    if not loop.attrs["carry"]:
        return "it carries no sum"
    if not isinstance(loop, Loop) or loop.range.first != 0 or len(loop.range) < 1:
        return f"the experts are {loop.attrs['experts']}: a sort by expert counts from 0"
    if "*" not in loop.scope:
        return f"scope {loop.scope or 'none'} has no *: all experts share their parameters"
    if any(isinstance(v.type, STATE_TYPES) for v in loop.values):
        return "it threads state through the experts"
    return ""


def group_loop(m: Match) -> list[Value]:
    loop = m.root
    if not isinstance(loop, Loop):
        raise Refusal("is no loop")
    body = m.module[loop.callee]
    grouping = Grouping(m, loop, body)
    results = [grouping.total(number) for number in range(loop.carry)]
    grouping.finish()
    starts = {v.op for v in loop.operands[: loop.carry] if isinstance(v, OpResult)}

    def tidy() -> None:
        unmirror(m.module, m.function.name, loop)
        if not m.module.callers(body.name):
            m.module.remove(body.name)
        for op in starts:
            if op.name == "zeros_like" and not m.uses(op.results[0]):
                m.function.erase(op)

    m.later(tidy)
    return results


def own_weights(m: Match) -> str:
    """Both weights serve this product only: else the joint one would be a copy beside the originals."""
    for name in ("gate", "up"):
        if m.uses(m[name]) > 1:
            return f"{m[name].text} is used elsewhere too"
        if why := bound_outside(m.module, m.function.name, m[name].name):
            return why
    return ""


def join_gate_up(m: Match) -> Value:
    """The one product whose columns are the gate's, then the up projection's, and the swiglu of it."""
    gate, up = m["gate"], m["up"]
    axis = gate.type.rank - 2
    name = joint_name(gate.name, up.name)
    parts = [loaded(m.module, m.function, gate), loaded(m.module, m.function, up)]
    joint = emit(m.module, m.function, "concat", parts, {"axis": axis}, "w13").results[0]
    w13 = bind(m.module, m.function, joint, fresh_name(m.module, m.function, name))
    product = m["product"]
    operands = [m["x"], w13, *product.operands[2:]]
    gate_up = m.create(product.name, *operands, out="gu", loc=product.loc)

    def tidy() -> None:
        for old in (gate, up):
            m.function.drop_param(old.name)

    m.later(tidy)
    (h,) = m.create("swiglu", gate_up, **m.root.attrs).op.results
    return h


def joint_name(gate: str, up: str) -> str:
    """``experts.gate_proj.weight``, ``experts.up_proj.weight`` -> ``experts.w13``."""
    common = []
    for a, b in zip(gate.split("."), up.split("."), strict=False):
        if a != b:
            break
        common.append(a)
    return ".".join([*common, "w13"])


def even_width(m: Match) -> str:
    y = m.root.results[0].type
    width = y.shape[-1] if isinstance(y, TensorType) else None
    return "" if isinstance(width, int) else f"the width {width} isn't known"


RULES: Rules = {
    "expert-loop": (
        P.for_each(..., callee=ANY, carry=ANY, scope=ANY, experts=ANY).where(over_all_experts),
        group_loop,
    ),  # for_each expert: gather, linear.., scatter_add -> sort, gather, grouped_linear.., combine
    "grouped-gate-up": (
        P.swiglu(
            P.grouped_linear("x", param("gate"), "off").once().named("product"),
            P.grouped_linear("x", param("up"), "off").once(),
            act=ANY,
            limit=ANY,
        )
        .where(own_weights)
        .where(even_width),
        join_gate_up,
    ),  # swiglu(grouped_linear(x, g), grouped_linear(x, u)) -> swiglu(grouped_linear(x, [g; u]))
    "gate-up": (
        P.swiglu(
            P.linear("x", param("gate")).once().named("product"),
            P.linear("x", param("up")).once(),
            act=ANY,
            limit=ANY,
        )
        .where(own_weights)
        .where(even_width),
        join_gate_up,
    ),  # swiglu(linear(x, g), linear(x, u)) -> swiglu(linear(x, [g; u]))
}


@register
class ExpertGrouping(Pass):
    """Per-expert loop -> sort by expert, gather, two grouped products, combine; gate and up as one weight."""

    name = "expert-grouping"
    Options = Options

    def run(self, module: Module) -> bool:
        changed = self.apply(module, RULES)
        if self.options.fold_shared:
            changed = self.apply(module, fold_shared.RULES) or changed
        if changed:
            drop_dead_bindings(module)
        return changed
