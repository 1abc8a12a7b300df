"""moec.ops on the GPU against double precision, with NaN wherever nobody wrote."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moec.errors import Misaligned
from moec.ops import fused_experts, grouped_experts
from tests.gpu import reference
from tests.gpu.device import Device
from tests.moec.experts import Layer, close, layer

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
HIDDEN, WIDTH, EXPERTS, TOP = 128, 64, 16, 6

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def drawn(device: Device, tokens: int, dtype: torch.dtype, **sizes: int) -> Layer:
    sizes = {"k": TOP, "experts": EXPERTS, "hidden": HIDDEN, "width": WIDTH, **sizes}
    return device.layer(layer(tokens, dtype=dtype, **sizes))


@each_dtype
@pytest.mark.parametrize("tokens", [0, 1, 2, 16, 64, 257, 1024])
def test_fused_experts(tokens: int, dtype: torch.dtype, device: Device) -> None:
    one = drawn(device, tokens, dtype)
    close(fused_experts(*one.args), reference.experts(one), dtype)


@each_dtype
@pytest.mark.parametrize(("hidden", "width"), [(136, 56), (67, 33), (8, 520)])
@pytest.mark.parametrize("tokens", [3, 130])
def test_sizes_that_no_tile_divides(
    tokens: int, hidden: int, width: int, dtype: torch.dtype, device: Device
) -> None:
    one = drawn(device, tokens, dtype, hidden=hidden, width=width, experts=5, k=2)
    close(fused_experts(*one.args), reference.experts(one), dtype)


# Who is chosen.
@each_dtype
@pytest.mark.parametrize("tokens", [1, 33, 512])
def test_all_tokens_to_one_expert(tokens: int, dtype: torch.dtype, device: Device) -> None:
    one = drawn(device, tokens, dtype, k=1)
    one.ids.fill_(EXPERTS - 1)
    close(fused_experts(*one.args), reference.experts(one), dtype)


@each_dtype
def test_experts_that_nobody_chose_are_not_read(dtype: torch.dtype, device: Device) -> None:
    one = drawn(device, 65, dtype, k=2)
    one.ids = one.ids // 4 * 4  # repeated choices too: 0, 4, 8 and 12 remain
    wanted = reference.experts(one)
    idle = [e for e in range(EXPERTS) if e % 4]
    one.w13[idle], one.w2[idle] = math.nan, math.inf
    close(fused_experts(*one.args), wanted, dtype)


@each_dtype
def test_a_skewed_router(dtype: torch.dtype, device: Device) -> None:
    one = drawn(device, 700, dtype)
    popular = torch.arange(1, EXPERTS + 1).double().pow(-2).expand(700, -1)
    chosen = torch.multinomial(popular, TOP, generator=torch.Generator().manual_seed(0))
    one.ids = chosen.to(one.ids)
    close(fused_experts(*one.args), reference.experts(one), dtype)


@each_dtype
@pytest.mark.parametrize("skipped", [-1, EXPERTS, 2**31 - 1])
def test_a_skipped_choice_contributes_nothing(skipped: int, dtype: torch.dtype, device: Device) -> None:
    one = drawn(device, 40, dtype)
    one.ids[::2, 1], one.weights[::2, 1] = skipped, math.nan
    one.ids[7] = skipped
    got = fused_experts(*one.args)
    close(got, reference.experts(one), dtype)
    assert got[7].eq(0).all()


@each_dtype
def test_ranks_add_up(dtype: torch.dtype, device: Device) -> None:
    one = drawn(device, 50, dtype)
    half = EXPERTS // 2
    for first in (0, half):
        here = Layer(one.x, one.w13[first : first + half], one.w2[first : first + half], one.weights, one.ids)
        got = fused_experts(*here.args, expert_range=(first, first + half))
        close(got, reference.experts(here, first), dtype)


# What one token may do to another, and one call to the next.
@each_dtype
@pytest.mark.parametrize("tokens", [5, 200])
def test_nan_stays_in_its_token(tokens: int, dtype: torch.dtype, device: Device) -> None:
    one = drawn(device, tokens, dtype)
    clean = fused_experts(*one.args)
    one.x[3] = math.nan
    got = fused_experts(*one.args)
    rest = [t for t in range(tokens) if t != 3]
    assert got[3].isnan().all()
    assert torch.equal(got[rest], clean[rest])


@each_dtype
def test_the_same_call_gives_the_same_bits(dtype: torch.dtype, device: Device) -> None:
    one = drawn(device, 300, dtype)
    first = fused_experts(*one.args)
    assert all(torch.equal(fused_experts(*one.args), first) for _ in range(5))


@each_dtype
def test_tokens_in_another_order(dtype: torch.dtype, device: Device) -> None:
    one = drawn(device, 300, dtype)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1)).to(device.type)
    moved = Layer(one.x[order], one.w13, one.w2, one.weights[order], one.ids[order])
    got, wanted = fused_experts(*moved.args), fused_experts(*one.args)[order]
    if device.real:
        assert torch.equal(got, wanted)
    else:  # a CPU's products may sum a row differently by its place
        close(got, wanted.double(), dtype)


# How arguments lie in memory.
@each_dtype
def test_out_shared_and_strides(dtype: torch.dtype, device: Device) -> None:
    one = drawn(device, 37, dtype)
    shared = torch.randn_like(one.x)
    wanted = reference.experts(one, shared=shared)
    out = torch.full_like(one.x, math.nan)
    assert fused_experts(*one.args, shared=shared, out=out) is out
    close(out, wanted, dtype)
    apart = Layer(_strided(one.x), one.w13, one.w2, _strided(one.weights), one.ids.long())
    close(fused_experts(*apart.args, shared=_strided(shared)), wanted, dtype)
    assert fused_experts(*one.args, shared=shared, out=one.x) is one.x
    close(one.x, wanted, dtype)


@each_dtype
@pytest.mark.parametrize("misplaced", ["x", "w13", "w2", "weights", "ids"])
def test_a_pointer_that_nothing_divides(misplaced: str, dtype: torch.dtype, device: Device) -> None:
    """Kernels that were promised a multiple of 16 bytes refuse what isn't one; nothing is read wrongly."""
    one = drawn(device, 19, dtype)
    wanted = reference.experts(one)
    setattr(one, misplaced, _misplaced(getattr(one, misplaced)))
    try:
        got = fused_experts(*one.args)
    except Misaligned as refused:
        assert device.kernels and misplaced in ("x", "w13", "w2"), refused
    else:
        close(got, wanted, dtype)


