"""The fused routed experts: token by token in double precision, and what their parts give."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moec.ir import parse_module
from moec.ir.cost import op_cost
from moec.ir.op import OPS, Op
from moec.ir.ops.experts import parts_of
from moec.ir.scaled import quantize
from tests.ir.helpers import reference


def exactly(
    x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, ids: list[list[int]], w: torch.Tensor
) -> torch.Tensor:
    """From the ids themselves, without a sort: act(gate) · up as the formula says it."""
    y = torch.zeros(len(x), w2.shape[1], dtype=torch.float64)
    for t, chosen in enumerate(ids):
        for j, e in enumerate(chosen):
            if 0 <= e < len(w13):
                gate, up = (w13[e].double() @ x[t].double()).chunk(2)
                gate, up = gate.clamp(max=0.5), up.clamp(-0.5, 0.5)
                h = torch.tensor(
                    [g / (1 + math.exp(-g)) * u for g, u in zip(gate.tolist(), up.tolist(), strict=True)]
                )
                y[t] += w[t, j].double() * (w2[e].double() @ h.double())
    return y


def drawn(experts: int, tokens: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(tokens)
    return torch.randn(tokens, 3), torch.randn(experts, 4, 3), torch.randn(experts, 5, 2)


@given(st.integers(1, 4), st.integers(0, 5), st.integers(1, 3), st.booleans())
def test_experts(experts: int, tokens: int, k: int, plus: bool) -> None:
    x, w13, w2 = drawn(experts, tokens)
    ids = torch.randint(-1, experts + 1, (tokens, k), dtype=torch.int32)
    slot, off = reference("sort_by_expert", ids, experts=experts)
    weights, added = torch.randn(tokens, k), torch.randn(tokens, 5) if plus else None
    found = reference("experts", x, w13, w2, off, slot, weights, added, limit=0.5)
    wanted = exactly(x, w13, w2, ids.tolist(), weights) + (0 if added is None else added.double())
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


@given(st.integers(1, 4), st.integers(0, 5), st.integers(0, 2))
def test_routed_experts(experts: int, tokens: int, shared: int) -> None:
    """A softmax router whose choice is the largest logits, and experts behind them that all take."""
    x, w13, w2 = drawn(experts + shared, tokens)
    logits = torch.randn(tokens, experts)
    k = max(1, experts - 1)
    found = reference(
        "routed_experts", x, w13, w2, logits, score="softmax", k=k, shared=shared, limit=0.5, renorm=True
    )
    best = logits.topk(k, dim=1)
    ids = [[*row, *range(experts, experts + shared)] for row in best.indices.tolist()]
    w = torch.cat([best.values.double().softmax(1), torch.ones(tokens, shared).double()], 1)
    torch.testing.assert_close(found.double(), exactly(x, w13, w2, ids, w), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("quant", [None, (1, 128)])
def test_the_bits_of_its_parts(quant: tuple[int, int] | None) -> None:
    """In fp8, with and without quantisation between the products."""
    torch.manual_seed(0)
    x = quantize(torch.randn(4, 8), (1, 128))
    w13 = quantize(torch.randn(3, 12, 8), (128, 128))
    w2 = quantize(torch.randn(3, 5, 6), (128, 128)) if quant else torch.randn(3, 5, 6).bfloat16()
    ids = torch.tensor([[0, 2], [2, 1], [0, 1], [1, 1]], dtype=torch.int32)
    slot, off = reference("sort_by_expert", ids, experts=3)
    weights = torch.rand(4, 2)
    how = {"per_row": 2, "epilogue": "swiglu", "quant": quant, "scale": "ue8m0" if quant else "fp32"}
    h = reference("gather_grouped_linear", x, w13, slot, off, **how)
    wanted = reference("grouped_linear_combine", h, w2, off, slot, weights)
    found = reference("experts", x, w13, w2, off, slot, weights, quant=quant, quant_scale=how["scale"])
    assert torch.equal(found, wanted)


ROUTED = """\
moec.ir 1 func @forward(%x: bf16[T,64], %l: f32[T,16], %s: bf16[T,64]) -> bf16[T,64] target=cpu
  param $w13: bf16[16,96,64]
  param $w2: bf16[16,64,48]
  %w, %id, %slot, %off = route_sort(%l) {k=4, score=softmax} : f32[T,4], i32[T,4], i32[4*T~16], i32[17]
  %h = gather_grouped_linear(%x, $w13, %slot, %off) {epilogue=swiglu, per_row=4} : bf16[4*T~16,48]
  %y = grouped_linear_combine(%h, $w2, %off, %slot, %w, %s) : bf16[T,64]
  %e = experts(%x, $w13, $w2, %off, %slot, %w, %s) : bf16[T,64]
  %r = routed_experts(%x, $w13, $w2, %l, _, %s) {k=4, score=softmax} : bf16[T,64]
  return %y
end
"""


def test_costs_are_sums_with_one_launch() -> None:
    route, up, down, experts, routed = parse_module(ROUTED)["forward"].ops
    products, whole = op_cost(up) + op_cost(down), op_cost(route) + op_cost(up) + op_cost(down)
    for op, cost in ((experts, products), (routed, whole)):
        found = op_cost(op)
        assert (found.flops - cost.flops).simplify() == 0 and (found.bytes - cost.bytes).simplify() == 0
        assert found.launches == 1


def test_parts_are_the_ops_that_it_stands_for() -> None:
    route, up, down, _, routed = parse_module(ROUTED)["forward"].ops
    found = parts_of(routed)
    for part, op in zip(found, (route, up, down), strict=True):
        assert isinstance(part, Op) and part.attrs == op.attrs and type(part) is OPS[op.name]
        assert [r.type for r in part.results] == [r.type for r in op.results]
    with pytest.raises(TypeError, match="has no parts"):
        parts_of(up)
