"""Pointwise, dense, shape and weight ops against torch's own functions or a calculation by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from transformers.activations import ACT2FN

from moec.ir.types import bf16, f32
from tests.ir.helpers import ints, reference

F32_BF16 = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    torch.manual_seed(sum(shape))
    return torch.randn(*shape).to(dtype)


@F32_BF16
def test_add_and_mul_round_once_and_broadcast(dtype: torch.dtype) -> None:
    a, b = randn(3, 4, dtype=dtype), randn(4, dtype=dtype)
    assert torch.equal(reference("add", a, b), torch.add(a, b))
    assert torch.equal(reference("mul", a, b[:1]), torch.mul(a, b[:1]))
    assert reference("mul", a, b).dtype == dtype


@F32_BF16
def test_sigmoid(dtype: torch.dtype) -> None:
    x = randn(3, 4, dtype=dtype)
    expected = torch.tensor([[1 / (1 + math.exp(-v)) for v in row] for row in x.tolist()])
    torch.testing.assert_close(reference("sigmoid", x), expected.to(dtype))


def test_clamp() -> None:
    x = torch.tensor([-3.0, -0.5, 0.0, 2.0, math.nan])
    found = reference("clamp", x, lo=-1.0, hi=1.5)
    assert torch.equal(found[:4], torch.tensor([-1.0, -0.5, 0.0, 1.5])) and found[4].isnan()


def test_cast_rounds_to_even() -> None:
    # bf16 holds 8 bits: 257 lies between 256 and 258, 259 between 258 and 260.
    assert reference("cast", torch.tensor([257.0, 259.0]), to=bf16).tolist() == [256.0, 260.0]


def test_zeros_like() -> None:
    found = reference("zeros_like", torch.full((2, 3), math.nan).bfloat16(), dtype=f32)
    assert found.dtype == torch.float32 and found.tolist() == [[0.0] * 3] * 2


@F32_BF16
@pytest.mark.parametrize(
    ("act", "hf"), [("silu", "silu"), ("gelu", "gelu"), ("gelu_tanh", "gelu_pytorch_tanh")]
)
def test_swiglu(act: str, hf: str, dtype: torch.dtype) -> None:
    gate, up = randn(5, 8, dtype=dtype), randn(5, 9, dtype=dtype)[:, :8]
    expected = (ACT2FN[hf](gate.double()) * up.double()).to(dtype)
    found = reference("swiglu", gate, up, act=act)
    torch.testing.assert_close(found, expected)
    # With one operand the gate comes first: the other order differs.
    torch.testing.assert_close(reference("swiglu", torch.cat([gate, up], 1), None, act=act), found)
    assert not torch.allclose(reference("swiglu", torch.cat([up, gate], 1), None, act=act), found)


@given(st.floats(width=16), st.floats(width=16), st.sampled_from([0.5, 3.0, 1e6]))
def test_a_limit_clamps_first(gate: float, up: float, limit: float) -> None:
    """As DeepSeek V4's experts do: of NaN and infinity what torch.clamp makes of them."""
    gates, ups = torch.tensor([gate]).half(), torch.tensor([up]).half()
    clamped = torch.nn.SiLU()(gates.double().clamp(max=limit)) * ups.double().clamp(min=-limit, max=limit)
    found = reference("swiglu", gates, ups, act="silu", limit=limit)
    torch.testing.assert_close(found, clamped.half(), equal_nan=True)
    assert found.isnan().item() == (math.isnan(gate) or math.isnan(up) or gate == -math.inf)


@F32_BF16
def test_linear(dtype: torch.dtype) -> None:
    x, w, bias = randn(2, 3, 16, dtype=dtype), randn(5, 16, dtype=dtype), randn(5, dtype=dtype)
    exact = F.linear(x.double(), w.double(), bias.double())
    torch.testing.assert_close(reference("linear", x, w, bias), exact.to(dtype))
    torch.testing.assert_close(reference("linear", x, w), F.linear(x.double(), w.double()).to(dtype))
    # acc=f32 leaves out the rounding to the operands' dtype.
    wide = reference("linear", x, w, bias, acc=f32)
    assert wide.dtype == torch.float32
    torch.testing.assert_close(wide, exact.float(), rtol=1e-5, atol=1e-5)


