"""Routing and experts where they go wrong: no tokens, empty experts, ties, stray ids, NaN."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moec.ir import Interpreter, Module, TensorType
from moec.ir.ops.route import SCORES
from moec.ir.types import DTYPES, f32, i32, symbol
from tests.codegen.emission import agree, close, emitted, forward

N = symbol("N")
H, I = 6, 5


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def routing(experts: int, bias: bool = False, **attrs: Any) -> Module:
    def write(b, logits):  # type: ignore[no-untyped-def]
        return b.route(logits, b.param("bias", (experts,)) if bias else None, **attrs)

    return forward(write, TensorType(f32, (N, experts)))


def grouped(experts: int, k: int) -> Module:
    """Rows through the experts that ``id`` names: forward(x, w, id)."""

    def write(b, x, w, id):  # type: ignore[no-untyped-def]
        slot, off = b.sort_by_expert(id, experts=experts)
        rows = b.gather_rows(x, slot, per_row=k)
        h = b.swiglu(b.grouped_linear(rows, b.param("w13", (experts, 2 * I, H)), off))
        return b.combine(b.grouped_linear(h, b.param("w2", (experts, H, I)), off), slot, w)

    return forward(write, TensorType(f32, (N, H)), TensorType(f32, (N, k)), TensorType(i32, (N, k)))


def expert_weights(experts: int) -> dict[str, torch.Tensor]:
    return {"w13": randn(experts, 2 * I, H, seed=1), "w2": randn(experts, H, I, seed=2)}


# Routing.
@st.composite
def tied_logits(draw: Any, experts: int) -> torch.Tensor:
    """Few different values, so that most rows hold ties."""
    row = st.lists(st.sampled_from([-1.0, 0.0, 0.5]), min_size=experts, max_size=experts)
    return torch.tensor(draw(st.lists(row, max_size=4))).view(-1, experts)


@given(tied_logits(6), st.integers(1, 6), st.sampled_from(SCORES))
def test_equal_scores_go_to_the_lowest_id(logits: torch.Tensor, k: int, score: str) -> None:
    _, ids = emitted(routing(6, score=score, k=k), {}, logits)
    for row, chosen in zip(logits.tolist(), ids.tolist(), strict=True):
        assert chosen == sorted(range(6), key=lambda e: (-row[e], e))[:k]


@given(
    tied_logits(8), st.booleans(), st.sampled_from(["zero", "neginf"]), st.sampled_from(["max", "top2sum"])
)
def test_tied_groups_go_as_in_the_reference(
    logits: torch.Tensor, bias: bool, masked: str, group_score: str
) -> None:
    module = routing(
        8,
        bias,
        score="sigmoid",
        k=3,
        groups=4,
        topk_groups=2,
        masked=masked,
        group_score=group_score,
        renorm=True,
    )
    weights = {"bias": torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0, 0.5, 0.0, 0.0])} if bias else {}
    agree(module, weights, [logits])


def test_the_bias_chooses_and_does_not_weigh() -> None:
    w, ids = emitted(
        routing(3, True, score="sigmoid", k=1), {"bias": torch.tensor([0.0, 0.0, 9.0])}, torch.zeros(1, 3)
    )
    assert ids.tolist() == [[2]]
    assert w.tolist() == [[0.5]]


@pytest.mark.parametrize("score", SCORES)
def test_all_experts_may_be_chosen(score: str) -> None:
    module = routing(5, score=score, k=5, renorm=True, scale=2.5)
    agree(module, {}, [randn(4, 5)])
    w, ids = emitted(module, {}, randn(4, 5))
    assert ids.sort(-1).values.tolist() == [[0, 1, 2, 3, 4]] * 4
    torch.testing.assert_close(w.sum(-1), torch.full((4,), 2.5))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("score", SCORES)
def test_a_bad_token_routes_somewhere_and_leaves_others_alone(bad: float, score: str) -> None:
    logits = randn(4, 6)
    module = routing(6, score=score, k=2, groups=3, topk_groups=2, group_score="top2sum", renorm=True)
    w, ids = emitted(module, {}, logits)
    logits[1] = bad
    w_bad, ids_bad = emitted(module, {}, logits)
    assert int(ids_bad.min()) >= 0 and int(ids_bad.max()) < 6
    keep = [0, 2, 3]
    assert torch.equal(w[keep], w_bad[keep])
    assert torch.equal(ids[keep], ids_bad[keep])


# Sorting.
@given(
    ids=st.lists(
        st.sampled_from([0, 1, 2, 3, 4, -1, 5, 6, 99, -(2**31), -(2**31) + 1, 2**31 - 1]), max_size=12
    ),
    experts=st.just(5),
)
def test_stray_ids_are_left_out(ids: list[int], experts: int) -> None:
    module = forward(lambda b, id: b.sort_by_expert(id, experts=experts), TensorType(i32, (N, 1)))
    id = torch.tensor(ids, dtype=torch.int32).view(-1, 1)
    slot, off = emitted(module, {}, id)
    want_slot, want_off = Interpreter(module, {}).run("forward", id)
    assert off.tolist() == want_off.tolist()
    end = int(off[-1])
    assert slot[:end].tolist() == want_slot[:end].tolist()
    assert sorted(slot.tolist()) == list(range(len(ids)))  # all slots, so that what follows defines every row


# Experts.
@st.composite
def choices(draw: Any) -> tuple[int, int, torch.Tensor]:
    """Experts, k and ids of which some stray; one expert may get all, others none."""
    experts = draw(st.integers(1, 5))
    k = draw(st.integers(1, experts))
    pool = draw(
        st.sampled_from([list(range(experts)), [experts - 1], [0], [-1, *range(experts), experts, 77]])
    )
    tokens = draw(st.integers(0, 5))
    ids = draw(st.lists(st.sampled_from(pool), min_size=tokens * k, max_size=tokens * k))
    return experts, k, torch.tensor(ids, dtype=torch.int32).view(tokens, k)


@given(choices())
def test_experts_get_their_rows(drawn: tuple[int, int, torch.Tensor]) -> None:
    experts, k, id = drawn
    args = [randn(len(id), H), randn(len(id), k, seed=4), id]
    (want,) = Interpreter(grouped(experts, k), expert_weights(experts)).run("forward", *args)
    (got,) = emitted(grouped(experts, k), expert_weights(experts), *args)
    # Stray slots come in another order at the end, where all rows are zeros.
    close(got, want, grouped(experts, k)["forward"].outputs[0])


@given(st.integers(0, 4), st.sampled_from([float("nan"), float("inf")]), st.integers(0, 99))
def test_a_bad_token_never_reaches_another(token: int, bad: float, seed: int) -> None:
    x, w = randn(5, H, seed=seed), randn(5, 2, seed=4).abs()
    id = torch.tensor([[0, 1], [1, 0], [2, 1], [1, 2], [0, 2]], dtype=torch.int32)
    module, weights = grouped(4, 2), expert_weights(4)
    (clean,) = emitted(module, weights, x, w, id)
    x[token] = bad
    (dirty,) = emitted(module, weights, x, w, id)
    keep = [t for t in range(5) if t != token]
    assert torch.equal(clean[keep], dirty[keep])
    assert not dirty[token].isfinite().any()


def test_the_weights_of_experts_without_rows_are_not_touched() -> None:
    weights = expert_weights(3)
    weights["w13"][1], weights["w2"][1] = torch.nan, torch.nan
    id = torch.tensor([[0, 2], [2, 0]], dtype=torch.int32)
    (y,) = emitted(grouped(3, 2), weights, randn(2, H), randn(2, 2), id)
    assert y.isfinite().all()


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_rows_that_no_expert_owns_are_zeros(dtype: str) -> None:
    kind = DTYPES[dtype]
    module = forward(
        lambda b, x, off: b.grouped_linear(x, b.param("w", (2, 4, 3), kind), off),
        TensorType(kind, (N, 3)),
        TensorType(i32, (3,)),
    )
    x = randn(5, 3).to(kind.torch)
    x[3:] = torch.nan
    (y,) = emitted(
        module, {"w": randn(2, 4, 3).to(kind.torch)}, x, torch.tensor([0, 2, 3], dtype=torch.int32)
    )
    assert y[3:].eq(0).all()
    assert y[:3].isfinite().all()
