"""A routed layer in one cooperative launch, whose programs wait for each other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import moec
from moec import models
from moec.runtime import counters
from tests.gpu.device import Device

GROUPED = "canonicalise,expert-grouping{fold_shared=true},canonicalise"
FUSED = "permute-fusion{route_sort=true,combine=true}"
FORMS = {"routed": "one-launch", "experts": "one-launch{route=false}", "": ""}
HIDDEN = 256
Run = Callable[[Tensor], Tensor]


def layer(device: Device, folder: Path, form: str, fp8: bool = False) -> Run:
    """A layer with a shared expert, in one of FORMS; the same weights in each."""
    block = models.MoE(
        models.Router(experts=16, top_k=3, renorm=True, score="sigmoid", bias=True),
        models.Experts(count=16, intermediate=128),
        shared=models.SwiGLU(intermediate=128),
    )
    spec = models.Layer(block, hidden=HIDDEN, dtype="bf16", name="moe-layer")
    passes = [GROUPED, *["fp8-cast"] * fp8, FUSED, *[FORMS[form]] * bool(form), "select", "plan"]
    options = moec.BuildOptions(passes=",".join(passes))
    built = moec.build(spec, target=device.target, out=folder / (form or "steps"), options=options)
    source = (built.path / "model.py").read_text(encoding="utf-8")
    assert {"routed": "routed_experts(", "experts": " experts(", "": "grouped_linear_combine("}[
        form
    ] in source
    return device.load(built.path)  # type: ignore[return-value]


def tokens(count: int, device: Device, seed: int = 0) -> Tensor:
    x = torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed))
    return x.to(device.type, torch.bfloat16)


each_form = pytest.mark.parametrize("form", ["routed", "experts"])


@each_form
@pytest.mark.parametrize("fp8", [False, True])
def test_as_step_by_step(form: str, fp8: bool, device: Device, tmp_path: Path) -> None:
    """Routers of other kernels may round a weight otherwise, and schedules differ: nearly the same, then."""
    once, steps = layer(device, tmp_path, form, fp8), layer(device, tmp_path, "", fp8)
    for count in (0, 1, 2, 5, 16, 17, 40):
        x = tokens(count, device, count)
        found, wanted = once(x), steps(x)
        assert found.shape == wanted.shape and bool(found.isfinite().all())
        torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)


@each_form
def test_launch_after_launch(form: str, device: Device, tmp_path: Path) -> None:
    """Whoever comes last at a meeting: the same bits, and counters that are zero again."""
    once, x = layer(device, tmp_path, form), tokens(13, device)
    first = once(x)
    assert all(torch.equal(once(x), first) for _ in range(200 if device.real else 2))
    if device.real:
        torch.cuda.synchronize()
        assert not any(words.any() for words in counters._of_stream.values())


@each_form
def test_a_graph_replayed_with_other_inputs(form: str, device: Device, tmp_path: Path) -> None:
    once, x = layer(device, tmp_path, form), tokens(9, device)
    replay = device.record(lambda: once(x))
    for seed in range(5):
        other = tokens(9, device, seed)
        x.copy_(other)
        found = replay().clone()
        assert torch.equal(found, once(other))
        assert torch.equal(found, replay())


def test_two_streams_side_by_side(device: Device, tmp_path: Path) -> None:
    """Each launch wants all of its programs on the device at once: one waits for the other, none for ever."""
    layers = [layer(device, tmp_path, form) for form in ("routed", "experts")]
    inputs = [tokens(n, device, n) for n in (3, 16)]
    wanted = [once(x) for once, x in zip(layers, inputs, strict=True)]
    if not device.real:
        return
    streams = [torch.cuda.Stream() for _ in layers]
    found: list[list[Tensor]] = [[], []]
    torch.cuda.synchronize()
    for _ in range(100):
        for stream, once, x, kept in zip(streams, layers, inputs, found, strict=True):
            with torch.cuda.stream(stream):
                kept.append(once(x))
    torch.cuda.synchronize()
    for kept, want in zip(found, wanted, strict=True):
        assert all(torch.equal(y, want) for y in kept)


def test_nothing_waits_for_the_device(device: Device, tmp_path: Path) -> None:
    once, x = layer(device, tmp_path, "routed"), tokens(16, device)
    want = once(x)
    with device.without_synchronising():
        found = once(x)
    assert torch.equal(found, want)
