"""moec.ops on the GPU with experts in fp8, against the numbers that they stand for in double precision."""

from __future__ import annotations

import math

import pytest
import torch

from moec.ops import fused_experts, grouped_experts
from tests.gpu import reference
from tests.gpu.device import Device
from tests.moec.fp8_experts import BLOCKS, E4M3, LEAST, X_BLOCKS, FP8Layer, fp8_layer, ratio

HIDDEN, WIDTH, EXPERTS, TOP = 384, 256, 16, 6

each_block = pytest.mark.parametrize("block", BLOCKS, ids=["blocks", "rows", "experts"])


def drawn(device: Device, block: tuple[int, int] = (128, 128), **given: object) -> FP8Layer:
    sizes = {
        "tokens": 40,
        "k": TOP,
        "experts": EXPERTS,
        "hidden": HIDDEN,
        "width": WIDTH,
        "dtype": torch.bfloat16,
    }
    one = fp8_layer(block, **{**sizes, **given})  # type: ignore[arg-type]
    return FP8Layer(*(t if t is None else t.to(device.type) for t in vars(one).values()))


def run(one: FP8Layer) -> torch.Tensor:
    return fused_experts(*one.args, **one.scales)


def near(found: torch.Tensor, one: FP8Layer) -> None:
    assert found.dtype == torch.bfloat16 and bool(found.isfinite().all())
    assert ratio(found, reference.experts(one.meant())) > LEAST


@each_block
@pytest.mark.parametrize("scaled_x", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 16, 64, 257, 1024])
def test_fused_experts(tokens: int, scaled_x: bool, block: tuple[int, int], device: Device) -> None:
    one = drawn(device, block, tokens=tokens, scaled_x=scaled_x)
    near(run(one), one)


@each_block
@pytest.mark.parametrize("x_block", X_BLOCKS[1:], ids=["row", "tensor"])
@pytest.mark.parametrize("tokens", [1, 70, 257])
def test_scales_of_rows_and_of_all_of_x(
    tokens: int, x_block: tuple[int, int], block: tuple[int, int], device: Device
) -> None:
    one = drawn(device, block, tokens=tokens, scaled_x=x_block)
    near(run(one), one)


@each_block
@pytest.mark.parametrize("scaled_x", [False, *X_BLOCKS])
@pytest.mark.parametrize("rows", [5, 300])
def test_grouped_experts(
    rows: int, scaled_x: bool | tuple[int, int], block: tuple[int, int], device: Device
) -> None:
    """Half of the experts have no rows; those behind the last are no expert's."""
    one = drawn(device, block, tokens=rows, scaled_x=scaled_x)
    counts = torch.zeros(EXPERTS, dtype=torch.int64)
    counts[::2] = torch.randint(0, rows // 8 + 2, (EXPERTS // 2,), generator=torch.Generator().manual_seed(2))
    off = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).clamp(max=rows)
    off = off.to(device.type, torch.int32)
    found = grouped_experts(one.x, off, one.w13, one.w2, **one.scales)
    meant = one.meant()
    wanted = reference.grouped(meant, meant.x, off)
    end = int(off[-1])
    assert found.dtype == torch.bfloat16 and found[end:].eq(0).all()
    assert ratio(found[:end], wanted[:end]) > LEAST


def test_no_tokens(device: Device) -> None:
    one = drawn(device, tokens=0)
    assert run(one).shape == (0, HIDDEN)


@each_block
@pytest.mark.parametrize(("hidden", "width"), [(144, 48), (132, 36), (67, 33), (16, 520), (1000, 200)])
@pytest.mark.parametrize("tokens", [3, 130])
def test_sizes_that_no_tile_divides(
    tokens: int, hidden: int, width: int, block: tuple[int, int], device: Device
) -> None:
    """Partial blocks of scales, up rows that start inside one, steps that are partial or read in pieces."""
    one = drawn(device, block, tokens=tokens, hidden=hidden, width=width, experts=5, k=2)
    near(run(one), one)


def test_256_experts(device: Device) -> None:
    one = drawn(device, tokens=33, experts=256, k=8)
    near(run(one), one)


@pytest.mark.parametrize("tokens", [1, 33, 512])
def test_all_tokens_to_one_expert(tokens: int, device: Device) -> None:
    one = drawn(device, tokens=tokens, k=1)
    one.ids.fill_(EXPERTS - 1)
    near(run(one), one)


def test_experts_that_nobody_chose_are_not_read(device: Device) -> None:
    one = drawn(device, tokens=65, k=2)
    one.ids = one.ids // 4 * 4
    wanted = run(one)
    idle = [e for e in range(EXPERTS) if e % 4]
    one.w13[idle], one.w13_scale[idle], one.w2_scale[idle] = math.nan, math.nan, math.inf
    assert torch.equal(run(one), wanted)


@pytest.mark.parametrize("skipped", [-1, EXPERTS, 2**31 - 1])
def test_a_skipped_choice_contributes_nothing(skipped: int, device: Device) -> None:
    one = drawn(device)
    one.ids[::2, 1], one.weights[::2, 1] = skipped, math.nan
    one.ids[7] = skipped
    got = run(one)
    near(got, one)
    assert got[7].eq(0).all()


@pytest.mark.parametrize("tokens", [5, 200])
def test_nan_stays_in_its_token(tokens: int, device: Device) -> None:
    one = drawn(device, tokens=tokens)
    clean = run(one)
    one.x[3] = math.nan
    got = run(one)
    rest = [t for t in range(tokens) if t != 3]
    assert got[3].isnan().all()
    assert torch.equal(got[rest], clean[rest])


@each_block
def test_the_same_call_gives_the_same_bits(block: tuple[int, int], device: Device) -> None:
    one = drawn(device, block, tokens=300)
    first = run(one)
    assert all(torch.equal(run(one), first) for _ in range(5))


def test_tokens_in_another_order(device: Device) -> None:
    one = drawn(device, tokens=300)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1)).to(device.type)
    wanted = run(one)[order]
    one.x, one.weights, one.ids = one.x[order], one.weights[order], one.ids[order]
    got = run(one)
    if device.real:
        assert torch.equal(got, wanted)
    else:  # a CPU's products may sum a row differently by its place
        assert ratio(got, wanted) > 40


def test_weights_past_int32(device: Device) -> None:
    """Only the last expert's exist; a self-test has room for the same in small only."""
    hidden, width, experts = (4096, 4224, 64) if device.real else (256, 128, 4)
    size = 3 * hidden * width * experts
    if device.free() < size * 5 // 4:
        pytest.skip(f"needs {size * 1.25 / 2**30:.1f} GiB of free memory on the device")
    small = drawn(device, tokens=5, hidden=hidden, width=width, experts=1, k=1)
    w13 = torch.empty(experts, 2 * width, hidden, dtype=E4M3, device=device.type)
    w2 = torch.empty(experts, hidden, width, dtype=E4M3, device=device.type)
    w13_scale, w2_scale = (s.expand(experts, -1, -1).clone() for s in (small.w13_scale, small.w2_scale))
    assert not device.real or w13.numel() > 2**31
    w13[-1], w2[-1] = small.w13[0], small.w2[0]
    small.ids.fill_(0)
    ids = torch.full_like(small.ids, experts - 1)
    got = fused_experts(small.x, w13, w2, small.weights, ids, w13_scale=w13_scale, w2_scale=w2_scale)
    near(got, small)
