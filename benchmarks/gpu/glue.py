"""What stands around DeepGEMM's grouped products, in four kernels that this benchmark brings along.

Rows of chosen experts lie as a product wants them. ``contiguous``: one run of rows [R, ·], every expert's
from a multiple of ALIGN on. ``masked``: ROWS rows for each expert [E·ROWS, ·], of which its first are used.
Scales of 1 x 128 values are written column-major at once, [groups, ROWS] of every ROWS rows, ROWS being R in
the contiguous layout: what DeepGEMM would else make in a launch of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

WIDE: int = 8  # groups of 128 values that one program takes


@triton.jit
def quantised(value):
    """[groups, 128] fp32 as fp8, and the groups' scales."""
    scale = tl.maximum(tl.max(tl.abs(value), axis=1), 1e-10) / 448.0
    return (value / scale[:, None]).to(tl.float8e4nv), scale


@triton.jit
def rank(
    x,  # [T, H]
    q,  # [T, H] fp8, where the products are of that
    scales,  # [T, groups] fp32
    ids,  # [T, k]
    counts,  # [E] int32, zero before
    ranks,  # [T, k] int32: which of its expert's rows a choice is, in no particular order
    hidden,
    groups,
    top_k: tl.constexpr,
    choices: tl.constexpr,  # top_k as a power of two
    wide: tl.constexpr,
    quantise: tl.constexpr,
):
    """Counts every expert's rows; each token is quantised, once."""
    token = tl.program_id(0)
    part = tl.program_id(1)
    if part == 0:
        choice = tl.arange(0, choices)
        there = choice < top_k
        expert = tl.load(ids + token * top_k + choice, mask=there, other=0)
        found = tl.atomic_add(counts + expert, 1, mask=there)
        tl.store(ranks + token * top_k + choice, found, mask=there)
    if quantise:
        group = part * wide + tl.arange(0, wide)
        column = group[:, None] * 128 + tl.arange(0, 128)[None, :]
        at = token.to(tl.int64) * hidden + column
        value = tl.load(x + at, mask=column < hidden, other=0.0).to(tl.float32)
        small, scale = quantised(value)
        tl.store(q + at, small, mask=column < hidden)
        tl.store(scales + token * groups + group, scale, mask=group < groups)


@triton.jit
def scatter(
    x,  # [T, H], in the products' dtype
    scales,  # [T, groups]
    ids,
    ranks,
    counts,
    rows,  # [R, H] or [E·ROWS, H]
    row_scales,
    owner,  # [R] int32: a row's expert, -1 where there is no row; contiguous only
    places,  # [T, k] int32: a choice's row
    tokens,
    experts,
    hidden,
    groups,
    ROWS,
    top_k: tl.constexpr,
    lanes: tl.constexpr,  # experts as a power of two
    ALIGN: tl.constexpr,
    wide: tl.constexpr,
    masked: tl.constexpr,
    quantise: tl.constexpr,
):
    """Each token's row to its experts; programs past the tokens say whose the rows are."""
    token = tl.program_id(0)
    part = tl.program_id(1)
    lane = tl.arange(0, lanes)
    count = tl.load(counts + lane, mask=lane < experts, other=0)
    room = (count + ALIGN - 1) // ALIGN * ALIGN
    end = tl.cumsum(room, axis=0)
    start = end - room
    if token < tokens:
        group = part * wide + tl.arange(0, wide)
        column = group[:, None] * 128 + tl.arange(0, 128)[None, :]
        value = tl.load(x + token.to(tl.int64) * hidden + column, mask=column < hidden)
        if quantise:
            scale = tl.load(scales + token * groups + group, mask=group < groups)
        for j in range(top_k):
            expert = tl.load(ids + token * top_k + j)
            first = expert * ROWS if masked else tl.sum(tl.where(lane == expert, start, 0), axis=0)
            row = (first + tl.load(ranks + token * top_k + j)).to(tl.int64)
            tl.store(rows + row * hidden + column, value, mask=column < hidden)
            if quantise:
                at = (row // ROWS) * groups * ROWS + group * ROWS + row % ROWS
                tl.store(row_scales + at, scale, mask=group < groups)
            if part == 0:
                tl.store(places + token * top_k + j, row.to(tl.int32))
    elif part == 0:
        here = (token - tokens) * ALIGN
        whose = tl.sum((end <= here).to(tl.int32), axis=0)
        used = tl.sum(tl.where(lane == whose, start + count, 0), axis=0)
        row = here + tl.arange(0, ALIGN)
        tl.store(owner + row, tl.where(row < used, whose, -1))


@triton.jit
def swiglu(
    gate_up,  # [·, 2·I]
    places,  # [T·k]
    out,  # [·, I]
    scales,
    width,
    groups,
    ROWS,
    wide: tl.constexpr,
    quantise: tl.constexpr,
):
    """silu(gate) · up of the rows that there are, quantised at once."""
    row = tl.load(places + tl.program_id(0)).to(tl.int64)
    group = tl.program_id(1) * wide + tl.arange(0, wide)
    column = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    there = column < width
    gate = tl.load(gate_up + row * 2 * width + column, mask=there, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + column, mask=there, other=0.0).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up
    if quantise:
        small, scale = quantised(value)
        tl.store(out + row * width + column, small, mask=there)
        at = (row // ROWS) * groups * ROWS + group * ROWS + row % ROWS
        tl.store(scales + at, scale, mask=group < groups)
    else:
        tl.store(out + row * width + column, value.to(out.dtype.element_ty), mask=there)


@triton.jit
def combine(
    down,  # [·, H]
    places,
    weights,  # [T, k] fp32
    y,  # [T, H]
    hidden,
    top_k: tl.constexpr,
    block: tl.constexpr,
):
    """y[t] = Σ_j weights[t, j] · down[places[t, j]], in fp32."""
    token = tl.program_id(0)
    column = tl.program_id(1) * block + tl.arange(0, block)
    total = tl.zeros([block], dtype=tl.float32)
    for j in tl.static_range(top_k):
        row = tl.load(places + token * top_k + j).to(tl.int64)
        part = tl.load(down + row * hidden + column, mask=column < hidden, other=0.0).to(tl.float32)
        total += tl.load(weights + token * top_k + j) * part
    tl.store(y + token.to(tl.int64) * hidden + column, total.to(y.dtype.element_ty), mask=column < hidden)
