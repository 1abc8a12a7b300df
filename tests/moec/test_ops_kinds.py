"""moec.ops given what is of another kind than they take: named, with a code; graphs still hold the calls."""

from __future__ import annotations

from inspect import signature
from typing import Any

import pytest
import torch
from torch import Tensor

from moec.errors import BadInput
from moec.ops import fused_experts, grouped_experts, hash_route, route, routed_experts
from tests.moec.experts import layer


def kinds() -> list[tuple[str, object]]:
    """Arguments, and what is no such thing."""
    tensors = [
        "x",
        "w13",
        "w2",
        "topk_weights",
        "topk_ids",
        "shared",
        "w13_scale",
        "w2_scale",
        "x_scale",
        "out",
    ]
    wrong: list[tuple[str, object]] = [(name, [[1.0]]) for name in tensors]
    wrong += [("x", None), ("topk_ids", 3), ("out", True), ("w2", "w2")]
    wrong += [("activation", None), ("activation", 1), ("activation", torch.zeros(3))]
    wrong += [("limit", "7"), ("limit", True), ("limit", [7.0]), ("limit", torch.tensor(7.0))]
    return wrong + [("batch_invariant", value) for value in (2, None, "yes", torch.tensor(True))]


KINDS = [pytest.param(name, value, id=f"{name}-{type(value).__name__}") for name, value in kinds()]


@pytest.mark.parametrize(("name", "value"), KINDS)
def test_what_is_of_another_kind_is_named(name: str, value: object) -> None:
    """By each of the operators that take it; what is in a tensor isn't shown."""
    one = layer()
    logits, off = torch.zeros(5, 4), torch.tensor([0, 1, 2, 3, 5], dtype=torch.int32)
    router: dict[str, Any] = {"k": 2, "score": "softmax", "renorm": True}
    weights = {"x": one.x, "w13": one.w13, "w2": one.w2}
    sorted_rows = {"x_sorted": one.x, "off": off, "w13": one.w13, "w2": one.w2}
    calls: list[tuple[Any, dict[str, Any]]] = [
        (fused_experts, weights | {"topk_weights": one.weights, "topk_ids": one.ids}),
        (routed_experts, weights | {"logits": logits} | router),
        (grouped_experts, sorted_rows),
    ]
    taken = 0
    for op, given in calls:
        op(**given)
        mine = "x_sorted" if op is grouped_experts and name == "x" else name
        if mine in signature(op).parameters:
            taken += 1
            with pytest.raises(BadInput, match=rf"M0601.*{mine} is .*; it must be") as caught:
                op(**given | {mine: value})
            assert "tensor(" not in str(caught.value)
    assert taken >= (1 if name.startswith("topk") else 2 if name == "shared" else 3)


@pytest.mark.parametrize("name", ["k", "groups", "topk_groups"])
def test_integers_of_a_router_have_64_bits(name: str) -> None:
    router: dict[str, Any] = {"k": 2, "score": "softmax", "renorm": True}
    for value, message in ((10**30, "an integer of 100 bits"), (10**5000, "an integer of 16610 bits")):
        with pytest.raises(BadInput, match=f"{name} is {message}; it must be one of 64"):
            route(torch.zeros(5, 4), **router | {name: value})
    with pytest.raises(BadInput, match="logits is None; it must be a tensor"):
        route(None, **router)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="bias is 1; it must be a tensor, or left out"):
        route(torch.zeros(5, 4), 1, **router)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="tokens is a list; it must be a tensor"):
        hash_route(torch.zeros(5, 4), torch.zeros(3, 2).int(), [0], score="sigmoid", renorm=True)  # type: ignore[arg-type]


@pytest.mark.parametrize("dynamic", [False, True])
def test_graphs_hold_calls_whose_arguments_are_all_given(dynamic: bool) -> None:
    one, logits = layer(), torch.randn(5, 4)

    def call(x: Tensor, limit: float, first: int) -> Tensor:
        how: dict[str, Any] = {"activation": "geglu", "limit": limit, "batch_invariant": False}
        ids = one.ids + first
        y = fused_experts(
            x, one.w13, one.w2, one.weights, ids, shared=x, expert_range=(first, first + 4), **how
        )
        return y + routed_experts(
            x, logits, one.w13, one.w2, None, k=2, score="softmax", renorm=True, scale=2.0, **how
        )

    traced = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for limit, first in ((0.5, 0), (0.25, 3)):
        assert torch.equal(traced(one.x, limit, first), call(one.x, limit, first))
