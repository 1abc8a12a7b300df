"""Caches of 8 bits against numbers worked out one by one in Python, byte by byte."""

from __future__ import annotations

import math
import struct
from bisect import bisect_left

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moec.ir import CacheType, Interpreter, Module, TensorType
from moec.ir.cached import PagedCache, load, store
from moec.ir.op import Argument, op_class
from moec.ir.types import DTYPES, IndexType, bf16, f32, i32, parse_type, symbol
from tests.ir.helpers import ints, reference

# Every non-negative number of e4m3 by its byte: 4 bits of exponent, 3 of mantissa, 0x7f a NaN.
E4M3 = [math.ldexp(m + 8 * (e > 0), max(e, 1) - 10) for e in range(16) for m in range(8) if (e, m) != (15, 7)]


def encode(x: float) -> int:
    """The byte of x: the nearest, ties to the even one, saturating; of a NaN without its sign."""
    if math.isnan(x):
        return 0x7F
    size = min(abs(x), 448.0)
    at = bisect_left(E4M3, size)
    if at and E4M3[at] != size:
        below, above = size - E4M3[at - 1], E4M3[at] - size
        at -= below < above or (below == above and at % 2 == 1)
    return at | (0x80 if math.copysign(1, x) < 0 else 0)


def fp32(x: float) -> float:
    return struct.unpack("<f", struct.pack("<f", x))[0]  # type: ignore[no-any-return]


def brain(x: float) -> bytes:
    """x in bf16, ties to even."""
    (bits,) = struct.unpack("<I", struct.pack("<f", x))
    if math.isnan(x):
        return struct.pack("<H", 0x7FC0)
    return struct.pack("<H", (bits + 0x7FFF + (bits >> 16 & 1)) >> 16)


def packed(row: list[float], rank: int) -> bytes:
    """An entry as its bytes."""
    tiles = [row[i : min(i + 128, rank)] for i in range(0, rank, 128)]
    scales = [fp32(max(fp32(1e-4), *map(abs, tile)) / 448) for tile in tiles]
    q = [encode(fp32(x / s)) for tile, s in zip(tiles, scales, strict=True) for x in tile]
    return bytes(q) + b"".join(struct.pack("<f", s) for s in scales) + b"".join(map(brain, row[rank:]))


WIDTHS = [(512, 64, 656), (130, 2, 142), (3, 0, 7), (1, 1, 7), (128, 4, 140)]


@pytest.mark.parametrize(("rank", "rope", "size"), WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_packed_entries_byte_by_byte(rank: int, rope: int, size: int, dtype: torch.dtype) -> None:
    type = CacheType(bf16, (rank + rope,), 64).packed(rank)
    assert type.entry == (size,) and type.elements == (rank + rope,) and type.entry_bytes == size
    generator = torch.Generator().manual_seed(rank)
    rows = (torch.randn(4, rank + rope, generator=generator) * torch.tensor([[1], [30], [1e-3], [0]])).to(
        dtype
    )
    stored = store(rows, type)
    assert [bytes(r.tolist()) for r in stored] == [packed(r.tolist(), rank) for r in rows]
    # Each element within half a step of e4m3 of its tile's scale; what turns as bf16 has it.
    meant = load(stored, type)
    scale = rows[:, :rank].float().abs().amax(1, keepdim=True).clamp(min=1e-4) / 448
    error = (meant[:, :rank] - rows[:, :rank].float()).abs()
    assert bool((error <= (rows[:, :rank].float().abs() / 16).maximum(scale * 2**-10) * 1.0001).all())
    assert torch.equal(meant[:, rank:], rows[:, rank:].bfloat16().float())
    assert torch.equal(load(stored, type, torch.bfloat16), meant.bfloat16())


@given(st.lists(st.floats(width=32), min_size=1, max_size=9), st.sampled_from([1.0, 0.5, 0.3, 7.0]))
def test_one_scale_byte_by_byte(row: list[float], scale: float) -> None:
    """Any float there is: it saturates, NaN stays NaN."""
    type = CacheType(DTYPES["f8e4m3"], (len(row),), 4, scale=scale)
    stored = store(torch.tensor([row]), type)
    want = [encode(fp32(x / fp32(scale)) if abs(x) < 1e30 else x) for x in row]
    nan = [b & 0x7F == 0x7F for b in want]
    got = stored.view(torch.uint8)[0].tolist()
    assert [b & 0x7F if n else b for b, n in zip(got, nan, strict=True)] == want
    meant = load(stored, type)[0].tolist()
    for x, y in zip(row, meant, strict=True):
        limit = max(abs(x) / 16, fp32(scale) * 2**-10)
        assert math.isnan(y) if math.isnan(x) else abs(x) > 448 * scale or abs(x - y) <= limit * 1.0001


def test_the_infinities_and_nan_of_a_packed_entry() -> None:
    """They spoil no other element."""
    type = CacheType(f32, (6,), 4).packed(4)
    row = torch.tensor([[math.nan, 2.0, -math.inf, 1.0, math.nan, math.inf]])
    meant = load(store(row, type), type)[0]
    assert meant.isnan().tolist() == [True, False, True, False, True, False]
    assert float(meant[1]) == 2.0 and float(meant[5]) == math.inf


@pytest.mark.parametrize(
    "text",
    ["cache<f8e4m3[3], page=2>", "cache<f8e4m3[3], page=2, scale=0.5>", "cache<u8[8], page=2, rank=2>"],
)
def test_what_is_not_written_is_no_number(text: str) -> None:
    """A new cache reads as NaN; writes go to their slots alone, and reads meet nothing else."""
    type = parse_type(text)
    assert isinstance(type, CacheType)
    cache = Interpreter(Module("none"), {}).new_cache(type, 1, 3)
    assert bool(cache.meant(0).isnan().all())
    entry = torch.tensor([[1.0, -2.0, 0.5], [7.0, 0.25, 0.0], [9.0, 9.0, 9.0]])
    after = reference("cache_write", cache, 0, entry, ints(5, 0, -1))
    assert isinstance(after, PagedCache) and after.type == type
    assert after.meant(0).isnan().any(1).tolist() == [False, True, True, True, True, False]
    read = reference("cache_read", after, 0, ints(2, 0)[:, None], ints(0, 1), rows="S", to=bf16)
    assert read.dtype == torch.bfloat16 and torch.equal(read, load(store(entry[1:2], type), type).bfloat16())


def test_costs_count_the_bytes_that_are_stored() -> None:
    """A step of N tokens writes 656 bytes each; decode reads as many of each cached entry."""
    type = CacheType(bf16, (576,), 64).packed(512)
    cache, layer = Argument("kv", type), Argument("layer", IndexType())
    entry = Argument("x", TensorType(bf16, (symbol("N"), 576)))
    write = op_class("cache_write")([cache, layer, entry, Argument("s", TensorType(i32, (symbol("N"),)))])
    assert write.cost().bytes == (1152 + 656 + 4) * symbol("N")
    q = Argument("q", TensorType(bf16, (4, 16, 576)))
    table, cu, lens = (Argument(n, TensorType(i32, s)) for n, s in (("t", (4, 9)), ("c", (5,)), ("l", (4,))))
    op = op_class("latent_attention")([q, cache, layer, table, cu, lens], {"rank": 512, "scale": 0.1})
    op.results = (Argument("o", op.infer()),)  # type: ignore[assignment]
    assert op.cost().bytes.coeff(symbol("S")) == 656
