"""What the GPU's tests share: the device, memory poisoned with NaN, and the summary at the end."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch

import moec
from moec.runtime.triton_mode import interpreting
from tests.gpu.device import Device

if interpreting():  # a self-test's kernels compute as a GPU does
    from tests.codegen import interpreter_casts

    interpreter_casts.install()

HERE = Path(__file__).parent
PACKAGES = ("torch", "triton", "cuda-core", "transformers")


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> Device:
    """The GPU; with --gpu-self-test the CPU."""
    return Device("cpu" if pytestconfig.getoption("--gpu-self-test") else "cuda")


@pytest.fixture(autouse=True)
def poisoned(device: Device) -> Iterator[None]:
    """Memory that PyTorch allocates holds NaN, or the largest integer, until somebody writes to it."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(8, device=device.type).isnan().all(), "this PyTorch doesn't fill what it allocates"
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Device, versions and counts, wherever these tests ran."""
    self_test = bool(config.getoption("--gpu-self-test"))
    if not self_test and not torch.cuda.is_available():
        return
    counts = {
        outcome: sum(1 for report in terminalreporter.stats.get(outcome, []) if _ours(report, config))
        for outcome in ("passed", "failed", "error", "skipped")
    }
    if not any(counts.values()):
        return
    terminalreporter.section("the GPU's tests" + (", run on the CPU as a self-test" if self_test else ""))
    terminalreporter.line(f"device    {_device(self_test)}")
    terminalreporter.line(f"versions  {_versions()}")
    terminalreporter.line(
        "results   " + ", ".join(f"{n} {what}" for what, n in counts.items() if n or what == "passed")
    )


def _ours(report: Any, config: pytest.Config) -> bool:
    path = (config.rootpath / report.nodeid.partition("::")[0]).resolve()
    return HERE in path.parents


def _device(self_test: bool) -> str:
    if self_test:
        return "cpu, kernels in Triton's interpreter" if Device("cpu").kernels else "cpu; no kernel ran"
    about = torch.cuda.get_device_properties(torch.cuda.current_device())
    capability, memory = f"{about.major}.{about.minor}", about.total_memory / 2**30
    return f"{about.name}, compute capability {capability}, {memory:.0f} GiB"


def _versions() -> str:
    found = [f"moec {moec.__version__}", f"python {sys.version.split()[0]}", f"CUDA {torch.version.cuda}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join(found)
