"""Packages with Gluon's kernels on the CPU: the Triton twins that run there against the ops' references.

Run by test_triton_kernels.py in a process of its own.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.codegen.kernels import triton_grouped
from moec.codegen.kernels.triton_grouped import problem
from moec.codegen.schedules import Schedule
from moec.codegen.specialised import specialised
from moec.ir.devices import GPUS
from moec.ir.op import Op
from moec.ir.ops.moe import SortByExpert
from moec.ir.types import DTYPES
from moec.runtime.launch import Kernel
from tests.codegen.interpreted import FOLDER, call, close, folder, normal, poisoned, routings
from tests.codegen.triton_interpreted_fp8 import scaled, within_one_rounding
from tests.codegen.triton_kernels import fp8_op, gluon_source, grouped_combine_op, grouped_op

__all__ = ["folder", "poisoned"]  # fixtures, which pytest finds by name


@pytest.fixture(autouse=True)
def twins(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which functions were interpreted."""
    interpreted: list[str] = []
    on_cpu = Kernel._on_cpu

    def noted(self: Kernel, *args: Any) -> None:
        interpreted.append(self.name)
        on_cpu(self, *args)

    monkeypatch.setattr(Kernel, "_on_cpu", noted)
    TWINS["names"] = interpreted
    return interpreted


TWINS: dict[str, list[str]] = {}
H100 = GPUS["sm_90a"]


def tiles(op: Op) -> list[Schedule]:
    return specialised(problem(op), H100)


def only(op: Op, which: int = 0) -> str:
    """The kernel file with one rung, so that few rows are a twin's too."""
    return gluon_source(op, [tiles(op)[which]])


FEW_ROUTINGS = routings(most_tokens=40)
EPILOGUES = st.sampled_from([(None, None), ("silu", None), ("silu", 0.5), ("gelu", None)])


@given(FEW_ROUTINGS, st.sampled_from(["bf16", "f16"]), EPILOGUES)
@settings(max_examples=8)
def test_gather_grouped_linear(routing: Any, dtype: str, epilogue: tuple[str | None, float | None]) -> None:
    act, limit = epilogue
    experts, k, ids = routing
    slot, off = SortByExpert.reference(ids, experts=experts)
    x = normal(1, len(ids), 64, dtype=DTYPES[dtype].torch)
    w = normal(2, experts, 128 * (2 if act else 1), 64, dtype=x.dtype) / 8
    op = grouped_op(dtype, experts, 128, 64, gather=True, per_row=k, act=act, limit=limit)
    found = call(op, only(op), FOLDER["kernels"], x, w, slot, off)
    close(found, type(op).reference(x, w, slot, off, **op.attrs))
    assert set(TWINS["names"]) <= {"gather_grouped_linear_twin"}


@given(FEW_ROUTINGS, st.sampled_from(["bf16", "f16"]), st.booleans(), st.sampled_from([0, -1]))
@settings(max_examples=8)
def test_grouped_linear(routing: Any, dtype: str, scatter: bool, which: int) -> None:
    experts, _, ids = routing
    slot, off = SortByExpert.reference(ids, experts=experts)
    x = normal(3, len(slot), 64, dtype=DTYPES[dtype].torch)
    w = normal(4, experts, 256, 64, dtype=x.dtype) / 8
    op = grouped_op(dtype, experts, 256, 64, scatter=scatter)
    places = slot if scatter else None
    found = call(op, only(op, which), FOLDER["kernels"], x, w, off, places)
    close(found, type(op).reference(x, w, off, places))


@given(FEW_ROUTINGS, st.sampled_from(["", "fp32", "ue8m0"]), EPILOGUES)
@settings(max_examples=6)
def test_gather_grouped_linear_in_fp8(
    routing: Any, quant: str, epilogue: tuple[str | None, float | None]
) -> None:
    act, limit = epilogue
    experts, k, ids = routing
    slot, off = SortByExpert.reference(ids, experts=experts)
    x = scaled(5, len(ids), 256, block="1x128")
    w = scaled(6, experts, 128 * (2 if act else 1), 256, block="128x128")
    op = fp8_op(experts, 128, 256, gather=True, per_row=k, act=act, limit=limit, quant=quant)
    found = call(op, only(op), FOLDER["kernels"], x, w, slot, off)
    expected = type(op).reference(x, w, slot, off, **op.attrs)
    if quant:
        within_one_rounding(found, expected)
    else:
        close(found, expected)


