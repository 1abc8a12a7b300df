"""The fp8 kernels against their ops' references, in Triton's interpreter, once its casts are PyTorch's.

Run by test_triton_kernels.py in a process of its own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.codegen.schedules import Schedule
from moec.ir.ops.moe import SortByExpert
from moec.ir.scaled import Scaled, quantize
from moec.ir.types import DTYPES, parse_block
from tests.codegen.interpreted import FOLDER, call, close, folder, normal, poisoned, routings
from tests.codegen.triton_kernels import combine_op, fp8_op, linear_op, norm_op, quant_op, sort_op, source

__all__ = ["folder", "poisoned"]  # fixtures, which pytest finds by name

E4M3 = torch.float8_e4m3fn


@triton.jit
def cast_all(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n).to(y.dtype.element_ty), mask=i < n)


@triton.jit
def multiply(a, b, y, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(y + at, tl.dot(tl.load(a + at), tl.load(b + at)))


def saturated(x: torch.Tensor, to: torch.dtype) -> torch.Tensor:
    most = torch.finfo(to).max
    return (x.float().clamp(-most, most) if to.itemsize == 1 else x).to(to)


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """The same bits, but for NaN's."""
    nan = expected.isnan()
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[expected.element_size()]
    assert found.dtype == expected.dtype and torch.equal(found.isnan(), nan)
    assert torch.equal(found.view(bits)[~nan], expected.view(bits)[~nan])


@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16, E4M3, torch.float8_e5m2], ids=str)
def test_casts_are_pytorchs(to: torch.dtype) -> None:
    """Of fp32 with every upper half, and the lower half below, at and above the middle: and back again."""
    upper = torch.arange(1 << 16, dtype=torch.int64)[:, None] << 16
    bits = upper + torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    x = bits.flatten().to(torch.int32).view(torch.float32)
    y, back = torch.empty(len(x), dtype=to), torch.empty(len(x))
    cast_all[(triton.cdiv(len(x), 1 << 14),)](x, y, len(x), BLOCK=1 << 14)
    same(y, saturated(x, to))
    cast_all[(triton.cdiv(len(x), 1 << 14),)](y, back, len(x), BLOCK=1 << 14)
    same(back, y.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, E4M3], ids=str)
def test_products_are_of_the_operands_values(dtype: torch.dtype) -> None:
    a, b = normal(0, 32, 32, dtype=dtype), normal(1, 32, 32, dtype=dtype)
    y = torch.empty(32, 32)
    multiply[(1,)](a, b, y, N=32)
    torch.testing.assert_close(y, a.float() @ b.float(), atol=1e-5, rtol=1e-5)


def ordered(q: torch.Tensor) -> torch.Tensor:
    """e4m3's bits as integers in the order of their values."""
    bits = q.view(torch.uint8).int()
    return torch.where(bits >= 128, 128 - bits, bits)


# Of 1 + erf(x) in its tail little more is left than what both round off: |gate · up| · 2⁻²³ / 448.
GELU_TAIL = 5e-9


def within_one_rounding(found: Any, expected: Scaled, atol: float = 0.0) -> None:
    """Scales equal but for the last bits of an amax; values next to each other; the same NaN."""
    q, scale = found
    torch.testing.assert_close(scale, expected.scale, rtol=1e-5, atol=atol)
    nan = expected.q.float().isnan()
    assert torch.equal(q.float().isnan(), nan)
    assert ((ordered(q) - ordered(expected.q)).abs() <= 1)[~nan].all()


def bit_exact(found: Any, expected: Scaled) -> None:
    same(found[1], expected.scale)
    same(found[0], expected.q)


SPECIAL = [torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-7, -1e-5, 448.0, 449.0, 6e4]


@given(
    st.sampled_from([0, 1, 5, 70]),
    st.sampled_from([1, 100, 128, 130, 384]),
    st.sampled_from(["bf16", "f16", "f32"]),
    st.sampled_from(["1x128", "1x*"]),
    st.sampled_from(["fp32", "ue8m0"]),
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 383), st.sampled_from(SPECIAL)), max_size=4),
    st.sampled_from([0.0, 1e-6, 1.0, 3e4]),
)
def test_quant(rows: int, depth: int, dtype: str, block: str, scale: str, special: Any, size: float) -> None:
    x = (normal(depth, rows, depth, dtype=torch.float32) * size).to(DTYPES[dtype].torch)
    for row, column, value in special:
        if row < rows and column < depth:
            x[row, column] = value
    op = quant_op(dtype, depth, block, scale)
    bit_exact(call(op, source(op), FOLDER["kernels"], x), type(op).reference(x, **op.attrs))


