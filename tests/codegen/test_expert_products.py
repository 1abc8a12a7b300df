"""The experts' products as the CPU runs them, with new tensors full of NaN: what isn't written shows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moec.codegen.kernels import Templated, select
from moec.codegen.render import render_python
from moec.ir import Function, TensorType
from moec.ir.op import op_class
from moec.ir.types import DType

# Expert 1 of three has no slot; three slots are those of no expert.
ID = torch.tensor([[0, 3], [-1, 0], [2, 9], [0, 2]], dtype=torch.int32)
EXPERTS, K = 3, 2

# What one more rounding may change, of the largest magnitude.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def check(name: str, *operands: torch.Tensor | None, **attrs: Any) -> None:
    """The op's kernel against its reference."""
    function = Function("f")
    values = [
        None if t is None else function.add_argument("x", TensorType(DType.of(str(t.dtype)), tuple(t.shape)))
        for t in operands
    ]
    op = function.create(op_class(name)(values, attrs))
    record = select(op, "cpu")
    assert isinstance(record, Templated)
    scope: dict[str, Any] = {"torch": torch, "F": torch.nn.functional, "linear": torch.nn.functional.linear}
    called = {record.calls: record.calls} if record.calls else {}
    exec(render_python(record.template, name="kernel", **record.constants(op), **called), scope)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", lambda x, *shape: x.new_full(shape, torch.nan))
        patch.setattr(torch, "empty_like", lambda x: torch.full_like(x, torch.nan))
        found = scope["kernel"](*(t for t in operands if t is not None))
    want = op_class(name).reference(*operands, **op.attrs)
    assert found.dtype == want.dtype
    limit = TOLERANCE[want.dtype] * float(want.abs().max()) if want.numel() else 0.0
    torch.testing.assert_close(found, want, rtol=0, atol=limit)


def sort(id: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    slot, off = op_class("sort_by_expert").reference(id, experts=EXPERTS)
    return slot, off


def randn(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@DTYPES
@pytest.mark.parametrize("tokens", [0, 1, 4])
@pytest.mark.parametrize("act", ["none", "silu", "gelu", "gelu_tanh"])
def test_gather_grouped_linear(act: str, tokens: int, dtype: torch.dtype) -> None:
    how = {} if act == "none" else {"epilogue": "swiglu", "act": act}
    operands = randn(dtype, tokens, 5), randn(dtype, EXPERTS, 6, 5), *sort(ID[:tokens])
    check("gather_grouped_linear", *operands, per_row=K, **how)


@DTYPES
@pytest.mark.parametrize("tokens", [0, 1, 4])
@pytest.mark.parametrize("placed", [False, True])
def test_grouped_linear(placed: bool, tokens: int, dtype: torch.dtype) -> None:
    slot, off = sort(ID[:tokens])
    rows, w = randn(dtype, tokens * K, 5), randn(dtype, EXPERTS, 6, 5)
    check("grouped_linear", rows, w, off, slot if placed else None)


@DTYPES
@pytest.mark.parametrize("tokens", [0, 1, 4])
@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("placed", [False, True])
def test_combine(placed: bool, plus: bool, tokens: int, dtype: torch.dtype) -> None:
    rows, w = randn(dtype, tokens * K, 5), randn(torch.float32, tokens, K)
    slot = None if placed else sort(ID[:tokens])[0]
    check("combine", rows, slot, w, randn(dtype, tokens, 5) if plus else None)


@DTYPES
@pytest.mark.parametrize("tokens", [0, 1, 4])
@pytest.mark.parametrize("plus", [False, True])
def test_grouped_linear_combine(plus: bool, tokens: int, dtype: torch.dtype) -> None:
    slot, off = sort(ID[:tokens])
    rows, w, by_token = (
        randn(dtype, tokens * K, 5),
        randn(dtype, EXPERTS, 6, 5),
        randn(torch.float32, tokens, K),
    )
    check("grouped_linear_combine", rows, w, off, slot, by_token, randn(dtype, tokens, 6) if plus else None)


def test_slots_are_what_the_ir_says_that_kernels_of_another_kind_read() -> None:
    """PyTorch sorts to int64; a Triton kernel beside it takes pointers to int32."""
    function = Function("f")
    id = function.add_argument("id", TensorType(DType.of("i32"), (4, K)))
    op = function.create(op_class("sort_by_expert")([id], {"experts": EXPERTS}))
    record = select(op, "cpu")
    assert isinstance(record, Templated)
    scope: dict[str, Any] = {"torch": torch}
    exec(render_python(record.template, name="kernel", **record.constants(op)), scope)
    for found, result in zip(scope["kernel"](ID), op.results, strict=True):
        assert isinstance(result.type, TensorType) and found.dtype == result.type.dtype.torch


def test_a_product_over_no_columns() -> None:
    """oneDNN has none; PyTorch's is zeros."""
    scope: dict[str, Any] = {"torch": torch, "F": torch.nn.functional}
    exec(render_python("python/kernels/linear.py.jinja", name="linear"), scope)
    assert torch.equal(scope["linear"](torch.zeros(9, 0), torch.zeros(4, 0)), torch.zeros(9, 4))
    assert scope["linear"](torch.zeros(0, 3), torch.zeros(4, 3)).shape == (0, 4)
