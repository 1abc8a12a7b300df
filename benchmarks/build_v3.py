"""How long does it take to compile DeepSeek-V3 at its true size, and how much memory? Prints JSON.

python benchmarks/build_v3.py [--target cpu] [--out DIR]

The seconds are those of a whole process, Python's start and imports included.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from datetime import date
from math import prod
from pathlib import Path
from typing import Any


def measure(target: str, out: Path) -> dict[str, Any]:
    """Runs ``moec build deepseek-v3`` in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "moec",
        "build",
        "deepseek-v3",
        "--target",
        target,
        "--out",
        str(out),
        "--json",
    ]
    start = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    manifest = json.loads(done.stdout)["manifest"]
    return {
        "what": "moec build deepseek-v3",
        "target": target,
        "seconds": round(seconds, 2),
        "peak_bytes": peak * (1 if sys.platform == "darwin" else 1024),
        "parameters": sum(elements(e) for e in manifest["parameters"] if not e.get("view")),
        "moec": manifest["moec"],
        "python": platform.python_version(),
        "machine": platform.machine(),
        "date": date.today().isoformat(),
    }


def elements(entry: dict[str, Any]) -> int:
    """Of all tensors that a manifest's entry stands for."""
    return prod(entry["shape"]) * prod(last - first + 1 for first, last in entry["ranges"])


def main() -> None:
    parser = argparse.ArgumentParser(description="time and memory of compiling DeepSeek-V3")
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--out", type=Path, help="keep the package here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(args.target, args.out or Path(folder) / "package"), indent=2))


if __name__ == "__main__":
    main()
