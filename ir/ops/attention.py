"""Attention over ragged sequences, and the paged cache that it reads."""

from __future__ import annotations

import math
from typing import Any

import sympy
import torch

from moec.ir.attrs import BOOL, DTYPE, FLOAT, INT, SYMBOL
from moec.ir.cached import PagedCache as PagedCache
from moec.ir.cached import load
from moec.ir.op import Cost, Op, Value, attr, operand, result
from moec.ir.types import CacheType, TensorType, symbol


def cache_of(op: Op, value: Value) -> CacheType:
    """``value``'s type, once it's known to be a cache."""
    if not isinstance(value.type, CacheType):
        raise op.mismatch(f"{value.text} is {value.type}, not a cache")
    return value.type


def check_entries(op: Op, entries: TensorType, text: str, cache: CacheType) -> None:
    """Raises unless entries [N, ...] may be written into a cache, which may quantise them."""
    floats = entries.dtype.is_float and entries.dtype.bits >= 16
    dtype = floats if cache.quantised else entries.dtype == cache.dtype
    if not dtype or entries.shape[1:] != cache.elements:
        raise op.mismatch(f"{text} {entries}, which doesn't fit {cache}")


def stored_bytes(cache: Value, rows: Any) -> Any:
    """Bytes that ``rows`` entries of a cache take."""
    return rows * cache.type.entry_bytes  # type: ignore[union-attr]


def pairs(queries: Any, keys: Any, sequences: Any) -> Any:
    """Queries times the keys that each meets, as if all sequences were of one length, and every key seen."""
    return sympy.Integer(1) * queries * keys / sympy.Max(1, sequences)


class CacheWrite(Op, name="cache_write"):
    """Puts token n's entry into slot slot_mapping[n] of a layer's pages; a negative slot is skipped.

    A cache of 8 bits takes floats of 16 or more and quantises them, as its type says (``moec.ir.cached``).
    """

    cache = operand("cache")
    layer = operand("index")
    entry = operand("[N, *entry]")
    slot_mapping = operand("[N] integers: page · page size + place")
    out = result("cache")

    def infer(self) -> CacheType:
        cache, entry = cache_of(self, self.cache), self.tensor(self.entry, min_rank=1)
        self.index(self.layer)
        slots = self.integers(self.slot_mapping, 1)
        self.same("N", entry.shape[0], self.entry, slots.shape[0], self.slot_mapping)
        check_entries(self, entry, f"{self.entry.text} is", cache)
        return cache

    def cost(self) -> Cost:
        return Cost(0, self.moved_bytes() + stored_bytes(self.cache, self.entry.type.shape[0]))

    @staticmethod
    def reference(
        cache: PagedCache, layer: int, entry: torch.Tensor, slot_mapping: torch.Tensor
    ) -> PagedCache:
        return cache.write(layer, slot_mapping.tolist(), entry)


