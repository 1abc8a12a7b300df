"""CUDA graphs: recorded once, replayed with other inputs; and nothing that makes the host wait."""

from __future__ import annotations

import pytest
import torch

import moec
from moec import models
from moec.ops import fused_experts, grouped_experts
from moec.runtime import LayerModel
from tests.gpu.device import Device
from tests.moec.experts import Layer, layer

HIDDEN, EXPERTS = 64, 8


@pytest.fixture(scope="module")
def compiled(device: Device, tmp_path_factory: pytest.TempPathFactory) -> LayerModel:
    """One MoE layer, router included, as a package for this device."""
    block = models.MoE(
        models.Router(experts=EXPERTS, top_k=3, renorm=True), models.Experts(count=EXPERTS, intermediate=48)
    )
    spec = models.Layer(block, hidden=HIDDEN, dtype="f16", name="moe-layer")
    built = moec.build(spec, target=device.target, out=tmp_path_factory.mktemp("package") / "layer")
    loaded = device.load(built.path)
    assert isinstance(loaded, LayerModel)
    return loaded


def drawn(device: Device, tokens: int, seed: int) -> Layer:
    one = layer(tokens, k=3, experts=EXPERTS, hidden=HIDDEN, width=48, dtype=torch.float16, seed=seed)
    return device.layer(one)


def x_of(device: Device, tokens: int, seed: int) -> torch.Tensor:
    x = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))
    return x.to(device.type, torch.float16)


@pytest.mark.parametrize("tokens", [1, 16, 130])
def test_an_operator_is_replayed_with_other_inputs(tokens: int, device: Device) -> None:
    held = drawn(device, tokens, seed=0)
    replay = device.record(lambda: fused_experts(*held.args))
    for seed in (1, 2):
        other = drawn(device, tokens, seed)
        for into, value in zip(held.args, other.args, strict=True):
            into.copy_(value)
        assert torch.equal(replay(), fused_experts(*other.args))


def test_an_operator_called_for_one_token_is_recorded_for_many(device: Device) -> None:
    """Few and many tokens take different kernels: the first call has loaded them all."""
    fused_experts(*drawn(device, 1, seed=0).args)
    held = drawn(device, 1024, seed=1)
    replay = device.record(lambda: fused_experts(*held.args), warm=False)
    assert torch.equal(replay(), fused_experts(*held.args))


@pytest.mark.parametrize("tokens", [1, 16, 130])
def test_a_package_is_recorded_once_it_is_loaded(tokens: int, device: Device, compiled: LayerModel) -> None:
    compiled(x_of(device, 7, seed=9))  # for cuBLAS, which sets itself up at its first product
    held = x_of(device, tokens, seed=0)
    replay = device.record(lambda: compiled(held), warm=False)
    for seed in (1, 2):
        other = x_of(device, tokens, seed)
        held.copy_(other)
        assert torch.equal(replay(), compiled(other))


def test_replays_give_the_same_bits(device: Device, compiled: LayerModel) -> None:
    held = x_of(device, 33, seed=0)
    replay = device.record(lambda: compiled(held))
    first = replay().clone()
    assert all(torch.equal(replay(), first) for _ in range(5))


@pytest.mark.parametrize("tokens", [0, 1, 130])
def test_an_operator_never_waits(tokens: int, device: Device) -> None:
    one = drawn(device, tokens, seed=0)
    off = torch.tensor([0, *[tokens] * EXPERTS], dtype=torch.int32).to(device.type)
    fused_experts(*one.args), grouped_experts(one.x, off, one.w13, one.w2)  # builds and loads
    with device.without_synchronising():
        fused_experts(*one.args)
        grouped_experts(one.x, off, one.w13, one.w2)


@pytest.mark.parametrize("tokens", [0, 1, 130])
def test_a_package_never_waits(tokens: int, device: Device, compiled: LayerModel) -> None:
    x = x_of(device, tokens, seed=0)
    compiled(x)
    with device.without_synchronising():
        compiled(x)


def test_that_waiting_would_be_noticed(device: Device) -> None:
    if not device.real:
        pytest.skip("a CPU has nothing to wait for")
    x = torch.ones(1, device=device.type)
    with pytest.raises(RuntimeError), device.without_synchronising():
        x.item()


def test_another_stream(device: Device) -> None:
    one = drawn(device, 20, seed=0)
    wanted = fused_experts(*one.args)
    if not device.real:
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = fused_experts(*one.args)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(got, wanted)
