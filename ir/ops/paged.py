"""Attention that reads the pages of the KV cache where they lie: nothing is gathered."""

from __future__ import annotations

from typing import Any

import torch

from moec.ir.attrs import BOOL, FLOAT, INT, SYMBOL
from moec.ir.op import Cost, Op, attr, operand, result
from moec.ir.ops.attention import Attention, CacheRead, PagedCache, cache_of, pairs, stored_bytes
from moec.ir.types import CacheType, TensorType, symbol


class Paged(Op):
    """Queries of this step over the cached entries of a layer, ``attention`` in all that is said there.

    Sequence b owns rows cu_q[b]:cu_q[b+1] of q and the first seq_lens[b] entries behind its block table.
    Those of a cache of 8 bits are the numbers that it holds, rounded to q's dtype.
    """

    products = True
    q = operand("[N, heads, D]")
    cache = operand("cache")
    layer = operand("index")
    block_table = operand("[B, P] page numbers; those beyond a sequence's length are never read")
    cu_q = operand("[B+1] offsets")
    seq_lens = operand("[B] entries of each sequence, new ones included")
    scale = attr(FLOAT, doc="of the scores, before the softmax")
    causal = attr(BOOL, True, doc="a query sees no later keys")
    window = attr(INT, 0, doc="how many keys a query sees; 0: all of them")
    rows = attr(SYMBOL, "S", doc="the symbol that counts the entries of all sequences, for the cost")

    def _sizes(self) -> tuple[TensorType, int, CacheType]:
        """Types of q and of the cache, and q's heads, once what both attentions ask for holds."""
        q, cache = self.tensor(self.q, 3), cache_of(self, self.cache)
        self.index(self.layer)
        table, cu_q = self.integers(self.block_table, 2), self.integers(self.cu_q, 1)
        lens = self.integers(self.seq_lens, 1)
        self.same("B", table.shape[0], self.block_table, lens.shape[0], self.seq_lens)
        self.same("B+1", cu_q.shape[0], self.cu_q, lens.shape[0] + 1, self.seq_lens)
        if not cache.quantised:
            self.same("the dtype", q.dtype, self.q, cache.dtype, self.cache)
        heads = q.shape[1]
        if not isinstance(heads, int):
            raise self.mismatch(f"{self.q.text} is {q}: its heads must be known")
        if self.window < 0:
            raise self.mismatch(f"window is {self.window}")
        return q, heads, cache

    def _cost(self, width: Any) -> Cost:
        """Of products that add up to ``width`` for a head, a query and a key; every entry is read once."""
        q, read = self.q.type, stored_bytes(self.cache, symbol(self.rows))
        count = pairs(q.shape[0], symbol(self.rows), self.cu_q.type.shape[0] - 1)
        return Cost(2 * count * q.shape[1] * width, self.moved_bytes() + read)


class PagedAttention(Paged, name="paged_attention"):
    """Attention over cached entries of kv_heads keys, then as many values.

    Query heads share key heads in equal groups; a key and a value are as wide as a query.
    """

    o = result("[N, heads, D]")

    def infer(self) -> TensorType:
        q, heads, cache = self._sizes()
        if len(cache.elements) != 2 or cache.elements[1] != q.shape[2]:
            raise self.mismatch(f"{self.q.text} is {q}, which doesn't fit {cache}")
        kv_heads, odd = divmod(cache.elements[0], 2)
        if odd or heads % kv_heads:
            raise self.mismatch(f"{heads} query heads can't share the keys of {cache}")
        return q.with_(groups=None)

    def cost(self) -> Cost:
        return self._cost(2 * self.q.type.shape[2])

    @staticmethod
    def reference(
        q: torch.Tensor,
        cache: PagedCache,
        layer: int,
        block_table: torch.Tensor,
        cu_q: torch.Tensor,
        seq_lens: torch.Tensor,
        *,
        rows: str,
        **how: Any,
    ) -> torch.Tensor:
        entries = _entries(q, cache, layer, block_table, seq_lens)
        k, v = entries.chunk(2, dim=1)
        return Attention.reference(q, k, v, cu_q, _offsets(seq_lens), **how)


class LatentAttention(Paged, name="latent_attention"):
    """Attention over cached latents [c | k_pe]: one key head for all query heads, whose values are c itself.

    A query is [q_nope·W_UK | q_pe]: scores q_nope·(W_UK·c) are (q_nope·W_UK)·c, and W_UV, which makes values
    of c, comes out of the sum over keys (DeepSeek-V2 report, section 2.1).
    """

    rank = attr(INT, doc="C, the width of c")
    o = result("[N, heads, C]")

    def infer(self) -> TensorType:
        q, _, cache = self._sizes()
        if cache.elements != q.shape[2:]:
            raise self.mismatch(f"{self.q.text} is {q}, which doesn't fit {cache}")
        if not 1 <= self.rank <= cache.elements[0]:
            raise self.mismatch(f"rank is {self.rank}, of entries that are {cache.elements[0]} wide")
        if cache.rank not in (0, self.rank):
            raise self.mismatch(f"rank is {self.rank}, but {self.cache.text} is {cache}")
        return TensorType(q.dtype, (*q.shape[:2], self.rank))

    def cost(self) -> Cost:
        return self._cost(self.q.type.shape[2] + self.rank)

    @staticmethod
    def reference(
        q: torch.Tensor,
        cache: PagedCache,
        layer: int,
        block_table: torch.Tensor,
        cu_q: torch.Tensor,
        seq_lens: torch.Tensor,
        *,
        rank: int,
        rows: str,
        **how: Any,
    ) -> torch.Tensor:
        keys = _entries(q, cache, layer, block_table, seq_lens)[:, None]
        return Attention.reference(q, keys, keys[:, :, :rank], cu_q, _offsets(seq_lens), **how)


def _entries(q: torch.Tensor, cache: PagedCache, layer: int, *where: torch.Tensor) -> torch.Tensor:
    return CacheRead.reference(cache, layer, *where, rows="").to(q.dtype)


def _offsets(lengths: torch.Tensor) -> torch.Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
