"""What stands between projections and attention: norm, rotary embedding and cache write in one op each.

Each computes in fp32 and rounds once, to the dtype of its result or of the entries. A cache of 8 bits
quantises these as it does with ``cache_write``."""

from __future__ import annotations

import math
from typing import Any

import torch

from moec.ir.attrs import BOOL, FLOAT, INT, choice
from moec.ir.op import Cost, Op, Value, attr, operand, result
from moec.ir.ops.attention import CacheWrite, PagedCache, check_entries, stored_bytes
from moec.ir.ops.norm import RMSNorm, check_eps
from moec.ir.ops.rope import Rope
from moec.ir.types import CacheType, TensorType, as_dim, f32


def check_table(op: Op, cos: Value, sin: Value, rows: Any) -> int:
    """The rotary width R, once cos and sin [N, R/2] are known to fit ``rows``."""
    table = op.tensor(cos, 2)
    op.same("the table", table, cos, op.tensor(sin, 2), sin)
    if table.dtype != f32 or not isinstance(table.shape[1], int):
        raise op.mismatch(f"the table is {table}, not f32 of a known width")
    if table.shape[0] != rows:
        raise op.mismatch(f"N is {rows}, but the table is {table}")
    return 2 * table.shape[1]


def check_write(op: Op, cache: Value, layer: Value, slot_mapping: Value, entry: TensorType) -> CacheType:
    """The cache's type, once entries [N, *shape] and their slots are known to fit it."""
    if not isinstance(cache.type, CacheType):
        raise op.mismatch(f"{cache.text} is {cache.type}, not a cache")
    op.index(layer)
    slots = op.integers(slot_mapping, 1)
    if slots.shape[0] != entry.shape[0]:
        raise op.mismatch(f"N is {entry.shape[0]}, but {slot_mapping.text} is {slots}")
    check_entries(op, entry, "the entries are", cache.type)
    return cache.type


class Heads(Op):
    """With ``w``, heads are normed by ``rms_norm``, each on its own (w [D]) or, for norm=full, all heads of a
    token as one row (w [h·D]). They are clamped to lo … hi: before each head's norm, but behind a full one.
    Then columns start … start+R of each head turn as ``rope`` turns them.
    """

    norm = attr(choice("head", "full"), "head", doc="what w norms: each head, or all heads at once")
    eps = attr(FLOAT, 0.0, doc="keeps the norm's root from zero")
    lo = attr(FLOAT, -math.inf)
    hi = attr(FLOAT, math.inf)
    layout = attr(choice("interleaved", "half"))
    start = attr(INT, 0, doc="the first column that turns")

    def check_heads(self, x: Value, w: Value | None, cos: Value, sin: Value) -> TensorType:
        """x's type, [N, h, D], once all else fits it."""
        heads = self.tensor(x, 3)
        width = check_table(self, cos, sin, heads.shape[0])
        columns = heads.shape[2]
        if not isinstance(columns, int) or not 0 <= self.start <= columns - width:
            raise self.mismatch(
                f"{x.text} is {heads}: columns {self.start}..{self.start + width - 1} aren't all there"
            )
        if self.lo > self.hi:
            raise self.mismatch(f"lo is {self.lo}, above hi, {self.hi}")
        check_eps(self, self.eps)
        if w is None:
            if (self.norm, self.eps) != ("head", 0.0):
                raise self.mismatch(f"norm is {self.norm} and eps {self.eps}, but there is no w")
            return heads
        normed = columns if self.norm == "head" else as_dim(heads.shape[1] * columns)
        if self.tensor(w, 1).shape[0] != normed:
            raise self.mismatch(f"norm is {self.norm}, of {normed} columns, but {w.text} is {w.type}")
        return heads

    def heads_flops(self, x: Value, w: Value | None) -> Any:
        elements = x.type.numel  # type: ignore[union-attr]
        return (3 + 4 * (w is not None)) * elements


def turned(
    x: torch.Tensor,
    w: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    norm: str,
    eps: float,
    lo: float,
    hi: float,
    layout: str,
    start: int,
) -> torch.Tensor:
    """What ``Heads`` says of x [N, h, D], in fp32."""
    y = x.float()
    if w is not None and norm == "full":
        y = RMSNorm.reference(y.flatten(1), w, eps=eps).view(y.shape)
    y = y.clamp(lo, hi)
    if w is not None and norm == "head":
        y = RMSNorm.reference(y, w, eps=eps)
    end = start + 2 * cos.shape[1]
    middle = Rope.reference(y[..., start:end], cos, sin, layout=layout)
    return torch.cat([y[..., :start], middle, y[..., end:]], dim=-1)


