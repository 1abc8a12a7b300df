"""Few tokens: kernels whose last program goes on with the work of all, whoever that is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import moec
from moec import models
from moec.codegen.schedules import Problem
from moec.codegen.select import ladder
from moec.ir.devices import GPUS
from moec.ops import fused_experts
from moec.runtime import LayerModel, counters
from tests.gpu import reference
from tests.gpu.device import Device
from tests.moec.experts import Layer, close, layer
from tests.moec.fp8_experts import LEAST, FP8Layer, fp8_layer, ratio

# One row's tiles are so few that K is split: of the first product, and of the second.
FIRST = {"k": 2, "experts": 16, "hidden": 4096, "width": 32}
SECOND = {"k": 2, "experts": 4, "hidden": 256, "width": 4096}

each_size = pytest.mark.parametrize("sizes", [FIRST, SECOND], ids=["first", "second"])
each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)


def drawn(device: Device, tokens: int, dtype: torch.dtype = torch.bfloat16, **sizes: int) -> Layer:
    return device.layer(layer(tokens, dtype=dtype, **sizes))


def test_these_sizes_split_k() -> None:
    first = Problem(16, 32, 4096, "bf16", 2, matrices=2, gathered=True)
    second = Problem(4, 256, 4096, "bf16", 2)
    for target, device in GPUS.items():
        for problem in (first, second):
            assert any(s.split > 1 for _, s in ladder(problem, device)), target


@each_dtype
@each_size
@pytest.mark.parametrize("tokens", [1, 2, 3, 8, 16, 31])
def test_few_tokens(tokens: int, sizes: dict[str, int], dtype: torch.dtype, device: Device) -> None:
    one = drawn(device, tokens, dtype, **sizes)
    one.ids[-1, 0] = -1
    close(fused_experts(*one.args), reference.experts(one), dtype)


@pytest.mark.parametrize("tokens", [1, 5, 16])
def test_few_tokens_in_fp8(tokens: int, device: Device) -> None:
    one = fp8_layer((128, 128), tokens=tokens, k=2, experts=4, hidden=8192, width=128)
    one = FP8Layer(*(t if t is None else t.to(device.type) for t in vars(one).values()))
    found = fused_experts(*one.args, **one.scales)
    assert ratio(found, reference.experts(one.meant())) > LEAST
    assert torch.equal(found, fused_experts(*one.args, **one.scales))


@each_size
def test_who_ends_last_changes_nothing(sizes: dict[str, int], device: Device) -> None:
    one = drawn(device, 13, **sizes)
    first = fused_experts(*one.args)
    assert all(torch.equal(fused_experts(*one.args), first) for _ in range(50 if device.real else 2))
    if device.real:
        torch.cuda.synchronize()
        assert not any(words.any() for words in counters._of_stream.values())


def test_two_streams_side_by_side(device: Device) -> None:
    layers = [drawn(device, 13, **sizes) for sizes in (FIRST, SECOND)]
    wanted = [fused_experts(*one.args) for one in layers]
    if not device.real:
        return
    streams = [torch.cuda.Stream() for _ in layers]
    found: list[list[torch.Tensor]] = [[], []]
    torch.cuda.synchronize()
    for _ in range(100):
        for stream, one, kept in zip(streams, layers, found, strict=True):
            with torch.cuda.stream(stream):
                kept.append(fused_experts(*one.args))
    torch.cuda.synchronize()
    for kept, want in zip(found, wanted, strict=True):
        assert all(torch.equal(y, want) for y in kept)


def test_graphs_replayed_between_and_beside_other_launches(device: Device) -> None:
    """Two graphs of one stream and calls that no graph holds; each graph with other inputs in turn."""
    held = [drawn(device, 13, **sizes) for sizes in (FIRST, SECOND)]
    replays = [device.record(lambda one=one: fused_experts(*one.args)) for one in held]
    for seed in range(3):
        for one, replay, sizes in zip(held, replays, (FIRST, SECOND), strict=True):
            other = device.layer(layer(13, dtype=torch.bfloat16, seed=seed, **sizes))
            for into, value in zip(one.args, other.args, strict=True):
                into.copy_(value)
            assert torch.equal(replay(), fused_experts(*other.args))
    if device.real:
        wanted = [replay().clone() for replay in replays]
        side = torch.cuda.Stream()
        for _ in range(50):
            with torch.cuda.stream(side):
                beside = replays[1]()
            y = replays[0]()
        torch.cuda.synchronize()
        assert torch.equal(y, wanted[0]) and torch.equal(beside, wanted[1])


@pytest.mark.parametrize("tokens", [1, 16])
def test_the_sum_in_one_launch_has_the_bits_of_two(tokens: int, device: Device, tmp_path: Path) -> None:
    block = models.MoE(
        models.Router(experts=16, top_k=3, renorm=True), models.Experts(count=16, intermediate=96)
    )
    spec = models.Layer(block, hidden=320, dtype="bf16", name="moe-layer")
    x = torch.randn(tokens, 320, generator=torch.Generator().manual_seed(0)).to(device.type, torch.bfloat16)
    found = []
    for combine in ("true", "false"):
        passes = f"canonicalise,expert-grouping,canonicalise,permute-fusion{{combine={combine}}},select,plan"
        options = moec.BuildOptions(passes=passes)
        built = moec.build(spec, target=device.target, out=tmp_path / combine, options=options)
        assert ("grouped_linear_combine(" in (built.path / "model.py").read_text()) == (combine == "true")
        compiled = device.load(built.path)
        assert isinstance(compiled, LayerModel)
        found.append(compiled(x))
    assert torch.equal(*found)
