"""What stands between projections and attention becomes one op each, for queries, keys and values, latents.

::

    %c, %k_pe = split(%kv_a) {sizes=[512,64]}
    %c.norm = rms_norm(%c, $kv_a_layernorm.weight) {eps=1e-06}
    %k_pe.rope = rope(%k_pe, %cos, %sin) {layout=interleaved}
    %latent = concat(%c.norm, %k_pe.rope)
    %kv.1 = cache_write(%kv, %layer, %latent, %slot_mapping)
    %q_nope, %q_pe = split(%q.heads) {sizes=[128,64]}
    %q_pe.rope = rope(%q_pe, %cos, %sin) {layout=interleaved}
    %q = concat(%q_nope, %q_pe.rope)

    %kv.1 = latent_cache_write(%kv, %layer, %kv_a, $kv_a_layernorm.weight, %cos, %sin, %slot_mapping)
              {eps=1e-06, layout=interleaved}
    %q = norm_rope(%q.heads, %cos, %sin) {layout=interleaved, start=128}

Absorbed queries, which come out of another product, are ``before`` of the op that turns q_pe. Grouped-query
attention has its keys and values written by ``kv_cache_write``, norms and clamps included.

The rope comes first, then what stands around it is taken in, outwards: a head's norm, a clamp, a norm of all
heads; columns that don't turn; the write.

Below f32 what was rounded between these ops no longer is: results come nearer to the exact ones. Latents, and
heads without a norm, are right bit for bit."""

from __future__ import annotations

import math
from typing import Any

from moec.ir import Module, Op, Value
from moec.ir.builder import stem
from moec.passes.manager import Pass, register
from moec.passes.pattern import ANY, Match, P, Rules, maybe, param

OPEN = {"lo": -math.inf, "hi": math.inf}
UNNORMED = {"norm": "head", "eps": 0.0}


# Conditions: "" or why not.
def of_heads(m: Match) -> str:
    x = m["x"].type
    if x.rank != 3:
        return f"{m['x'].text} is {x}, not heads"
    return "" if isinstance(x.shape[2], int) else f"how wide the heads of {m['x'].text} are isn't known"


def all_heads(m: Match) -> str:
    """A norm behind a reshape: over the heads' columns together."""
    row, heads = m["row"].type, m["cut"].results[0].type
    if row.rank != 2 or row.shape[1] != heads.shape[1] * heads.shape[2]:
        return f"{m['row'].text} is {row}, not all heads of {heads} in a row"
    return ""


def in_order(m: Match) -> str:
    """A clamp comes in only where no other has, and not in front of a norm of all heads."""
    attrs = m["turn"].attrs
    if attrs["norm"] == "full":
        return "all heads are normed behind it"
    return "" if (attrs["lo"], attrs["hi"]) == (-math.inf, math.inf) else "there is a clamp already"


def siblings(m: Match) -> str:
    """Both operands of the concat are the parts of one split, in order, one of them turned."""
    cut, other = m["cut"], m["other.cut"]
    if cut.attrs != other.attrs or cut.operands != other.operands:
        return (
            f"what is joined was cut from {cut.operands[0].text} and {other.operands[0].text}, or otherwise"
        )
    if len(cut.results) != 2:
        return f"{cut.operands[0].text} is cut into {len(cut.results)} parts"
    last = cut.results[0].type.rank - 1
    if any(op.attrs["axis"] not in (-1, last) for op in (cut, m.root)):
        return "columns are cut or joined along another axis"
    return ""


def behind(m: Match) -> str:
    return "" if m.root.attrs["axis"] in (-1, 2) else "the heads' columns are not what is joined"


def keys_then_values(m: Match) -> str:
    entry, k, v = m["entry"], m["turn"].results[0].type, m["v"].type
    if entry.attrs["axis"] not in (-2, 1):
        return "keys and values are joined along another axis"
    return "" if k == v else f"keys are {k} but values {v}"


def same_clamp(m: Match) -> str:
    mine, values = m.root.attrs, m["clamp"].attrs
    if (mine["lo"], mine["hi"]) != (values["lo"], values["hi"]):
        return f"values are clamped to {values['lo']}..{values['hi']}, keys to {mine['lo']}..{mine['hi']}"
    return ""


def one_latent(m: Match) -> str:
    if why := siblings_of_latent(m["cut"], m["other.cut"]):
        return why
    return "" if m["entry"].attrs["axis"] in (-1, 1) else "c and k_pe are joined along another axis"


