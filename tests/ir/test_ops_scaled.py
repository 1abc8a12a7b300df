"""Quantised values: every bit against torch's float8 types and arithmetic written out number by number."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moec.ir.scaled import Scaled, quantize
from moec.ir.types import bf16, f32
from tests.ir.helpers import reference

BLOCKS = st.tuples(st.sampled_from([0, 1, 2, 3, 128]), st.sampled_from([0, 1, 2, 4, 128]))
FORMATS = st.sampled_from(["fp32", "ue8m0"])


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


# e4m3 from its definition: a sign, 4 bits of exponent (bias 7), 3 of mantissa; 0x7f is NaN, nothing infinite.
def decode(code: int) -> Fraction:
    sign, exponent, mantissa = -1 if code & 0x80 else 1, code >> 3 & 15, code & 7
    if exponent == 0:
        return sign * Fraction(mantissa, 8) * Fraction(1, 2**6)
    return sign * (1 + Fraction(mantissa, 8)) * Fraction(2) ** (exponent - 7)


CODES = {code: decode(code) for code in range(256) if code & 0x7F != 0x7F}


def encode(value: float) -> int:
    """The nearest code, of two the even one; beyond 448 the last."""
    exact = Fraction(value)
    same_sign = [c for c in CODES if bool(c & 0x80) == (math.copysign(1.0, value) < 0)]
    return min(same_sign, key=lambda c: (abs(CODES[c] - exact), c & 1))


def test_the_format_is_torch_s() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    values = codes.view(torch.float8_e4m3fn).double().tolist()
    for code, value in enumerate(values):
        assert math.isnan(value) if code not in CODES else Fraction(value) == CODES[code]


def expected(x: torch.Tensor, block: tuple[int, int], scale: str) -> tuple[list[list[int]], np.ndarray]:
    """Codes and scales of a matrix, one number at a time, in NumPy's fp32."""
    rows, columns = x.shape
    heights, widths = block[0] or max(rows, 1), block[1] or max(columns, 1)
    grid = (
        1 if block[0] == 0 else -(-rows // heights),
        1 if block[1] == 0 else -(-columns // widths),
    )
    values = x.float().numpy()
    scales = np.zeros(grid, np.float32)
    codes = [[0] * columns for _ in range(rows)]
    for i in range(grid[0]):
        for j in range(grid[1]):
            r, c = range(rows)[i * heights : (i + 1) * heights], range(columns)[j * widths : (j + 1) * widths]
            inside = [abs(values[a, b]) for a in r for b in c if math.isfinite(values[a, b])]
            s = max(np.float32(1e-4), *inside, np.float32(0)) / np.float32(448)
            if scale == "ue8m0":
                s = np.float32(
                    2.0 ** next(e for e in range(-126, 128) if Fraction(2) ** e >= Fraction(float(s)))
                )
            scales[i, j] = s
            for a in r:
                for b in c:
                    v = values[a, b]
                    codes[a][b] = encode(float(v / s)) if math.isfinite(v) else 0x7F
    return codes, scales


@st.composite
def matrices(draw: st.DrawFn) -> torch.Tensor:
    rows, columns = draw(st.integers(0, 4)), draw(st.integers(1, 9))
    numbers = st.one_of(
        st.floats(-1e4, 1e4, width=32),
        st.sampled_from([0.0, -0.0, 1e-6, 448.0, 3e38, -1e30, math.inf, -math.inf, math.nan, 1.0, 0.5, 17.0]),
    )
    drawn = draw(st.lists(numbers, min_size=rows * columns, max_size=rows * columns))
    return torch.tensor(drawn, dtype=torch.float32).view(rows, columns)


@given(matrices(), BLOCKS, FORMATS)
def test_values_and_scales_bit_for_bit(x: torch.Tensor, block: tuple[int, int], scale: str) -> None:
    found = reference("quant", x, block=block, scale=scale)
    codes, scales = expected(x, block, scale)
    assert found.block == block and found.q.dtype == torch.float8_e4m3fn
    assert torch.equal(found.scale, torch.from_numpy(scales))
    bits = found.q.view(torch.uint8)
    finite = x.isfinite()
    assert torch.equal(bits[finite], torch.tensor(codes, dtype=torch.uint8).view(x.shape)[finite])
    assert bool(found.q.float()[~finite].isnan().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_whole_tiles_are_what_torch_s_cast_makes_of_them(dtype: torch.dtype) -> None:
    x = (randn(64, 512) * torch.logspace(-3, 2, 64)[:, None]).to(dtype)
    found = reference("quant", x, block=(1, 128), scale="fp32")
    tiles = x.float().view(64, 4, 128)
    s = tiles.abs().amax(-1).clamp(min=1e-4) / 448
    assert torch.equal(found.scale, s)
    assert torch.equal(
        found.q.view(torch.uint8), (tiles / s[..., None]).to(found.q.dtype).view(64, 512).view(torch.uint8)
    )
    # A block with more than a few values reaches the largest one.
    assert bool((found.q.float().view(64, 4, 128).abs().amax(-1) == 448).all())


@given(st.lists(st.floats(2.0**-126, 2.0**120, width=32), min_size=1, max_size=8))
def test_ue8m0_scales_are_torch_s_e8m0_and_the_next_from_there_on_up(amax: list[float]) -> None:
    x = torch.tensor(amax, dtype=torch.float32)[:, None]
    plain = reference("quant", x, block=(1, 0), scale="fp32").scale
    power = reference("quant", x, block=(1, 0), scale="ue8m0").scale
    assert torch.equal(power.to(torch.float8_e8m0fnu).float(), power)
    assert bool((power >= plain).all()) and bool((power / 2 < plain).all())


def test_a_stack_has_scales_of_its_own() -> None:
    x = randn(3, 5, 7) * torch.tensor([1.0, 100.0, 0.01])[:, None, None]
    together = reference("quant", x, block=(2, 4), scale="fp32")
    for e in range(3):
        alone = reference("quant", x[e], block=(2, 4), scale="fp32")
        assert torch.equal(together.scale[e], alone.scale)
        assert torch.equal(together.q[e].view(torch.uint8), alone.q.view(torch.uint8))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_spoils_only_itself(bad: float) -> None:
    x = randn(3, 256)
    x[1, 5] = 0.0
    clean = reference("quant", x, block=(1, 128), scale="fp32")
    x[1, 5] = bad
    found = reference("quant", x, block=(1, 128), scale="fp32")
    assert torch.equal(found.scale, clean.scale)
    differ = found.q.view(torch.uint8) != clean.q.view(torch.uint8)
    assert differ.nonzero().tolist() == [[1, 5]] and bool(found.q[1, 5].float().isnan())
    w = reference("quant", randn(4, 256), block=(128, 128), scale="fp32")
    y = reference("linear", found, w, None, acc=f32)
    assert y.isnan().tolist() == [[False] * 4, [True] * 4, [False] * 4]


def scaled(shape: tuple[int, ...], block: tuple[int, int], seed: int) -> Scaled:
    """Values and scales that no quantisation made: any fp8 times any scale."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(shape, generator=generator).mul(20).to(torch.float8_e4m3fn)
    grid = [1 if b == 0 else -(-n // b) for n, b in zip(shape[-2:], block, strict=True)]
    return Scaled(q, torch.rand(*shape[:-2], *grid, generator=generator) + 0.5, block)


def meant(x: Scaled) -> torch.Tensor:
    """The numbers in float64, one at a time."""
    if x.q.dim() == 3:
        parts = (Scaled(q, s, x.block) for q, s in zip(x.q, x.scale, strict=True))
        return torch.stack([meant(part) for part in parts])
    out = x.q.double()
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            a, b = (i // x.block[0] if x.block[0] else 0), (j // x.block[1] if x.block[1] else 0)
            out[i, j] *= x.scale[a, b].double()
    return out


@given(BLOCKS, st.integers(1, 5), st.integers(1, 9))
def test_dequant(block: tuple[int, int], rows: int, columns: int) -> None:
    x = scaled((2, rows, columns), block, rows)
    found = reference("dequant", x, to=f32)
    assert torch.equal(found, meant(x).float())  # a product of 4 and 24 bits, rounded once
    assert torch.equal(reference("dequant", x, to=bf16), found.bfloat16())


def test_scaled_pairs_two_tensors() -> None:
    x = scaled((5, 7), (2, 3), 0)
    found = reference("scaled", x.q, x.scale, block=(2, 3))
    assert found.q is x.q and found.scale is x.scale and found.block == (2, 3)


@given(
    st.sampled_from(
        [((4, 6), (2, 3)), ((4, 6), (1, 6)), ((0, 4), (3, 2)), ((0, 0), (1, 5)), ((2, 1), (2, 1))]
    )
)
def test_refine_changes_no_number(blocks: tuple[tuple[int, int], tuple[int, int]]) -> None:
    old, new = blocks
    x = scaled((2, 5, 11), old, 3)
    found = reference("refine", x, block=new)
    assert found.block == new and torch.equal(found.q.view(torch.uint8), x.q.view(torch.uint8))
    assert found.scale.shape == (2, *(-(-n // b) for n, b in zip((5, 11), new, strict=True)))
    assert torch.equal(meant(found), meant(x))


@given(
    st.tuples(st.sampled_from([0, 1]), st.sampled_from([0, 1, 3, 4])),
    BLOCKS,
    st.integers(0, 3),
    st.integers(1, 9),
)
def test_products(x_block: tuple[int, int], w_block: tuple[int, int], rows: int, depth: int) -> None:
    """Against float64; not the order of operations, which the next test holds."""
    x, w = scaled((rows, depth), x_block, 1), scaled((5, depth), w_block, 2)
    exact = meant(x) @ meant(w).T
    y = reference("linear", x, w, None, acc=f32)
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-3)
    assert reference("linear", x, w, None, acc=None).dtype == torch.bfloat16
    bias = randn(5)
    torch.testing.assert_close(
        reference("linear", x, w, bias, acc=f32).double(), exact + bias.double(), rtol=1e-5, atol=1e-3
    )


def test_a_block_is_summed_before_it_is_scaled() -> None:
    """Along K wherever a scale of x or of w changes: here at 2, 3, 4, 6 of 8."""
    x, w = scaled((3, 8), (1, 2), 1), scaled((4, 8), (2, 3), 2)
    y = torch.zeros(3, 4)
    for start, end in ((0, 2), (2, 3), (3, 4), (4, 6), (6, 8)):
        part = x.q[:, start:end].float() @ w.q[:, start:end].float().T
        y = y + part * x.scale[:, start // 2, None] * w.scale[:, start // 3].repeat_interleave(2)
    assert torch.equal(reference("linear", x, w, None, acc=f32), y)


@pytest.mark.parametrize("x_block", [(1, 4), (0, 0), (1, 0)])
def test_experts(x_block: tuple[int, int]) -> None:
    x, w = scaled((6, 8), x_block, 1), scaled((3, 4, 8), (2, 3), 2)
    off = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    wide, weights = meant(x), meant(w)
    exact = torch.zeros(6, 4, dtype=torch.float64)
    exact[:2], exact[2:5] = wide[:2] @ weights[0].T, wide[2:5] @ weights[2].T
    y = reference("grouped_linear", x, w, off, None, to=f32)
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-3)
    slot = torch.tensor([3, 0, 5, 1, 2, 4], dtype=torch.int32)
    placed = reference("grouped_linear", x, w, off, slot, to=f32)
    assert torch.equal(placed[slot.long()], y)
    # The same rows, gathered from three tokens of two slots each.
    token = slot // 2
    rows = reference("gather_rows", x, slot, per_row=2)
    torch.testing.assert_close(meant(rows), wide[token.long()])
    how = {"per_row": 2, "epilogue": "swiglu", "act": "silu"}
    plain = reference("gather_grouped_linear", x, w, slot, off, **how, quant=None, scale="fp32", to=f32)
    product = reference("grouped_linear", rows, w, off, None, to=f32)
    torch.testing.assert_close(plain, reference("swiglu", product, None, act="silu"))
    for scale in ("fp32", "ue8m0"):
        fused = reference("gather_grouped_linear", x, w, slot, off, **how, quant=(1, 2), scale=scale, to=None)
        apart = quantize(plain, (1, 2), scale)
        assert torch.equal(fused.scale, apart.scale) and fused.block == (1, 2)
        assert torch.equal(fused.q.view(torch.uint8), apart.q.view(torch.uint8))


def test_moving_scaled_values_moves_their_scales() -> None:
    x = scaled((8, 6), (2, 3), 1)
    for axis, sizes in ((0, (2, 6)), (1, (3, 3)), (-1, (3, 3))):
        parts = reference("split", x, sizes=sizes, axis=axis)
        wanted = meant(x).split(list(sizes), dim=axis)
        assert all(torch.equal(meant(p), m) for p, m in zip(parts, wanted, strict=True))
        again = reference("concat", *parts, axis=axis)
        assert torch.equal(again.scale, x.scale) and torch.equal(meant(again), meant(x))
    whole = scaled((8, 6), (0, 3), 1)
    parts = reference("split", whole, sizes=(3, 5), axis=0)
    assert [torch.equal(p.scale, whole.scale) for p in parts] == [True, True]
    heads = reference("reshape", x, shape=(2, 4, 6))
    assert heads.scale.shape == (2, 2, 2) and torch.equal(meant(heads), meant(x).view(2, 4, 6))
    rows = scaled((4, 12), (1, 3), 1)
    heads = reference("reshape", rows, shape=(4, 2, 6))
    assert torch.equal(meant(heads), meant(rows).view(4, 2, 6))
    stacked = reference("stack", [x, x], experts=None)
    assert stacked.scale.shape == (2, 4, 2) and torch.equal(meant(stacked)[1], meant(x))
