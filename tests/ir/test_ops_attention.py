"""attention against torch's scaled_dot_product_attention, and the paged cache against a table of entries."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from moec.ir.ops.attention import PagedCache
from tests.ir.helpers import ints, offsets, reference


def expected(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool, window: int
) -> torch.Tensor:
    """One sequence, [n, heads, D] and [keys, kv_heads, D], through torch with a mask made entry by entry."""
    n, keys = q.shape[0], k.shape[0]
    mask = torch.zeros(n, keys, dtype=torch.bool)
    for i in range(n):
        at = keys - n + i
        for j in range(keys):
            mask[i, j] = (j <= at or not causal) and (not window or j > at - window)
    heads = [t.double().transpose(0, 1)[None] for t in (q, k, v)]
    out = F.scaled_dot_product_attention(*heads, attn_mask=mask, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1).to(q.dtype)


def check(
    news: list[int], olds: list[int], heads: int, kv: int, d: int, dv: int, causal: bool, window: int
) -> None:
    torch.manual_seed(sum(news) + 7 * sum(olds))
    keys = [n + o for n, o in zip(news, olds, strict=True)]
    q = 2 * torch.randn(sum(news), heads, d)
    k, v = torch.randn(sum(keys), kv, d), torch.randn(sum(keys), kv, dv)
    found = reference(
        "attention", q, k, v, offsets(news), offsets(keys), scale=0.7, causal=causal, window=window
    )
    assert found.shape == (sum(news), heads, dv)
    at = zip(found.split(news), q.split(news), k.split(keys), v.split(keys), strict=True)
    for mine, qs, ks, vs in at:
        if len(qs):
            torch.testing.assert_close(mine, expected(qs, ks, vs, 0.7, causal, window), rtol=1e-5, atol=1e-5)


@given(
    batch=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5)), max_size=4),
    kv=st.sampled_from([1, 2]),
    group=st.sampled_from([1, 3]),
    dims=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    causal=st.booleans(),
    window=st.sampled_from([0, 1, 2, 5]),
)
def test_attention_over_ragged_batches(
    batch: list[tuple[int, int]], kv: int, group: int, dims: tuple[int, int], causal: bool, window: int
) -> None:
    news, olds = [n for n, _ in batch], [o for _, o in batch]
    check(news, olds, kv * group, kv, *dims, causal, window)


def test_heads_share_keys_in_runs() -> None:
    # Query heads 0 and 1 read key head 0, heads 2 and 3 read key head 1.
    v = torch.tensor([[[1.0], [2.0]]])
    found = reference(
        "attention", torch.ones(1, 4, 1), torch.ones(1, 2, 1), v, ints(0, 1), ints(0, 1), scale=1.0
    )
    assert found.flatten().tolist() == [1.0, 1.0, 2.0, 2.0]


def test_queries_without_keys_give_zeros() -> None:
    q, k = torch.ones(3, 1, 2), torch.ones(1, 1, 2)
    found = reference("attention", q, k, k, ints(0, 1, 3), ints(0, 0, 1), scale=1.0)
    # Sequence 0 has no keys. Of sequence 1's two queries only the last sees its one key.
    assert found[:, 0, 0].tolist() == [0.0, 0.0, 1.0]


def test_bf16_is_rounded_once() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 2, 8).bfloat16() for _ in range(3))
    found = reference("attention", q, k, v, ints(0, 3), ints(0, 3), scale=0.35)
    exact = reference("attention", q.float(), k.float(), v.float(), ints(0, 3), ints(0, 3), scale=0.35)
    assert torch.equal(found, exact.bfloat16())


@st.composite
def paged(draw: st.DrawFn) -> tuple[int, list[list[int]], list[int]]:
    """A page size, each sequence's pages (scattered, never shared), each sequence's length."""
    page = draw(st.sampled_from([1, 2, 4]))
    order = draw(st.permutations(range(8)))
    lengths = draw(st.lists(st.integers(0, 3 * page), max_size=2))
    return page, [list(order[3 * b : 3 * b + 3]) for b in range(len(lengths))], lengths


@given(paged())
def test_what_is_written_to_scattered_pages_is_read_back(
    case: tuple[int, list[list[int]], list[int]],
) -> None:
    page, tables, lengths = case
    cache = PagedCache(
        page, {0: torch.full((8 * page, 2), torch.nan), 5: torch.full((8 * page, 2), torch.nan)}
    )
    entries, slots = [], []
    for b, length in enumerate(lengths):
        for position in range(length):
            entries.append([float(b), float(position)])
            slots.append(tables[b][position // page] * page + position % page)
    order = list(reversed(range(len(slots))))
    entry = torch.tensor(entries).view(-1, 2)
    after = reference("cache_write", cache, 5, entry[order], ints(*(slots[i] for i in order)))
    # Ids beyond a sequence's length are garbage.
    garbage = torch.tensor(
        [
            [id if i * page < length else -9 for i, id in enumerate(table)] + [10**6]
            for table, length in zip(tables, lengths, strict=True)
        ],
        dtype=torch.int32,
    ).view(len(lengths), 4)
    assert torch.equal(reference("cache_read", after, 5, garbage, ints(*lengths)), entry)
    assert after.layers[0] is cache.layers[0] and cache.layers[5].isnan().all()
    assert int(after.layers[5].isnan().any(1).sum()) == 8 * page - len(slots)  # nothing else was written


def test_negative_slots_are_skipped() -> None:
    cache = PagedCache(2, {0: torch.zeros(4, 1)})
    after = reference("cache_write", cache, 0, torch.tensor([[1.0], [2.0], [3.0]]), ints(-1, 3, -7))
    assert after.layers[0].flatten().tolist() == [0.0, 0.0, 0.0, 2.0]


@pytest.mark.parametrize("window", [1, 3])
def test_a_window_hides_what_lies_before_it(window: int) -> None:
    v = torch.arange(5.0).view(5, 1, 1)
    same = torch.ones(5, 1, 1)
    found = reference("attention", same, same, v, ints(0, 5), ints(0, 5), scale=1.0, window=window)
    means = [sum(range(max(0, i - window + 1), i + 1)) / min(window, i + 1) for i in range(5)]
    torch.testing.assert_close(found.flatten(), torch.tensor(means))
