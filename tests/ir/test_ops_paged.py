"""Attention over pages, and parts of a batch, against formulas taken entry by entry in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moec.ir.ops.attention import PagedCache
from tests.ir.helpers import ints, offsets, reference

PAGES = 9


def attended(query: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor]) -> torch.Tensor:
    """One head's softmax(0.7 · q·k) · v over these keys, zeros over none."""
    if not keys:
        return torch.zeros(len(values[0]) if values else 0, dtype=torch.float64)
    scores = [0.7 * float(query.double() @ k.double()) for k in keys]
    weights = [math.exp(s - max(scores)) for s in scores]
    out = sum(w * v.double() for w, v in zip(weights, values, strict=True))
    return torch.as_tensor(out) / sum(weights)


def seen(query: int, queries: int, entries: int, causal: bool, window: int) -> list[int]:
    at = entries - queries + query
    return [j for j in range(entries) if (j <= at or not causal) and (not window or j > at - window)]


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[int], list[int], list[list[int]], int]:
    """New tokens and entries of each sequence, its pages in any order, and the page's size."""
    page = draw(st.integers(1, 3))
    news = draw(st.lists(st.integers(0, 4), max_size=3))
    lens = [max(0, n + draw(st.integers(-1, 4))) for n in news]
    return news, lens, [draw(st.permutations(range(PAGES))) for _ in news], page


@given(
    batch=batches(),
    latent=st.booleans(),
    kv=st.integers(1, 2),
    group=st.integers(1, 2),
    width=st.integers(1, 4),
    causal=st.booleans(),
    window=st.sampled_from([0, 1, 2, 5]),
    data=st.data(),
)
def test_ragged_batches(
    batch: tuple[list[int], list[int], list[list[int]], int],
    latent: bool,
    kv: int,
    group: int,
    width: int,
    causal: bool,
    window: int,
    data: st.DataObject,
) -> None:
    news, lens, tables, page = batch
    rank = data.draw(st.integers(1, width))
    heads = kv * group
    torch.manual_seed(sum(lens) + 7 * heads)
    # Every page is written, as sequences may share some; what is read is picked entry by entry.
    slots = torch.randn(PAGES * page, *((width,) if latent else (2 * kv, width)))
    q = torch.randn(sum(news), heads, width)
    how = {"rank": rank} if latent else {}
    found = reference(
        "latent_attention" if latent else "paged_attention",
        q,
        PagedCache(page, {3: slots, 0: torch.full_like(slots, torch.nan)}),
        3,
        torch.tensor(tables, dtype=torch.int32).view(len(news), PAGES),
        offsets(news),
        ints(*lens),
        scale=0.7,
        causal=causal,
        window=window,
        **how,
    )
    out_width = rank if latent else width
    assert found.shape == (sum(news), heads, out_width)
    row = 0
    for n, entries, table in zip(news, lens, tables, strict=True):
        for i in range(n):
            at = [table[j // page] * page + j % page for j in seen(i, n, entries, causal, window)]
            for h in range(heads):
                keys = [slots[s] if latent else slots[s, h // group] for s in at]
                values = [slots[s, :rank] if latent else slots[s, kv + h // group] for s in at]
                want = attended(q[row, h], keys, values) if at else torch.zeros(out_width)
                torch.testing.assert_close(found[row, h].double(), want.double(), rtol=1e-5, atol=2e-5)
            row += 1


@pytest.mark.parametrize("op", ["latent_attention", "paged_attention"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_rounded_once(op: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q = torch.randn(3, 2, 4).to(dtype)
    slots = torch.randn(8, *((4,) if op == "latent_attention" else (2, 4))).to(dtype)
    how = {"scale": 0.3} | ({"rank": 3} if op == "latent_attention" else {})

    def run(q: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        table = torch.tensor([[1, 0]], dtype=torch.int32)
        return reference(op, q, PagedCache(4, {0: slots}), 0, table, ints(0, 3), ints(5), **how)

    assert torch.equal(run(q, slots), run(q.float(), slots.float()).to(dtype))


@given(counts=st.lists(st.integers(0, 5), max_size=5), spare=st.integers(0, 2), below=st.integers(1, 6))
def test_a_batch_in_two_parts(counts: list[int], spare: int, below: int) -> None:
    """Each part describes its sequences as the batch did; rows of no sequence are the last short ones."""
    b, n = len(counts), sum(counts) + spare
    lens, table = torch.arange(b) + 10, torch.arange(3 * b).view(b, 3)
    parts = reference("split_batch", torch.zeros(n, 2), offsets(counts), lens, table, below=below)
    rows = torch.arange(n).split([*counts, spare])
    for short, (row, cu, of, pages) in ((True, parts[:4]), (False, parts[4:])):
        mine = [i for i, count in enumerate(counts) if (count < below) == short]
        want = [rows[i] for i in mine] + ([rows[-1]] if short else [])
        assert row.tolist() == torch.cat(want or [torch.arange(0)]).tolist()
        assert cu.tolist() == offsets([counts[i] for i in mine]).tolist()
        assert of.tolist() == [10 + i for i in mine]
        assert pages.tolist() == [[3 * i, 3 * i + 1, 3 * i + 2] for i in mine]
    x = torch.randn(n, 2)
    a, c = reference("take_rows", x, parts[0]), reference("take_rows", x, parts[4])
    assert torch.equal(reference("merge_rows", a, parts[0], c, parts[4]), x)


def test_head_linear_is_a_product_a_head() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(3, 2, 4), torch.randn(2, 5, 4)
    found = reference("head_linear", x, w)
    for h in range(2):
        torch.testing.assert_close(found[:, h], x[:, h] @ w[h].T)
    assert torch.equal(reference("head_linear", x, w.mT.contiguous(), transposed=True), found)
