"""Shared experts become experts that every token takes, behind those that its router chose.

::

    %w, %id = route(%logits) {k=8}
    %slot, %off = sort_by_expert(%id) {experts=256}
    %xe = gather_rows(%x, %slot) {per_row=8}
    %gu = grouped_linear(%xe, $experts.w13, %off)
    %h = swiglu(%gu)
    %d = grouped_linear(%h, $experts.w2, %off)
    %s = linear(swiglu(linear(%x, $shared.w13)), $shared.w2)
    %y = combine(%d, %slot, %w, %s)

    %w, %id = route(%logits) {k=8, shared=1}
    %slot, %off = sort_by_expert(%id) {experts=257}
    %xe = gather_rows(%x, %slot) {per_row=9}
    ..
    %y = combine(%d, %slot, %w)

A shared MLP n times as wide as an expert is n experts: its columns in n runs, whose products add up. Its
weight is 1, so nothing changes but the order of fp32 sums. One that is weighed by a gate (Qwen2-MoE) stays
apart.

Its rows are then gathered, and stored by slot, as the experts' are: fewer launches for more traffic."""

from __future__ import annotations

from typing import Any

from moec.ir import Op, TensorType, Value
from moec.ir.op import OpResult, Param
from moec.passes.loading import bind, bound_outside, emit, fresh_name, loaded
from moec.passes.pattern import ANY, Match, OpPattern, P, Rules, param


# Conditions: "" or why not.
def routed_here(m: Match) -> str:
    """The slots are those of the route's ids, and nothing else needs the routing as it is."""
    route, slot, off = m["route"], m["slot"], m["off"]
    if not isinstance(slot, OpResult) or slot.op.name != "sort_by_expert":
        return f"{slot.text} doesn't come from sort_by_expert"
    sort = slot.op
    if off not in sort.results or sort.operands[0] is not route.results[1]:
        return f"{slot.text} and {off.text} are not of {route.results[1].text}, sorted"
    for value, wanted in zip((*route.results, *sort.results), (1, 1, 2, 2), strict=True):
        if m.uses(value) != wanted:
            return f"{value.text} is used elsewhere too"
    experts = _shape(route.operands[0])[1] + route.attrs["shared"]
    if sort.attrs["experts"] != experts or m["gather"].attrs["per_row"] != _shape(route.results[0])[1]:
        return f"{slot.text} sorts {sort.attrs['experts']} experts, but the router knows {experts}"
    return ""


def fits(m: Match) -> str:
    """The shared MLP is a whole number of experts."""
    w13, s13, s2 = m["w13"].type, m["s13"].type, m["s2"].type
    for name in ("act", "limit"):
        own, shared = (m[h].attrs[name] for h in ("h", "s.h"))
        if own != shared:
            return f"the experts' {name} is {own or 'not given'}, the shared one's {shared or 'not given'}"
    if w13.dtype != s13.dtype or m["w2"].type.dtype != s2.dtype:
        return f"the experts' weights are {w13.dtype}, the shared ones {s13.dtype}"
    if s13.shape[0] % w13.shape[1]:
        wide, width = s13.shape[0] // 2, w13.shape[1] // 2
        return f"the shared MLP has {wide} columns, no multiple of an expert's {width}"
    for name in ("w13", "w2", "s13", "s2"):
        if m.uses(m[name]) > 1:
            return f"{m[name].text} is used elsewhere too"
        if why := bound_outside(m.module, m.function.name, m[name].name):
            return why
    return ""


def _shape(value: Any) -> tuple[Any, ...]:
    type = value.type
    if not isinstance(type, TensorType):
        raise TypeError(f"{value.text} is no tensor")
    return type.shape


# Rewrite.
def fold(m: Match) -> Value:
    """The combine of all experts, the shared ones among them, in the root's dtype."""
    route, sort, product = m["route"], m["slot"].op, m["d"]
    width = _shape(m["w13"])[1] // 2
    count = _shape(m["s13"])[0] // (2 * width)
    attrs = route.attrs | {"shared": route.attrs["shared"] + count}
    w, id = m.create("route", *route.operands, out=[r.name for r in route.results], loc=route.loc, **attrs)
    experts = sort.attrs["experts"] + count
    slot, off = m.create(
        "sort_by_expert", id, experts=experts, out=[r.name for r in sort.results], loc=sort.loc
    )
    rows = _again(m, m["gather"], m["x"], slot, per_row=_shape(w)[1])
    gate_up = _again(m, m["gu"], rows, _joint(m, m["w13"], _gate_up(m, count, width)), off)
    h = _again(m, m["h"], gate_up)
    d = _again(m, product, h, _joint(m, m["w2"], _down(m, count, width)), off)
    dtype = m.root.tensor(m.root.results[0]).dtype
    to = None if dtype == d.type.dtype else dtype  # type: ignore[union-attr]
    (y,) = m.create("combine", d, slot, w, None, to=to).op.results
    old = [m[name] for name in ("w13", "w2", "s13", "s2")]

    def tidy() -> None:
        m.function.erase(sort)  # users before producers
        m.function.erase(route)
        for p in old:
            m.function.drop_param(p.name)

    m.later(tidy)
    return y