class CacheRead(Op, name="cache_read"):
    """Gathers every sequence's entries of a layer, one sequence after the other, as they were written.

    Those of a cache of 8 bits are the numbers that it holds, rounded to ``to``.
    """

    cache = operand("cache")
    layer = operand("index")
    block_table = operand("[B, P] page numbers; those beyond a sequence's length are never read")
    seq_lens = operand("[B] entries of each sequence, new ones included")
    rows = attr(SYMBOL, "S", doc="the symbol that counts the gathered entries")
    to = attr(DTYPE, None, doc="dtype of the entries; none: the cache's, which one of 8 bits can't say")
    entries = result("[S, *entry]")

    def infer(self) -> TensorType:
        cache = cache_of(self, self.cache)
        self.index(self.layer)
        table, lens = self.integers(self.block_table, 2), self.integers(self.seq_lens, 1)
        self.same("B", table.shape[0], self.block_table, lens.shape[0], self.seq_lens)
        if cache.quantised and (self.to is None or not self.to.is_float or self.to.bits < 16):
            raise self.mismatch(f"{self.cache.text} is {cache}: to must say a dtype of its entries")
        if not cache.quantised and self.to not in (None, cache.dtype):
            raise self.mismatch(f"{self.cache.text} is {cache}, but to is {self.to}")
        return TensorType(self.to or cache.dtype, (symbol(self.rows), *cache.elements))

    def cost(self) -> Cost:
        entries = self.entries.type
        read = stored_bytes(self.cache, entries.shape[0])
        return Cost(0, entries.nbytes + read + self.block_table.type.nbytes)

    @staticmethod
    def reference(
        cache: PagedCache,
        layer: int,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        *,
        rows: str,
        to: Any = None,
    ) -> torch.Tensor:
        pages = cache.layers[layer]
        picked = []
        for table, length in zip(block_table.tolist(), seq_lens.tolist(), strict=True):
            for position in range(length):
                picked.append(table[position // cache.page] * cache.page + position % cache.page)
        found = pages[torch.tensor(picked, dtype=torch.long, device=pages.device)]
        return load(found, cache.type, None if to is None else to.torch)


class Attention(Op, name="attention"):
    """softmax(scale · q·kᵀ) · v within each sequence, the softmax in fp32.

    Sequence b owns rows cu_q[b]:cu_q[b+1] of q and cu_k[b]:cu_k[b+1] of k and v. Its queries are the last
    positions of its keys: with ``causal``, query i of n sees keys up to (keys - n + i), with ``window`` > 0
    only the last ``window`` of these. A query that sees no key gives zeros. Query heads share key heads in
    equal groups.
    """

    products = True
    q = operand("[N, heads, D]")
    k = operand("[S, kv_heads, D]")
    v = operand("[S, kv_heads, V]")
    cu_q = operand("[B+1] offsets")
    cu_k = operand("[B+1] offsets")
    scale = attr(FLOAT, doc="of the scores, before the softmax")
    causal = attr(BOOL, True, doc="a query sees no later keys")
    window = attr(INT, 0, doc="how many keys a query sees; 0: all of them")
    o = result("[N, heads, V]")

    def infer(self) -> TensorType:
        q, k, v = self.tensor(self.q, 3), self.tensor(self.k, 3), self.tensor(self.v, 3)
        self.same("D", q.shape[2], self.q, k.shape[2], self.k)
        self.same("S", k.shape[0], self.k, v.shape[0], self.v)
        self.same("kv_heads", k.shape[1], self.k, v.shape[1], self.v)
        self.same("the dtype", q.dtype, self.q, k.dtype, self.k)
        self.same("the dtype", q.dtype, self.q, v.dtype, self.v)
        cu_q, cu_k = self.integers(self.cu_q, 1), self.integers(self.cu_k, 1)
        self.same("B+1", cu_q.shape[0], self.cu_q, cu_k.shape[0], self.cu_k)
        heads, kv_heads = q.shape[1], k.shape[1]
        if not (isinstance(heads, int) and isinstance(kv_heads, int) and kv_heads and heads % kv_heads == 0):
            raise self.mismatch(f"{heads} query heads can't share {kv_heads} key heads equally")
        if self.window < 0:
            raise self.mismatch(f"window is {self.window}")
        return TensorType(q.dtype, (*q.shape[:2], v.shape[2]))

    def cost(self) -> Cost:
        q, k, v = self.q.type, self.k.type, self.v.type
        met = pairs(q.shape[0], k.shape[0], self.cu_q.type.shape[0] - 1)
        return Cost(2 * met * q.shape[1] * (q.shape[2] + v.shape[2]), self.moved_bytes())

    @staticmethod
    def reference(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_q: torch.Tensor,
        cu_k: torch.Tensor,
        *,
        scale: float,
        causal: bool,
        window: int,
    ) -> torch.Tensor:
        out = q.new_zeros(q.shape[0], q.shape[1], v.shape[2])
        group = q.shape[1] // k.shape[1]
        for b in range(len(cu_q) - 1):
            q0, q1, k0, k1 = int(cu_q[b]), int(cu_q[b + 1]), int(cu_k[b]), int(cu_k[b + 1])
            if q0 == q1 or k0 == k1:
                continue
            qb = q[q0:q1].float().transpose(0, 1)  # [heads, n, D]
            kb = k[k0:k1].float().transpose(0, 1).repeat_interleave(group, dim=0)
            vb = v[k0:k1].float().transpose(0, 1).repeat_interleave(group, dim=0)
            scores = qb @ kb.transpose(1, 2) * scale
            at = torch.arange(k1 - k0 - (q1 - q0), k1 - k0, device=q.device)[:, None]
            key = torch.arange(k1 - k0, device=q.device)[None]
            hidden = key > at if causal else key < 0
            if window:
                hidden = hidden | (key <= at - window)
            weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
            weights = weights.masked_fill(hidden.all(-1, keepdim=True), 0.0)
            out[q0:q1] = (weights @ vb).transpose(0, 1).to(q.dtype)
        return out
