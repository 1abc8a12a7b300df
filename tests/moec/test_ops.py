"""What moec.ops computes, against a loop over tokens and their choices."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moec.ops import compiled, fused_experts, grouped_experts
from tests.moec.experts import ACTS, TOLERANCE, Layer, close, expert, layer, loop, strided


@given(st.data())
def test_fused_experts(data: st.DataObject) -> None:
    draw = data.draw
    experts = draw(st.sampled_from([1, 3, 8]))
    k = draw(st.integers(1, experts))
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    one = layer(
        draw(st.integers(0, 9)), k, experts, draw(st.sampled_from([1, 5, 16])), 7, dtype=dtype, seed=k
    )
    first = draw(st.sampled_from([0, 0, 5]))
    # Whatever ids a router or a dispatcher writes: repeated ones, other ranks', sentinels.
    id = st.integers(first, first + experts - 1) | st.sampled_from([-1, first + experts, 2**31 - 1, -(2**31)])
    size = one.ids.numel()
    if draw(st.booleans()):
        ids = draw(st.lists(id, min_size=size, max_size=size))
        one.ids = torch.tensor(ids, dtype=torch.int32).view(one.ids.shape)
    else:
        one.ids += first
    if draw(st.booleans()):
        one.ids = one.ids.long()
    if draw(st.booleans()):
        one.weights = one.weights.to(dtype)
    how = {
        "activation": draw(st.sampled_from(list(ACTS))),
        "limit": draw(st.sampled_from([None, 0.5])),
        "shared": torch.randn_like(one.x) if draw(st.booleans()) else None,
    }
    wanted = loop(one, first, **how)
    if draw(st.booleans()):
        one = Layer(*map(strided, one.args))
        how["shared"] = None if how["shared"] is None else strided(how["shared"])
    span = (first, first + experts) if first or draw(st.booleans()) else None
    close(fused_experts(*one.args, **how, expert_range=span), wanted, dtype)


@given(st.data())
def test_grouped_experts(data: st.DataObject) -> None:
    draw = data.draw
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    one = layer(0, experts=3, dtype=dtype)
    counts = draw(st.lists(st.integers(0, 4), min_size=3, max_size=3))
    spare = draw(st.integers(0, 3))
    owner = [e for e, count in enumerate(counts) for _ in range(count)]
    off = torch.tensor([0, *counts]).cumsum(0).to(draw(st.sampled_from([torch.int32, torch.int64])))
    x = torch.randn(len(owner) + spare, 8).to(dtype)
    x[len(owner) :] = math.nan
    how = {"activation": draw(st.sampled_from(list(ACTS))), "limit": draw(st.sampled_from([None, 0.5]))}
    wanted = torch.zeros(x.shape, dtype=torch.float64)
    for row, e in enumerate(owner):
        wanted[row] = expert(x[row], one.w13[e], one.w2[e], **how)
    close(grouped_experts(x, off, one.w13, one.w2, **how), wanted, dtype)
    into = strided(x)
    assert grouped_experts(into, off, one.w13, one.w2, **how, out=into) is into
    close(into, wanted, dtype)


def test_all_tokens_to_one_expert() -> None:
    one = layer(33, k=1)
    one.ids.fill_(2)
    close(fused_experts(*one.args), loop(one), torch.float32)


# What may not be read may be anything.
def test_nan_stays_in_its_token() -> None:
    one = layer()
    clean = fused_experts(*one.args)
    one.x[3] = math.nan
    got = fused_experts(*one.args)
    assert got[3].isnan().all()
    rest = [0, 1, 2, 4]
    assert torch.equal(got[rest], clean[rest])


@pytest.mark.parametrize("skipped", [-1, 4, 1000])
@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf, 1.0])
def test_a_skipped_choice_contributes_nothing(skipped: int, weight: float) -> None:
    one = layer()
    one.ids[:, 1], one.weights[:, 1] = skipped, weight
    close(fused_experts(*one.args), loop(one), torch.float32)


def test_a_token_of_which_every_choice_is_skipped_gets_what_is_shared() -> None:
    one = layer()
    one.x[2], one.ids[2] = math.nan, 9
    shared = torch.randn_like(one.x)
    assert fused_experts(*one.args)[2].eq(0).all()
    assert torch.equal(fused_experts(*one.args, shared=shared)[2], shared[2])


def test_weights_of_experts_that_nobody_chose_are_not_read() -> None:
    one = layer()
    one.ids[one.ids == 1] = 3
    clean = fused_experts(*one.args)
    one.w13[1], one.w2[1] = math.nan, math.inf
    assert torch.equal(fused_experts(*one.args), clean)


def test_a_weight_of_a_choice_that_counts_is_not_hidden() -> None:
    one = layer()
    one.weights[1, 0] = math.nan
    got = fused_experts(*one.args)
    assert got[1].isnan().all() and not got[[0, 2, 3, 4]].isnan().any()


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_add_up(ranks: int) -> None:
    one = layer(9, k=3, experts=8)
    each = 8 // ranks
    total = torch.zeros_like(one.x)
    for rank in range(ranks):
        here = slice(rank * each, (rank + 1) * each)
        span = range(here.start, here.stop) if rank % 2 else (here.start, here.stop)
        total += fused_experts(one.x, one.w13[here], one.w2[here], one.weights, one.ids, expert_range=span)
    close(total, loop(one), torch.float32)


# Where the result goes.
def test_out_is_written_and_returned() -> None:
    one = layer()
    wanted = fused_experts(*one.args, shared=one.x)
    out = torch.full_like(one.x, math.nan)
    assert fused_experts(*one.args, shared=one.x, out=out) is out
    assert torch.equal(out, wanted)
    assert fused_experts(*one.args, shared=one.x, out=one.x) is one.x
    assert torch.equal(one.x, wanted)


def test_the_arguments_stay_as_they_were() -> None:
    one = layer()
    before = [a.clone() for a in one.args]
    y = fused_experts(*one.args, shared=one.x)
    assert all(map(torch.equal, before, one.args))
    assert y.is_contiguous() and y.data_ptr() not in {a.data_ptr() for a in one.args}


def test_the_same_call_gives_the_same_bits() -> None:
    one = layer(64, k=3, experts=8)
    assert torch.equal(fused_experts(*one.args), fused_experts(*one.args))


def test_the_number_of_tokens_builds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[compiled.Key] = []
    build = compiled._build
    monkeypatch.setattr(compiled, "_build", lambda key: built.append(key) or build(key))
    for tokens in (1, 2, 100):
        fused_experts(*layer(tokens, k=3, hidden=11).args)
    assert len(built) == 1
    fused_experts(*layer(1, k=3, hidden=12).args)
    assert len(built) == 2
