"""The worker that measures for ``moec tune``, on the CPU: kernels in Triton's interpreter, its clock."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moec.runtime.draw import MOST_SETS, Sets, difference
from moec.runtime.values import Scaled

ROOT = Path(__file__).parents[2]
W = {"name": "w", "role": "weights", "dtype": "f16", "shape": [4, 6, 8], "scale": None}
CHOICES = {"experts": 4, "tokens": 9, "choices": 2}


def argument(name: str, role: str, dtype: str, *shape: int, scale: list[int] | None = None) -> dict:
    return {"name": name, "role": role, "dtype": dtype, "shape": list(shape), "scale": scale}


ARGUMENTS = [
    argument("x", "rows", "f8e4m3", 9, 8, scale=[9, 1]),
    W,
    argument("slot", "slot", "i32", 18),
    argument("off", "off", "i32", 5),
    argument("w", "routing", "f32", 9, 2),
]


def test_operands_are_those_of_a_router_s_choices() -> None:
    for x, w, slot, off, routing in Sets(ARGUMENTS, "cpu", 1000).draw(ARGUMENTS, CHOICES):
        assert isinstance(x, Scaled) and x.q.dtype == torch.float8_e4m3fn and x.scale.shape == (9, 1)
        assert w.shape == (4, 6, 8) and w.dtype == torch.float16 and w.isfinite().all()
        assert sorted(slot.tolist()) == list(range(18)) and slot.dtype == off.dtype == torch.int32
        assert off[0] == 0 and off[-1] == 18 and (off.diff() >= 0).all()
        # An expert's slots are those of tokens that chose it: none twice, in order.
        for e in range(4):
            mine = slot[off[e] : off[e + 1]].tolist()
            assert mine == sorted(mine) and len({s // 2 for s in mine}) == len(mine)
        assert routing.shape == (9, 2)


@pytest.mark.parametrize(
    ("cache", "weights", "sets"), [(0, 1, 2), (1000, 8, 8), (10**9, MOST_SETS, MOST_SETS)]
)
def test_no_call_finds_in_the_cache_what_the_last_one_read(cache: int, weights: int, sets: int) -> None:
    """384 bytes of weights: eight copies are three times a cache of 1000 bytes."""
    drawn = Sets(ARGUMENTS, "cpu", cache)
    assert len(drawn.weights) == weights
    made = drawn.draw(ARGUMENTS, CHOICES)
    assert len(made) == sets
    assert len({one[1].data_ptr() for one in made}) == weights
    assert len({one[0].q.data_ptr() for one in made}) == sets


def test_differences() -> None:
    y = torch.tensor([[1.0, -4.0], [2.0, 0.0]])
    off = torch.tensor([[1.0, -4.0], [2.0, 1.0]])
    assert difference(y, y) == 0 and difference(off, y) == 0.25
    assert difference(y.where(y > 0, math.nan), y) == math.inf and difference(y[:1], y) == math.inf
    assert difference(y[:0], y[:0]) == 0
    q, scale = torch.ones(2, 200), torch.ones(2, 2)
    wrong = scale.clone()
    wrong[1, 1] = 3.0
    assert difference(Scaled(q, scale), Scaled(q, scale)) == 0
    assert difference(Scaled(q, wrong), Scaled(q, scale)) == 2
    assert difference((q[:, :128], scale[:, :1]), (q[:, :128], 2 * scale[:, :1])) == 0.5


def test_the_worker_itself() -> None:
    """In a process of its own: Triton interprets only where that was set before it was imported."""
    tests = Path(__file__).with_name("interpreted_tuning.py")
    command = [sys.executable, "-m", "pytest", str(tests), "-q", "-x", "-p", "no:cacheprovider"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
