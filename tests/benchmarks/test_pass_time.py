"""benchmarks/pass_time.py runs. What it measures is printed, not judged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "pass_time.py"


def test_pass_time_measures_every_stage(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    command = [sys.executable, SCRIPT, "--layers", "1,2", "--repeats", "1", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found == json.loads(done.stdout)
    stages = set(found["deepseek-v3"])
    assert {"lower", "expert-grouping", "all passes", "print", "parse", "emit"} <= stages
    assert all(set(found["all layers distinct"][n]) == stages for n in ("1", "2"))
    assert set(found["growth"]["1 to 2"]) == stages