@given(FEW_ROUTINGS, st.sampled_from(["bf16", "f32"]), st.booleans())
@settings(max_examples=6)
def test_grouped_linear_in_fp8(routing: Any, to: str, scatter: bool) -> None:
    experts, _, ids = routing
    slot, off = SortByExpert.reference(ids, experts=experts)
    x = scaled(7, len(slot), 256, block="1x128")
    w = scaled(8, experts, 128, 256, block="128x128")
    op = fp8_op(experts, 128, 256, scatter=scatter, to=to)
    places = slot if scatter else None
    found = call(op, only(op), FOLDER["kernels"], x, w, off, places)
    close(found, type(op).reference(x, w, off, places, **op.attrs))


def test_rungs_of_both_in_one_ladder(twins: list[str]) -> None:
    """By rows an expert, in any order: Triton's kernels where a rung is theirs, the twin where not."""
    op = grouped_op("f16", 2, 256, 64)
    wide, *_, narrow = tiles(op)
    assert wide.block_n == 256 and narrow.block_n == 128
    few, many = Schedule("swapped", 16, 64, 64, 4, 3), Schedule("rows", 64, 64, 64, 4, 3)
    text = gluon_source(op, [few, narrow, many, wide])  # below 1, 2 and 3 rows an expert
    w = normal(9, 2, 256, 64, dtype=torch.float16) / 8
    names = {few: "grouped_linear_swapped", many: "grouped_linear_rows"}
    for rows, s in ((1, few), (3, narrow), (5, many), (6, wide), (300, wide)):
        x, off = normal(10, rows, 64, dtype=w.dtype), torch.tensor([0, 1, rows], dtype=torch.int32)
        twins.clear()
        close(call(op, text, FOLDER["kernels"], x, w, off), type(op).reference(x, w, off))
        assert set(twins) == {names.get(s, "grouped_linear_twin")}, (rows, twins)


def test_few_rows_are_tritons(twins: list[str]) -> None:
    """Of an op that names the kernel: below the last rung of Triton's ladder its kernels run."""
    op = grouped_op("f16", 2, 256, 64)
    (_, first), *_ = triton_grouped.rungs(op, H100)
    text = gluon_source(op)
    w = normal(9, 2, 256, 64, dtype=torch.float16) / 8
    for rows, last in ((4, False), (9000, True)):
        x, off = normal(10, rows, 64, dtype=w.dtype), torch.tensor([0, 1, rows], dtype=torch.int32)
        twins.clear()
        close(call(op, text, FOLDER["kernels"], x, w, off), type(op).reference(x, w, off))
        assert set(twins) == {f"grouped_linear_{'twin' if last else first.function}"}


@pytest.mark.parametrize("scales", [("", ""), ("1x128", "128x128")])
@pytest.mark.parametrize("few", [True, False])
def test_rows_summed_by_token(scales: tuple[str, str], few: bool, twins: list[str]) -> None:
    """Few tokens in one launch of Triton's, many by the twin and combine; y in another dtype than rows.

    Without a rung of Triton's any number of tokens takes both.
    """
    experts, k, columns, depth = 2, 2, 128, 128
    dtype = "f8e4m3" if scales[0] else "f16"
    op = grouped_combine_op(dtype, experts, columns, depth, k, scales=scales, to="f32", plus="f32")
    rungs = [Schedule("swapped", 16, 64, 128 if scales[0] else 64, 4, 3)] * few + tiles(op)[:1]
    text = gluon_source(op, rungs[:1] * 3 + rungs)  # below 4 rows an expert, Triton's
    for tokens, last in ((3, not few), (200, True)):
        ids = torch.randint(0, experts, (tokens, k), generator=torch.Generator().manual_seed(1))
        slot, off = SortByExpert.reference(ids.int(), experts=experts)
        if scales[0]:
            x = scaled(11, tokens * k, depth, block=scales[0])
            w = scaled(12, experts, columns, depth, block=scales[1])
        else:
            x = normal(11, tokens * k, depth, dtype=torch.float16)
            w = normal(12, experts, columns, depth, dtype=torch.float16) / 8
        weights, plus = (
            normal(13, tokens, k, dtype=torch.float32),
            normal(14, tokens, columns, dtype=torch.float32),
        )
        twins.clear()
        found = call(op, text, FOLDER["kernels"], x, w, off, slot, weights, plus)
        wanted = type(op).reference(x, w, off, slot, weights, plus, **op.attrs)
        torch.testing.assert_close(found, wanted, atol=2e-2, rtol=2e-2)
        assert ("grouped_linear_combine_twin" in twins) == last, twins
        assert ("grouped_linear_combine_swapped_sum" in twins) != last, twins
