"""The GPU's tests, run on the CPU: their bodies hold, so that a machine with a GPU finds tests that work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_gpu_tests_hold_on_the_cpu() -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests/gpu",
        "--gpu-self-test",
        "-p",
        "no:cacheprovider",
        "-rs",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "run on the CPU as a self-test" in done.stdout and " passed" in done.stdout
    # Of what a CPU can stand in for, nothing is skipped.
    skipped = [line for line in done.stdout.splitlines() if line.startswith("SKIPPED")]
    assert len(skipped) == 1 and "a CPU has nothing to wait for" in skipped[0], done.stdout