class NormRope(Heads, name="norm_rope"):
    """Queries made ready for attention: normed and clamped where they are to be, then turned.

    ``before`` stands in front of each head's columns as it is: queries in the latent's space, before what
    turns with the position."""

    x = operand("[N, h, D]")
    cos = operand("[N, R/2]")
    sin = operand("[N, R/2]")
    w = operand("[D], or [h·D] for norm=full", optional=True)
    before = operand("[N, h, A]", optional=True)
    y = result("[N, h, A+D]")

    def infer(self) -> TensorType:
        x = self.check_heads(self.x, self.w, self.cos, self.sin)
        if self.before is None:
            return x
        before = self.tensor(self.before, 3)
        if (before.dtype, before.shape[:2]) != (x.dtype, x.shape[:2]):
            raise self.mismatch(f"{self.before.text} is {before}, but {self.x.text} is {x}")
        return x.with_(shape=(*x.shape[:2], as_dim(before.shape[2] + x.shape[2])))

    def cost(self) -> Cost:
        return Cost(self.heads_flops(self.x, self.w), self.moved_bytes())

    @staticmethod
    def reference(
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        w: torch.Tensor | None = None,
        before: torch.Tensor | None = None,
        **how: Any,
    ) -> torch.Tensor:
        y = turned(x, w, cos, sin, **how).to(x.dtype)
        return y if before is None else torch.cat([before, y], dim=-1)


class KVCacheWrite(Heads, name="kv_cache_write"):
    """Keys made ready for attention, and their values, put into a layer's pages.

    Heads of keys come first in an entry, which goes into its slot as ``cache_write`` puts it."""

    cache = operand("cache, entries [2·h, D]")
    layer = operand("index")
    k = operand("[N, h, D]")
    v = operand("[N, h, D]")
    cos = operand("[N, R/2]")
    sin = operand("[N, R/2]")
    slot_mapping = operand("[N] integers: page · page size + place")
    w = operand("[D], or [h·D] for norm=full", optional=True)
    clamp_v = attr(BOOL, False, doc="v is clamped to lo … hi too")
    out = result("cache")

    def infer(self) -> CacheType:
        k = self.check_heads(self.k, self.w, self.cos, self.sin)
        self.same("k and v", k, self.k, self.tensor(self.v), self.v)
        entry = k.with_(shape=(k.shape[0], as_dim(2 * k.shape[1]), k.shape[2]))
        return check_write(self, self.cache, self.layer, self.slot_mapping, entry)

    def cost(self) -> Cost:
        written = stored_bytes(self.cache, self.k.type.shape[0])
        return Cost(self.heads_flops(self.k, self.w), self.moved_bytes() + written)

    @staticmethod
    def reference(
        cache: PagedCache,
        layer: int,
        k: torch.Tensor,
        v: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        slot_mapping: torch.Tensor,
        w: torch.Tensor | None = None,
        *,
        clamp_v: bool,
        **how: Any,
    ) -> PagedCache:
        if clamp_v:
            v = v.clamp(how["lo"], how["hi"])
        entry = torch.cat([turned(k, w, cos, sin, **how).to(k.dtype), v], dim=1)
        return CacheWrite.reference(cache, layer, entry, slot_mapping)


class LatentCacheWrite(Op, name="latent_cache_write"):
    """The entries of multi-head latent attention, put into a layer's pages.

    An entry is c, the first columns, behind its ``rms_norm``, then k_pe, turned as ``rope`` turns it. It goes
    into its slot as ``cache_write`` puts it."""

    cache = operand("cache, entries [C+R]")
    layer = operand("index")
    kv_a = operand("[N, C+R]: c, then k_pe")
    w = operand("[C]")
    cos = operand("[N, R/2]")
    sin = operand("[N, R/2]")
    slot_mapping = operand("[N] integers: page · page size + place")
    eps = attr(FLOAT, doc="keeps the norm's root from zero")
    layout = attr(choice("interleaved", "half"))
    out = result("cache")

    def infer(self) -> CacheType:
        kv_a, w = self.tensor(self.kv_a, 2), self.tensor(self.w, 1)
        width = check_table(self, self.cos, self.sin, kv_a.shape[0])
        self.same("C+R", kv_a.shape[1], self.kv_a, as_dim(w.shape[0] + width), self.w)
        check_eps(self, self.eps)
        cache = check_write(self, self.cache, self.layer, self.slot_mapping, kv_a)
        if cache.rank and cache.rank != w.shape[0]:
            raise self.mismatch(f"c is {w.shape[0]} wide in {self.w.text}, but {self.cache.text} is {cache}")
        return cache

    def cost(self) -> Cost:
        written = stored_bytes(self.cache, self.kv_a.type.shape[0])
        return Cost(4 * self.kv_a.type.numel, self.moved_bytes() + written)

    @staticmethod
    def reference(
        cache: PagedCache,
        layer: int,
        kv_a: torch.Tensor,
        w: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        slot_mapping: torch.Tensor,
        *,
        eps: float,
        layout: str,
    ) -> PagedCache:
        c, k_pe = kv_a[:, : len(w)], kv_a[:, len(w) :]
        c, k_pe = RMSNorm.reference(c, w, eps=eps), Rope.reference(k_pe, cos, sin, layout=layout)
        return CacheWrite.reference(cache, layer, torch.cat([c, k_pe], dim=1), slot_mapping)
