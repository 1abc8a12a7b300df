"""How attention blocks meet the KV cache: write this step's entries, read every sequence's."""

from __future__ import annotations

from moec.ir import Builder, Value
from moec.ir.builder import stem
from moec.models.blocks.base import tensor


def cache_name(entry: tuple[int, ...]) -> str:
    """The context's name for the cache whose entries have this shape."""
    return f"cache of {'x'.join(map(str, entry))}"


def through_cache(b: Builder, entry: Value) -> Value:
    """entry [N, *shape] into its slots, then the entries of all sequences [S, *shape]."""
    name, layer = cache_name(tuple(int(d) for d in tensor(entry).shape[1:])), b.context["layer"]
    cache = b.context[name]
    written = b.cache_write(cache, layer, entry, b.context["slot_mapping"], out=stem(cache.name))
    b.context[name] = written
    seen: Value = b.cache_read(
        written, layer, b.context["block_table"], b.context["seq_lens"], out=f"{entry.name}.all"
    )
    return seen


def key_offsets(b: Builder) -> Value:
    """cu_k [B+1]: where each sequence's cached entries begin; made once in the entry function."""
    root = b.context.root
    if "cu_k" not in root:
        root["cu_k"] = root.builder.prefix_sum(root["seq_lens"], out="cu_k")
    return b.context["cu_k"]


def attend(b: Builder, q: Value, k: Value, v: Value, *, scale: float, window: int = 0) -> Value:
    """Causal attention of this step's queries over the cached keys: [N, heads, V]."""
    o: Value = b.attention(
        q, k, v, b.context["cu_seqlens"], key_offsets(b), scale=scale, causal=True, window=window, out="o"
    )
    return o
