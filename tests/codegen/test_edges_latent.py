"""Attention over latents, where its two forms meet and where each goes wrong."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.ir import Module, TensorType
from moec.ir.types import DTYPES, f32, i32, symbol
from tests.codegen.emission import agree, emitted, forward

N, B, S = (symbol(n) for n in "NBS")

# Heads, then the widths of q_nope, q_pe, v and c.
Sizes = tuple[int, int, int, int, int]
TINY: Sizes = (2, 4, 2, 3, 8)


def attending(sizes: Sizes, dtype: str = "f32", **attrs: Any) -> Module:
    heads, nope, rope, value, rank = sizes
    kind = DTYPES[dtype]
    how = {"scale": (nope + rope) ** -0.5, "absorb_below": 3} | attrs

    def write(b: Any, q: Any, latent: Any, *offsets: Any) -> Any:
        w = b.param("w", (heads * (nope + value), rank), kind)
        return b.latent_attention(q, latent, w, *offsets, nope=nope, value=value, **how)

    return forward(
        write,
        TensorType(kind, (N, heads, nope + rope)),
        TensorType(kind, (S, rank + rope)),
        TensorType(i32, (B + 1,)),
        TensorType(i32, (B + 1,)),
    )


def inputs(
    queries: list[int], keys: list[int], sizes: Sizes, dtype: str = "f32"
) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """The weight, of columns as long as those of a trained one, and the arguments."""
    heads, nope, rope, value, rank = sizes
    generator = torch.Generator().manual_seed(sum(keys))
    shapes = [(sum(queries), heads, nope + rope), (sum(keys), rank + rope), (heads * (nope + value), rank)]
    q, latent, w = (torch.randn(s, generator=generator) for s in shapes)
    bounds = [torch.tensor([0, *accumulate(n)], dtype=torch.int32) for n in (queries, keys)]
    kind = DTYPES[dtype].torch
    return {"w": (w * rank**-0.5).to(kind)}, [q.to(kind), latent.to(kind), *bounds]


@settings(max_examples=80)
@given(
    batch=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 6)), max_size=4),
    sizes=st.sampled_from([TINY, (1, 1, 1, 1, 1), (3, 2, 3, 7, 4), (2, 3, 0, 3, 5), (4, 5, 3, 8, 6)]),
    causal=st.booleans(),
    window=st.sampled_from([0, 1, 2, 9]),
    absorb_below=st.sampled_from([0, 1, 2, 4, 2**31 - 1]),
)
def test_ragged_batches(
    batch: list[tuple[int, int]], sizes: Sizes, causal: bool, window: int, absorb_below: int
) -> None:
    """Prefill, decode, chunks and empty sequences, absorbed and not, often both in one batch."""
    queries, keys = [q for q, _ in batch], [q + more for q, more in batch]
    module = attending(sizes, causal=causal, window=window, absorb_below=absorb_below)
    weights, args = inputs(queries, keys, sizes)
    agree(module, weights, args)


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("absorb_below", [0, 99])
@pytest.mark.parametrize("window", [0, 6])
def test_16_bits(dtype: str, absorb_below: int, window: int) -> None:
    """Either form rounds what it makes of c: a unit in the last place or two of the largest result."""
    sizes = (4, 16, 8, 16, 32)
    weights, args = inputs([1, 5, 9, 2], [20, 5, 30, 2], sizes, dtype)
    tolerance = {"bf16": 2**-6, "f16": 2**-9}[dtype]
    agree(attending(sizes, dtype, absorb_below=absorb_below, window=window), weights, args, tolerance)


@pytest.mark.parametrize(("queries", "keys"), [([3], [1]), ([2, 3], [0, 2]), ([1], [0]), ([4, 1], [2, 1])])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [0, 2])
@pytest.mark.parametrize("absorb_below", [0, 99])
def test_a_query_that_sees_no_key_gives_zeros(
    queries: list[int], keys: list[int], causal: bool, window: int, absorb_below: int
) -> None:
    module = attending(TINY, causal=causal, window=window, absorb_below=absorb_below)
    agree(module, *inputs(queries, keys, TINY))


def test_one_sequence_never_sees_another() -> None:
    """Of one query, of two (both absorbed) and of four."""
    weights, args = inputs([1, 2, 4], [5, 3, 4], TINY)
    module = attending(TINY)
    (clean,) = emitted(module, weights, *args)
    args[1][5:8] = torch.nan
    (dirty,) = emitted(module, weights, *args)
    assert dirty[1:3].isnan().all()
    assert torch.equal(clean[[0, 3, 4, 5, 6]], dirty[[0, 3, 4, 5, 6]])


def test_rows_that_no_sequence_owns_are_zeros() -> None:
    weights, args = inputs([2, 2], [2, 2], TINY)
    args[2], args[3] = args[2][:2], args[3][:2]
    (out,) = emitted(attending(TINY), weights, *args)
    assert out[2:].eq(0).all()


def test_w_may_be_a_view() -> None:
    heads, nope, _, value, rank = TINY

    def write(b: Any, q: Any, latent: Any, *offsets: Any) -> Any:
        w, _ = b.split(b.param("w", (heads * (nope + value), rank + 1)), sizes=(rank, 1))
        return b.latent_attention(q, latent, w, *offsets, nope=nope, value=value, scale=0.5, absorb_below=2)

    types = [v.type for v in attending(TINY)["forward"].args]
    weights, args = inputs([1, 4], [3, 4], TINY)
    wide = {"w": torch.cat([weights["w"], weights["w"].new_full((len(weights["w"]), 1), torch.nan)], 1)}
    module = forward(write, *types)
    assert module["forward"].ops[0].results[0].type.dtype == f32  # type: ignore[union-attr]
    agree(module, wide, args)
