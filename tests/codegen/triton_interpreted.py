"""Every Triton template against its op's reference, in Triton's interpreter.

Run by test_triton_kernels.py in a process of its own, since Triton fixes its mode when it is imported.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.codegen.kernels import triton_grouped
from moec.codegen.schedules import Schedule
from moec.ir.ops.expert_parallel import LocalSort
from moec.ir.ops.moe import SortByExpert
from moec.ir.ops.route import SCORES
from moec.ir.types import DTYPES
from tests.codegen.interpreted import FOLDER, call, close, folder, normal, poisoned, routings
from tests.codegen.triton_kernels import (
    combine_op,
    grouped_op,
    hash_route_op,
    local_sort_op,
    route_op,
    sort_op,
    source,
)

__all__ = ["folder", "poisoned"]  # fixtures, which pytest finds by name

SCHEDULES = st.builds(
    Schedule,
    form=st.sampled_from(["rows", "swapped"]),
    block_m=st.sampled_from([16, 32]),
    block_n=st.sampled_from([16, 32]),
    block_k=st.sampled_from([16, 32]),
    warps=st.just(4),
    stages=st.just(3),
    split=st.sampled_from([1, 1, 2, 4]),
)
# With and without tensor descriptors; columns and depths that end inside a tile, rows in pieces of 4 bytes.
TARGETS = st.sampled_from(["sm_80", "sm_90a"])
COLUMNS = st.sampled_from([1, 16, 24, 33, 70])
DEPTHS = st.sampled_from([8, 16, 22, 40])
FLOATS = st.sampled_from(["bf16", "f16", "f32"])


@given(
    routings(),
    SCHEDULES,
    TARGETS,
    COLUMNS,
    DEPTHS,
    FLOATS,
    st.sampled_from([None, "silu", "gelu", "gelu_tanh"]),
    st.sampled_from([None, 0.5]),
    st.booleans(),
)
def test_gather_grouped_linear(
    routing: Any,
    schedule: Schedule,
    target: str,
    columns: int,
    depth: int,
    dtype: str,
    act: str | None,
    limit: float | None,
    nan: bool,
) -> None:
    experts, k, ids = routing
    slot, off = SortByExpert.reference(ids, experts=experts)
    x = normal(1, len(ids), depth, dtype=DTYPES[dtype].torch)
    if nan and len(ids):
        x[0] = torch.nan
    w = normal(2, experts, columns * (2 if act else 1), depth, dtype=x.dtype) / depth**0.5
    op = grouped_op(dtype, experts, columns, depth, gather=True, per_row=k, act=act, limit=limit)
    found = call(op, source(op, target, [schedule]), FOLDER["kernels"], x, w, slot, off)
    close(found, type(op).reference(x, w, slot, off, **op.attrs))


@given(routings(), SCHEDULES, TARGETS, COLUMNS, DEPTHS, FLOATS, st.booleans(), st.booleans())
def test_grouped_linear(
    routing: Any,
    schedule: Schedule,
    target: str,
    columns: int,
    depth: int,
    dtype: str,
    scatter: bool,
    nan: bool,
) -> None:
    experts, _, ids = routing
    slot, off = SortByExpert.reference(ids, experts=experts)
    x = normal(3, len(slot), depth, dtype=DTYPES[dtype].torch)
    if nan and len(x):
        x[0] = torch.nan
    w = normal(4, experts, columns, depth, dtype=x.dtype) / depth**0.5
    places = slot if scatter else None
    op = grouped_op(dtype, experts, columns, depth, scatter=scatter)
    found = call(op, source(op, target, [schedule]), FOLDER["kernels"], x, w, off, places)
    close(found, type(op).reference(x, w, off, places))


@pytest.mark.parametrize("form", ["rows", "swapped"])
def test_many_tiles_in_bands(form: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """More row tiles than a band holds, and several column tiles: each tile of y is written, once."""
    monkeypatch.setattr(triton_grouped, "band", lambda *_: 16)
    experts, rows = 3, 16 * 40
    off = torch.tensor([0, 16 * 35 + 3, 16 * 35 + 3, rows - 5], dtype=torch.int32)
    x, w = normal(5, rows, 16, dtype=torch.float16), normal(6, experts, 40, 16, dtype=torch.float16)
    op = grouped_op("f16", experts, 40, 16)
    found = call(op, source(op, "sm_90a", [Schedule(form, 16, 16, 16, 4, 3)]), FOLDER["kernels"], x, w, off)
    expected = type(op).reference(x, w, off)
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=4e-3)


@pytest.mark.parametrize("form", ["rows", "swapped"])
def test_the_grid_holds_every_tile(form: Any) -> None:
    """The most tiles that rows can need: each expert, and the rows of none, one row beyond a full tile."""
    off = torch.tensor([0, 17, 34, 51], dtype=torch.int32)
    x, w = normal(20, 4 * 17, 16, dtype=torch.float16), normal(21, 3, 16, 16, dtype=torch.float16) / 4
    op = grouped_op("f16", 3, 16, 16)
    found = call(op, source(op, "sm_90a", [Schedule(form, 16, 16, 16, 4, 3)]), FOLDER["kernels"], x, w, off)
    close(found, type(op).reference(x, w, off))


def test_what_selection_picks() -> None:
    """The file as a package holds it: the ladder picks a variant for each number of rows."""
    experts, k, columns, depth = 4, 2, 24, 40
    op = grouped_op("f16", experts, columns, depth, gather=True, per_row=k, act="silu")
    text = source(op)
    w = normal(7, experts, 2 * columns, depth, dtype=torch.float16) / depth**0.5
    for tokens in (1, 7, 300):
        x = normal(8, tokens, 2 * depth, dtype=torch.float16)[:, :depth]  # not contiguous
        ids = torch.randint(0, experts, (tokens, k), generator=torch.Generator().manual_seed(9))
        slot, off = SortByExpert.reference(ids, experts=experts)
        found = call(op, text, FOLDER["kernels"], x, w, slot, off)
        close(found, type(op).reference(x, w, slot, off, **op.attrs))


@given(routings(most_tokens=400))
def test_sort_by_expert(routing: Any) -> None:
    experts, k, ids = routing
    op = sort_op(k, experts)
    slot, off = call(op, source(op), FOLDER["kernels"], ids)
    expected_slot, expected_off = SortByExpert.reference(ids, experts=experts)
    assert torch.equal(slot, expected_slot) and torch.equal(off, expected_off)


@given(routings(most_tokens=400), st.integers(0, 3), st.sampled_from([torch.int32, torch.int64]))
def test_local_sort(routing: Any, first: int, ids_dtype: torch.dtype) -> None:
    """Choices that aren't here weigh nothing, even NaN."""
    experts, k, ids = routing
    w = normal(3, *ids.shape, dtype=torch.float32)
    w[(ids < first) | (ids >= first + experts)] = torch.nan
    op = local_sort_op(k, experts, first, ids=str(ids_dtype).replace("torch.int", "i"))
    found = call(op, source(op), FOLDER["kernels"], w, ids.to(ids_dtype))
    expected = LocalSort.reference(w, ids.to(ids_dtype), first=first, experts=experts)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, expected, strict=True))


