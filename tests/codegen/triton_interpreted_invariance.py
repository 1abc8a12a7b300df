"""A token alone and in any batch, through the GPU's kernels in Triton's interpreter: the same bits.

Run by test_invariance.py in a process of its own, with TRITON_INTERPRET=1 and MOEC_INTERPRET=1.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from moec.codegen.schedules import Schedule
from moec.ir.devices import GPU
from moec.ir.op import Op
from moec.ops import fused_experts, grouped_experts
from tests.codegen import interpreter_casts

interpreter_casts.install()


interpreter_casts.original["dot"] = interpreter_casts.in_order

EXPERTS, HIDDEN, WIDTH, TOKENS, K = 3, 272, 144, 37, 2
Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, bool], torch.Tensor]


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


W13, W2 = draw(EXPERTS, 2 * WIDTH, HIDDEN, seed=1), draw(EXPERTS, HIDDEN, WIDTH, seed=2)


def fused(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, invariant: bool) -> torch.Tensor:
    return fused_experts(x, W13.to(x.dtype), W2.to(x.dtype), weights, ids, batch_invariant=invariant)


def fp8(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, invariant: bool) -> torch.Tensor:
    blocks = [(EXPERTS, -(-n // 128), -(-k // 128)) for n, k in (W13.shape[1:], W2.shape[1:])]
    scales = [torch.rand(*b, generator=torch.Generator().manual_seed(5)) + 0.5 for b in blocks]
    w13, w2 = (w.to(torch.float8_e4m3fn) for w in (W13, W2))
    return fused_experts(
        x, w13, w2, weights, ids, w13_scale=scales[0], w2_scale=scales[1], batch_invariant=invariant
    )


def grouped(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, invariant: bool) -> torch.Tensor:
    """Each token to its first choice."""
    owner, order = ids[:, 0].sort(stable=True)
    off = torch.searchsorted(owner, torch.arange(EXPERTS + 1, dtype=torch.int32), out_int32=True)
    rows = grouped_experts(x[order].contiguous(), off, W13, W2, batch_invariant=invariant)
    return torch.empty_like(rows).index_copy_(0, order, rows)


@pytest.mark.parametrize(
    ("run", "dtype"),
    [(fused, torch.float32), (fused, torch.float16), (fp8, torch.float32), (grouped, torch.float16)],
)
def test_a_token_s_bits_are_its_own(run: Run, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    # So that one launch sums a few tokens' rows, and two those of all.
    monkeypatch.setattr("moec.codegen.kernels.triton_grouped_combine.few_tokens", lambda *given: 16)
    x = draw(TOKENS, HIDDEN, seed=3, dtype=dtype)
    scores = torch.rand(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(4))
    ids = scores.topk(K, dim=1).indices.to(torch.int32)
    ids[: TOKENS // 2] = torch.tensor([1, 2], dtype=torch.int32)  # so that an expert has several tiles
    weights = scores.gather(1, ids.long())
    whole = run(x, weights, ids, True)
    assert whole.isfinite().all()
    picks = [[7], [36], [3, 35, 20], torch.randperm(TOKENS).tolist()]
    for pick_ in picks:
        some = run(x[pick_], weights[pick_], ids[pick_], True)
        assert torch.equal(some, whole[pick_]), pick_


def test_a_schedule_s_order_along_k_shows_in_the_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the test above can fail: it does where few tokens get steps of 32 along K, and many of 16."""

    def other(op: Op, device: GPU) -> list[tuple[float, Schedule]]:
        return [(4.0, Schedule("rows", 16, 64, 32, 4, 3)), (math.inf, Schedule("rows", 64, 64, 16, 4, 3))]

    monkeypatch.setattr("moec.codegen.kernels.triton_grouped.rungs", other)
    x, weights = draw(TOKENS, HIDDEN, seed=3, dtype=torch.float32), torch.ones(TOKENS, 1)
    ids = torch.zeros(TOKENS, 1, dtype=torch.int32)
    whole = fused(x, weights, ids, True)
    assert not torch.equal(fused(x[:1], weights[:1], ids[:1], True), whole[:1])