def siblings_of_latent(cut: Op, other: Op) -> str:
    if cut.attrs != other.attrs or cut.operands != other.operands or len(cut.results) != 2:
        return "c and k_pe are not the two parts of one tensor"
    return "" if cut.attrs["axis"] in (-1, 1) else "c and k_pe are not columns of one tensor"


# Rewrites.
def turn(m: Match) -> Value:
    return _turn(m, m["x"], layout=m.root.attrs["layout"])


def take_norm(m: Match) -> Value:
    """norm=head: x's own norm is of each head."""
    return _turn(m, m["x"], m["w"], **m["turn"].attrs | {"norm": "head", "eps": m["norm"].attrs["eps"]})


def take_full_norm(m: Match) -> Value:
    x = m.create("reshape", m["row"], shape=m["cut"].attrs["shape"], out=stem(m["cut"].results[0].name))
    return _turn(m, x, m["w"], **m["turn"].attrs | {"norm": "full", "eps": m["norm"].attrs["eps"]})


def take_clamp(m: Match) -> Value:
    x, clamp = m["x"], m["clamp"]
    if (cut := m.captures.get("cut")) is not None:
        x = m.create("reshape", x, shape=cut.attrs["shape"], out=stem(cut.results[0].name))
    bounds = {key: clamp.attrs[key] for key in OPEN}
    return _turn(m, x, m["w"], **m["turn"].attrs | bounds)


def widen(m: Match) -> Value:
    """All of the split's columns, of which the turned part starts where it stood."""
    part = m["turned"]
    start = 0 if part == 0 else m["cut"].attrs["sizes"][0]
    return _turn(m, m["cut"].operands[0], **m["turn"].attrs | {"start": start + m["turn"].attrs["start"]})


def first_turns(m: Match) -> Value:
    m.captures["turned"] = 0
    return widen(m)


def last_turns(m: Match) -> Value:
    m.captures["turned"] = 1
    return widen(m)


def take_before(m: Match) -> Value:
    return _turn(m, m["x"], m["w"], m["before"], **m["turn"].attrs)


def _turn(m: Match, x: Value, w: Value | None = None, before: Value | None = None, **attrs: Any) -> Value:
    (y,) = m.create("norm_rope", x, m["cos"], m["sin"], w, before, **attrs).op.results
    return y


def write_keys(m: Match) -> Value:
    operands = [m[name] for name in ("cache", "layer", "x", "v", "cos", "sin", "slots", "w")]
    (out,) = m.create("kv_cache_write", *operands, **m["turn"].attrs).op.results
    return out


def clamp_values(m: Match) -> Value:
    v = m["v"]
    if (cut := m.captures.get("cut")) is not None:
        v = m.create("reshape", v, shape=cut.attrs["shape"], out=stem(cut.results[0].name))
    operands = [*m.root.operands[:3], v, *m.root.operands[4:]]
    (out,) = m.create("kv_cache_write", *operands, **m.root.attrs | {"clamp_v": True}).op.results
    return out


def write_latent(m: Match) -> Value:
    operands = [m[name] for name in ("cache", "layer", "kv_a", "w", "cos", "sin", "slots")]
    how = {"eps": m["norm"].attrs["eps"], "layout": m["rope"].attrs["layout"]}
    (out,) = m.create("latent_cache_write", *operands, **how).op.results
    return out


# What turns, whatever it has taken in so far; ``norm`` and ``start`` as a rule wants them.
def TURN(x: Any, w: Any = None, **attrs: Any) -> Any:
    free = dict.fromkeys(("norm", "eps", "lo", "hi", "layout", "start"), ANY)
    return P.norm_rope(x, "cos", "sin", w, None, **free | attrs).named("turn")


NORM = P.rms_norm("x", param("w"), eps=ANY).once().named("norm")
ROW_NORM = P.rms_norm("row", param("w"), eps=ANY).once().named("norm")
CLAMP = P.clamp("x", lo=ANY, hi=ANY).once().named("clamp")
CUT = P.split(..., sizes=ANY, axis=ANY)


def CUT_HEADS(x: Any) -> Any:
    return P.reshape(x, shape=ANY).once().named("cut")


