"""Where does the time of one MoE layer go on a GPU: which kernels, which pipe, what do warps wait for?

python benchmarks/layer_profile.py [--shape deepseek-v3] [--tokens 64] [--dtype fp8] [--only moec] [--out F]

First the kernels of one call and their times, by PyTorch's profiler. Then, where Nsight Compute's ``ncu`` is
on PATH and may read the counters, each kernel's share of the device's memory, L2 and compute throughput, its
busiest pipe, and what its warps wait for most.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from gpu import report
from gpu.peers import ADAPTERS, FP8_ADAPTERS, Adapter, layer_of
from gpu.problem import DTYPES, draw_inputs, draw_weights
from gpu.shapes import SELF_TEST_SHAPES, SHAPES, Shape

SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "WarpStateStats", "LaunchStats", "Occupancy")
# ncu's names of what is kept, and ours.
KEPT = {
    "Duration": "us",
    "DRAM Throughput": "dram",
    "L2 Cache Throughput": "l2",
    "Compute (SM) Throughput": "sm",
    "Registers Per Thread": "registers",
    "Achieved Occupancy": "occupancy",
}
MICROSECONDS = {"ns": 1e-3, "us": 1.0, "usecond": 1.0, "nsecond": 1e-3, "ms": 1e3, "msecond": 1e3}
INSIDE = "MOEC_UNDER_NCU"


def one_call(adapter: Adapter, name: str, shape: Shape, tokens: int, dtype: torch.dtype, device: str) -> Any:
    """From logits to y; two inputs in turn."""
    (weights,) = draw_weights(shape, dtype, device, cache=0)
    given = itertools.cycle(draw_inputs(shape, tokens, dtype, device, 0, copies=1))
    layer = layer_of(name, adapter, weights, shape)

    @torch.inference_mode()
    def call() -> torch.Tensor:
        one = next(given)
        return layer(one.x, one.logits)

    return call


def kernels(text: str) -> list[dict[str, Any]]:
    """What ``ncu --csv --page details`` says of each launch, in order; ``notes`` are its rules' words.

    Lines before the table, which are the program's own, are passed over.
    """
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    found: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(lines[start:]):
        if not (row["ID"] or "").isdigit():
            continue
        about = found.setdefault(row["ID"], {"kernel": row["Kernel Name"].partition("(")[0], "notes": []})
        name, value = row["Metric Name"], (row["Metric Value"] or "").replace(",", "")
        if name in KEPT and value:
            scale = MICROSECONDS.get(row["Metric Unit"], 1.0) if name == "Duration" else 1.0
            about[KEPT[name]] = float(value) * scale
        words = " ".join((row.get("Rule Description") or "").split())
        if words and row["Section Name"] in ("Compute Workload Analysis", "Warp State Statistics"):
            about["notes"].append(words)
    return list(found.values())


def table(found: list[dict[str, Any]]) -> list[str]:
    lines = [f"{'kernel':<44}{'µs':>9}{'DRAM %':>8}{'L2 %':>7}{'SM %':>7}{'regs':>6}{'occ. %':>8}"]
    for one in found:
        cells = [f"{one.get(key, float('nan')):.1f}" for key in ("us", "dram", "l2", "sm")]
        regs, occupancy = one.get("registers", float("nan")), one.get("occupancy", float("nan"))
        lines.append(
            f"{one['kernel'][:43]:<44}{cells[0]:>9}{cells[1]:>8}{cells[2]:>7}{cells[3]:>7}"
            f"{regs:>6.0f}{occupancy:>8.1f}"
        )
        lines += [f"    {note[:200]}" for note in one["notes"]]
    return lines


def by_torch(call: Any) -> list[dict[str, Any]]:
    """Kernels of one call and the microseconds of each, over ten calls."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(10):
            call()
        torch.cuda.synchronize()
    spent: dict[str, list[float]] = defaultdict(list)
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            spent[event.name].append(event.device_time)
    return [
        {"kernel": name, "us": sum(times) / len(times), "launches": len(times) / 10}
        for name, times in spent.items()
    ]


def by_ncu() -> tuple[list[dict[str, Any]], str]:
    """Each launch as ncu sees it, or none and why."""
    ncu = shutil.which("ncu")
    if ncu is None:
        return [], "ncu is not on PATH: which pipe is busy, and what warps wait for, stays open"
    sections = [word for section in SECTIONS for word in ("--section", section)]
    command = [ncu, "--csv", "--page", "details", "--profile-from-start", "off", *sections]
    done = subprocess.run(
        [*command, sys.executable, *sys.argv], env=os.environ | {INSIDE: "1"}, capture_output=True, text=True
    )
    found = kernels(done.stdout)
    if found:
        return found, ""
    last = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()][-3:]
    return [], f"ncu profiled nothing: {' | '.join(last)}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=[*SHAPES, *SELF_TEST_SHAPES], default="deepseek-v3")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--dtype", choices=DTYPES, default="fp8")
    parser.add_argument("--only", default="moec", help="whose layer")
    parser.add_argument("--out", type=Path, help="write the JSON here")
    args = parser.parse_args()
    if args.tokens < 1:
        parser.error("--tokens: 1 or more")
    if not torch.cuda.is_available():
        sys.exit("no NVIDIA GPU is here: there is nothing to profile")
    adapters = FP8_ADAPTERS if args.dtype == "fp8" else ADAPTERS
    shape = (SHAPES | SELF_TEST_SHAPES)[args.shape]
    call = one_call(adapters[args.only], args.only, shape, args.tokens, DTYPES[args.dtype], "cuda")
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    if os.environ.get(INSIDE):
        torch.cuda.profiler.start()
        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        return
    timed = by_torch(call)
    for one in sorted(timed, key=lambda one: -one["us"] * one["launches"]):
        print(f"{one['us'] * one['launches']:>9.1f} µs  {one['launches']:>5.1f} ×  {one['kernel'][:90]}")
    found, why = by_ncu()
    print(why or "\n".join(table(found)))
    result = report.header("cuda", args.dtype) | {
        "shape": args.shape,
        "tokens": args.tokens,
        "implementation": args.only,
        "kernels": timed,
        "ncu": found,
        "ncu_missing": why,
    }
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
