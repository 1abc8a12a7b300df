"""Norm, rope and cache write in one, against their formulas in fp64, element by element."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moec.ir.op import op_class
from moec.ir.ops.attention import PagedCache
from tests.ir.helpers import reference


def turned(row: list[float], angles: list[float], layout: str) -> list[float]:
    """Each pair as a complex number, times e^(i·angle)."""
    out, half = list(row), len(angles)
    for i, angle in enumerate(angles):
        a, b = (2 * i, 2 * i + 1) if layout == "interleaved" else (i, i + half)
        z = complex(row[a], row[b]) * complex(math.cos(angle), math.sin(angle))
        out[a], out[b] = z.real, z.imag
    return out


def normed(row: list[float], w: list[float], eps: float) -> list[float]:
    root = math.sqrt(sum(v * v for v in row) / len(row) + eps)
    return [v / root * s for v, s in zip(row, w, strict=True)]


def heads_of(
    x: torch.Tensor,
    w: torch.Tensor | None,
    angles: torch.Tensor,
    norm: str,
    hi: float,
    layout: str,
    start: int,
) -> torch.Tensor:
    """x [N, h, D] as ``norm_rope`` has it, token by token."""
    out = []
    for token, angle in zip(x.double().tolist(), angles.double().tolist(), strict=True):
        flat = [v for head in token for v in head]
        if w is not None and norm == "full":
            flat = normed(flat, w.double().tolist(), 0.01)
        flat = [min(max(v, -hi), hi) for v in flat]
        width = len(token[0])
        heads = [flat[i : i + width] for i in range(0, len(flat), width)]
        if w is not None and norm == "head":
            heads = [normed(head, w.double().tolist(), 0.01) for head in heads]
        end = start + 2 * len(angle)
        out.append([head[:start] + turned(head[start:end], angle, layout) + head[end:] for head in heads])
    return torch.tensor(out, dtype=torch.float64).view(x.shape)


cases = given(
    tokens=st.integers(0, 3),
    norm=st.sampled_from([None, "head", "full"]),
    hi=st.sampled_from([math.inf, 0.5]),
    layout=st.sampled_from(["interleaved", "half"]),
    start=st.integers(0, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)


def drawn(
    tokens: int, norm: str | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    torch.manual_seed(tokens + 1)
    x, angles = torch.randn(tokens, 2, 7).to(dtype), torch.randn(tokens, 2) * 3
    return x, None if norm is None else torch.randn(7 if norm == "head" else 14), angles


@cases
def test_norm_rope(
    tokens: int, norm: str | None, hi: float, layout: str, start: int, dtype: torch.dtype
) -> None:
    x, w, angles = drawn(tokens, norm, dtype)
    how = {"norm": norm or "head", "eps": 0.01 if norm else 0.0, "layout": layout, "start": start}
    before = torch.randn(tokens, 2, 3).to(dtype)
    found = reference("norm_rope", x, angles.cos(), angles.sin(), w, before, lo=-hi, hi=hi, **how)
    expected = heads_of(x, w, angles, norm or "head", hi, layout, start).to(dtype)
    assert torch.equal(found[..., :3], before) and found.dtype == dtype
    torch.testing.assert_close(found[..., 3:], expected)


@cases
def test_kv_cache_write(
    tokens: int, norm: str | None, hi: float, layout: str, start: int, dtype: torch.dtype
) -> None:
    k, w, angles = drawn(tokens, norm, dtype)
    v = torch.randn(tokens, 2, 7).to(dtype)
    how = {"norm": norm or "head", "eps": 0.01 if norm else 0.0, "layout": layout, "start": start}
    pages = torch.full((8, 4, 7), 9.0).to(dtype)
    slots = torch.tensor([5, -1, 2][:tokens])
    for clamped in (False, True):
        cache = PagedCache(4, {3: pages})
        args = cache, 3, k, v, angles.cos(), angles.sin(), slots, w
        found = reference("kv_cache_write", *args, lo=-hi, hi=hi, clamp_v=clamped, **how).layers[3]
        expected = pages.clone()
        keys = heads_of(k, w, angles, norm or "head", hi, layout, start).to(dtype)
        for n, slot in enumerate(slots.tolist()):
            if slot >= 0:
                expected[slot] = torch.cat([keys[n], v[n].clamp(-hi, hi) if clamped else v[n]])
        torch.testing.assert_close(found, expected)
        assert (pages == 9.0).all()


@pytest.mark.parametrize("layout", ["interleaved", "half"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latent_cache_write(layout: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    kv_a, w, angles = torch.randn(3, 9).to(dtype), torch.randn(5), torch.randn(3, 2) * 3
    pages, slots = torch.full((8, 9), 9.0).to(dtype), torch.tensor([5, -1, 2])
    args = PagedCache(4, {0: pages}), 0, kv_a, w, angles.cos(), angles.sin(), slots
    found = reference("latent_cache_write", *args, eps=0.01, layout=layout).layers[0]
    expected = pages.clone()
    for n, slot in enumerate(slots.tolist()):
        row = kv_a[n].double().tolist()
        c = normed(row[:5], w.double().tolist(), 0.01)
        if slot >= 0:
            entry = torch.tensor([*c, *turned(row[5:], angles[n].double().tolist(), layout)])
            expected[slot] = entry.to(dtype)
    torch.testing.assert_close(found, expected)


def test_costs_by_hand() -> None:
    """What is read once, and the entries, which are written."""
    from moec.ir import Function
    from moec.ir.types import parse_type

    f = Function("f")
    types = [
        "cache<bf16[576], page=64>",
        "index",
        "bf16[10,576]",
        "bf16[512]",
        "f32[10,32]",
        "f32[10,32]",
        "i64[10]",
    ]
    args = [f.add_argument(f"a{i}", parse_type(t)) for i, t in enumerate(types)]
    op = f.create(op_class("latent_cache_write")(args, {"eps": 1e-6, "layout": "half"}))
    assert op.cost().bytes == 2 * 10 * 576 * 2 + 512 * 2 + 2 * 10 * 32 * 4 + 10 * 8