def test_local_sort_of_many_slots() -> None:
    generator = torch.Generator().manual_seed(10)
    ids = torch.randint(-2, 40, (2741, 6), generator=generator, dtype=torch.int32)
    w = torch.rand(ids.shape, generator=generator).to(torch.bfloat16)
    op = local_sort_op(6, 20, 10, "bf16")
    found = call(op, source(op), FOLDER["kernels"], w, ids)
    expected = LocalSort.reference(w, ids, first=10, experts=20)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("low, high, experts", [(-1, 8, 7), (0, 2, 300)])
def test_sort_of_many_slots(low: int, high: int, experts: int) -> None:
    """So many that chunks of them are counted and ranked; their number is no multiple of a chunk."""
    generator = torch.Generator().manual_seed(10)
    ids = torch.randint(low, high, (2741, 6), generator=generator, dtype=torch.int32)
    op = sort_op(6, experts)
    slot, off = call(op, source(op), FOLDER["kernels"], ids)
    expected_slot, expected_off = SortByExpert.reference(ids, experts=experts)
    assert torch.equal(slot, expected_slot) and torch.equal(off, expected_off)


@given(st.data(), st.sampled_from(["route", "route_sort"]), st.sampled_from([0, 1, 7]))
def test_route(data: st.DataObject, name: str, tokens: int) -> None:
    """Every router, many ties, NaN, experts and groups that are no power of two."""
    groups, size = data.draw(st.sampled_from([(1, 1), (1, 5), (1, 60), (1, 256), (3, 2), (5, 3), (8, 32)]))
    kept = data.draw(st.integers(1, groups))
    experts, score = groups * size, data.draw(st.sampled_from(SCORES))
    attrs: dict[str, Any] = {"score": score, "renorm": data.draw(st.booleans())}
    if groups > 1:
        attrs |= {
            "groups": groups,
            "topk_groups": kept,
            "group_score": data.draw(st.sampled_from(["max", "top2sum"])),
        }
        attrs["masked"] = data.draw(st.sampled_from(["zero", "neginf"]))
    attrs |= {
        "scale": data.draw(st.sampled_from([1.0, 2.5])),
        "shared": data.draw(st.sampled_from([0, 0, 3])),
    }
    k = data.draw(st.integers(1, min(kept * size, 17)))
    bias = data.draw(st.booleans())
    dtype = data.draw(FLOATS)
    op = route_op(name, experts, k, dtype, bias, **attrs)
    # Steps far apart: what PyTorch and Triton round differently turns no choice, and many scores are equal.
    logits = (normal(data.draw(st.integers(0, 99)), tokens, experts, dtype=torch.float32) * 2).round() / 2
    if tokens > 1 and data.draw(st.booleans()):
        logits[1, experts // 2] = torch.nan
    logits = logits.to(DTYPES[dtype].torch)
    operands = [logits, (normal(3, experts, dtype=torch.float32) * 4).round() / 4 if bias else None]
    found = call(op, source(op), FOLDER["kernels"], *operands)
    expected = type(op).reference(*operands, **op.attrs)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6, equal_nan=True)
    for have, want in zip(found[1:], expected[1:], strict=True):
        assert torch.equal(have, want)


