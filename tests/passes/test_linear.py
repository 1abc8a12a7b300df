"""Work grows with a model as its layers do: counted, not timed.

Counted is each line of Python that runs, moec's and its libraries'. A loop's turns are lines, those of
comprehensions too, so that no search through all functions hides. Only loops inside of C functions do.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.passes.growth import ENVIRONMENT, lines_run

# The last step adds three times the layers that the first one does: three times the work, where a part that
# is quadratic would have eleven times its own. Seen: 3.006 at most.
MOST = 3.02


@pytest.mark.parametrize("target", [pytest.param("cpu", marks=pytest.mark.slow), "sm_90a"])
def test_work_grows_as_the_layers_do(target: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.passes.growth", target, str(tmp_path)]
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    growth = json.loads(done.stdout)
    assert all(growth[name] > 2.5 for name in ("lower", "verify", "print", "parse")), growth
    assert max(growth.values()) < MOST, {n: round(g, 2) for n, g in growth.items() if g >= MOST}


@pytest.mark.parametrize(
    ("work", "quadratic"),
    [
        (lambda n: [i for i in range(n)], False),  # noqa: C416
        (lambda n: [[j for j in range(n)] for i in range(n)], True),  # noqa: C416
        (lambda n: [any(j == -1 for j in range(n)) for i in range(n)], True),
    ],
)
def test_the_counter_sees_loops_within_loops(work: Callable[[int], Any], quadratic: bool) -> None:
    small, middle, large = (lines_run(lambda n=n: work(n)) for n in (30, 90, 270))
    assert ((large - middle) / (middle - small) > MOST) == quadratic
