"""latent_attention against its formulas, head by head and query by query in fp64, in the absorbed form."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.ir.helpers import ints, offsets, reference


def expected(
    q: torch.Tensor, latent: torch.Tensor, w: torch.Tensor, nope: int, value: int, causal: bool, window: int
) -> torch.Tensor:
    """One sequence: q [n, heads, P+R], latent [keys, C+R], w [heads·(P+V), C]."""
    (n, heads, _), keys, rank = q.shape, len(latent), w.shape[1]
    out = torch.zeros(n, heads, value, dtype=torch.float64)
    for h in range(heads):
        rows = w[h * (nope + value) : (h + 1) * (nope + value)].double()
        w_uk, w_uv = rows[:nope], rows[nope:]
        for i in range(n):
            at = keys - n + i
            seen = [j for j in range(keys) if (j <= at or not causal) and (not window or j > at - window)]
            if not seen:
                continue
            c, k_pe = latent[seen, :rank].double(), latent[seen, rank:].double()
            query = q[i, h].double()
            scores = 0.7 * (c @ (query[:nope] @ w_uk) + k_pe @ query[nope:])
            p = torch.tensor([math.exp(s - float(scores.max())) for s in scores], dtype=torch.float64)
            out[i, h] = w_uv @ ((p / p.sum()) @ c)
    return out.to(q.dtype)


@given(
    batch=st.lists(st.tuples(st.integers(0, 4), st.integers(-1, 5)), max_size=3),
    heads=st.integers(1, 3),
    widths=st.tuples(st.integers(1, 4), st.integers(0, 3), st.integers(1, 4), st.integers(1, 5)),
    causal=st.booleans(),
    window=st.sampled_from([0, 1, 2, 5]),
    absorb_below=st.sampled_from([0, 2, 99]),
)
def test_ragged_batches(
    batch: list[tuple[int, int]],
    heads: int,
    widths: tuple[int, int, int, int],
    causal: bool,
    window: int,
    absorb_below: int,
) -> None:
    nope, rope, value, rank = widths
    news = [n for n, _ in batch]
    keys = [max(n + old, 0) for n, old in batch]
    torch.manual_seed(sum(keys) + 7 * heads)
    q, latent = torch.randn(sum(news), heads, nope + rope), torch.randn(sum(keys), rank + rope)
    w = torch.randn(heads * (nope + value), rank)
    found = reference(
        "latent_attention",
        q,
        latent,
        w,
        offsets(news),
        offsets(keys),
        nope=nope,
        value=value,
        scale=0.7,
        causal=causal,
        window=window,
        absorb_below=absorb_below,
    )
    assert found.shape == (sum(news), heads, value)
    for mine, qs, rows in zip(found.split(news), q.split(news), latent.split(keys), strict=True):
        want = expected(qs, rows, w, nope, value, causal, window)
        torch.testing.assert_close(mine, want, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_rounded_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, latent, w = (torch.randn(*s).to(dtype) for s in [(3, 2, 6), (5, 10), (2 * 9, 8)])
    how = {"nope": 4, "value": 5, "scale": 0.3, "absorb_below": 9}
    found = reference("latent_attention", q, latent, w, ints(0, 3), ints(0, 5), **how)
    wide = (t.float() for t in (q, latent, w))
    assert torch.equal(found, reference("latent_attention", *wide, ints(0, 3), ints(0, 5), **how).to(dtype))


def test_w_holds_each_head_s_keys_then_its_values() -> None:
    # Head 0: k = c, v = 10·c; head 1: k = 0, v = 20·c. Two keys, c = 0 and 50: head 0 sees only the second.
    w = torch.tensor([[1.0], [10.0], [0.0], [20.0]])
    found = reference(
        "latent_attention",
        torch.ones(1, 2, 1),
        torch.tensor([[0.0], [50.0]]),
        w,
        ints(0, 1),
        ints(0, 2),
        nope=1,
        value=1,
        scale=1.0,
        absorb_below=0,
    )
    assert found.flatten().tolist() == [500.0, 500.0]