@given(
    st.sampled_from([0, 1, 5]),
    st.sampled_from([1, 2, 6, 20]),
    st.sampled_from([1, 24, 1030]),
    FLOATS,
    FLOATS,
    FLOATS,
    st.sampled_from([None, "bf16", "f16", "f32"]),
    st.booleans(),
)
@settings(max_examples=15)
def test_combine(
    tokens: int, k: int, width: int, rows_dtype: str, w_dtype: str, to: str, plus: str | None, slot: bool
) -> None:
    rows = normal(11, tokens * k, width, dtype=DTYPES[rows_dtype].torch)
    w = normal(12, tokens, k, dtype=DTYPES[w_dtype].torch)
    added = normal(13, tokens, width, dtype=DTYPES[plus].torch) if plus else None
    if tokens:
        rows[0] = torch.nan  # in one token only
    places = torch.randperm(tokens * k, generator=torch.Generator().manual_seed(14)).int() if slot else None
    op = combine_op(rows_dtype, w_dtype, to, k, width, slot, plus)
    found = call(op, source(op), FOLDER["kernels"], rows, places, w, added)
    close(found, type(op).reference(rows, places, w, added, **op.attrs))


@given(
    st.sampled_from([0, 1, 9, 70]),
    st.sampled_from([1, 2, 6, 16]),
    st.sampled_from([1, 12, 256]),
    FLOATS,
    st.sampled_from(["i32", "i64"]),
    st.sampled_from(["sigmoid", "sqrtsoftplus"]),
    st.booleans(),
    st.integers(0, 99),
)
def test_hash_route(
    tokens: int, k: int, experts: int, dtype: str, table: str, score: str, renorm: bool, seed: int
) -> None:
    """Tokens without a row, entries that are no expert, NaN that stays in its token's weights."""
    generator = torch.Generator().manual_seed(seed)
    op = hash_route_op(experts, k, 11, dtype, table, score=score, renorm=renorm, scale=1.5)
    logits = normal(seed, tokens, experts, dtype=DTYPES[dtype].torch) * 4
    if tokens > 1:
        logits[1] = torch.nan
    rows = torch.randint(-1, experts + 1, (11, k), generator=generator, dtype=DTYPES[table].torch)
    ids = torch.randint(-1, 12, (tokens,), generator=generator)
    found = call(op, source(op), FOLDER["kernels"], logits, rows, ids)
    expected = type(op).reference(logits, rows, ids, **op.attrs)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6, equal_nan=True)
    assert torch.equal(found[1], expected[1])


def test_square_roots_of_softplus_where_it_vanishes() -> None:
    """ln(1 + e^x) of an x far below 0 is e^x, which 1 + e^x rounds away; far above, x."""
    row = [-80.0, -30.0, -17.0, -9.0, -0.1, 0.0, 0.5, 15.0, 25.0, 1e4, -torch.inf]
    logits = torch.tensor([row, [torch.inf, *row[1:]], [*row[:-1], torch.nan]])
    op = route_op("route", 11, 11, score="sqrtsoftplus")
    w, id = call(op, source(op), FOLDER["kernels"], logits, None)
    expected = torch.nn.functional.softplus(logits.double()).sqrt().gather(1, id.long())
    assert torch.equal(id, type(op).reference(logits, None, **op.attrs)[1])
    torch.testing.assert_close(w.double(), expected, rtol=1e-6, atol=0, equal_nan=True)


def test_a_layer_of_experts() -> None:
    """The four kernels in a row, tokens of other ranks included: what the ops' references make of it."""
    experts, k, width, inner = 5, 3, 40, 24
    ids = torch.randint(-1, experts + 1, (33, k), generator=torch.Generator().manual_seed(22)).int()
    x, shared = normal(23, 33, width, dtype=torch.float32), normal(24, 33, width, dtype=torch.float32)
    w13 = normal(25, experts, 2 * inner, width, dtype=torch.float32) / width**0.5
    w2 = normal(26, experts, width, inner, dtype=torch.float32) / inner**0.5
    weights = normal(27, 33, k, dtype=torch.float32).softmax(-1)
    ops = [
        sort_op(k, experts),
        grouped_op("f32", experts, inner, width, gather=True, per_row=k, act="silu"),
        grouped_op("f32", experts, width, inner, scatter=True),
        combine_op("f32", "f32", "f32", k, width, slot=False, plus="f32"),
    ]
    sort, up, down, combine = [partial(call, op, source(op), FOLDER["kernels"]) for op in ops]
    slot, off = sort(ids)
    found = combine(down(up(x, w13, slot, off), w2, off, slot), weights, shared)
    expected = shared.clone()
    for t in range(33):
        for j, e in enumerate(ids[t].tolist()):
            if 0 <= e < experts:
                gate, up_row = (w13[e] @ x[t]).chunk(2)
                expected[t] += weights[t, j] * (w2[e] @ (torch.nn.functional.silu(gate) * up_row))
    close(found, expected)
