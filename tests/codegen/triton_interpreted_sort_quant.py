"""Sorts with quantisation beside them, in Triton's interpreter: the bits of the two.

Run by test_triton_kernels.py in a process of its own.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moec.ir.scaled import quantize
from moec.ir.types import DTYPES
from moec.ops import fused_experts
from moec.runtime.launch import Launchable
from tests.codegen.interpreted import FOLDER, call, folder, normal, poisoned, routings
from tests.codegen.rows import KINDS, equal_bits, rows
from tests.codegen.triton_kernels import and_quant, local_sort_op, route_op, sort_op, source
from tests.moec.fp8_experts import fp8_layer

__all__ = ["folder", "poisoned"]  # fixtures, which pytest finds by name


def judge(sort: Any, operands: list[torch.Tensor], x: torch.Tensor, scale: str) -> None:
    """Fails unless the bits are those of the sort's own kernel and of quant's reference."""
    op = and_quant(sort, str(x.dtype).removeprefix("torch."), x.shape[1], scale)
    *order, q = call(op, source(op), FOLDER["kernels"], *operands, x)
    for have, want in zip(order, call(sort, source(sort), FOLDER["kernels"], *operands), strict=True):
        torch.testing.assert_close(have, want, rtol=0, atol=0, equal_nan=True)
    equal_bits(q, quantize(x, (1, 128), scale))


@given(
    routing=routings(most_tokens=40),
    sort=st.sampled_from(["sort_by_expert", "local_sort", "route_sort"]),
    dtype=st.sampled_from(["bf16", "f16", "f32"]),
    depth=st.sampled_from([1, 128, 200, 256]),
    kind=st.sampled_from(KINDS),
    scale=st.sampled_from(["fp32", "ue8m0"]),
)
def test_the_bits_of_the_two(routing: Any, sort: str, dtype: str, depth: int, kind: str, scale: str) -> None:
    experts, k, ids = routing
    x = rows(DTYPES[dtype].torch, len(ids), depth, kind, seed=experts)
    if sort == "sort_by_expert":
        judge(sort_op(k, experts), [ids], x, scale)
    elif sort == "local_sort":
        judge(local_sort_op(k, experts, 1), [normal(3, *ids.shape, dtype=torch.float32), ids], x, scale)
    else:
        op = route_op("route_sort", experts, min(k, experts), score="softmax", bias=True)
        judge(op, [normal(1, len(ids), experts, dtype=torch.float32), torch.zeros(experts)], x, scale)


def test_many_slots() -> None:
    """So many that chunks of them are counted: programs behind the chunks' quantise."""
    ids = torch.randint(-1, 8, (2741, 6), generator=torch.Generator().manual_seed(10), dtype=torch.int32)
    x = rows(torch.bfloat16, len(ids), 8, "odd", 0)
    judge(sort_op(6, 7), [ids], x, "fp32")
    judge(local_sort_op(6, 5, 1), [torch.rand(ids.shape), ids], x, "ue8m0")


@pytest.mark.parametrize("tokens", [1, 16])
def test_moec_ops_fp8_layer_is_three_launches(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sort with quantisation beside it, and the two products."""
    made: list[str] = []
    launch = Launchable._launch

    def counted(self: Launchable, variant: str, grid: Any, *args: Any) -> None:
        made.append(self.name)
        launch(self, variant, grid, *args)

    monkeypatch.setenv("MOEC_INTERPRET", "1")
    one = fp8_layer(tokens=tokens, k=2, experts=4, hidden=256, width=128)
    scales = {"w13_scale": one.w13_scale, "w2_scale": one.w2_scale}
    fused_experts(one.x, one.w13, one.w2, one.weights, one.ids, **scales)
    monkeypatch.setattr(Launchable, "_launch", counted)
    y = fused_experts(one.x, one.w13, one.w2, one.weights, one.ids, **scales)
    assert made[0].startswith("local_sort_and_quant") and len(made) == 3, made
    assert y.shape == one.x.shape
