"""The addition to the residual stream and the norm that follows become one op with two results.

::

    %x.attn = add(%h, %attn)
    %mlp.in = rms_norm(%x.attn, $post_attention_layernorm.weight) {eps=1e-06}

    %x.attn, %mlp.in = add_rms_norm(%h, %attn, $post_attention_layernorm.weight) {eps=1e-06}

The sum is read once where it was written and read again. It may be used elsewhere too, as it is by the next
addition. Right bit for bit: the norm is taken of the rounded sum.

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


RULES: Rules = {
    "add-norm": (
        P.rms_norm(P.add("x", "residual").named("add").where(same_shape), param("w"), eps=ANY),
        add_rms_norm,
    ),  # s = add(x, r); rms_norm(s, w) -> s, n = add_rms_norm(x, r, w)
}


@register
class NormFusion(Pass):
    """The residual's addition and the RMSNorm behind it -> one op that gives both."""

    name = "norm-fusion"

    def run(self, module: Module) -> bool:
        return self.apply(module, RULES)
