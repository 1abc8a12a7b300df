"""How long do the passes take on DeepSeek-V3, and how does every stage of a build grow with distinct layers?

python benchmarks/pass_time.py [--target sm_90a] [--layers 61,244,976] [--repeats 3] [--out FILE]

First the model as it is, 61 layers of three kinds; then as many layers as asked for, each a function of its
own, since no two have one eps. Prints JSON: for each stage the least of the repeats in seconds of CPU time,
and how much longer it takes at each next number of layers (4 is linear from 61 to 244).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

import moec
from moec import models
from moec.codegen.emit import emit_python
from moec.codegen.parameters import manifest_tensors
from moec.ir import parse_module, print_module, verify
from moec.passes import Events, PassManager, pipeline


def distinct(layers: int) -> models.Model:
    """DeepSeek-V3 with this many layers, no two of them equal."""
    v3 = models.resolve("deepseek-v3")
    made = [v3.layers[min(i, len(v3.layers) - 1)] for i in range(layers)]
    return replace(v3, layers=[replace(layer, eps=1e-6 * (1 + i / 4096)) for i, layer in enumerate(made)])


def measure(spec: models.Model, target: str) -> dict[str, float]:
    """Seconds by stage: lowering, each pass, text both ways, emission."""
    seconds: dict[str, float] = {}

    def timed(stage: str, work: Callable[[], Any]) -> Any:
        gc.collect()
        start = time.process_time()
        found = work()
        seconds[stage] = seconds.get(stage, 0.0) + time.process_time() - start
        return found

    module = timed("lower", lambda: models.lower(spec))
    module.target = target
    for each in pipeline(3, target):
        timed(each.name, lambda each=each: each.run(module))
    seconds["all passes"] = sum(seconds[name] for name in {p.name for p in pipeline(3, target)})
    timed("verify", lambda: verify(module))
    text = timed("print", lambda: print_module(module))
    timed("parse", lambda: parse_module(text))
    timed("emit", lambda: emit_python(module, target, moec.__version__))
    timed("manifest", lambda: manifest_tensors(module))
    naive = models.lower(spec)
    with tempfile.TemporaryDirectory() as folder:
        manager = PassManager(pipeline(3, target), [Events(Path(folder) / "events.jsonl")])
        timed("passes, verified, with events", lambda: manager.run(naive))
    return seconds


def least(spec: models.Model, target: str, repeats: int) -> dict[str, float]:
    runs = [measure(spec, target) for _ in range(repeats)]
    return {stage: round(min(run[stage] for run in runs), 4) for stage in runs[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description="seconds of each stage of a build, by number of layers")
    parser.add_argument("--target", default="sm_90a")
    parser.add_argument("--layers", default="61,244,976")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    args = parser.parse_args()
    numbers = [int(n) for n in args.layers.split(",")]
    measure(models.resolve("deepseek-v3"), args.target)  # imports, and the caches of libraries
    as_it_is = least(models.resolve("deepseek-v3"), args.target, args.repeats)
    by_layers = {str(n): least(distinct(n), args.target, args.repeats) for n in numbers}
    growth = {
        f"{a} to {b}": {
            stage: round(by_layers[str(b)][stage] / max(by_layers[str(a)][stage], 1e-9), 2)
            for stage in as_it_is
        }
        for a, b in pairwise(numbers)
    }
    found = {
        "what": "CPU seconds by stage of compiling DeepSeek-V3, -O3",
        "target": args.target,
        "deepseek-v3": as_it_is,
        "all layers distinct": by_layers,
        "growth": growth,
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "versions": {
            "moec": moec.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
    }
    text = json.dumps(found, indent=1)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
