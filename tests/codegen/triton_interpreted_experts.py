"""The routed experts in one launch, phase by phase in Triton's interpreter, against the kernels of its parts.

Run by test_triton_kernels.py in a process of its own.
"""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from hypothesis import given
from hypothesis import strategies as st

from moec.codegen.kernels import triton_experts
from moec.codegen.schedules import Schedule
from moec.ir.op import Op
from moec.ir.ops.experts import parts_of
from moec.ir.ops.moe import SortByExpert
from moec.ir.scaled import quantize
from moec.ir.types import DTYPES, parse_block
from tests.codegen.interpreted import FOLDER, TOLERANCE, call, folder, normal, poisoned, routings
from tests.codegen.routers import KINDS, ROUTERS, inputs, router
from tests.codegen.triton_kernels import experts_op, routed_experts_op, source

__all__ = ["folder", "poisoned"]  # fixtures, which pytest finds by name

TARGETS = st.sampled_from(["sm_89", "sm_90a"])
FLOATS = st.sampled_from(["bf16", "f16", "f32"])
FORMS = st.sampled_from(["rows", "swapped"])
# Of scales that change along K, and of such as are applied after the last step.
SCALES = st.sampled_from([("1x128", "128x128"), ("1x*", "1x*"), ("*x*", "64x128")])


def weights_of(dtype: str, experts: int, inner: int, width: int, scales: Any = None) -> list[Any]:
    """w13 and w2, with scales where some are given."""
    kind = torch.float32 if scales else DTYPES[dtype].torch
    made = [
        normal(1, experts, 2 * inner, width, dtype=kind) / width**0.5,
        normal(2, experts, width, inner, dtype=kind) / inner**0.5,
    ]
    return [quantize(w, parse_block(scales[1])) for w in made] if scales else made


def tokens_of(dtype: str, count: int, width: int, scales: Any = None) -> Any:
    x = normal(3, count, width, dtype=torch.float32 if scales else DTYPES[dtype].torch)
    return quantize(x, parse_block(scales[0])) if scales else x


def by_parts(op: Op, target: str, pair: Any, *operands: Any) -> torch.Tensor:
    """What the kernels of the op's parts make, each at its schedule of ``pair`` (None: as picked)."""
    first, second = ([s] for s in pair) if pair else (None, None)
    route, up, down = parts_of(op)
    x, w13, w2, *rest = operands
    plus = [rest.pop()] if down.operands[5] is not None else []
    if route is not None:
        weights, _, slot, off = run(route, source(route, target), *rest)
    else:
        off, slot, weights = rest
    h = run(up, source(up, target, first), x, w13, slot, off)
    return run(down, source(down, target, second), h, w2, off, slot, weights, *plus)


def run(op: Op, text: str, *operands: Any) -> Any:
    return call(op, text, FOLDER["kernels"], *operands)


def at_once(op: Op, target: str, pair: Any, *operands: Any) -> torch.Tensor:
    """What the one launch makes, at these schedules; of more tokens, the kernels that follow each other."""
    with patch.object(triton_experts, "together", lambda *_: pair):
        text = source(op, target)
    assert "_at_once[variant" not in text and "kernel.at_once(variant" in text
    return run(op, text, *operands)


