"""Persistent programs in Triton's interpreter: few of them, many tiles, the same bits as a program a tile.

Run by test_triton_kernels.py in a process of its own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.codegen.kernels import triton_grouped
from moec.codegen.schedules import Schedule
from moec.ir.op import Op
from moec.ir.ops.moe import SortByExpert
from moec.ir.scaled import Scaled, quantize
from moec.ir.types import DTYPES, parse_block
from moec.runtime import launch
from tests.codegen.interpreted import FOLDER, call, close, folder, normal, poisoned, routings
from tests.codegen.triton_kernels import fp8_op, grouped_op, linear_op, source

__all__ = ["folder", "poisoned"]  # fixtures, which pytest finds by name

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
ROWS = Schedule("rows", 16, 32, 32, 4, 3)
TARGETS = st.sampled_from(["sm_80", "sm_90a"])  # without and with descriptors
AT_ONCE = st.sampled_from([1, 2, 5, 1000])
BANDS = st.sampled_from([1, 2, 3, 100])
COLUMNS = st.sampled_from([24, 32, 100])
DEPTHS = st.sampled_from([16, 32, 72])
SCALES = st.sampled_from([("1x128", "128x128"), ("1x*", "1x*"), ("*x*", "*x*"), ("1x128", "1x128")])


def both(op: Op, schedule: Schedule, target: str, at_once: int, band: int, *operands: Any) -> list[Any]:
    """What persistent programs make of it, and what programs of one tile do."""
    with (
        patch.object(launch, "INTERPRETED_AT_ONCE", at_once),
        patch.object(triton_grouped, "band", lambda *_: band),
    ):
        texts = [source(op, target, [replace(schedule, persistent=p)]) for p in (True, False)]
        assert ["num_programs" in text for text in texts] == [True, False]
        return [call(op, text, FOLDER["kernels"], *operands) for text in texts]


def same_bits(found: Any, expected: Any) -> None:
    for a, b in zip(*((v[:2] if isinstance(v, tuple) else [v]) for v in (found, expected)), strict=True):
        bits = BITS[b.element_size()]
        assert torch.equal(a.isnan(), b.isnan())
        assert torch.equal(a.view(bits)[~a.isnan()], b.view(bits)[~b.isnan()])


@given(
    routings(most_tokens=50),
    TARGETS,
    AT_ONCE,
    BANDS,
    COLUMNS,
    DEPTHS,
    st.sampled_from(["bf16", "f16"]),
    st.sampled_from([None, "silu"]),
)
@settings(max_examples=20)
def test_gather_grouped_linear(
    routing: Any, target: str, at_once: int, band: int, columns: int, depth: int, dtype: str, act: str | None
) -> None:
    experts, k, ids = routing
    slot, off = SortByExpert.reference(ids, experts=experts)
    x = normal(1, len(ids), depth, dtype=DTYPES[dtype].torch)
    if len(ids):
        x[0] = torch.nan
    w = normal(2, experts, columns * (2 if act else 1), depth, dtype=x.dtype) / depth**0.5
    op = grouped_op(dtype, experts, columns, depth, gather=True, per_row=k, act=act)
    found, expected = both(op, ROWS, target, at_once, band, x, w, slot, off)
    same_bits(found, expected)
    close(found, type(op).reference(x, w, slot, off, **op.attrs))


@given(
    routings(most_tokens=50),
    TARGETS,
    AT_ONCE,
    BANDS,
    COLUMNS,
    DEPTHS,
    st.sampled_from(["bf16", "f16"]),
    st.booleans(),
)
@settings(max_examples=20)
def test_grouped_linear(
    routing: Any, target: str, at_once: int, band: int, columns: int, depth: int, dtype: str, scatter: bool
) -> None:
    experts, _, ids = routing
    slot, off = SortByExpert.reference(ids, experts=experts)
    x = normal(3, len(slot), depth, dtype=DTYPES[dtype].torch)
    w = normal(4, experts, columns, depth, dtype=x.dtype) / depth**0.5
    places = slot if scatter else None
    op = grouped_op(dtype, experts, columns, depth, scatter=scatter)
    found, expected = both(op, ROWS, target, at_once, band, x, w, off, places)
    same_bits(found, expected)
    close(found, type(op).reference(x, w, off, places))


@given(
    routings(most_tokens=30),
    st.sampled_from(["sm_89", "sm_90a"]),
    AT_ONCE,
    SCALES,
    st.sampled_from(["", "fp32", "ue8m0"]),
    st.sampled_from([None, "silu"]),
)
@settings(max_examples=12)
def test_gather_grouped_linear_in_fp8(
    routing: Any, target: str, at_once: int, scales: tuple[str, str], quant: str, act: str | None
) -> None:
    experts, k, ids = routing
    slot, off = SortByExpert.reference(ids, experts=experts)
    x = scaled(5, len(ids), 256, block=scales[0])
    w = scaled(6, experts, 128 * (2 if act else 1), 256, block=scales[1])
    op = fp8_op(experts, 128, 256, gather=True, per_row=k, act=act, scales=scales, quant=quant)
    same_bits(*both(op, Schedule("rows", 16, 128, 128, 4, 3), target, at_once, 2, x, w, slot, off))


@given(
    routings(most_tokens=30),
    st.sampled_from(["sm_89", "sm_90a"]),
    AT_ONCE,
    SCALES,
    st.sampled_from(["bf16", "f32"]),
    st.booleans(),
)
@settings(max_examples=12)
def test_grouped_linear_in_fp8(
    routing: Any, target: str, at_once: int, scales: tuple[str, str], to: str, scatter: bool
) -> None:
    experts, _, ids = routing
    slot, off = SortByExpert.reference(ids, experts=experts)
    x, w = scaled(7, len(slot), 256, block=scales[0]), scaled(8, experts, 200, 256, block=scales[1])
    op = fp8_op(experts, 200, 256, scatter=scatter, scales=scales, to=to)
    places = slot if scatter else None
    same_bits(*both(op, Schedule("rows", 16, 64, 128, 4, 3), target, at_once, 3, x, w, off, places))


@pytest.mark.parametrize("at_once", [1, 3])
@pytest.mark.parametrize("rows", [0, 1, 16 * 13])
def test_linear_in_fp8(rows: int, at_once: int) -> None:
    x, w = scaled(9, rows, 128, block="1x128"), scaled(10, 200, 128, block="128x128")
    same_bits(*both(linear_op(200, 128), Schedule("rows", 16, 64, 128, 4, 3), "sm_90a", at_once, 4, x, w))


def test_512_experts_most_of_them_idle() -> None:
    """Four programs find the tiles of a few experts, first and last among them."""
    off = torch.tensor([0, *[5] * 200, *[40] * 311, 57], dtype=torch.int32)
    x, w = normal(11, 60, 32, dtype=torch.float16), normal(12, 512, 64, 32, dtype=torch.float16)
    op = grouped_op("f16", 512, 64, 32)
    found, expected = both(op, ROWS, "sm_90a", 4, 2, x, w, off)
    same_bits(found, expected)
    torch.testing.assert_close(found, type(op).reference(x, w, off), atol=2e-2, rtol=4e-3)
    assert not found[57:].any()  # rows that no expert owns


def scaled(seed: int, *shape: int, block: str) -> Scaled:
    return quantize(normal(seed, *shape, dtype=torch.float32), parse_block(block))
