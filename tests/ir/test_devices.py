"""The devices' figures: what every device must say, and what is read where one says nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moec.codegen.targets import TARGETS
from moec.ir.devices import CPU, DEVICES, GPUS


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