def test_quant_of_powers_of_two() -> None:
    """amax / 448 just below, at and just above a power of two."""
    x = torch.tensor([[448.0], [448.00003], [447.99997], [224.0], [3.5], [3.4e38], [1e-4]])
    op = quant_op("f32", 1, scale="ue8m0")
    found = call(op, source(op), FOLDER["kernels"], x)
    assert found.scale.flatten().tolist()[:5] == [1.0, 2.0, 1.0, 0.5, 2.0**-7]
    bit_exact(found, type(op).reference(x, **op.attrs))


@pytest.mark.parametrize(("add", "plain"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("depth", [1, 127, 128, 520])
@pytest.mark.parametrize("scale", ["fp32", "ue8m0"])
def test_norm_and_quant(add: bool, plain: bool, dtype: str, depth: int, scale: str) -> None:
    """Sums bit for bit; of the norm, whose mean is summed in another order, a step of e4m3 here and there."""
    rows = [normal(depth + n, 5, depth, dtype=torch.float32).to(DTYPES[dtype].torch) for n in range(1 + add)]
    w = normal(3, depth, dtype=torch.float32)
    op = norm_op(dtype, depth, add, scale, plain=plain)
    found = call(op, source(op), FOLDER["kernels"], *rows, w)
    expected = type(op).reference(*rows, w, **op.attrs)
    if add:
        same(found[0], expected[0])
        if plain:
            torch.testing.assert_close(found[1], expected[1])
            q = quantize(found[1], (1, 128), scale)  # of just those rows
            same(found[2].q.float(), q.q.float())
            same(found[2].scale, q.scale)
        found, expected = found[-1], expected[-1]
    assert torch.allclose(found.scale, expected.scale, rtol=2e-2 if dtype == "bf16" else 3e-3)
    a, b = (Scaled(v.q, v.scale, (1, 128)).float() for v in (found, expected))
    away = (a - b).abs() > 1e-5 * b.abs()
    assert float(away.float().mean()) < 0.1 and bool(((a - b).abs() <= 0.13 * b.abs() + 1e-3).all())


BLOCKS = [
    ("1x128", "128x128"),
    ("1x128", "64x128"),
    ("1x128", "1x*"),
    ("1x*", "1x*"),
    ("*x*", "*x*"),
    ("1x*", "128x128"),
]
SCALES = st.sampled_from(BLOCKS)
SCHEDULES = st.builds(
    Schedule,
    form=st.sampled_from(["rows", "swapped"]),
    block_m=st.sampled_from([16, 32]),
    block_n=st.sampled_from([64, 128]),
    block_k=st.just(128),
    warps=st.just(4),
    stages=st.just(3),
    split=st.sampled_from([1, 1, 2, 4]),
)
# With and without tensor descriptors; columns that end inside a tile, up rows that start inside a block of
# scales, steps along K that are partial or read in pieces of 4 bytes.
TARGETS = st.sampled_from(["sm_89", "sm_90a"])
COLUMNS = st.sampled_from([1, 64, 128, 200])
DEPTHS = st.sampled_from([64, 132, 256, 300])
NANS = st.sampled_from(["", "x", "x_scale", "w_scale"])


def scaled(seed: int, *shape: int, block: str) -> Scaled:
    return quantize(normal(seed, *shape, dtype=torch.float32), parse_block(block))


def spoil(x: Scaled, w: Scaled, where: str) -> None:
    """NaN in a value of x's first row, in one of its scales, or in w's first scale."""
    if where == "x" and len(x.q):
        x.q[0, 3] = torch.nan
    elif where == "x_scale" and len(x.scale):
        x.scale[0, -1] = torch.nan
    elif where == "w_scale":
        w.scale.flatten(0, -2)[0, -1] = torch.nan


@given(
    routings(),
    SCHEDULES,
    TARGETS,
    COLUMNS,
    DEPTHS,
    SCALES,
    st.sampled_from(["", "fp32", "ue8m0"]),
    st.sampled_from([None, "silu", "gelu", "gelu_tanh"]),
    st.sampled_from([None, 0.5]),
    NANS,
)
def test_gather_grouped_linear(
    routing: Any,
    schedule: Schedule,
    target: str,
    columns: int,
    depth: int,
    scales: tuple[str, str],
    quant: str,
    act: str | None,
    limit: float | None,
    nan: str,
) -> None:
    experts, k, ids = routing
    slot, off = SortByExpert.reference(ids, experts=experts)
    x = scaled(1, len(ids), depth, block=scales[0])
    w = scaled(2, experts, columns * (2 if act else 1), depth, block=scales[1])
    spoil(x, w, nan)
    how = {"act": act, "limit": limit, "scales": scales, "quant": quant}
    op = fp8_op(experts, columns, depth, gather=True, per_row=k, **how)
    if quant:
        schedule = replace(schedule, block_n=128)
    found = call(op, source(op, target, [schedule]), FOLDER["kernels"], x, w, slot, off)
    expected = type(op).reference(x, w, slot, off, **op.attrs)
    if quant:
        within_one_rounding(found, expected, GELU_TAIL if act and act.startswith("gelu") else 0.0)
    else:
        close(found, expected)


@given(
    routings(),
    SCHEDULES,
    TARGETS,
    COLUMNS,
    DEPTHS,
    SCALES,
    st.sampled_from(["bf16", "f32"]),
    st.booleans(),
    NANS,
)
def test_grouped_linear(
    routing: Any,
    schedule: Schedule,
    target: str,
    columns: int,
    depth: int,
    scales: tuple[str, str],
    to: str,
    scatter: bool,
    nan: str,
) -> None:
    experts, _, ids = routing
    slot, off = SortByExpert.reference(ids, experts=experts)
    x = scaled(3, len(slot), depth, block=scales[0])
    w = scaled(4, experts, columns, depth, block=scales[1])
    spoil(x, w, nan)
    places = slot if scatter else None
    op = fp8_op(experts, columns, depth, scatter=scatter, scales=scales, to=to)
    found = call(op, source(op, target, [schedule]), FOLDER["kernels"], x, w, off, places)
    close(found, type(op).reference(x, w, off, places, **op.attrs))


@given(
    st.sampled_from([0, 1, 5, 70]),
    SCHEDULES,
    TARGETS,
    COLUMNS,
    DEPTHS,
    SCALES,
    st.sampled_from(["bf16", "f32"]),
    NANS,
)
def test_linear(
    rows: int,
    schedule: Schedule,
    target: str,
    columns: int,
    depth: int,
    scales: tuple[str, str],
    to: str,
    nan: str,
) -> None:
    x, w = scaled(5, rows, depth, block=scales[0]), scaled(6, columns, depth, block=scales[1])
    spoil(x, w, nan)
    op = linear_op(columns, depth, scales, to)
    found = call(op, source(op, target, [schedule]), FOLDER["kernels"], x, w)
    close(found, type(op).reference(x, w, **op.attrs))


def test_linear_of_many_rows_and_axes() -> None:
    """More row tiles than a band holds, several column tiles; x has two axes of rows."""
    x, w = scaled(7, 3, 16 * 13, 128, block="1x128"), scaled(8, 200, 128, block="128x128")
    op = linear_op(200, 128)
    text = source(op, "sm_90a", [Schedule("rows", 16, 64, 128, 4, 3)])
    found = call(op, text, FOLDER["kernels"], x, w)
    close(found, type(op).reference(x, w, **op.attrs))


@given(routings(), SCHEDULES, TARGETS, st.sampled_from(["fp32", "ue8m0"]), st.sampled_from([128, 200]))
@settings(max_examples=10)
def test_quantised_products_are_bit_exact(
    routing: Any, schedule: Schedule, target: str, quant: str, columns: int
) -> None:
    """Of small whole numbers and powers of two, so that every sum is exact in whatever order."""
    experts, k, ids = routing
    slot, off = SortByExpert.reference(ids, experts=experts)
    generator = torch.Generator().manual_seed(5)

    def whole(*shape: int) -> torch.Tensor:
        return torch.randint(-8, 9, shape, generator=generator).float().to(E4M3)

    def powers(*shape: int) -> torch.Tensor:
        return torch.randint(-2, 3, shape, generator=generator).float().exp2()

    x = Scaled(whole(len(ids), 256), powers(len(ids), 2), (1, 128))
    w = Scaled(whole(experts, columns, 256), powers(experts, -(-columns // 128), 2), (128, 128))
    op = fp8_op(experts, columns, 256, gather=True, per_row=k, quant=quant)
    schedule = replace(schedule, block_n=128)
    found = call(op, source(op, target, [schedule]), FOLDER["kernels"], x, w, slot, off)
    bit_exact(found, type(op).reference(x, w, slot, off, **op.attrs))


@pytest.mark.parametrize("target", ["sm_89", "sm_90a", "sm_100a", "sm_120a"])
@pytest.mark.parametrize("quant", ["", "fp32"])
def test_what_selection_picks(target: str, quant: str) -> None:
    """256 experts, most of them without rows, and the top 6: the ladder picks a variant for any number."""
    experts, k = 256, 6
    op = fp8_op(experts, 128, 256, gather=True, per_row=k, act="silu", quant=quant)
    text = source(op, target)
    w = scaled(7, experts, 256, 256, block="128x128")
    for tokens in (1, 40):
        x = scaled(8, tokens, 256, block="1x128")
        ids = torch.randint(0, 9, (tokens, k), generator=torch.Generator().manual_seed(9)) * 31
        slot, off = SortByExpert.reference(ids, experts=experts)
        found = call(op, text, FOLDER["kernels"], x, w, slot, off)
        expected = type(op).reference(x, w, slot, off, **op.attrs)
        within_one_rounding(found, expected) if quant else close(found, expected)


FAR = (1 << 31) // 128 + 3  # a row of 128 values beyond the reach of 32-bit offsets


@pytest.mark.parametrize("form", ["rows", "swapped"])
def test_tokens_beyond_32_bits(form: Any) -> None:
    """2 GiB of tokens that nobody touches but two, so that they take no memory."""
    x, few = torch.empty(FAR + 1, 128, dtype=E4M3), scaled(15, 2, 128, block="1x128")
    scale = torch.empty(FAR + 1, 1)
    x[[2, FAR]], scale[[2, FAR]] = few.q, few.scale
    w = scaled(16, 1, 64, 128, block="128x128")
    slot, off = torch.tensor([FAR, 2], dtype=torch.int32), torch.tensor([0, 2], dtype=torch.int32)
    op = fp8_op(1, 64, 128, gather=True)
    text = source(op, "sm_89", [Schedule(form, 16, 64, 128, 4, 3)])
    wide = Scaled(x, scale, (1, 128))
    close(
        call(op, text, FOLDER["kernels"], wide, w, slot, off),
        type(op).reference(wide, w, slot, off, **op.attrs),
    )


def test_a_layer_of_experts() -> None:
    """Five kernels in a row, tokens of other ranks included, beside the layer that isn't quantised."""
    experts, k, width, inner, tokens = 5, 3, 320, 160, 33
    ids = torch.randint(-1, experts + 1, (tokens, k), generator=torch.Generator().manual_seed(22)).int()
    x = normal(23, tokens, width, dtype=torch.bfloat16)
    w13 = normal(25, experts, 2 * inner, width, dtype=torch.float32) / width**0.5
    w2 = normal(26, experts, width, inner, dtype=torch.float32) / inner**0.5
    weights = normal(27, tokens, k, dtype=torch.float32).softmax(-1)
    ops = [
        quant_op("bf16", width),
        sort_op(k, experts),
        fp8_op(experts, inner, width, gather=True, per_row=k, act="silu", quant="fp32"),
        fp8_op(experts, width, inner, scatter=True, to="f32"),
        combine_op("f32", "f32", "f32", k, width, slot=False, plus=None),
    ]
    quant, sort, up, down, combine = [
        lambda *operands, op=op: call(op, source(op), FOLDER["kernels"], *operands) for op in ops
    ]
    slot, off = sort(ids)
    h = up(quant(x), quantize(w13, (128, 128)), slot, off)
    found = combine(down(h, quantize(w2, (128, 128)), off, slot), weights)
    expected = torch.zeros(tokens, width)
    for t in range(tokens):
        for j, e in enumerate(ids[t].tolist()):
            if 0 <= e < experts:
                gate, up_row = (w13[e] @ x[t].float()).chunk(2)
                expected[t] += weights[t, j] * (w2[e] @ (torch.nn.functional.silu(gate) * up_row))
    noise = (found - expected).square().sum() / expected.square().sum()
    # dB. A product of fp8 is good for 28; gate times up adds the errors of two, then another product follows.
    assert -10 * noise.log10() > 23