def _again(m: Match, op: Op, *operands: Value, **attrs: Any) -> Value:
    """``op`` with other operands."""
    (y,) = m.create(op.name, *operands, out=op.results[0].name, loc=op.loc, **op.attrs | attrs).op.results
    return y


def _joint(m: Match, experts: Param, shared: Value) -> Param:
    """The experts' weights with the shared ones behind them."""
    parts = [loaded(m.module, m.function, experts), shared]
    value = emit(m.module, m.function, "concat", parts, {"axis": 0}, "all").results[0]
    return bind(m.module, m.function, value, fresh_name(m.module, m.function, f"{experts.name}_shared"))


def _emit(m: Match, op: str, operands: list[Value], **attrs: Any) -> list[Value]:
    return list(emit(m.module, m.function, op, operands, attrs, "shared").results)


def _gate_up(m: Match, count: int, width: int) -> Value:
    """[2·n·I, H], gate then up, as n experts' [2·I, H]."""
    whole = loaded(m.module, m.function, m["s13"])
    columns = _shape(whole)[1]
    if count == 1:
        return _emit(m, "reshape", [whole], shape=(1, 2 * width, columns))[0]
    halves = _emit(m, "split", [whole], axis=0, sizes=(count * width,) * 2)
    by_expert = [_emit(m, "reshape", [half], shape=(count, width, columns))[0] for half in halves]
    return _emit(m, "concat", by_expert, axis=1)[0]


def _down(m: Match, count: int, width: int) -> Value:
    """[H, n·I] as n experts' [H, I]."""
    whole = loaded(m.module, m.function, m["s2"])
    rows = _shape(whole)[0]
    parts = _emit(m, "split", [whole], axis=1, sizes=(width,) * count) if count > 1 else [whole]
    by_expert = [_emit(m, "reshape", [part], shape=(1, rows, width))[0] for part in parts]
    return _emit(m, "concat", by_expert, axis=0)[0] if count > 1 else by_expert[0]


FREE = ("score", "k", "renorm", "scale", "groups", "topk_groups", "group_score", "masked", "dtype", "shared")
ROUTE = P.route(..., **dict.fromkeys(FREE, ANY)).named("route")
EXPERTS = (
    P.grouped_linear(
        P.swiglu(
            P.grouped_linear(
                P.gather_rows("x", "slot", per_row=ANY).once().named("gather"), param("w13"), "off"
            )
            .once()
            .named("gu"),
            act=ANY,
            limit=ANY,
        )
        .once()
        .named("h"),
        param("w2"),
        "off",
    )
    .once()
    .named("d")
)
SHARED = P.linear(
    P.swiglu(P.linear("x", param("s13")).once(), act=ANY, limit=ANY).once().named("s.h"), param("s2")
).once()
SUM = P.combine(EXPERTS, "slot", ROUTE, to=ANY).once()


def _where(pattern: OpPattern) -> OpPattern:
    return pattern.where(routed_here).where(fits)


RULES: Rules = {
    "fold-shared": (
        _where(P.combine(EXPERTS, "slot", ROUTE, SHARED, to=ANY)),
        fold,
    ),  # combine(experts(x), slot, w, shared(x)) -> combine(experts and shared(x), slot, w)
    "fold-shared-add": (
        _where(P.add(SUM, SHARED).commutes()),
        fold,
    ),  # add(combine(experts(x), slot, w), shared(x)) -> combine(experts and shared(x), slot, w)
    "fold-shared-cast": (
        _where(P.add(P.cast(SUM, to=ANY).once(), SHARED).commutes()),
        fold,
    ),  # add(cast(combine(experts(x), slot, w)), shared(x)) -> combine(experts and shared(x), slot, w)
}
