"""A routed layer becomes one op, which GPUs run in one cooperative launch while tokens are few.

::

    %w, %id, %slot, %off = route_sort(%logits, $bias) {k=8, score=sigmoid}
    %h.q = gather_grouped_linear(%x.q, $experts.w13.q, %slot, %off) {epilogue=swiglu, per_row=8, quant=1x128}
    %y = grouped_linear_combine(%h.q, $experts.w2.q, %off, %slot, %w)

    %y = routed_experts(%x.q, $experts.w13.q, $experts.w2.q, %logits, $bias) {k=8, quant=1x128, score=sigmoid}

or, with ``route=false``, the products alone::

    %y = experts(%x.q, $experts.w13.q, $experts.w2.q, %off, %slot, %w) {quant=1x128}

It goes behind permute-fusion{route_sort=true,combine=true}, whose ops it takes; what it makes has their bits.
No -O level runs it: whether one launch is faster than three has not been measured. What a router inside of
``routed_experts`` chooses is no value any more: nobody can record it or compare it. ``route=false`` keeps it.
"""

from __future__ import annotations

from dataclasses import dataclass

from moec.ir import Module, Value
from moec.ir.ops.experts import Experts
from moec.ir.ops.route import RouteSort
from moec.passes.manager import Pass, register
from moec.passes.pattern import ANY, Match, P, Rules, maybe


@dataclass(frozen=True)
class Options:
    route: bool = True  # the router too, where nothing else asks what it chose


# Conditions: "" or why not.
def rows_of_tokens(m: Match) -> str:
    per_row, (_, k) = m["up"].attrs["per_row"], m["weights"].type.shape
    return "" if per_row == k else f"a token has {per_row} rows in the first product, but {k} in the second"


def its_own_choice(m: Match) -> str:
    """Weights and order are those of the router, and nothing else reads them."""
    weights, id, slot, off = m["route"].results
    for given, value in (m["slot"], slot), (m["weights"], weights):
        if given is not value:
            return f"{given.text} is not what the router gives, {value.text}"
    read = [v.text for v in (weights, slot, off) if m.uses(v) > 1] + [id.text] * bool(m.uses(id))
    return f"{' and '.join(read)} is read elsewhere too" if read else ""


# Rewrites.
def experts(m: Match) -> Value:
    """Both products as one op."""
    up, down = m["up"].attrs, m.root.attrs
    attrs = {key: up[key] for key in ("act", "limit", "quant")} | {"quant_scale": up["scale"], "h": up["to"]}
    attrs |= {key: down[key] for key in ("rows", "order", "to")}
    operands = [m[name] for name in ("x", "w13", "w2", "off", "slot", "weights", "plus")]
    (y,) = m.create("experts", *operands, **attrs).op.results
    return y


def routed(m: Match) -> Value:
    """The router and the experts as one op."""
    route = m["route"]
    operands = [*(m[name] for name in ("x", "w13", "w2")), *route.operands, m["plus"]]
    (y,) = m.create("routed_experts", *operands, **route.attrs, **m.root.attrs).op.results
    return y


PRODUCTS: Rules = {
    "experts": (
        P.grouped_linear_combine(
            P.gather_grouped_linear(
                "x",
                "w13",
                "slot",
                "off",
                per_row=ANY,
                epilogue="swiglu",
                act=ANY,
                limit=ANY,
                quant=ANY,
                scale=ANY,
                to=ANY,
            )
            .once()
            .named("up"),
            "w2",
            "off",
            "slot",
            "weights",
            maybe("plus"),
            rows=ANY,
            to=ANY,
        ).where(rows_of_tokens),
        experts,
    ),  # grouped_linear_combine(gather_grouped_linear(x) {epilogue=swiglu}) -> experts(x)
}
ROUTED: Rules = {
    "routed-experts": (
        P.experts(
            "x",
            "w13",
            "w2",
            P.route_sort(..., **dict.fromkeys(RouteSort.attr_specs, ANY)).named("route").out(3),
            "slot",
            "weights",
            maybe("plus"),
            **dict.fromkeys(Experts.attr_specs, ANY),
        ).where(its_own_choice),
        routed,
    ),  # w, id, slot, off = route_sort(l); experts(x, off, slot, w) -> routed_experts(x, l)
}


@register
class OneLaunch(Pass):
    """A routed layer, or its experts alone, as one op: one cooperative launch for a few tokens."""

    name = "one-launch"
    Options = Options

    def run(self, module: Module) -> bool:
        changed = self.apply(module, PRODUCTS)
        if self.options.route:
            changed = self.apply(module, ROUTED) or changed
        return changed
