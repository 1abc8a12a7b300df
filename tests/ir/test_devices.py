"""The devices' figures: what every device must say, and what is read where one says nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moec.codegen.targets import TARGETS
from moec.errors import BadOption
from moec.ir.devices import CPU, DEVICES, GPUS, with_figures


def test_every_target_has_a_device() -> None:
    assert list(TARGETS) == list(DEVICES)
    assert "cpu" not in GPUS


@pytest.mark.parametrize("name", list(DEVICES))
def test_figures_are_complete_and_of_one_order(name: str) -> None:
    device = DEVICES[name]
    assert device.name == name
    rates = device.matmul_flops
    assert {"f32", "bf16", "f16"} <= rates.keys()
    assert rates["f32"] <= rates["bf16"] == rates["f16"] <= rates.get("f8e4m3", float("inf"))
    # A product of square matrices is bound by arithmetic from a few hundred rows on, nowhere by a few.
    assert 10 < rates["bf16"] / device.bandwidth < 1000


def test_a_dtype_without_a_unit_runs_at_bf16_s_rate() -> None:
    h100, a100 = GPUS["sm_90a"], GPUS["sm_80"]
    assert (h100.fp8, a100.fp8) == (True, False)
    assert h100.flops_of("f8e4m3") == 1979e12  # NVIDIA's data sheet: 3,958e12 with sparsity, half without
    assert a100.flops_of("f8e4m3") == a100.flops_of("bf16") == 312e12
    assert CPU.flops_of("f64") == CPU.flops_of("bf16")
    assert replace(CPU, matmul_flops={"f32": 1e9}).flops_of("bf16") == 1e9


def test_figures_can_be_replaced() -> None:
    h100 = GPUS["sm_90a"]
    sheet = with_figures(h100, "bandwidth=3.35e12, bf16=989e12")
    assert sheet == replace(h100, bandwidth=3.35e12, matmul_flops={**h100.matmul_flops, "bf16": 989e12})
    assert with_figures(CPU, "launch=1e-6,f8e4m3=1e12").flops_of("f8e4m3") == 1e12
    assert with_figures(CPU, "") == CPU
    for bad, why in [
        ("bandwith=1", "did you mean bandwidth"),
        ("bf16", "a figure is a positive number"),
        ("bf16=0", "a figure is a positive number"),
        ("bf16=inf", "a figure is a positive number"),
        ("bf16=x", "a figure is a positive number"),
    ]:
        with pytest.raises(BadOption, match=why):
            with_figures(CPU, bad)