@F32_BF16
def test_add_rms_norm_norms_the_rounded_sum(dtype: torch.dtype) -> None:
    x, residual, w = randn(5, 16, dtype=dtype), randn(6, 16, dtype=dtype)[1:], randn(16)
    total, normed = reference("add_rms_norm", x, residual, w, eps=1e-3)
    assert torch.equal(total, x + residual)
    exact = F.rms_norm((x + residual).double(), (16,), w.double(), 1e-3)
    torch.testing.assert_close(normed, exact.to(dtype))


@F32_BF16
def test_plain_and_quantised_rows_are_of_one_norm(dtype: torch.dtype) -> None:
    x, residual, w = randn(5, 16, dtype=dtype), randn(6, 16, dtype=dtype)[1:], randn(16)
    total, normed, q = reference("add_rms_norm_and_quant", x, residual, w, eps=1e-3, quant=(1, 4))
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(normed, F.rms_norm(total.double(), (16,), w.double(), 1e-3).to(dtype))
    by = normed.float().view(5, 4, 4).abs().amax(2).clamp_min(1e-4) / 448
    assert torch.equal(q.scale, by)
    again = (normed.float().view(5, 4, 4) / by[..., None]).to(torch.float8_e4m3fn).view(5, 16)
    assert torch.equal(q.q.float(), again.float())


def test_embedding() -> None:
    table = randn(7, 3)
    ids = torch.tensor([6, 0, 6])
    assert torch.equal(reference("embedding", ids, table), F.embedding(ids, table))
    assert torch.equal(reference("embedding", ids.int(), table), F.embedding(ids, table))


@F32_BF16
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_rms_norm(eps: float, dtype: torch.dtype) -> None:
    x, w = randn(3, 4, 16, dtype=dtype), randn(16)
    found = reference("rms_norm", x, w, eps=eps)
    torch.testing.assert_close(found, F.rms_norm(x.double(), (16,), w.double(), eps).to(dtype))
    if dtype == torch.bfloat16:  # rounding before the weight, as some models do, is another function
        assert not torch.equal(found, F.rms_norm(x.float(), (16,), None, eps).to(dtype) * w.to(dtype))


def test_reshape_is_row_major() -> None:
    x = torch.arange(6).view(2, 3)
    assert reference("reshape", x, shape=(3, 2)).tolist() == [[0, 1], [2, 3], [4, 5]]


def test_split_and_concat_undo_each_other() -> None:
    x = randn(4, 6)
    for axis, sizes in ((-1, (1, 2, 3)), (0, (3, 1)), (1, (6,))):
        parts = reference("split", x, sizes=sizes, axis=axis)
        assert [p.shape[axis] for p in parts] == list(sizes)
        assert torch.equal(reference("concat", *parts, axis=axis), x)
    assert torch.equal(reference("split", x, sizes=(1, 5))[0], x[:, :1])


def test_broadcast() -> None:
    x = randn(2, 3)
    found = reference("broadcast", x, axis=1, size=4)
    assert found.shape == (2, 4, 3)
    assert all(torch.equal(found[:, i], x) for i in range(4))
    assert reference("broadcast", x, axis=2, size=4).shape == (2, 3, 4)


@pytest.mark.parametrize(("lengths", "expected"), [((3, 0, 2), [0, 3, 3, 5]), ((), [0])])
def test_prefix_sum(lengths: tuple[int, ...], expected: list[int]) -> None:
    found = reference("prefix_sum", ints(*lengths))
    assert found.tolist() == expected and found.dtype == torch.int32


def test_stack() -> None:
    members = [randn(2, 3) + n for n in range(3)]
    found = reference("stack", members, experts=None)
    assert found.shape == (3, 2, 3) and all(torch.equal(found[n], members[n]) for n in range(3))
