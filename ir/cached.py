"""KV cache entries in 8 bits: what is stored of an entry, and what that means.

Per tensor, ``cache<f8e4m3[576], page=64, scale=0.5>``: x / scale, clamped to ±448 and rounded to e4m3, ties
to even; NaN stays NaN. One scale, known beforehand, for all entries.

Packed, ``cache<u8[656], page=64, rank=512>``, for the entries [c | k_pe] of multi-head latent attention, one
row of bytes, numbers little-endian::

    C e4m3                    c, quantised as ``quant`` does with blocks of 1x128
    ceil(C/128) fp32          its scales, one for each 128 elements; the last tile may be partial
    R bf16                    k_pe, whatever the model's dtype: exact for bf16, rounded once for f32 and f16

C = 512 and R = 64 are DeepSeek-V3's 656 bytes.
"""

from __future__ import annotations

from typing import Any

import torch

from moec.ir import scaled
from moec.ir.types import TILE, CacheType


class PagedCache:
    """The interpreter's KV cache: ``layers[l]`` is [slots, *entry]. Written by copy, never in place.

    ``type`` may be left out where entries are stored as they are.
    """

    def __init__(self, page: int, layers: dict[int, torch.Tensor], type: CacheType | None = None) -> None:
        self.page, self.layers, self.type = page, layers, type

    def write(self, layer: int, slots: list[int], entries: torch.Tensor) -> PagedCache:
        """The cache with entries in these slots of a layer; negative ones are skipped."""
        pages = self.layers[layer].clone()
        stored = store(entries, self.type)
        for n, slot in enumerate(slots):
            if slot >= 0:
                pages[slot] = stored[n]
        return PagedCache(self.page, {**self.layers, layer: pages}, self.type)

    def meant(self, layer: int, to: torch.dtype | None = None) -> torch.Tensor:
        """A layer's entries as numbers, in ``to`` or, without it, as plain entries are or else in fp32."""
        return load(self.layers[layer], self.type, to)

    def stored_as(self, type: CacheType) -> PagedCache:
        """The same entries, as a cache of ``type`` keeps them."""
        layers = {n: store(self.meant(n), type).to(type.dtype.torch) for n in self.layers}
        return PagedCache(self.page, layers, type)


def store(entries: torch.Tensor, type: CacheType | None) -> torch.Tensor:
    """Entries [N, ...] as the cache keeps them."""
    if type is None or not type.quantised:
        return entries
    if not type.rank:
        ratio = entries.float() / type.scale
        return ratio.clamp(-scaled.E4M3_MAX, scaled.E4M3_MAX).to(type.dtype.torch)
    c = scaled.quantize(entries[:, : type.rank], (1, TILE))
    parts = [c.q, c.scale, entries[:, type.rank :].to(torch.bfloat16)]
    return torch.cat([_bytes(part) for part in parts if part.shape[1]], dim=1)


def load(stored: torch.Tensor, type: CacheType | None, to: torch.dtype | None = None) -> torch.Tensor:
    """What rows of a cache mean, rounded once to ``to``; without it as plain ones are, others in fp32."""
    if type is None or not type.quantised:
        return stored if to is None else stored.to(to)
    to = to or torch.float32
    if not type.rank:
        return (stored.float() * type.scale).to(to)
    rank, scales = type.rank, 4 * type.tiles
    q = _numbers(stored[:, :rank], torch.float8_e4m3fn)
    scale = _numbers(stored[:, rank : rank + scales], torch.float32)
    c = scaled.Scaled(q, scale, (1, TILE)).float().to(to)
    k_pe = _numbers(stored[:, rank + scales :], torch.bfloat16).to(to)
    return torch.cat([c, k_pe], dim=1)


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def _numbers(x: torch.Tensor, dtype: Any) -> torch.Tensor:
    """Bytes [N, n] as numbers, wherever in memory they begin; none of none."""
    if not x.numel():
        return x.new_empty((x.shape[0], x.shape[1] // dtype.itemsize), dtype=dtype)
    return x.clone(memory_format=torch.contiguous_format).view(dtype)
