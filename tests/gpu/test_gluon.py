"""Gluon's kernels on the GPU: each case in a process that is ended when it hangs, as a wrong barrier does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu.device import Device
from tests.gpu.gluon_products import TOLERANCE

SCRIPT = Path(__file__).with_name("gluon_products.py")
ROOT = SCRIPT.parents[2]
SECONDS = 300  # compiling two kernels takes ten


def guarded(command: list[str], environment: dict[str, str], seconds: float) -> None:
    """Runs a script that must end, and say that it checked."""
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as late:
        pytest.fail(
            f"it hangs: is a barrier's phase or count wrong? So far:\n{(late.stdout or b'').decode()}"
        )
    assert done.returncode == 0 and "checked" in done.stdout, done.stdout + done.stderr[-4000:]


@pytest.mark.parametrize("case", TOLERANCE)
def test_gluon_products(case: str, device: Device) -> None:
    if device.real and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("they are for compute capability 9.0")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path} | ({} if device.real else {"TRITON_INTERPRET": "1"})
    guarded([sys.executable, str(SCRIPT), device.type, case], environment, SECONDS)


def test_what_hangs_is_ended_and_named() -> None:
    hangs = "print('70 tokens', flush=True)\nwhile True: pass"
    with pytest.raises(pytest.fail.Exception, match=r"it hangs: .*\n70 tokens"):
        guarded([sys.executable, "-c", hangs], dict(os.environ), seconds=1)
