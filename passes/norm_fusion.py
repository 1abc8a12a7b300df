"""The addition to the residual stream and the norm that follows become one op with two results.

::

    %x.attn = add(%h, %attn)
    %mlp.in = rms_norm(%x.attn, $post_attention_layernorm.weight) {eps=1e-06}

    %x.attn, %mlp.in = add_rms_norm(%h, %attn, $post_attention_layernorm.weight) {eps=1e-06}

The sum is read once where it was written and read again. It may be used elsewhere too, as it is by the next
addition. Right bit for bit: the norm is taken of the rounded sum.

A ``quant`` that is all that reads the normed rows becomes the end of their norm, whether it adds or not::

    %x.attn, %mlp.in = add_rms_norm(%h, %attn, $post_attention_layernorm.weight) {eps=1e-06}
    %mlp.in.q = quant(%mlp.in) {block=1x128}

    %x.attn, %mlp.in.q = add_rms_norm(%h, %attn, $post_attention_layernorm.weight) {eps=1e-06, quant=1x128}

The rows are rounded first, as they were: bit for bit too. Where others read them, a router say, behind an
addition, the op gives both::

    %x.attn, %mlp.in, %mlp.in.q = add_rms_norm_and_quant(%h, %attn, $weight) {eps=1e-06, quant=1x128}

A layer's last addition and the next layer's first norm stay apart. They stand in different functions, or in
one that runs for many layers: to join them, the stream between layers would have to be two values, the sum so
far and what is yet to be added, in every body and entry alike."""

from __future__ import annotations

from moec.ir import Module, Value
from moec.passes.manager import Pass, register
from moec.passes.pattern import ANY, Match, P, Rules, param


def same_shape(m: Match) -> str:
    a, b = m["x"].type, m["residual"].type
    return "" if a == b else f"it adds {m['residual'].text}, {b}, to {m['x'].text}, {a}"


def add_rms_norm(m: Match) -> Value:
    """The normed rows; whoever uses the sum has that of the new op."""
    out = (m["add"].results[0].name, m.root.results[0].name)
    total, normed = m.create("add_rms_norm", m["x"], m["residual"], m["w"], eps=m.root.attrs["eps"], out=out)
    m.also(m["add"], total)
    return normed


def tiles_of_rows(m: Match) -> str:
    block = m.root.attrs["block"]
    return "" if block[:-1] in ((), (1,)) else "a scale of several rows is known after the last of them"


def quant(m: Match) -> Value:
    """The norm with the quantisation as its end; whoever uses the sum has that of the new op."""
    norm, attrs = m["norm"], m.root.attrs
    made = dict(norm.attrs) | {"quant": attrs["block"], "scale": attrs["scale"]}
    y = m.root.results[0].name
    if norm.name == "rms_norm":
        normed: Value = m.create("rms_norm", *norm.operands, **made, out=y)
        return normed
    total, normed = m.create("add_rms_norm", *norm.operands, **made, out=(norm.results[0].name, y))
    m.also(norm, total)
    return normed


def read_elsewhere(m: Match) -> str:
    normed = m["norm"].results[1]
    return "" if m.uses(normed) > 1 else f"only the quant reads {normed.text}"


def and_quant(m: Match) -> Value:
    """The quantised rows; whoever uses the sum or the plain rows has those of the new op."""
    norm, attrs = m["norm"], m.root.attrs
    made = dict(norm.attrs) | {"quant": attrs["block"], "scale": attrs["scale"]}
    out = (*(r.name for r in norm.results), m.root.results[0].name)
    total, normed, q = m.create("add_rms_norm_and_quant", *norm.operands, **made, out=out)
    m.also(norm, total, normed)
    return q


RULES: Rules = {
    "add-norm": (
        P.rms_norm(P.add("x", "residual").named("add").where(same_shape), param("w"), eps=ANY),
        add_rms_norm,
    ),  # s = add(x, r); rms_norm(s, w) -> s, n = add_rms_norm(x, r, w)
    "norm-quant": (
        P.quant(P.rms_norm(..., eps=ANY).once().named("norm"), block=ANY, scale=ANY).where(tiles_of_rows),
        quant,
    ),  # quant(rms_norm(x, w)) -> rms_norm(x, w) {quant=..}
    "add-norm-quant": (
        P.quant(P.add_rms_norm(..., eps=ANY).out(1).once(1).named("norm"), block=ANY, scale=ANY).where(
            tiles_of_rows
        ),
        quant,
    ),  # s, n = add_rms_norm(x, r, w); quant(n) -> s, q = add_rms_norm(x, r, w) {quant=..}
    "add-norm-and-quant": (
        P.quant(P.add_rms_norm(..., eps=ANY).out(1).named("norm"), block=ANY, scale=ANY)
        .where(tiles_of_rows)
        .where(read_elsewhere),
        and_quant,
    ),  # s, n = add_rms_norm(x, r, w); quant(n), and n -> s, n, q = add_rms_norm_and_quant(x, r, w)
}


@register
class NormFusion(Pass):
    """The residual's addition and the RMSNorm behind it -> one op that gives both."""

    name = "norm-fusion"

    def run(self, module: Module) -> bool:
        return self.apply(module, RULES)
