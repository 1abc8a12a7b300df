"""Routing against transformers' routers; what the experts do with it against plain loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    DeepseekV4Config,
    MixtralConfig,
    Qwen3MoeConfig,
)
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4TopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from moec.ir.types import bf16, f32
from tests.ir.helpers import ints, offsets, reference
from tests.strategies_types import of

HIDDEN, TOKENS = 16, 9


def hidden(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    torch.manual_seed(3)
    return torch.randn(TOKENS, HIDDEN).to(dtype)


def randomised(router: Any) -> Any:
    torch.manual_seed(4)
    with torch.no_grad():
        router.weight.normal_()
        if hasattr(router, "e_score_correction_bias"):
            router.e_score_correction_bias.normal_(std=0.3)
    return router


def by_expert(w: torch.Tensor, id: torch.Tensor, experts: int) -> torch.Tensor:
    """[T, E] weights: what doesn't depend on the order in which a router lists its choices."""
    return torch.zeros(len(w), experts, dtype=w.dtype).scatter(1, id.long(), w)


def agree(router: Any, x: torch.Tensor, experts: int, **attrs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        logits, w, id = router(x)
    bias = getattr(router, "e_score_correction_bias", None)
    mine = reference("route", logits, bias, **attrs)
    torch.testing.assert_close(by_expert(*mine, experts), by_expert(w, id, experts))
    assert mine[0].dtype == w.dtype and mine[1].dtype == torch.int32
    return mine


@pytest.mark.parametrize(("groups", "kept", "k"), [(4, 2, 3), (2, 1, 2), (1, 1, 5), (4, 4, 8)])
@pytest.mark.parametrize("renorm", [True, False])
def test_deepseek_v3(groups: int, kept: int, k: int, renorm: bool) -> None:
    config = DeepseekV3Config(
        hidden_size=HIDDEN,
        n_routed_experts=16,
        n_group=groups,
        topk_group=kept,
        num_experts_per_tok=k,
        norm_topk_prob=renorm,
        routed_scaling_factor=2.5,
    )
    router = randomised(DeepseekV3TopkRouter(config))
    attrs = {
        "score": "sigmoid",
        "k": k,
        "renorm": renorm,
        "scale": 2.5,
        "groups": groups,
        "topk_groups": kept,
    }
    _, id = agree(router, hidden(), 16, group_score="top2sum", **attrs)
    # The bias chooses: without it other experts would be picked.
    with torch.no_grad():
        logits = router(hidden())[0]
    if k < 8:
        assert not torch.equal(reference("route", logits, None, group_score="top2sum", **attrs)[1], id)


@pytest.mark.parametrize(("groups", "kept", "k"), [(4, 2, 3), (8, 3, 6), (1, 1, 4), (8, 1, 4)])
def test_deepseek_v2(groups: int, kept: int, k: int) -> None:
    config = DeepseekV2Config(
        hidden_size=HIDDEN,
        num_attention_heads=1,
        n_routed_experts=16,
        n_group=groups,
        topk_group=kept,
        num_experts_per_tok=k,
        topk_method="greedy" if groups == 1 else "group_limited_greedy",
        routed_scaling_factor=16.0,
    )
    router = randomised(DeepseekV2TopkRouter(config))
    attrs = {"score": "softmax", "k": k, "scale": 16.0, "groups": groups, "topk_groups": kept}
    w, _ = agree(router, hidden(), 16, masked="zero", **attrs)
    # (8, 1, 4): more choices than the group allows; the rest weigh nothing.
    assert (w == 0).any() == (k > 16 // groups * kept)


@pytest.mark.parametrize("score", ["sqrtsoftplus", "sigmoid"])
def test_deepseek_v4(score: str) -> None:
    config = DeepseekV4Config(
        hidden_size=HIDDEN,
        n_routed_experts=12,
        num_experts_per_tok=6,
        routed_scaling_factor=1.5,
        scoring_func=score,
        num_hidden_layers=1,
    )
    router = randomised(DeepseekV4TopKRouter(config))
    agree(router, hidden(), 12, score=score, k=6, renorm=True, scale=1.5)


def test_mixtral() -> None:
    router = randomised(MixtralTopKRouter(MixtralConfig(hidden_size=HIDDEN, num_local_experts=8)))
    agree(router, hidden(), 8, score="softmax", k=2, renorm=True)


@pytest.mark.parametrize("renorm", [True, False])
@pytest.mark.parametrize("dtype", [f32, bf16])
def test_qwen3(renorm: bool, dtype: Any) -> None:
    config = Qwen3MoeConfig(hidden_size=HIDDEN, num_experts=16, num_experts_per_tok=4, norm_topk_prob=renorm)
    router = randomised(Qwen3MoeTopKRouter(config)).to(dtype.torch)
    agree(router, hidden(dtype.torch), 16, score="softmax", k=4, renorm=renorm, dtype=dtype)


def test_ties_go_to_the_lower_id_and_the_best_comes_first() -> None:
    logits = torch.tensor([[1.0, 3.0, 1.0, 3.0, 1.0]])
    w, id = reference("route", logits, score="sigmoid", k=4)
    assert id.tolist() == [[1, 3, 0, 2]]
    assert w[0].tolist() == sorted(w[0].tolist(), reverse=True)
    same = torch.zeros(1, 6)
    _, id = reference("route", same, score="softmax", k=3, groups=3, topk_groups=2)
    assert id.tolist() == [[0, 1, 2]]


def test_no_tokens() -> None:
    w, id = reference("route", torch.zeros(0, 4), score="softmax", k=2, groups=2, topk_groups=1)
    assert w.shape == id.shape == (0, 2)


# Ids may lie outside [0, E): slots of another rank.
id_tables = st.tuples(st.integers(0, 6), st.integers(1, 3), st.integers(1, 5)).flatmap(
    lambda s: st.lists(
        st.lists(st.integers(-1, s[2] + 1), min_size=s[1], max_size=s[1]), min_size=s[0], max_size=s[0]
    ).map(lambda rows: (torch.tensor(rows, dtype=torch.int32).view(s[0], s[1]), s[2]))
)


def slots_of(id: torch.Tensor, expert: int) -> list[int]:
    tokens, k = id.shape
    return [t * k + j for t in range(tokens) for j in range(k) if id[t, j] == expert]


@given(id_tables)
def test_sorting_and_slots(case: tuple[torch.Tensor, int]) -> None:
    id, experts = case
    slot, off = reference("sort_by_expert", id, experts=experts)
    assert slot.dtype == off.dtype == torch.int32 and off.shape == (experts + 1,)
    assert sorted(slot.tolist()) == list(range(id.numel()))
    for e in range(experts):
        mine = slots_of(id, e)
        assert slot[off[e] : off[e + 1]].tolist() == mine
        assert reference("expert_slots", id, e).tolist() == mine
    outside = [s for s in range(id.numel()) if not 0 <= id.flatten()[s] < experts]
    assert slot[off[-1] :].tolist() == outside


def test_gather_rows() -> None:
    x = torch.randn(3, 4)
    found = reference("gather_rows", x, ints(5, 0, 3, 1), per_row=2)
    assert torch.equal(found, x[[2, 0, 1, 0]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scatter_add(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    acc, rows, w = torch.randn(3, 4), torch.randn(4, 4).to(dtype), torch.randn(3, 2)
    slots = [4, 1, 0, 5]  # tokens 2, 0, 0, 2
    expected = acc.clone()
    for row, slot in enumerate(slots):
        expected[slot // 2] += w[slot // 2, slot % 2] * rows[row].float()
    before = acc.clone()
    torch.testing.assert_close(reference("scatter_add", acc, rows, ints(*slots), w, per_row=2), expected)
    assert torch.equal(acc, before)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=4), st.integers(0, 3))
def test_grouped_linear(counts: list[int], unowned: int) -> None:
    torch.manual_seed(sum(counts))
    rows = sum(counts) + unowned
    x, w = torch.randn(rows, 3), torch.randn(len(counts), 5, 3)
    x[sum(counts) :] = torch.nan  # never read
    found = reference("grouped_linear", x, w, offsets(counts))
    row = 0
    for e, count in enumerate(counts):
        for _ in range(count):
            torch.testing.assert_close(found[row], w[e] @ x[row])
            row += 1
    assert torch.equal(found[row:], torch.zeros(unowned, 5))


@given(id_tables)
def test_grouped_linear_stores_rows_by_slot(case: tuple[torch.Tensor, int]) -> None:
    id, experts = case
    torch.manual_seed(id.numel())
    slot, off = reference("sort_by_expert", id, experts=experts)
    x, w = torch.randn(id.numel(), 3), torch.randn(experts, 5, 3)
    x[off[-1] :] = torch.nan  # never read
    found = reference("grouped_linear", x, w, off, slot)
    place = {int(s): row for row, s in enumerate(slot)}
    for s, expert in enumerate(id.flatten().tolist()):
        expected = w[expert] @ x[place[s]] if 0 <= expert < experts else torch.zeros(5)
        torch.testing.assert_close(found[s], expected)


@given(id_tables, of(["none", "silu", "gelu", "gelu_tanh"]), of([None, 0.5]))
def test_gather_grouped_linear(case: tuple[torch.Tensor, int], act: str, limit: float | None) -> None:
    """Slot by slot against torch's modules: the expert's weights times the token that chose it."""
    id, experts = case
    tokens, k = id.shape
    torch.manual_seed(id.numel())
    x, w = torch.randn(tokens, 3), torch.randn(experts, 6, 3)
    slot, off = reference("sort_by_expert", id, experts=experts)
    how = {} if act == "none" else {"epilogue": "swiglu", "act": act, "limit": limit}
    found = reference("gather_grouped_linear", x, w, slot, off, per_row=k, **how)
    activations = {"silu": nn.SiLU(), "gelu": nn.GELU(), "gelu_tanh": nn.GELU("tanh")}
    for row, s in enumerate(slot.tolist()):
        expert = int(id[s // k, s % k])
        if not 0 <= expert < experts:
            assert not found[row].any()
            continue
        expected = w[expert] @ x[s // k]
        if act != "none":
            gate, up = expected[:3], expected[3:]
            if limit is not None:
                gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            expected = activations[act](gate) * up
        torch.testing.assert_close(found[row], expected)


def test_the_epilogue_sees_the_product_before_it_is_rounded() -> None:
    x = torch.tensor([[1.0, 2.0**-8]], dtype=torch.bfloat16)
    w = torch.tensor([[[192.0, 0.0], [1.0, 1.0]]], dtype=torch.bfloat16)  # gate 192, up 1 + 2^-8
    slot, off = ints(0), ints(0, 1)
    fused = reference("gather_grouped_linear", x, w, slot, off, per_row=1, epilogue="swiglu")
    rounded = reference("swiglu", reference("grouped_linear", x, w, off))
    # silu(192) is 192, and 192.75 lies nearer to 193; bf16 has no 1 + 2^-8.
    assert (fused.item(), rounded.item()) == (193.0, 192.0)


@given(id_tables, st.booleans(), st.booleans())
def test_combine(case: tuple[torch.Tensor, int], plus: bool, wide: bool) -> None:
    id, experts = case
    (tokens, k), torch_dtype = id.shape, torch.bfloat16
    torch.manual_seed(tokens)
    slot, _ = reference("sort_by_expert", id, experts=experts)
    rows, w = torch.randn(tokens * k, 3).to(torch_dtype), torch.randn(tokens, k)
    shared = torch.randn(tokens, 3).to(torch_dtype) if plus else None
    place = {int(s): i for i, s in enumerate(slot)}
    exact = torch.zeros(tokens, 3, dtype=torch.float64)
    for t in range(tokens):
        for j in range(k):
            exact[t] += w[t, j].double() * rows[place[t * k + j]].double()
        if shared is not None:
            exact[t] += shared[t].double()
    found = reference("combine", rows, slot, w, shared, to=f32 if wide else None)
    assert found.dtype == (torch.float32 if wide else torch_dtype)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if wide else {"rtol": 2**-8, "atol": 1e-5}
    torch.testing.assert_close(found.double(), exact, **tolerance)
    in_slot_order = rows[[place[s] for s in range(len(rows))]]
    assert torch.equal(reference("combine", in_slot_order, None, w, shared, to=f32 if wide else None), found)


def test_combine_sums_in_the_order_of_the_choices() -> None:
    # In fp32 (2^24 + 1) - 2^24 is 0 and (2^24 - 2^24) + 1 is 1: the order of j shows.
    big = 2.0**24
    w = torch.ones(1, 3)
    rows = torch.tensor([[1.0], [-big], [big]])  # rows of slots 1, 2 and 0
    assert reference("combine", rows, ints(1, 2, 0), w).tolist() == [[0.0]]
    assert reference("combine", rows, ints(2, 1, 0), w).tolist() == [[1.0]]
    assert reference("combine", rows, None, w).tolist() == [[1 - big + big]]


@given(id_tables, st.booleans(), st.booleans())
def test_grouped_linear_combine(case: tuple[torch.Tensor, int], plus: bool, wide: bool) -> None:
    """Token by token in double precision; and to the last bit the two ops that it stands for."""
    id, experts = case
    (tokens, k) = id.shape
    torch.manual_seed(tokens)
    slot, off = reference("sort_by_expert", id, experts=experts)
    x, w = torch.randn(tokens * k, 3).bfloat16(), torch.randn(experts, 5, 3).bfloat16()
    x[off[-1] :] = torch.nan  # never read
    weights, shared = torch.randn(tokens, k), torch.randn(tokens, 5).bfloat16() if plus else None
    found = reference("grouped_linear_combine", x, w, off, slot, weights, shared, to=f32 if wide else None)
    place = {int(s): row for row, s in enumerate(slot)}
    exact = shared.double() if shared is not None else torch.zeros(tokens, 5, dtype=torch.float64)
    for t in range(tokens):
        for j, e in enumerate(id[t].tolist()):
            if 0 <= e < experts:
                product = (w[e].double() @ x[place[t * k + j]].double()).bfloat16()
                exact[t] += weights[t, j].double() * product.double()
    assert found.dtype == (torch.float32 if wide else torch.bfloat16)
    torch.testing.assert_close(found.double(), exact, rtol=2**-7, atol=2**-7)
    rows = reference("grouped_linear", x, w, off, slot)
    assert torch.equal(found, reference("combine", rows, None, weights, shared, to=f32 if wide else None))


def test_grouped_linear_combine_rounds_the_products_first() -> None:
    """As the rows between two ops would be: 257 is no bf16, 256 is; times 2 that shows."""
    x, w = torch.tensor([[1.0, 1.0]]).bfloat16(), torch.tensor([[[256.0, 1.0]]]).bfloat16()
    args = x, w, ints(0, 1), ints(0), torch.tensor([[2.0]])
    assert reference("grouped_linear_combine", *args, to=f32).item() == 512.0


@given(id_tables)
def test_a_layer_grouped_is_a_layer_expert_by_expert(case: tuple[torch.Tensor, int]) -> None:
    id, experts = case
    (tokens, k) = id.shape
    torch.manual_seed(1)
    x, w13, w = torch.randn(tokens, 4), torch.randn(experts, 2, 4), torch.rand(tokens, k)
    slot, off = reference("sort_by_expert", id, experts=experts)
    rows = reference("grouped_linear", reference("gather_rows", x, slot, per_row=k), w13, off)
    grouped = reference("combine", rows, slot, w)
    naive = torch.zeros(tokens, 2)
    for e in range(experts):
        chosen = reference("expert_slots", id, e)
        y = reference("linear", reference("gather_rows", x, chosen, per_row=k), w13[e])
        naive = reference("scatter_add", naive, y, chosen, w, per_row=k)
    torch.testing.assert_close(grouped, naive)
