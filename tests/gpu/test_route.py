"""moec.ops.route on the GPU against the router's reference, in PyTorch on the CPU."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moec.ir.ops.hash_route import HashRoute
from moec.ir.ops.route import SCORES, Route
from moec.ir.types import f32
from moec.ops import fused_experts, hash_route, route, routed_experts
from tests.gpu.device import Device
from tests.moec.experts import layer

V3 = {
    "score": "sigmoid",
    "renorm": True,
    "scale": 2.5,
    "groups": 8,
    "topk_groups": 4,
    "group_score": "top2sum",
}
V2 = {"score": "softmax", "renorm": False, "scale": 16.0, "groups": 8, "topk_groups": 3, "masked": "zero"}
# Experts, whether there is a bias, and what route takes.
ROUTERS: dict[str, tuple[int, bool, dict[str, Any]]] = {
    "V2": (160, False, {"k": 6, **V2}),
    "V3": (256, True, {"k": 8, **V3}),
    "V3, 60 experts in 5 groups": (60, True, {"k": 7, **V3, "groups": 5, "topk_groups": 2}),
    "V4": (256, True, {"k": 6, "score": "sqrtsoftplus", "renorm": True, "scale": 1.5}),
    "Mixtral": (8, False, {"k": 2, "score": "softmax", "renorm": True}),
    "Qwen3-Next": (512, False, {"k": 10, "score": "softmax", "renorm": True}),
    "top-16 of 512": (512, True, {"k": 16, "score": "sigmoid", "renorm": False}),
    "all of 7": (7, False, {"k": 7, "score": "sqrtsoftplus", "renorm": True}),
}


def reference(logits: Tensor, bias: Tensor | None, **how: Any) -> tuple[Tensor, Tensor]:
    defaults = {"groups": 1, "topk_groups": 1, "group_score": "max", "masked": "neginf", "scale": 1.0}
    fixed = {"dtype": f32, "shared": 0}
    return Route.reference(logits.cpu(), None if bias is None else bias.cpu(), **defaults | fixed | how)


def drawn(tokens: int, experts: int, dtype: torch.dtype, device: Device) -> Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(tokens, experts, generator=generator).mul(2).to(device.type, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("tokens", [0, 1, 7, 300])
def test_every_router(tokens: int, name: str, dtype: torch.dtype, device: Device) -> None:
    experts, biased, how = ROUTERS[name]
    logits = drawn(tokens, experts, dtype, device)
    bias = drawn(1, experts, torch.float32, device)[0] / 8 if biased else None
    weights, ids = route(logits, bias, **how)
    wanted_weights, wanted_ids = reference(logits, bias, **how)
    assert weights.shape == ids.shape == (tokens, how["k"])
    # What the exponential rounds differently may turn a choice between scores that are equal but for that.
    same = (ids.cpu() == wanted_ids).all(1)
    assert tokens - int(same.sum()) <= tokens // 100
    torch.testing.assert_close(weights.cpu()[same], wanted_weights[same], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("experts", [5, 64, 384])
def test_equal_scores_go_to_the_lower_id(experts: int, score: str, device: Device) -> None:
    logits = drawn(65, experts, torch.float32, device).round().clamp(-1, 1)
    _, ids = route(logits, k=min(experts, 8), score=score, renorm=True)
    assert torch.equal(
        ids.cpu(), logits.cpu().sort(dim=-1, descending=True, stable=True).indices[:, :8].int()
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("score", SCORES)
def test_a_bad_token_goes_to_k_experts_and_changes_no_other(bad: float, score: str, device: Device) -> None:
    how: dict[str, Any] = {"k": 5, "score": score, "renorm": True, "groups": 4, "topk_groups": 2}
    logits = drawn(9, 64, torch.float32, device)
    clean = route(logits, **how)
    logits[3, 7] = bad
    weights, ids = route(logits, **how)
    assert len(set(ids[3].tolist())) == 5 and int(ids.min()) >= 0 and int(ids.max()) < 64
    rest = [0, 1, 2, 4, 5, 6, 7, 8]
    assert torch.equal(weights[rest], clean[0][rest]) and torch.equal(ids[rest], clean[1][rest])


@pytest.mark.parametrize("score", SCORES[1:])
@pytest.mark.parametrize("tokens", [0, 1, 300])
def test_a_table_of_token_ids(tokens: int, score: str, device: Device) -> None:
    """V4's first layers; some tokens have no row, some entries name no expert."""
    generator = torch.Generator().manual_seed(4)
    table = torch.randint(-1, 257, (1000, 6), generator=generator)
    ids = torch.randint(-1, 1001, (tokens,), generator=generator)
    logits = drawn(tokens, 256, torch.float32, device)
    how: dict[str, Any] = {"score": score, "renorm": True, "scale": 1.5}
    weights, chosen = hash_route(logits, table.to(device.type), ids.to(device.type), **how)
    wanted, experts = HashRoute.reference(logits.cpu(), table, ids, **how, k=6, dtype=f32)
    assert torch.equal(chosen.cpu(), experts)
    torch.testing.assert_close(weights.cpu(), wanted, rtol=1e-5, atol=1e-6)


def test_a_graph_of_router_and_experts_without_waiting(device: Device) -> None:
    one = device.layer(layer(40, k=3, experts=16, hidden=64, width=32))
    logits = drawn(40, 16, torch.float32, device)

    def call() -> Tensor:
        weights, ids = route(logits, k=3, score="softmax", renorm=True)
        return fused_experts(one.x, one.w13, one.w2, weights, ids)

    call()
    with device.without_synchronising():
        wanted = call()
    replay = device.record(call)
    assert torch.equal(replay(), wanted)


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("tokens", [0, 1, 16, 300])
def test_router_and_experts_in_one_call(tokens: int, name: str, device: Device) -> None:
    """What route and fused_experts give one after the other, bit for bit: both choose and sum alike."""
    experts, biased, how = ROUTERS[name]
    one = device.layer(layer(tokens, k=how["k"], experts=experts, hidden=64, width=32, dtype=torch.bfloat16))
    logits = drawn(tokens, experts, torch.float32, device)
    bias = drawn(1, experts, torch.float32, device)[0] / 8 if biased else None
    y = routed_experts(one.x, logits, one.w13, one.w2, bias, **how)
    assert torch.equal(y, fused_experts(one.x, one.w13, one.w2, *route(logits, bias, **how)))
