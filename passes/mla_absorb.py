"""Attention over keys and values expanded from a latent becomes attention over the latent itself.

::

    %c, %k_pe = split(%latent) {sizes=[512,64]}
    %kv = linear(%c, $kv_b_proj.weight)
    %kv.heads = reshape(%kv) {shape=[S,128,256]}
    %k_nope, %v = split(%kv.heads) {sizes=[128,128]}
    %k_pe.heads = broadcast(%k_pe) {axis=1, size=128}
    %k = concat(%k_nope, %k_pe.heads)
    %o = attention(%q, %k, %v, %cu_q, %cu_k) {scale=0.1}

    %o = latent_attention(%q, %latent, $kv_b_proj.weight, %cu_q, %cu_k)
           {absorb_below=171, nope=128, scale=0.1, value=128}

Scores q_nope·(W_UK·c) are (q_nope·W_UK)·c, and W_UV comes out of the sum over keys: new tokens then need no
keys and values of all the cached ones. For many new tokens it is cheaper to make these than to attend to rows
as wide as the latent; ``absorb_below`` says where that begins.

Below fp32 the results differ in what is rounded in between: keys and values no longer are.
"""

from __future__ import annotations

from dataclasses import dataclass

from moec.ir import Module, Value
from moec.passes.manager import Pass, register
from moec.passes.pattern import ANY, Match, P, Rules

# Of absorb_below, where absorbing pays for any number of new tokens.
ALWAYS = 2**31 - 1


@dataclass(frozen=True)
class Options:
    absorb_below: int | None = None  # new tokens of a sequence; none: where the two forms' FLOPs cross

    def __post_init__(self) -> None:
        if self.absorb_below is not None and self.absorb_below < 0:
            raise ValueError("absorb_below must not be negative")


def crossover(nope: int, value: int, rank: int) -> int:
    """The fewest new tokens (of a sequence with many more cached ones) for which expanding is as cheap.

    FLOPs of a head, for Sq new tokens, Sk cached ones, and P, R, V, C wide q_nope, q_pe, v and c:

        expanded   2·(P+R+V)·Sq·Sk + 2·C·(P+V)·Sk
        absorbed   2·(2C+R)·Sq·Sk + 2·C·(P+V)·Sq

    For Sk ≫ Sq the last term vanishes, and absorbed is cheaper where Sq < C·(P+V) / (2C - P - V).
    """
    dearer = 2 * rank - nope - value  # FLOPs / 2 that a pair of query and key costs more when absorbed
    return ALWAYS if dearer <= 0 else -(-rank * (nope + value) // dearer)


# Conditions: "" or why not. What else must hold, rows and widths, the ops' types have seen to.
def one_latent(m: Match) -> str:
    cuts = m["c.cut"], m["k_pe.cut"]
    if any(cut.attrs["axis"] not in (-1, 1) for cut in cuts):
        return f"{m['latent'].text} is not cut along its columns"
    c, k_pe = ([*cut.attrs["sizes"]] for cut in cuts)
    if c != k_pe or len(c) != 2:
        return f"{m['latent'].text} is cut into {c} for c and {k_pe} for k_pe"
    return ""


def one_expansion(m: Match) -> str:
    keys, values, heads = m["k.cut"], m["v.cut"], m["heads"].results[0]
    if keys is not values:
        return f"keys and values are cut from two: {heads.text} and {values.operands[0].text}"
    if keys.attrs["axis"] not in (-1, 2):
        return f"{heads.text} is not cut along each head's columns"
    return "" if len(keys.results) == 2 else f"{heads.text} is cut into {len(keys.results)} parts"


def one_rotary_key(m: Match) -> str:
    axis = m["k_pe.heads"].attrs["axis"]
    return "" if axis in (-2, 1) else f"k_pe repeats along axis {axis}, not once a head"


def a_key_head_each(m: Match) -> str:
    q, heads = m["q"].type.shape[1], m["heads"].results[0].type.shape[1]
    return "" if q == heads else f"{q} query heads share {heads} key heads"


# What is free, as cuts and views of the latent are, may be used elsewhere too.
KEYS_AND_VALUES = P.split(
    P.reshape(
        P.linear(P.split("latent", sizes=ANY, axis=ANY).named("c.cut"), "w").once(),
        shape=ANY,
    )
    .once()
    .named("heads"),
    sizes=ANY,
    axis=ANY,
).once()

EXPANDED = (
    P.attention(
        "q",
        P.concat(
            KEYS_AND_VALUES.named("k.cut"),
            P.broadcast(
                P.split("latent", sizes=ANY, axis=ANY).named("k_pe.cut").out(1), axis=ANY, size=ANY
            ).named("k_pe.heads"),
            axis=ANY,
        ).once(),
        P.split(..., sizes=ANY, axis=ANY).named("v.cut").out(1),
        "cu_q",
        "cu_k",
        scale=ANY,
        causal=ANY,
        window=ANY,
    )
    .where(one_latent)
    .where(one_expansion)
    .where(one_rotary_key)
    .where(a_key_head_each)
)


@register
class MLAAbsorb(Pass):
    """Attention over keys and values expanded from a latent -> over the latent, W_UK and W_UV absorbed."""

    name = "mla-absorb"
    Options = Options

    def run(self, module: Module) -> bool:
        rules: Rules = {
            "absorb": (EXPANDED, self._absorb),
        }  # attention(q, [W_UK·c | k_pe], W_UV·c) -> latent_attention(q, [c | k_pe], w)
        return self.apply(module, rules)

    def _absorb(self, m: Match) -> Value:
        nope, value = m["k.cut"].attrs["sizes"]
        below = self.options.absorb_below
        if below is None:
            below = crossover(nope, value, m["c.cut"].attrs["sizes"][0])
        o: Value = m.create(
            "latent_attention",
            *(m[name] for name in ("q", "latent", "w", "cu_q", "cu_k")),
            **m.root.attrs,
            nope=nope,
            value=value,
            absorb_below=below,
        )
        return o
