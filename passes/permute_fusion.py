"""The permutation of tokens to experts and back moves into the products on either side of it.

::

    %xp = gather_rows(%x, %slot) {per_row=8}
    %gu = grouped_linear(%xp, $experts.w13, %off)
    %h = swiglu(%gu)
    %d = grouped_linear(%h, $experts.w2, %off)
    %y = combine(%d, %slot, %w)

    %h = gather_grouped_linear(%x, $experts.w13, %slot, %off) {epilogue=swiglu, per_row=8}
    %d.by_slot = grouped_linear(%h, $experts.w2, %off, %slot)
    %y = combine(%d.by_slot, _, %w)

The first product reads its rows of x through the slots and applies the activation before it stores; the
second stores each row at the place of its slot, where combine reads a token's rows one behind the other and
adds them in the order of its choices. Neither the gathered rows nor gate and up reach memory. In fp8 what the
second one reads is quantised where it is made::

    %h = gather_grouped_linear(%x.q, $experts.w13.q, %slot, %off) {epilogue=swiglu, per_row=8}
    %h.q = quant(%h) {block=1x128}

    %h.q = gather_grouped_linear(%x.q, $experts.w13.q, %slot, %off) {epilogue=swiglu, per_row=8, quant=1x128}

With ``route_sort=true`` the router's choice and the sort by expert become one op as well::

    %w, %id = route(%logits) {k=8, score=sigmoid}
    %slot, %off = sort_by_expert(%id) {experts=256}

    %w, %id, %slot, %off = route_sort(%logits) {k=8, score=sigmoid}

and always so with a choice among the experts that are here, and the sort behind it::

    %kept, %local = local_experts(%w, %id) {experts=64, first=128}
    %slot, %off = sort_by_expert(%local) {experts=64}

    %kept, %local, %slot, %off = local_sort(%w, %id) {experts=64, first=128}

and with ``combine=true`` the second product and the sum of its rows::

    %d.by_slot = grouped_linear(%h, $experts.w2, %off, %slot)
    %y = combine(%d.by_slot, _, %w)

    %y = grouped_linear_combine(%h, $experts.w2, %off, %slot, %w)

Below f32 the activation is taken of the product in fp32, which was rounded before, and so is what is
quantised: results come nearer to the exact ones. All else is right bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moec.ir import Module, Value
from moec.ir.ops.route import Route
from moec.ir.types import bf16, f16, f32, format_block
from moec.passes.manager import Pass, register
from moec.passes.pattern import ANY, Match, P, Rules, maybe

DTYPES = (bf16, f16, f32)
# Beyond, one program's registers don't hold a token's scores; the sort alone still has a kernel then.
MOST_EXPERTS = 1024


@dataclass(frozen=True)
class Options:
    route_sort: bool = False  # router, top-k and sort as one op, too
    combine: bool = False  # the second product and the sum of its rows, too


# Conditions: "" or why not.
def known_dtype(m: Match) -> str:
    product = m["product"]
    x, known = product.tensor(product.x, scaled=True), ", ".join(map(str, DTYPES))
    dtype = x.dtype
    return "" if dtype in DTYPES or x.scale else f"the rows are {dtype}: the fused products take {known}"


def tiles_of_rows(m: Match) -> str:
    block = m.root.attrs["block"]
    if len(block) != 2 or block[0] != 1:
        return f"rows share a scale, in blocks of {format_block(block)}: it is known after the last of them"
    return "" if block[1] else "a row's scale is known after its last column"


def local_experts(m: Match) -> str:
    here, sorted = m["local"].attrs["experts"], m.root.attrs["experts"]
    return "" if here == sorted else f"{here} experts are here, {sorted} are sorted"


def every_expert(m: Match) -> str:
    scored, shared = m["route"].logits.type.shape[1], m["route"].attrs["shared"]
    sorted = m.root.attrs["experts"]
    if scored + shared != sorted:
        return f"the router knows {scored + shared} experts, not {sorted}"
    return "" if sorted <= MOST_EXPERTS else f"{sorted} experts are more than {MOST_EXPERTS}"


# Rewrites.
def route_sort(m: Match) -> Sequence[Value]:
    """The slots in order; whoever uses the weights and ids has those of the new op."""
    route = m["route"]
    out = [r.name for r in (*route.results, *m.root.results)]
    w, id, slot, off = m.create("route_sort", *route.operands, out=out, loc=route.loc, **route.attrs)
    m.also(route, w, id)
    return slot, off


def local_sort(m: Match) -> Sequence[Value]:
    """The slots in order; whoever uses the kept weights and numbers has those of the new op."""
    local = m["local"]
    out = [r.name for r in (*local.results, *m.root.results)]
    kept, id, slot, off = m.create("local_sort", *local.operands, out=out, loc=local.loc, **local.attrs)
    m.also(local, kept, id)
    return slot, off


def gather(m: Match) -> Value:
    """The product that reads its own rows of x."""
    per_row = m["gather"].attrs["per_row"]
    return _product(m, [m["x"], m["w"], m["slot"], m["off"]], per_row=per_row)


def gather_swiglu(m: Match) -> Value:
    """The same, with the root as its epilogue."""
    per_row = m["gather"].attrs["per_row"]
    operands = [m["x"], m["w"], m["slot"], m["off"]]
    return _product(m, operands, per_row=per_row, epilogue="swiglu", **m.root.attrs)


def swiglu(m: Match) -> Value:
    """The product as it was, with the root as its epilogue."""
    product = m["product"]
    return _product(m, product.operands, **product.attrs | {"epilogue": "swiglu"} | m.root.attrs)


def quant(m: Match) -> Value:
    """The product, quantised before it is stored."""
    product, how = m["product"], m.root.attrs
    return _product(m, product.operands, **product.attrs | {"quant": how["block"], "scale": how["scale"]})


def _product(m: Match, operands: Sequence[Value], **attrs: Any) -> Value:
    attrs["to"] = None if attrs.get("quant") else m["product"].attrs["to"]
    (y,) = m.create("gather_grouped_linear", *operands, loc=m["product"].loc, **attrs).op.results
    return y


def combine(m: Match) -> Value:
    """The sum of rows that their product has stored by slot."""
    product = m["product"]
    out = f"{product.results[0].name}.by_slot"
    operands = *product.operands[:3], m["slot"]
    rows = m.create("grouped_linear", *operands, out=out, loc=product.loc, to=product.attrs["to"])
    (y,) = m.create("combine", rows, None, m["weights"], m["plus"], **m.root.attrs).op.results
    return y


def product_combine(m: Match) -> Value:
    """The product that sums its rows by token."""
    product, attrs = m["product"], m.root.attrs
    operands = *product.operands, m["weights"], m["plus"]
    how = {"rows": product.attrs["to"], "to": attrs["to"], "order": attrs["order"]}
    (y,) = m.create("grouped_linear_combine", *operands, loc=product.loc, **how).op.results
    return y


GATHERED = P.gather_rows("x", "slot", per_row=ANY).once().named("gather")
PRODUCT = P.grouped_linear(GATHERED, "w", "off", to=ANY).named("product")

WITH_SWIGLU: Rules = {
    "gather-swiglu": (
        P.swiglu(PRODUCT.once(), act=ANY, limit=ANY).where(known_dtype),
        gather_swiglu,
    ),  # swiglu(grouped_linear(gather_rows(x))) -> gather_grouped_linear(x) {epilogue=swiglu}
    "swiglu": (
        P.swiglu(
            P.gather_grouped_linear(..., per_row=ANY, to=ANY).once().named("product"), act=ANY, limit=ANY
        ).where(known_dtype),
        swiglu,
    ),  # swiglu(gather_grouped_linear(x)) -> gather_grouped_linear(x) {epilogue=swiglu}
}
ALONE: Rules = {
    "gather": (
        PRODUCT.where(known_dtype),
        gather,
    ),  # grouped_linear(gather_rows(x)) -> gather_grouped_linear(x)
    "combine": (
        P.combine(
            P.grouped_linear("rows", "w", "off", to=ANY).once().named("product"),
            "slot",
            "weights",
            maybe("plus"),
            to=ANY,
        ).where(known_dtype),
        combine,
    ),  # combine(grouped_linear(rows), slot) -> combine(grouped_linear(rows, .., slot), _)
}
LOCAL: Rules = {
    "local-sort": (
        P.sort_by_expert(
            P.local_experts(..., first=ANY, experts=ANY).named("local").out(1), experts=ANY
        ).where(local_experts),
        local_sort,
    ),  # w, id = local_experts(..); sort_by_expert(id) -> w, id, slot, off = local_sort(..)
}
ROUTING: Rules = {
    "route-sort": (
        P.sort_by_expert(
            P.route(..., **dict.fromkeys(Route.attr_specs, ANY)).named("route").out(1), experts=ANY
        ).where(every_expert),
        route_sort,
    ),  # w, id = route(l); sort_by_expert(id) -> w, id, slot, off = route_sort(l)
}

SUMMED: Rules = {
    "product-combine": (
        P.combine(
            P.grouped_linear("rows", "w", "off", "slot", to=ANY).once().named("product"),
            None,
            "weights",
            maybe("plus"),
            to=ANY,
        ).where(known_dtype),
        product_combine,
    ),  # combine(grouped_linear(rows, .., slot), _) -> grouped_linear_combine(rows, .., slot)
}


QUANT: Rules = {
    "quant": (
        P.quant(
            P.gather_grouped_linear(..., per_row=ANY, epilogue=ANY, act=ANY, limit=ANY, to=ANY)
            .once()
            .named("product"),
            block=ANY,
            scale=ANY,
        ).where(tiles_of_rows),
        quant,
    ),  # quant(gather_grouped_linear(x)) -> gather_grouped_linear(x) {quant=..}
}


@register
class PermuteFusion(Pass):
    """Gather into the experts' first product, SwiGLU and quant behind it; the second stores rows by slot."""

    name = "permute-fusion"
    Options = Options

    def run(self, module: Module) -> bool:
        # Whole chains first: a product whose swiglu fits would else be fused without it, then once more.
        changed = self.apply(module, WITH_SWIGLU)
        changed = self.apply(module, ALONE) or changed
        changed = self.apply(module, QUANT) or changed
        changed = self.apply(module, LOCAL) or changed
        if self.options.route_sort:
            changed = self.apply(module, ROUTING) or changed
        if self.options.combine:
            changed = self.apply(module, SUMMED) or changed
        return changed
