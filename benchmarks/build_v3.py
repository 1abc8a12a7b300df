"""How long does it take to compile DeepSeek-V3 at its true size, and how much memory? Prints JSON.

python benchmarks/build_v3.py [--target cpu] [-O 3] [--fp8] [--warm 3] [--out DIR] [--json FILE]

The seconds are those of a whole process, Python's start and imports included. ``cold`` with an empty cache of
kernels, ``warm`` the same again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from math import prod
from pathlib import Path
from typing import Any


def measure(target: str, level: int, fp8: bool, warm: int, out: Path) -> dict[str, Any]:
    """Runs ``moec build deepseek-v3`` in processes of their own, with a cache of their own."""
    options = ["--target", target, "-O", str(level), *(["--fp8"] if fp8 else [])]
    command = [sys.executable, "-m", "moec", "build", "deepseek-v3", *options, "--json", "--force"]
    seconds = []
    with tempfile.TemporaryDirectory() as cache:
        for _ in range(1 + warm):
            start = time.perf_counter()
            done = subprocess.run(
                [*command, "--out", str(out)],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
                env=os.environ | {"MOEC_CACHE": cache},
            )
            seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    manifest = json.loads(done.stdout)["manifest"]
    return {
        "what": " ".join(["moec build deepseek-v3", *options]),
        "target": target,
        "cold_seconds": round(seconds[0], 2),
        "warm_seconds": round(statistics.median(seconds[1:]), 2) if warm else None,
        "cubins": len(list((out / "cubin").glob("*.cubin"))),
        "peak_bytes": peak * (1 if sys.platform == "darwin" else 1024),
        "parameters": sum(elements(e) for e in manifest["parameters"] if not e.get("view")),
        "moec": manifest["moec"],
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "date": date.today().isoformat(),
    }


def elements(entry: dict[str, Any]) -> int:
    """Of all tensors that a manifest's entry stands for."""
    return prod(entry["shape"]) * prod(last - first + 1 for first, last in entry["ranges"])


def main() -> None:
    parser = argparse.ArgumentParser(description="time and memory of compiling DeepSeek-V3")
    parser.add_argument("--target", default="cpu")
    parser.add_argument("-O", dest="level", type=int, default=2, help="the level")
    parser.add_argument("--fp8", action="store_true")
    parser.add_argument("--warm", type=int, default=3, help="builds with a full cache, of which the median")
    parser.add_argument("--out", type=Path, help="keep the package here")
    parser.add_argument("--json", type=Path, help="write the JSON here too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(args.target, args.level, args.fp8, args.warm, args.out or Path(folder) / "package")
    text = json.dumps(found, indent=2)
    print(text)
    if args.json is not None:
        args.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
