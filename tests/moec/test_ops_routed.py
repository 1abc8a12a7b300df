"""moec.ops.routed_experts against route and fused_experts, one after the other; refusals; one op for both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moec.errors import BadInput, NotDifferentiable
from moec.ops import compiled, fused_experts, route, routed_experts
from tests.moec.experts import layer
from tests.moec.fp8_experts import fp8_layer

V3: dict[str, Any] = {"score": "sigmoid", "renorm": True, "scale": 2.5, "groups": 2, "topk_groups": 1}
V3["group_score"] = "top2sum"
ROUTERS: list[dict[str, Any]] = [
    {"k": 2, "score": "softmax", "renorm": True},
    {"k": 3, "score": "softmax", "renorm": False, "scale": 16},
    {"k": 2, **V3},
    {"k": 1, "score": "sqrtsoftplus", "renorm": True, "scale": 1.5},
]


def logits_of(tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, 4, generator=torch.Generator().manual_seed(seed))


@given(
    st.sampled_from([0, 1, 5, 40]),
    st.sampled_from(ROUTERS),
    st.booleans(),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_it_is_route_and_then_the_experts(
    tokens: int, router: dict[str, Any], biased: bool, shared: bool, dtype: torch.dtype
) -> None:
    one = layer(tokens)
    logits = logits_of(tokens).to(dtype)
    bias = torch.tensor([0.0, 0.3, -0.2, 0.1]) if biased else None
    plus = torch.ones_like(one.x) if shared else None
    chosen = route(logits, bias, **router)
    y = routed_experts(one.x, logits, one.w13, one.w2, bias, **router, shared=plus)
    expected = fused_experts(one.x, one.w13, one.w2, *chosen, shared=plus)
    torch.testing.assert_close(y, expected)


def test_in_fp8_too() -> None:
    one = fp8_layer()
    x, w13, w2, _, _ = one.args
    logits = torch.randn(len(x), len(w13), generator=torch.Generator().manual_seed(1))
    scales = {f"{name}_scale": s for name, s in zip(("w13", "w2"), one.scales.values(), strict=False)}
    y = routed_experts(x, logits, w13, w2, k=2, score="softmax", renorm=True, **scales)
    chosen = route(logits, k=2, score="softmax", renorm=True)
    assert torch.equal(y, fused_experts(x, w13, w2, *chosen, **scales))


def test_choice_and_sort_are_one_op_on_a_gpu() -> None:
    key = compiled.Key(
        "routed", "sm_90a", False, torch.bfloat16, 8, 64, 64, k=2, weights=torch.float32,
        router=(("score", "softmax"), ("renorm", True), ("scale", 1.0)),
    )  # fmt: skip
    from moec.passes import PassManager, pipeline

    module = compiled.lower(key)
    PassManager(pipeline(2, "sm_90a")).run(module)
    names = [op.name for op in module["forward"].ops]
    assert "route_sort" in names and not {"route", "sort_by_expert", "local_experts"} & set(names)


def test_into_out_and_no_backward() -> None:
    one = layer()
    logits, how = logits_of(len(one.x)), ROUTERS[0]
    y = routed_experts(one.x, logits, one.w13, one.w2, **how)
    out = torch.empty_like(one.x)
    assert routed_experts(one.x, logits, one.w13, one.w2, **how, out=out) is out
    assert torch.equal(out, y)
    logits.requires_grad_()
    with pytest.raises(NotDifferentiable):
        routed_experts(one.x, logits, one.w13, one.w2, **how).sum().backward()
    with pytest.raises(NotDifferentiable, match="writes into out"):
        routed_experts(one.x, logits, one.w13, one.w2, **how, out=out)


def test_as_an_operator() -> None:
    one = layer()
    router = (torch.ones(4), 2, "sigmoid", 1, 1, "max", "neginf", True, 2.5)
    args = (
        one.x,
        logits_of(len(one.x)),
        one.w13,
        one.w2,
        *router,
        one.x,
        "geglu",
        None,
        None,
        None,
        None,
        False,
    )
    torch.library.opcheck(torch.ops.moec.routed_experts.default, args)
    torch.library.opcheck(torch.ops.moec.routed_experts_out.default, (*args, torch.empty_like(one.x)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": torch.zeros(5, 3)}, r"logits must be .* \[T, E\] = \[5, 4\], not float32 \[5, 3\]"),
        ({"logits": torch.zeros(4, 4)}, r"logits must be .* = \[5, 4\], not float32 \[4, 4\]"),
        ({"bias": torch.zeros(3)}, r"bias must be .* \[4\]"),
        ({"k": 5}, "k is 5; it must be 1 to 4"),
        ({"groups": 3}, "4 experts can't be parted"),
        ({"shared": torch.zeros(5, 7)}, "shared must be"),
        ({"activation": "relu"}, "activation is 'relu'"),
        ({"w13_scale": torch.ones(4, 1, 1)}, "w13 must be float8_e4m3fn"),
    ],
)
def test_what_doesnt_fit(changes: dict[str, Any], message: str) -> None:
    one = layer()
    given = {"x": one.x, "logits": logits_of(5), "w13": one.w13, "w2": one.w2, **ROUTERS[0]}
    with pytest.raises(BadInput, match=message):
        routed_experts(**given | changes)