@given(
    routings(most_tokens=16),
    FORMS,
    FORMS,
    TARGETS,
    st.sampled_from([8, 24, 40]),
    st.sampled_from([16, 72]),
    FLOATS,
    FLOATS,
    st.sampled_from(["silu", "gelu", "gelu_tanh"]),
    st.sampled_from([None, 0.5]),
    st.sampled_from([None, "bf16", "f32"]),
    st.sampled_from(["", "bf16", "f32"]),
)
def test_experts(
    routing: Any,
    first: Any,
    second: Any,
    target: str,
    inner: int,
    width: int,
    dtype: str,
    weights: str,
    act: str,
    limit: float | None,
    plus: str | None,
    to: str,
) -> None:
    """The bits of the kernels that follow each other, and the reference."""
    experts, k, ids = routing
    op = experts_op(dtype, experts, inner, width, k, weights=weights, to=to, act=act, limit=limit, plus=plus)
    slot, off = SortByExpert.reference(ids, experts=experts)
    by_token = normal(4, *ids.shape, dtype=DTYPES[weights].torch)
    given = [
        tokens_of(dtype, len(ids), width),
        *weights_of(dtype, experts, inner, width),
        off,
        slot,
        by_token,
    ]
    given += [normal(5, len(ids), width, dtype=DTYPES[plus].torch)] if plus else []
    pair = Schedule(first, 16, 16, 16, 4, 3), Schedule(second, 16, 32, 32, 4, 2)
    found = at_once(op, target, pair, *given)
    assert torch.equal(found, by_parts(op, target, pair, *given))
    expected = type(op).reference(*given, **op.attrs)
    tolerance = 2 * max(TOLERANCE[DTYPES[dtype].torch], TOLERANCE[expected.dtype])  # h is rounded too
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@given(
    routings(most_tokens=16),
    FORMS,
    FORMS,
    TARGETS,
    st.sampled_from([128, 200, 256]),
    SCALES,
    st.sampled_from(["", "fp32", "ue8m0"]),
    st.sampled_from([None, "bf16"]),
)
def test_experts_in_fp8(
    routing: Any, first: Any, second: Any, target: str, inner: int, scales: Any, quant: str, plus: str | None
) -> None:
    """The same bits again; what SwiGLU gives is quantised, or kept in bf16 for weights in bf16."""
    experts, k, ids = routing
    width = 256
    op = experts_op("f8e4m3", experts, inner, width, k, scales=scales, quant=quant, plus=plus)
    slot, off = SortByExpert.reference(ids, experts=experts)
    w13, w2 = weights_of("f8e4m3", experts, inner, width, scales)
    w2 = w2 if quant else weights_of("bf16", experts, inner, width)[1]
    weights = normal(4, *ids.shape, dtype=torch.float32)
    given = [tokens_of("f8e4m3", len(ids), width, scales), w13, w2, off, slot, weights]
    given += [normal(5, len(ids), width, dtype=torch.bfloat16)] if plus else []
    pair = Schedule(first, 16, 128, 128, 4, 3), Schedule(second, 16, 64, 128 if quant else 64, 4, 2)
    found = at_once(op, target, pair, *given)
    assert torch.equal(found, by_parts(op, target, pair, *given))
    expected = type(op).reference(*given, **op.attrs)
    noise = (found.double() - expected.double()).square().sum()
    # A value that is rounded to the other side is off by one step of 16.
    assert noise <= 1e-3 * expected.double().square().sum()


@given(
    st.sampled_from(list(ROUTERS)),
    st.sampled_from([0, 1, 2, 7, 16, 17, 20]),
    st.sampled_from(KINDS),
    st.integers(0, 1 << 16),
    TARGETS,
    st.booleans(),
)
def test_routed_experts(name: str, tokens: int, kind: str, seed: int, target: str, plus: bool) -> None:
    """Of every router, up to 16 tokens and beyond: the bits of the kernels that follow each other."""
    route, inner, width = router(name), 24, 16
    op = routed_experts_op(route, "bf16", inner, width, plus="bf16" if plus else None)
    experts = route.operands[0].type.shape[1] + route.attrs["shared"]  # type: ignore[union-attr]
    given = [tokens_of("bf16", tokens, width), *weights_of("bf16", experts, inner, width)]
    given += inputs(route, tokens, kind, seed)
    given += [normal(5, tokens, width, dtype=torch.bfloat16)] if plus else []
    pair = Schedule("swapped", 16, 32, 16, 4, 3), Schedule("rows", 16, 16, 32, 4, 2)
    with patch.object(triton_experts, "together", lambda *_: pair):
        found = run(op, source(op, target), *given)
    wanted = by_parts(op, target, pair if tokens <= 16 else None, *given)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