TURNS: Rules = {
    "rope": (P.rope("x", "cos", "sin", layout=ANY).where(of_heads), turn),  # rope(heads) -> norm_rope(heads)
}
TAKEN_IN: Rules = {
    "head-norm": (
        TURN(NORM, **OPEN, **UNNORMED),
        take_norm,
    ),  # norm_rope(rms_norm(x, w)) -> norm_rope(x, w)
    "clamp": (
        TURN(CLAMP, maybe("w")).where(in_order),
        take_clamp,
    ),  # norm_rope(clamp(x)) -> norm_rope(x) {lo, hi}
    "clamp-rows": (
        TURN(CUT_HEADS(CLAMP), maybe("w")).where(in_order),
        take_clamp,
    ),  # norm_rope(reshape(clamp(x))) -> norm_rope(reshape(x)) {lo, hi}
    "full-norm": (
        TURN(CUT_HEADS(ROW_NORM), **UNNORMED).where(all_heads),
        take_full_norm,
    ),  # norm_rope(reshape(rms_norm(x, w))) -> norm_rope(reshape(x), w) {norm=full}
    "partial": (
        P.concat(
            TURN(CUT.named("cut").out(0), **OPEN, **UNNORMED).once(), CUT.named("other.cut").out(1), axis=ANY
        ).where(siblings),
        first_turns,
    ),  # a, b = split(x); concat(norm_rope(a), b) -> norm_rope(x)
    "partial-last": (
        P.concat(
            CUT.named("other.cut").out(0), TURN(CUT.named("cut").out(1), **OPEN, **UNNORMED).once(), axis=ANY
        ).where(siblings),
        last_turns,
    ),  # a, b = split(x); concat(a, norm_rope(b)) -> norm_rope(x) {start=width of a}
}
BEHIND: Rules = {
    "before": (
        P.concat("before", TURN("x", maybe("w")).once(), axis=ANY).where(behind),
        take_before,
    ),  # concat(a, norm_rope(b)) -> norm_rope(b, before=a)
}
WRITES: Rules = {
    "keys-and-values": (
        P.cache_write(
            "cache",
            "layer",
            P.concat(TURN("x", maybe("w")).once(), "v", axis=ANY).once().named("entry"),
            "slots",
        ).where(keys_then_values),
        write_keys,
    ),  # cache_write(concat(norm_rope(k), v)) -> kv_cache_write(k, v)
    "latent": (
        P.cache_write(
            "cache",
            "layer",
            P.concat(
                P.rms_norm(P.split("kv_a", sizes=ANY, axis=ANY).named("cut"), param("w"), eps=ANY)
                .once()
                .named("norm"),
                P.rope(
                    P.split("kv_a", sizes=ANY, axis=ANY).named("other.cut").out(1), "cos", "sin", layout=ANY
                )
                .once()
                .named("rope"),
                axis=ANY,
            )
            .once()
            .named("entry"),
            "slots",
        ).where(one_latent),
        write_latent,
    ),  # cache_write(concat(rms_norm(c), rope(k_pe))) -> latent_cache_write([c | k_pe])
}


def WRITE(v: Any) -> Any:
    free = dict.fromkeys(("norm", "eps", "lo", "hi", "layout", "start"), ANY)
    return P.kv_cache_write("cache", "layer", "k", v, "cos", "sin", "slots", maybe("w"), **free)


VALUES = P.clamp("v", lo=ANY, hi=ANY).once().named("clamp")
CLAMPED: Rules = {
    "clamp-values": (WRITE(VALUES).where(same_clamp), clamp_values),
    # kv_cache_write(k, clamp(v)) -> kv_cache_write(k, v) {clamp_v=true}
    "clamp-value-rows": (WRITE(CUT_HEADS(VALUES)).where(same_clamp), clamp_values),
    # kv_cache_write(k, reshape(clamp(v))) -> kv_cache_write(k, reshape(v)) {clamp_v=true}
}


@register
class RopeCacheFusion(Pass):
    """Norm, clamp and RoPE of queries in one op; those of keys or latents with their write into the cache."""

    name = "rope-cache-fusion"
    phase = 1  # decode-entry folds splits away that hide what is joined to what turns

    def run(self, module: Module) -> bool:
        # From the rope outwards: a write takes over what its keys have taken in.
        tables = (TURNS, TAKEN_IN, BEHIND, WRITES, CLAMPED)
        return any([self.apply(module, table) for table in tables])  # noqa: C419 - each runs
