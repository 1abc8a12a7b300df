"""Packages whose KV cache is kept in 8 bits: what they compute, what they keep, what is reported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import moec
from moec.check import verify_package

from .conftest import Cli

ROOT = Path(__file__).parents[2]


def sqnr(exact: torch.Tensor, got: torch.Tensor) -> float:
    noise = (got.double() - exact.double()).square().sum()
    return float(10 * torch.log10(exact.double().square().sum() / noise))


def built(tmp_path: Path, name: str, kv: str, target: str = "cpu", dtype: str = "f32") -> Any:
    options = moec.BuildOptions(fp8=f"ops=[],kv={kv}")
    return moec.build(name, target, tmp_path / f"{name}-{target}-{dtype}", dtype=dtype, options=options)


@pytest.mark.parametrize(
    ("name", "kv", "dtype", "entry"),
    [
        ("deepseek-v3-tiny", "packed", "f32", 44),  # 24 e4m3, a scale, 8 bf16
        ("deepseek-v2-tiny", "packed", "bf16", 44),
        ("deepseek-v3-tiny", "per-tensor,kv_scale=0.25", "f32", 32),
        ("mixtral-tiny", "per-tensor", "f32", 40),
        ("llama-tiny", "per-tensor", "f16", None),
    ],
)
def test_a_package_computes_what_its_ir_says(
    name: str, kv: str, dtype: str, entry: int | None, tmp_path: Path
) -> None:
    package = built(tmp_path, name, kv, dtype=dtype)
    verdict = verify_package(package.path, "random:0", tokens=12, decode=2)
    assert verdict.ok and not verdict.exact
    assert min(r.sqnr for r in verdict.rows if r.sqnr is not None) > 12.0  # against the naive IR
    (cache,) = package.manifest["caches"]
    kept = moec.load(package, "random:0").new_cache(64)
    (layers,) = kept.tensors.values()
    assert all(t.element_size() == 1 for t in layers if t is not None)
    if entry is not None:
        assert kept.specs[0].bytes_per_token == entry * len(cache["layers"])
    for file in (package.path / "kernels").glob("*.py"):
        source = file.read_text(encoding="utf-8")
        file.write_text(source.replace(".clamp(-448, 448)", ".clamp(-1, 0.5)"), encoding="utf-8")
    assert not verify_package(package.path, "random:0", tokens=12, decode=2, allow_edited=True).ok


INTERPRET = """
import sys, torch, moec
plain = moec.load(sys.argv[1], "random:0")
model = moec.load(sys.argv[2], "random:0", device="interpret")
ids = torch.arange(6).view(1, 6)
a, b = plain(ids).double(), model(ids).double()
print(float(10 * torch.log10(a.square().sum() / (a - b).square().sum())))
"""


def test_a_gpu_s_package_in_the_interpreter(tmp_path: Path) -> None:
    """Fused writes, against the cpu's package of the same cache."""
    cpu = built(tmp_path, "deepseek-v3-tiny", "packed")
    gpu = built(tmp_path, "deepseek-v3-tiny", "packed", "sm_90a")
    text = "".join(f.read_text(encoding="utf-8") for f in (gpu.path / "kernels").glob("*cache_write*.py"))
    assert "torch.float8_e4m3fn" in text and "rms_norm" in text
    environment = {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]}
    command = [sys.executable, "-c", INTERPRET, str(cpu.path), str(gpu.path)]
    run = subprocess.run(
        command, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert float(run.stdout) > 25.0


def test_on_the_command_line(tmp_path: Path, cli: Cli) -> None:
    done = cli("build", "deepseek-v3-tiny", "-o", tmp_path / "a", "--fp8-recipe", "ops=[],kv=packed")
    assert "44 bytes a token and layer, 132 bytes a token over all layers" in done.out
    rows = [json.loads(line) for line in (tmp_path / "a" / "events.jsonl").read_text().splitlines()]
    (row,) = [r for r in rows if r["event"] == "pass" and r["pass"].startswith("fp8-cast")]
    assert row["fired"] == {"kv-packed": 1}
    refused = cli("build", "mixtral-tiny", "-o", tmp_path / "b", "--fp8-recipe", "kv=packed")
    refused.refused("M0701", "no cache of latents")
    refused = cli("build", "mixtral-tiny", "-o", tmp_path / "b", "--fp8-recipe", "kv=paked")
    refused.refused("M0701", "did you mean packed")


def test_where_nothing_multiplies_fp8_the_cache_is_still_kept_so(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="no fp8 units.*the KV cache is kept in 8 bits all the same"):
        options = moec.BuildOptions(fp8="kv=per-tensor")
        package = moec.build("llama-tiny", "sm_80", tmp_path / "p", dtype="bf16", options=options)
    assert package.manifest["caches"][0]["dtype"] == "f8e4m3"
