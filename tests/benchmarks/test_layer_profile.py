"""benchmarks/layer_profile.py: what it reads of ncu's table, and a call on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
COLUMNS = [
    "ID",
    "Process ID",
    "Kernel Name",
    "Section Name",
    "Metric Name",
    "Metric Unit",
    "Metric Value",
    "Rule Name",
    "Rule Type",
    "Rule Description",
]
ROWS = [
    ("0", "7", "up_rows(int)", "GPU Speed Of Light Throughput", "Duration", "us", "1,234.5", "", "", ""),
    ("0", "7", "up_rows(int)", "GPU Speed Of Light Throughput", "DRAM Throughput", "%", "81.25", "", "", ""),
    ("0", "7", "up_rows(int)", "Warp State Statistics", "", "", "", "Stall", "OPT", "waits for  L1TEX"),
    ("1", "7", "combine", "GPU Speed Of Light Throughput", "Duration", "ns", "500", "", "", ""),
    ("1", "7", "combine", "Launch Statistics", "Registers Per Thread", "register/thread", "40", "", "", ""),
    ("1", "7", "combine", "Occupancy", "", "", "", "Rule", "OPT", "not of the sections that explain"),
]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield import_module("layer_profile")
    for name in [n for n in sys.modules if n in ("gpu", "layer_profile") or n.startswith("gpu.")]:
        del sys.modules[name]


def test_kernels_of_a_table(script: Any) -> None:
    lines = [",".join(f'"{cell}"' for cell in row) for row in (COLUMNS, *ROWS)]
    found = script.kernels("==PROF== Connected\nsome output\n" + "\n".join(lines))
    assert found == [
        {"kernel": "up_rows", "notes": ["waits for L1TEX"], "us": 1234.5, "dram": 81.25},
        {"kernel": "combine", "notes": [], "us": 0.5, "registers": 40.0},
    ]
    up, note, combine = script.table(found)[1:]
    assert up.split() == ["up_rows", "1234.5", "81.2", "nan", "nan", "nan", "nan"]
    assert note.strip() == "waits for L1TEX" and combine.split()[:2] == ["combine", "0.5"]


def test_no_table(script: Any) -> None:
    assert script.kernels("==ERROR== no permission to read the counters\n") == []


def test_a_call_runs(script: Any) -> None:
    shape = script.SELF_TEST_SHAPES["tiny"]
    call = script.one_call(script.ADAPTERS["moec"], "moec", shape, 3, torch.bfloat16, "cpu")
    assert call().shape == (3, shape.hidden) and not torch.equal(call(), call())


def test_without_a_gpu_it_says_so() -> None:
    path = os.pathsep.join([str(BENCHMARKS.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    script = str(BENCHMARKS / "layer_profile.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "no NVIDIA GPU is here" in done.stderr