@each_dtype
@pytest.mark.parametrize("spare", [0, 9])
def test_grouped_experts(spare: int, dtype: torch.dtype, device: Device) -> None:
    one = drawn(device, 1, dtype, experts=6, k=1)
    counts = [0, 70, 1, 0, 16, 0]
    off = torch.tensor([0, *counts]).cumsum(0).to(device.type, torch.int32)
    x = torch.randn(sum(counts) + spare, HIDDEN, generator=torch.Generator().manual_seed(0))
    x = x.to(device.type, dtype)
    x[sum(counts) :] = math.nan
    close(grouped_experts(x, off, one.w13, one.w2), reference.grouped(one, x, off), dtype)


# Past the last element that an int32 counts. A self-test has room for the same bodies in small only.
def test_weights_past_int32(device: Device) -> None:
    hidden, width, experts = (4096, 4224, 64) if device.real else (64, 48, 4)
    size = 3 * hidden * width * experts * 2
    _need(device, size * 5 // 4)
    w13 = torch.empty(experts, 2 * width, hidden, dtype=torch.bfloat16, device=device.type)
    w2 = torch.empty(experts, hidden, width, dtype=torch.bfloat16, device=device.type)
    assert not device.real or w13.numel() > 2**31
    small = drawn(device, 5, torch.bfloat16, hidden=hidden, width=width, experts=1, k=1)
    w13[-1], w2[-1] = small.w13[0], small.w2[0]  # the rest stays NaN
    small.ids.fill_(0)
    got = fused_experts(small.x, w13, w2, small.weights, torch.full_like(small.ids, experts - 1))
    close(got, reference.experts(small), torch.bfloat16)


def test_rows_past_int32(device: Device) -> None:
    tokens, hidden = (2**16, 4224) if device.real else (64, 48)
    one = drawn(device, 8, torch.bfloat16, hidden=hidden, width=64, experts=8, k=8)
    rows = tokens * 8 * hidden
    _need(device, 3 * rows * 2)
    assert not device.real or rows > 2**31
    many = Layer(
        one.x.repeat(tokens // 8, 1),
        one.w13,
        one.w2,
        one.weights.repeat(tokens // 8, 1),
        one.ids.repeat(tokens // 8, 1),
    )
    got = fused_experts(*many.args)
    wanted = reference.experts(one)
    for first in (0, tokens // 2, tokens - 8):
        close(got[first : first + 8], wanted, torch.bfloat16)


def _strided(tensor: Tensor) -> Tensor:
    """The same values, every other column of a wider tensor."""
    wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), 77)
    wide[..., ::2] = tensor
    return wide[..., ::2]


def _misplaced(tensor: Tensor) -> Tensor:
    """The same, one element past where an allocation starts."""
    longer = tensor.new_empty(tensor.numel() + 1)
    longer[1:] = tensor.flatten()
    return longer[1:].view(tensor.shape)


def _need(device: Device, size: int) -> None:
    if device.free() < size:
        pytest.skip(f"needs {size / 2**30:.1f} GiB of free memory on the device")
