"""`moec tune` of a tiny package within seconds; and batch invariance where products run by one schedule."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import moec
from moec import models
from moec.codegen.tuned import read_tuning
from moec.ops import fused_experts
from moec.runtime import LayerModel
from moec.tune.session import Session
from tests.gpu.device import Device
from tests.moec.experts import layer

TOKENS = (1, 64)


def spec() -> models.Layer:
    block = models.MoE(
        models.Router(experts=4, top_k=2, renorm=True), models.Experts(count=4, intermediate=64)
    )
    return models.Layer(block, hidden=64, dtype="f16", name="layer")


def test_a_tiny_package_is_tuned_and_built_again(device: Device, tmp_path: Path) -> None:
    target = device.target if device.kernels else "sm_90a"
    options = moec.BuildOptions(tuning="none")
    built = moec.build(spec(), target, tmp_path / "before", options=options)
    out = tmp_path / "tuned.json"
    outcome = Session(built.path, 10, TOKENS, out, device="cuda" if device.real else "cpu").run()
    points = [point for one in outcome.found for point in one.points]
    assert len(points) == 2 * len(TOKENS)
    if not device.kernels:  # a worker whose every candidate fails
        assert outcome.file is None and all("interpreter" in w for p in points for w in p.excluded.values())
        return
    assert not any(point.excluded for point in points), [point.excluded for point in points]
    assert all(point.measured and not point.skipped for point in points)
    tuning = read_tuning(out, pytest.fail)
    assert tuning.device == (torch.cuda.get_device_name() if device.real else "cpu")
    assert all(0 < s < 1e3 for p in tuning.measured.values() for found in p.values() for s in found.values())
    again = moec.build(spec(), target, tmp_path / "after", options=moec.BuildOptions(tuning=str(out)))
    assert again.manifest["tuning"]["used"]
    x = torch.randn(19, 64, generator=torch.Generator().manual_seed(0)).half()
    results = []
    for package in (built.path, again.path):
        model = device.load(package)
        assert isinstance(model, LayerModel)
        results.append(model(x.to(device.type)).cpu().float())
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-2 * float(results[0].abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_token_s_bits_are_its_own(
    dtype: torch.dtype, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = 300 if device.real else 40
    if device.kernels and not device.real:
        from tests.codegen import interpreter_casts

        monkeypatch.setitem(interpreter_casts.original, "dot", interpreter_casts.in_order)
    one = device.layer(layer(tokens, k=2, experts=5, hidden=136, width=72, dtype=dtype))
    if not device.kernels:  # PyTorch's products promise nothing: that a call says so is what can be tested
        with pytest.warns(UserWarning, match="batch_invariant holds for moec's kernels only"):
            fused_experts(*one.args, batch_invariant=True)
        return
    whole = fused_experts(*one.args, batch_invariant=True)
    for some in ([0], [tokens - 1, 3], [*range(9, 31)], torch.randperm(tokens).tolist()):
        x, weights, ids = one.x[some], one.weights[some], one.ids[some]
        assert torch.equal(fused_experts(x, one.w13, one.w2, weights, ids, batch_invariant=True), whole[some])
