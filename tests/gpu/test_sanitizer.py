"""compute-sanitizer finds nothing: no access out of bounds, no race in shared memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu.device import Device

SCRIPT = Path(__file__).with_name("sanitized.py")
ROOT = SCRIPT.parents[2]
FOUND = 86  # the exit status where the tool found something


def sanitizer() -> str | None:
    """The tool: on PATH, or in a CUDA toolkit."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [os.environ.get("PATH", ""), *(str(Path(h) / "bin") for h in homes if h)]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def run(command: list[str], device: Device) -> subprocess.CompletedProcess[str]:
    # Without PyTorch's pool every tensor is an allocation of its own, so that its bounds are the tool's.
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [*command, sys.executable, str(SCRIPT), device.type]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)


@pytest.fixture(scope="module")
def plain(device: Device) -> subprocess.CompletedProcess[str]:
    """The script by itself: it must pass, and compiles what the tool then needn't wait for."""
    done = run([], device)
    assert done.returncode == 0 and "checked" in done.stdout, done.stdout + done.stderr
    return done


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool: str, device: Device, plain: subprocess.CompletedProcess[str]) -> None:
    found = sanitizer()
    if device.real and found is None:
        pytest.skip("compute-sanitizer is neither on PATH nor in a CUDA toolkit (CUDA_HOME)")
    options = ["--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "20"]
    done = run([found, *options], device) if device.real and found else plain
    assert done.returncode == 0 and "checked" in done.stdout, (done.stdout + done.stderr)[-8000:]
