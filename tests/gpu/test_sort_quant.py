"""Quantisation beside the sort by expert on the GPU: the bits of two launches, however many tokens there are.

In a self-test the functions run that stand in for the kernels on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from moec.ir.op import Op
from moec.ir.scaled import quantize
from moec.ir.types import DTYPES
from moec.ops import fused_experts, routed_experts
from tests.codegen.routers import inputs, router
from tests.codegen.rows import KINDS, equal_bits, rows
from tests.codegen.triton_kernels import and_quant
from tests.gpu.device import Device
from tests.gpu.test_route_sort import Run, bits, here, kernels
from tests.moec.fp8_experts import fp8_layer

__all__ = ["kernels"]  # a fixture, which pytest finds by name

TOKENS = pytest.mark.parametrize("tokens", [1, 8, 16, 17, 300])


@TOKENS
@pytest.mark.parametrize("scale", ["fp32", "ue8m0"])
@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("name", ["deepseek-v3", "qwen3", "qwen2-moe"])
def test_beside_a_router(
    name: str, dtype: str, scale: str, tokens: int, device: Device, kernels: Callable[[Op], Run]
) -> None:
    """As route_sort alone and as quant's reference, in one launch and in two."""
    sort, depth = router(name), 7168 if device.real else 392
    both = and_quant(sort, dtype, depth, scale)
    for kind in KINDS:
        x = rows(DTYPES[dtype].torch, tokens, depth, kind, seed=tokens)
        given = here(inputs(sort, tokens, "normal", seed=tokens), device)
        *chosen, q = kernels(both)(*given, x.to(device.type))
        assert torch.equal(bits(tuple(chosen)), bits(kernels(sort)(*given)))
        equal_bits((q[0].cpu(), q[1].cpu()), quantize(x, (1, 128), scale))


@TOKENS
@pytest.mark.parametrize("routed", [False, True], ids=["fused", "routed"])
def test_moec_ops(routed: bool, tokens: int, device: Device) -> None:
    """x in bf16, and the same x quantised beforehand, which leaves the sort alone: equal bits of y."""
    one = fp8_layer(tokens=tokens, k=6, experts=16, hidden=384, width=256, dtype=torch.bfloat16)
    x, w13, w2, weights, ids, *scales = (t.to(device.type) for t in vars(one).values() if t is not None)
    how: dict[str, Any] = dict(zip(("w13_scale", "w2_scale"), scales, strict=True))
    q = quantize(x.cpu(), (1, 128))
    logits = torch.randn(tokens, 16, generator=torch.Generator().manual_seed(tokens)).to(device.type)

    def layer(rows: torch.Tensor, **x_scale: torch.Tensor) -> torch.Tensor:
        if routed:
            router = {"k": 6, "score": "sigmoid", "renorm": True}
            return routed_experts(rows, logits, w13, w2, **router, **how, **x_scale)
        return fused_experts(rows, w13, w2, weights, ids, **how, **x_scale)

    y = layer(x)
    assert y.dtype == torch.bfloat16 and bool(y.isfinite().all())
    assert torch.equal(y, layer(q.q.to(device.type), x_scale=q.scale.to(device.type)))
