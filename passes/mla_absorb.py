"""Attention over keys and values expanded from cached latents becomes attention over the latents themselves,
for sequences with few new tokens.

::

    %latent = cache_read(%kv, %layer, %block_table, %seq_lens)
    %c, %k_pe = split(%latent) {sizes=[512,64]}
    %kv_b = linear(%c, $kv_b_proj.weight)
    %heads = reshape(%kv_b) {shape=[S,128,256]}
    %k_nope, %v = split(%heads) {sizes=[128,128]}
    %k_pe.heads = broadcast(%k_pe) {axis=1, size=128}
    %k = concat(%k_nope, %k_pe.heads)
    %o = attention(%q, %k, %v, %cu_q, %cu_k) {scale=0.1}

    %short.rows, .. %long.rows, .. = split_batch(%slot_mapping, %cu_q, %seq_lens, %block_table) {below=199}
    %q.short = take_rows(%q, %short.rows)
    %q_nope, %q_pe = split(%q.short) {sizes=[128,64]}
    %q_lat = head_linear(%q_nope, $kv_b_proj.w_uk) {transposed=true}
    %q.latent = concat(%q_lat, %q_pe)
    %o_lat = latent_attention(%q.latent, %kv, %layer, %short.table, %short.cu, %short.lens) {rank=512, ..}
    %o.short = head_linear(%o_lat, $kv_b_proj.w_uv)
    %q.long = take_rows(%q, %long.rows)
    ..the ops above, over the long sequences..
    %o = merge_rows(%o.short, %short.rows, %o.long, %long.rows)

Scores q_nope·(W_UK·c) are (q_nope·W_UK)·c, and W_UV comes out of the sum over keys: new tokens then need no
keys and values of all the cached ones. For many new tokens it is cheaper to make these than to attend to rows
as wide as the latent; where that begins is said by the costs of both on the target's device, or by
``absorb_below``. The split is made once, where the batch comes from, however deep the attention stands.

W_UK and W_UV are parts of kv_b_proj's weight, which the long sequences use as it is: one memory, three names.

Below fp32 the results differ in what is rounded in between: keys and values no longer are.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from typing import Any

from moec.ir import Module, Op, Value
from moec.ir.op import OpResult, Param
from moec.ir.ops.segments import SplitBatch
from moec.ir.types import TensorType
from moec.passes.invariants import hoist, is_prefix_sum, outside, sources
from moec.passes.latent_forms import ALWAYS, Segment, Sizes, absorbed, crossover, expanded
from moec.passes.loading import bind, emit, fresh_name, loaded
from moec.passes.manager import Pass, register
from moec.passes.pattern import ANY, Match, P, Refusal, Rules, param

PARTS = tuple(f"{part}.{what}" for part in ("short", "long") for what in ("rows", "cu", "lens", "table"))


@dataclass(frozen=True)
class Options:
    absorb_below: int | None = None  # new tokens of a sequence; none: from the cost of both forms

    def __post_init__(self) -> None:
        if self.absorb_below is not None and self.absorb_below < 0:
            raise ValueError("absorb_below must not be negative")


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


def all_entries(m: Match) -> str:
    latent = m["latent"]
    if getattr(getattr(latent, "op", None), "name", "") != "cache_read":
        return f"{latent.text} is not read from a cache"
    lens = latent.op.seq_lens
    if not is_prefix_sum(m.module, m.function, m["cu_k"], lens):
        return f"{m['cu_k'].text} isn't known to be the prefix_sum of {lens.text}, by which the cache is read"
    return ""


def not_the_long_ones(m: Match) -> str:
    lens = m["latent"].op.seq_lens
    made = (getattr(v, "op", None) for v in sources(m.module, m.function, lens))
    parts = any(isinstance(op, SplitBatch) for op in made)
    return f"{lens.text} are those of the long sequences already" if parts else ""


# What is free, as cuts and views of the latent are, may be used elsewhere too.
KEYS_AND_VALUES = P.split(
    P.reshape(
        P.linear(P.split("latent", sizes=ANY, axis=ANY).named("c.cut"), param("w")).once(),
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
    .where(all_entries)
    .where(not_the_long_ones)
)


@register
class MLAAbsorb(Pass):
    """Attention over keys and values expanded from cached latents -> over the latents, for few new tokens."""

    name = "mla-absorb"
    Options = Options

    def run(self, module: Module) -> bool:
        rules: Rules = {
            "absorb": (EXPANDED, self._absorb),
        }  # attention(q, [W_UK·c | k_pe], W_UV·c) -> merge_rows(latent_attention(..), attention(..))
        return self.apply(module, rules)

    def _absorb(self, m: Match) -> Value:
        sizes, read, how = _sizes(m), m["latent"].op, dict(m.root.attrs)
        below = self.options.absorb_below
        if below is None:
            below = crossover(sizes, m.module.target)
        if below <= 1:
            raise Refusal(f"absorb_below is {below}: no sequence has fewer new tokens")

        def make(op: str, *operands: Any, **attrs: Any) -> Any:
            return m.create(op, *operands, **attrs)

        cache, layer, table, lens = read.operands
        w_uk, w_uv = _halves(m, sizes)
        if below >= ALWAYS:
            every = Segment(cache, layer, table, m["cu_q"], lens, read.attrs["rows"])
            return absorbed(make, m["q"], every, w_uk, w_uv, sizes, **how)
        split, parts = _split(m, below, lens, table)
        rows, ends = [], []
        for at, entries in ((0, "short_entries"), (4, "long_entries")):
            row, cu, of, pages = parts[at : at + 4]
            rows.append(row)
            ends.append(Segment(cache, layer, pages, cu, of, split.attrs[entries]))
        (cu_k,) = hoist(m.module, m.function, "prefix_sum", [ends[1].lens], {}, ["long.cu_k"], m.root)
        q = [
            make("take_rows", m["q"], r, out=f"q.{part}")
            for r, part in zip(rows, ("short", "long"), strict=True)
        ]
        few = absorbed(make, q[0], ends[0], w_uk, w_uv, sizes, **how)
        many = expanded(make, q[1], ends[1], cu_k, m["w"], sizes, **how)
        o: Value = make("merge_rows", few, rows[0], many, rows[1])
        return o


def _sizes(m: Match) -> Sizes:
    q: TensorType = m["q"].type
    (nope, value), (rank, rope) = m["k.cut"].attrs["sizes"], m["c.cut"].attrs["sizes"]
    return Sizes(int(q.shape[1]), nope, rope, value, rank, str(q.dtype))


def _halves(m: Match, sizes: Sizes) -> list[Param]:
    """W_UK [heads, P, C] and W_UV [heads, V, C], which the load-time function cuts from the weight."""
    module, holder, w = m.module, m.function, m["w"]
    whole = loaded(module, holder, w)
    bind(module, holder, whole, w.name)  # it and its parts in one memory
    stem = w.name.removesuffix(".weight")
    shape = (sizes.heads, sizes.nope + sizes.value, sizes.rank)
    heads = emit(module, holder, "reshape", [whole], {"shape": shape}, "kv_b.heads").results[0]
    cuts = {"sizes": (sizes.nope, sizes.value), "axis": 1}
    parts = emit(module, holder, "split", [heads], cuts, "w_uk", "w_uv").results
    return [
        bind(module, holder, part, fresh_name(module, holder, f"{stem}.{name}"))
        for part, name in zip(parts, ("w_uk", "w_uv"), strict=True)
    ]


def _split(m: Match, below: int, lens: Value, table: Value) -> tuple[Op, tuple[Value, ...]]:
    """The split of the batch, one for all layers that ask alike; its parts as this function knows them."""
    module, function = m.module, m.function
    given = [_like(m, (m["cu_q"], lens, table)), m["cu_q"], lens, table]
    attrs = {"below": below} | _symbols(module)
    parts = hoist(
        module, function, "split_batch", given, attrs, PARTS, m.root, lambda op: op.attrs["below"] == below
    )
    (made, *_) = sources(module, function, parts[0])
    if not isinstance(made, OpResult):
        raise TypeError(f"{made.text} is no result of split_batch")
    return made.op, parts


def _like(m: Match, others: tuple[Value, ...]) -> Value:
    """What has as many rows as q, known as far outside as the sequences are: q itself in the last resort."""
    tokens = m["q"].type.shape[0]
    for arg in m.function.args:
        if isinstance(arg.type, TensorType) and arg.type.shape[:1] == (tokens,) and arg.type.rank == 1:
            known = len(outside(m.module, m.function, (arg, *others)))
            if known == len(outside(m.module, m.function, others)):
                return arg
    q: Value = m["q"]
    return q


def _symbols(module: Module) -> dict[str, str]:
    """Names for the sizes of the parts that no other split has."""
    taken = {op.attrs["rows"] for f in module for op in f.ops_named(SplitBatch.name)}
    number = next(n for n in count(0, 2) if f"N{n}" not in taken)
    return {
        "rows": f"N{number}",
        "sequences": f"B{number}",
        "short_entries": f"S{number}",
        "long_entries": f"S{number + 1}",
    }
