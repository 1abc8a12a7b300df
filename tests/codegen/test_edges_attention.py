"""Attention over ragged batches and the paged cache, where they go wrong."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.ir import CacheType, Interpreter, Module, TensorType
from moec.ir.ops.attention import PagedCache
from moec.ir.types import DTYPES, IndexType, bf16, f32, i32, i64, symbol
from tests.codegen.emission import agree, emitted, forward, pages_of

N, B, S, P = (symbol(n) for n in "NBSP")


def randn(*shape: int, seed: int = 0, dtype: str = "f32") -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DTYPES[dtype].torch)


def offsets(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def attending(heads: int, kv_heads: int, width: int, value: int, dtype: str = "f32", **attrs: Any) -> Module:
    kind = DTYPES[dtype]
    return forward(
        lambda b, *args: b.attention(*args, scale=width**-0.5, **attrs),
        TensorType(kind, (N, heads, width)),
        TensorType(kind, (S, kv_heads, width)),
        TensorType(kind, (S, kv_heads, value)),
        TensorType(i32, (B + 1,)),
        TensorType(i32, (B + 1,)),
    )


def inputs(
    queries: list[int], keys: list[int], heads: int, kv_heads: int, width: int, value: int, dtype: str = "f32"
) -> list[torch.Tensor]:
    q = randn(sum(queries), heads, width, seed=1, dtype=dtype)
    k = randn(sum(keys), kv_heads, width, seed=2, dtype=dtype)
    v = randn(sum(keys), kv_heads, value, seed=3, dtype=dtype)
    return [q, k, v, offsets(queries), offsets(keys)]


@settings(max_examples=80)
@given(
    batch=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5)), max_size=4),
    heads=st.sampled_from([(1, 1), (2, 2), (4, 2), (6, 1)]),
    widths=st.sampled_from([(4, 4), (6, 3), (3, 6), (8, 1), (1, 8)]),
    causal=st.booleans(),
    window=st.sampled_from([0, 1, 2, 9]),
    dtype=st.sampled_from(["f32", "bf16", "f16"]),
)
def test_ragged_attention(
    batch: list[tuple[int, int]],
    heads: tuple[int, int],
    widths: tuple[int, int],
    causal: bool,
    window: int,
    dtype: str,
) -> None:
    """Prefill (as many queries as keys), decode (one query), chunks (some of each), empty sequences."""
    queries, keys = [q for q, _ in batch], [q + more for q, more in batch]
    module = attending(*heads, *widths, dtype, causal=causal, window=window)
    agree(module, {}, inputs(queries, keys, *heads, *widths, dtype))


@pytest.mark.parametrize(("queries", "keys"), [([3], [1]), ([2, 3], [0, 2]), ([1], [0]), ([4, 1], [2, 1])])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [0, 2])
def test_a_query_that_sees_no_key_gives_zeros(
    queries: list[int], keys: list[int], causal: bool, window: int
) -> None:
    agree(attending(2, 1, 4, 3, causal=causal, window=window), {}, inputs(queries, keys, 2, 1, 4, 3))


def test_one_sequence_never_sees_another() -> None:
    module = attending(2, 1, 4, 4, causal=True)
    args = inputs([3, 1, 2], [3, 4, 2], 2, 1, 4, 4)
    (clean,) = emitted(module, {}, *args)
    for tensor, bounds in zip(args[:3], [(3, 4), (3, 7), (3, 7)], strict=True):
        tensor[slice(*bounds)] = torch.nan
    (dirty,) = emitted(module, {}, *args)
    assert torch.equal(clean[[0, 1, 2, 4, 5]], dirty[[0, 1, 2, 4, 5]])
    assert dirty[3].isnan().all()


def test_rows_that_no_sequence_owns_are_zeros() -> None:
    args = inputs([2, 2], [2, 2], 1, 1, 4, 4)
    args[3], args[4] = args[3][:2], args[4][:2]
    (out,) = emitted(attending(1, 1, 4, 4), {}, *args)
    assert out[2:].eq(0).all()


# The cache.
PAGE, PAGES, ENTRY = 4, 6, (2, 3)


def cache_module(dtype: str = "f32", write: bool = True, read: bool = True) -> Module:
    """forward(cache, layer, entry, slots, table, lens): writes, then reads back."""
    kind = DTYPES[dtype]

    def body(b, cache, layer, entry, slots, table, lens):  # type: ignore[no-untyped-def]
        if write:
            cache = b.cache_write(cache, layer, entry, slots)
        return (b.cache_read(cache, layer, table, lens), cache) if read else cache

    return forward(
        body,
        CacheType(kind, ENTRY, PAGE),
        IndexType(),
        TensorType(kind, (N, *ENTRY)),
        TensorType(i64, (N,)),
        TensorType(i32, (B, P)),
        TensorType(i32, (B,)),
    )


def poisoned(dtype: torch.dtype = torch.float32, layers: int = 2) -> PagedCache:
    return PagedCache(
        PAGE, {n: torch.full((PAGE * PAGES, *ENTRY), torch.nan, dtype=dtype) for n in range(layers)}
    )


@st.composite
def places(draw: Any) -> tuple[list[list[int]], list[int]]:
    """Scattered pages of each sequence, and their lengths."""
    lengths = draw(st.lists(st.integers(0, 2 * PAGE), max_size=3))
    free = draw(st.permutations(range(PAGES)))
    tables = []
    for length in lengths:
        count = -(-length // PAGE)
        tables.append(list(free[:count]))
        free = free[count:]
    return tables, lengths


@given(places(), st.sampled_from(["f32", "bf16"]), st.sampled_from([0, 1]))
def test_what_is_written_is_read_back(
    drawn: tuple[list[list[int]], list[int]], dtype: str, layer: int
) -> None:
    """Through scattered pages; block ids beyond the length are garbage, what isn't written is NaN."""
    tables, lengths = drawn
    slots = [t[p // PAGE] * PAGE + p % PAGE for t, n in zip(tables, lengths, strict=True) for p in range(n)]
    width = max(map(len, tables), default=0) + 1
    garbage = [[*t, *[10**6] * (width - len(t))] for t in tables]
    table = torch.tensor(garbage, dtype=torch.int32).view(len(tables), width)
    entry = randn(len(slots), *ENTRY, dtype=dtype)
    cache = poisoned(DTYPES[dtype].torch)
    args = [
        cache,
        layer,
        entry,
        torch.tensor(slots, dtype=torch.int64),
        table,
        torch.tensor(lengths, dtype=torch.int32),
    ]
    agree(cache_module(dtype), {}, args)
    pages = pages_of(cache)
    (read,) = emitted(cache_module(dtype), {}, pages, *args[1:])
    assert torch.equal(read, entry)
    assert pages[1 - layer].isnan().all()
    untouched = sorted(set(range(PAGE * PAGES)) - set(slots))
    assert pages[layer].flatten(0, 1)[untouched].isnan().all()


@given(st.lists(st.sampled_from([-1, -2, -99]), max_size=4), st.integers(0, PAGE * PAGES - 1))
def test_a_negative_slot_reaches_no_page(dropped: list[int], kept: int) -> None:
    slots = torch.tensor([*dropped, kept])
    cache = poisoned()
    pages = pages_of(cache)
    table, lens = torch.zeros(0, 1, dtype=torch.int32), torch.zeros(0, dtype=torch.int32)
    entry = randn(len(slots), *ENTRY)
    emitted(cache_module(read=False), {}, pages, 0, entry, slots, table, lens)
    written = pages[0][:-1].flatten(0, 1)
    assert torch.equal(written[kept], entry[-1])
    assert int(written.isnan().all(-1).all(-1).sum()) == PAGE * PAGES - 1


def test_what_reads_a_cache_before_a_write_sees_the_old_entries() -> None:
    """The package changes pages in place, so the order of the calls must be the IR's."""

    def body(b, cache, layer, entry, slots, table, lens):  # type: ignore[no-untyped-def]
        old = b.cache_read(cache, layer, table, lens, rows="S0")
        later = b.cache_write(cache, layer, entry, slots)
        return old, b.cache_read(later, layer, table, lens, rows="S1"), later

    kind = CacheType(f32, ENTRY, PAGE)
    rest = (TensorType(i64, (N,)), TensorType(i32, (B, P)), TensorType(i32, (B,)))
    module = forward(body, kind, IndexType(), TensorType(f32, (N, *ENTRY)), *rest)
    cache = PagedCache(PAGE, {0: randn(PAGE * PAGES, *ENTRY)})
    table, lens = torch.tensor([[3]], dtype=torch.int32), torch.tensor([4], dtype=torch.int32)
    args = [cache, 0, randn(4, *ENTRY, seed=5), torch.arange(12, 16), table, lens]
    old, new = Interpreter(module, {}).run("forward", *args)[:2]
    assert not torch.equal(old, new)
    agree(module, {}, args)


def test_bf16_values_survive_the_cache_unchanged() -> None:
    assert bf16.torch == torch.bfloat16
    entry = randn(1, *ENTRY, dtype="bf16")
    args = [
        0,
        entry,
        torch.tensor([5]),
        torch.tensor([[0, 1]], dtype=torch.int32),
        torch.tensor([6], dtype=torch.int32),
    ]
    (read,) = emitted(cache_module("bf16"), {}, pages_of(poisoned(torch.bfloat16)), *args)
    assert torch.equal(read[5], entry[0])
    assert read[:5].isnan().all()
