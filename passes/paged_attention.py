"""Attention over keys and values gathered from the cache reads them in its pages instead.

::

    %k_v = cache_read(%kv, %layer, %block_table, %seq_lens)
    %k, %v = split(%k_v) {axis=1, sizes=[8,8]}
    %o = attention(%q, %k, %v, %cu_q, %cu_k) {scale=0.1}

    %o = paged_attention(%q, %kv, %layer, %block_table, %cu_q, %seq_lens) {scale=0.1}

where cu_k is the prefix_sum of seq_lens, here or wherever the layer is run. Right bit for bit, as far as sums
over keys are in one order.
"""

from __future__ import annotations

from moec.ir import Module, Value
from moec.passes.invariants import is_prefix_sum
from moec.passes.manager import Pass, register
from moec.passes.pattern import ANY, Match, P, Rules


# Conditions: "" or why not.
def halves(m: Match) -> str:
    entries = m["read"].results[0]
    for cut in (m["k.cut"], m["v.cut"]):
        sizes = cut.attrs["sizes"]
        if cut.attrs["axis"] not in (1, 1 - entries.type.rank) or len(sizes) != 2 or sizes[0] != sizes[1]:
            return f"{entries.text} isn't cut into a half of keys and a half of values along its heads"
    return ""


def all_entries(m: Match) -> str:
    lens, cu_k = m["lens"], m["cu_k"]
    if is_prefix_sum(m.module, m.function, cu_k, lens):
        return ""
    return f"{cu_k.text} isn't known to be the prefix_sum of {lens.text}, by which the cache is read"


# Rewrites.
def in_pages(m: Match) -> Value:
    where = [m[name] for name in ("cache", "layer", "table", "cu_q", "lens")]
    o: Value = m.create("paged_attention", m["q"], *where, **m.root.attrs, rows=m["read"].attrs["rows"])
    return o


ENTRIES = P.cache_read("cache", "layer", "table", "lens", rows=ANY, to=ANY).named("read")

RULES: Rules = {
    "paged": (
        P.attention(
            "q",
            P.split(ENTRIES, sizes=ANY, axis=ANY).named("k.cut"),
            P.split(ENTRIES, sizes=ANY, axis=ANY).named("v.cut").out(1),
            "cu_q",
            "cu_k",
            scale=ANY,
            causal=ANY,
            window=ANY,
        )
        .where(halves)
        .where(all_entries),
        in_pages,
    ),  # attention(q, k, v) of k, v = split(cache_read(cache)) -> paged_attention(q, cache)
}


@register
class PagedAttention(Pass):
    """Attention over gathered keys and values -> over the pages that hold them."""

    name = "paged-attention"

    def run(self, module: Module) -> bool:
        return self.apply(module, RULES)
