"""Kernels whose last program goes on with the work of all, in Triton's interpreter: split K, tokens' sums.

Run by test_triton_kernels.py in a process of its own.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.codegen.kernels.triton_grouped import Sums
from moec.codegen.kernels.triton_grouped_combine import few_tokens
from moec.codegen.schedules import Schedule
from moec.ir.devices import GPUS
from moec.ir.ops.moe import SortByExpert
from moec.ir.scaled import Scaled, quantize
from moec.ir.types import DTYPES, parse_block
from tests.codegen.interpreted import FOLDER, TOLERANCE, call, close, folder, normal, poisoned, routings
from tests.codegen.triton_kernels import combine_op, grouped_combine_op, grouped_op, source

__all__ = ["folder", "poisoned"]  # fixtures, which pytest finds by name

SPLITS = st.sampled_from([1, 2, 3, 4])
FORMS = st.sampled_from(["rows", "swapped"])
TARGETS = st.sampled_from(["sm_89", "sm_90a"])
FLOATS = st.sampled_from(["bf16", "f16", "f32"])
# Of scales that change along K, and of such as are applied after the last step.
SCALES = st.sampled_from([None, ("1x128", "128x128"), ("1x*", "1x*"), ("*x*", "64x128")])


def operands(
    routing: Any, dtype: str, columns: int, depth: int, scales: Any, weights: str, plus: str | None
) -> list[Any]:
    """x and w (fp8 where ``scales`` are given), off, slot, weights of 0 for ids that are none, plus."""
    experts, _, ids = routing
    slot, off = SortByExpert.reference(ids, experts=experts)
    kind = torch.float32 if scales else DTYPES[dtype].torch
    x, w = (
        normal(1, ids.numel(), depth, dtype=kind),
        normal(2, experts, columns, depth, dtype=kind) / depth**0.5,
    )
    if scales:
        x, w = (quantize(t, parse_block(s)) for t, s in zip((x, w), scales, strict=True))
    by_token = normal(3, *ids.shape, dtype=DTYPES[weights].torch)
    by_token[(ids < 0) | (ids >= experts)] = 0
    added = normal(4, len(ids), columns, dtype=DTYPES[plus].torch) if plus else None
    return [x, w, off, slot, by_token, added]


def exactly(routing: Any, x: Any, w: Any, by_token: torch.Tensor, plus: torch.Tensor | None) -> torch.Tensor:
    """In double precision, token by token, from the ids themselves."""
    experts, k, ids = routing
    x, w = (t.float().double() if isinstance(t, Scaled) else t.double() for t in (x, w))
    place = {int(s): row for row, s in enumerate(SortByExpert.reference(ids, experts=experts)[0])}
    y = torch.zeros(len(ids), w.shape[1], dtype=torch.float64) if plus is None else plus.double()
    for t in range(len(ids)):
        for j, e in enumerate(ids[t].tolist()):
            if 0 <= e < experts:
                y[t] += by_token[t, j].double() * (w[e] @ x[place[t * k + j]])
    return y


@given(
    routings(),
    FORMS,
    SPLITS,
    TARGETS,
    st.sampled_from([1, 16, 40]),
    st.sampled_from([8, 40, 130]),
    FLOATS,
    SCALES,
    FLOATS,
    st.sampled_from([None, "bf16", "f32"]),
    st.sampled_from(["", "bf16", "f32"]),
)
def test_grouped_linear_combine(
    routing: Any,
    form: Any,
    split: int,
    target: str,
    columns: int,
    depth: int,
    dtype: str,
    scales: Any,
    weights: str,
    plus: str | None,
    to: str,
) -> None:
    """Its reference; double precision; and the bits of the two kernels that it replaces."""
    experts, k, _ = routing
    depth = 4 * depth if scales else depth
    schedule = Schedule(form, 16, 64 if scales else 16, 128 if scales else 16, 4, 3, split)
    x, w, off, slot, by_token, added = given = operands(routing, dtype, columns, depth, scales, weights, plus)
    kind = {"dtype": "f8e4m3", "scales": scales, "rows": dtype} if scales else {"dtype": dtype}
    op = grouped_combine_op(
        experts=experts, columns=columns, depth=depth, k=k, weights=weights, to=to, plus=plus, **kind
    )
    found = call(op, source(op, target, [schedule]), FOLDER["kernels"], *given)
    expected = type(op).reference(*given, **op.attrs)
    tolerance = max(TOLERANCE[DTYPES[dtype].torch], TOLERANCE[expected.dtype])  # products are rounded too
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
    if min(dtype, weights, plus or "f32", to or dtype) == "f32" and not scales:
        exact = exactly(routing, x, w, by_token, added)
        torch.testing.assert_close(found.double(), exact, atol=2e-5, rtol=2e-5)

    kind = {"scales": scales, "to": dtype} if scales else {}
    product = grouped_op("f8e4m3" if scales else dtype, experts, columns, depth, scatter=True, **kind)
    combine = combine_op(dtype, weights, to or dtype, k, columns, slot=False, plus=plus)
    rows = call(product, source(product, target, [schedule]), FOLDER["kernels"], x, w, off, slot)
    assert torch.equal(
        call(combine, source(combine, target), FOLDER["kernels"], rows, by_token, added), found
    )


def test_against_a_loop_over_tokens() -> None:
    routing = 4, 3, torch.tensor([[0, 3, 3], [4, -1, 2], [1, 0, 9], [2, 2, 2], [5, 5, 5]], dtype=torch.int32)
    x, w, _, _, by_token, added = given = operands(routing, "f32", 40, 24, None, "f32", "f32")
    op = grouped_combine_op("f32", 4, 40, 24, 3, plus="f32")
    for split in (1, 2):
        text = source(op, "sm_90a", [Schedule("rows", 16, 16, 8, 4, 3, split)])
        found = call(op, text, FOLDER["kernels"], *given)
        expected = exactly(routing, x, w, by_token, added)
        torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=2e-5)
        assert torch.equal(found[4], added[4])  # no expert's


def test_rows_of_no_expert_are_never_read() -> None:
    routing = 2, 2, torch.tensor([[0, 7], [-1, -1], [1, 0]], dtype=torch.int32)
    x, w, off, slot, by_token, _ = operands(routing, "f16", 24, 16, None, "f32", None)
    x[int(off[-1]) :] = torch.nan
    op = grouped_combine_op("f16", 2, 24, 16, 2)
    for form in ("rows", "swapped"):
        text = source(op, "sm_90a", [Schedule(form, 16, 16, 16, 4, 3)])  # type: ignore[arg-type]
        found = call(op, text, FOLDER["kernels"], x, w, off, slot, by_token)
        assert found.isfinite().all() and not found[1].any()


@given(routings(), FORMS, SPLITS, SCALES, st.integers(0, 99))
@settings(max_examples=15)
def test_permuted_tokens_have_permuted_bits(
    routing: Any, form: Any, split: int, scales: Any, seed: int
) -> None:
    experts, k, ids = routing
    schedule = Schedule(form, 16, 64 if scales else 16, 128 if scales else 16, 4, 3, split)
    columns, depth = 40, 384 if scales else 72
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    kind = {"dtype": "f8e4m3", "scales": scales} if scales else {"dtype": "f16"}
    op = grouped_combine_op(experts=experts, columns=columns, depth=depth, k=k, **kind)
    text = source(op, "sm_90a", [schedule])
    tokens = normal(5, len(ids), k, depth, dtype=torch.float32 if scales else torch.float16)
    by_token = normal(6, len(ids), k, dtype=torch.float32)
    _, w, *_ = operands(routing, "f16", columns, depth, scales, "f32", None)
    found = []
    for rearranged in (torch.arange(len(ids)), order):
        slot, off = SortByExpert.reference(ids[rearranged], experts=experts)
        x = tokens[rearranged].flatten(0, 1)[slot.long()]
        x = quantize(x, parse_block(scales[0])) if scales and scales[0] != "*x*" else x
        if scales and scales[0] == "*x*":  # one scale, whatever the order of its sum
            x = Scaled(x.to(torch.float8_e4m3fn), torch.ones(1, 1), (0, 0))
        found.append(call(op, text, FOLDER["kernels"], x, w, off, slot, by_token[rearranged]))
    assert torch.equal(found[0][order], found[1])


@pytest.mark.parametrize("target", ["sm_80", "sm_90a"])
def test_few_tokens_are_one_launch_and_many_are_two(target: str) -> None:
    """The file as a package holds it, on both sides of the limit: a token's bits don't change."""
    experts, k, columns, depth = 4, 2, 70, 24
    op, schedule = (
        grouped_combine_op("f16", experts, columns, depth, k, plus="f16"),
        Schedule("rows", 16, 64, 32, 4, 3),
    )
    text = source(op, target, [schedule])
    few = few_tokens([(math.inf, schedule)], Sums(k, True), experts, GPUS[target])
    assert f"for up to {few} tokens" in text
    ids = torch.randint(-1, experts + 1, (few + 1, k), generator=torch.Generator().manual_seed(7)).int()
    tokens, found = normal(8, few + 1, k, depth, dtype=torch.float16), []
    _, w, _, _, by_token, added = operands((experts, k, ids), "f16", columns, depth, None, "f32", "f16")
    for n in (few, few + 1):
        slot, off = SortByExpert.reference(ids[:n], experts=experts)
        x = tokens[:n].flatten(0, 1)[slot.long()]
        found.append(call(op, text, FOLDER["kernels"], x, w, off, slot, by_token[:n], added[:n]))
        close(found[-1], type(op).reference(x, w, off, slot, by_token[:n], added[:n], **op.attrs))
    assert torch.equal(found[0], found[1][:few])


def test_parts_are_added_in_the_order_of_k() -> None:
    """In fp32 (2^24 + 1) - 2^24 is 0 and 2^24 - 2^24 + 1 is 1: which comes first shows."""
    big = 2.0**24
    for values, expected in (([big, 1.0, -big], 0.0), ([big, -big, 1.0], 1.0), ([1.0, big, -big], 0.0)):
        x = torch.zeros(1, 24)
        x[0, [0, 8, 16]] = torch.tensor(values)
        op = grouped_op("f32", 1, 16, 24)
        text = source(op, "sm_90a", [Schedule("rows", 16, 16, 8, 4, 3, split=3)])
        found = call(op, text, FOLDER["kernels"], x, torch.ones(1, 16, 24), torch.tensor([0, 1]).int())
        assert found.tolist() == [[expected] * 16]


FAR = (1 << 31) // 16 + 3  # a row of 16 values beyond the reach of 32-bit offsets


def test_weights_beyond_32_bits() -> None:
    """Only the last of 2049 experts has rows, and only its weights exist."""
    w = torch.empty(2049, 1024, 1024, dtype=torch.float16)
    w[-1] = normal(17, 1024, 1024, dtype=w.dtype) / 32
    x, off = normal(18, 3, 1024, dtype=w.dtype), torch.zeros(2050, dtype=torch.int32)
    off[-1] = 3
    slot, weights = torch.tensor([2, 0, 1], dtype=torch.int32), torch.ones(3, 1)
    op = grouped_combine_op("f16", 2049, 1024, 1024, 1)
    for target in ("sm_80", "sm_90a"):
        text = source(op, target, [Schedule("rows", 16, 256, 256, 4, 3, split=2)])
        found = call(op, text, FOLDER["kernels"], x, w, off, slot, weights)
        close(found, (x.float() @ w[-1].float().T).half()[[1, 2, 0]])


def test_offsets_have_64_bits() -> None:
    """Rows by slot, parts and results, whose last would lie beyond the memory of this machine."""
    op = grouped_combine_op("bf16", 256, 7168, 2048, 8, plus="bf16")
    text = source(op, "sm_90a", [Schedule("swapped", 16, 64, 64, 4, 4, split=2)])
    assert "size = R.to(tl.int64) * N" in text and "parts + rows.to(tl.int64)[None, :] * N" in text
    assert "by_slot + place.to(tl.int64)[None, :] * N" in text
    assert "token = (earlier + tl.arange(0, TOKENS)).to(tl.int64)" in text


def test_a_tile_of_many_rows_and_bands() -> None:
    """More tiles than rows fill, several column tiles, idle programs: each column tile's count is known."""
    routing = 3, 2, torch.tensor([[1, 1]] * 24, dtype=torch.int32)
    given = operands(routing, "f16", 70, 40, None, "f32", None)
    op = grouped_combine_op("f16", 3, 70, 40, 2)
    for form in ("rows", "swapped"):
        for split in (1, 2):
            schedule = replace(Schedule("rows", 16, 16, 16, 4, 3, split), form=form)
            found = call(op, source(op, "sm_90a", [schedule]), FOLDER["kernels"], *given)
            close(found, type(op).reference(*given, **op.attrs))
