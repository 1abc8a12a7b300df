"""Whole models whose ops are fused: the CPU runs them, and Triton's interpreter what a GPU gets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moec
from moec import models
from moec.passes import pipeline, print_pipeline

ROOT = Path(__file__).parents[2]
FUSED = ("add_rms_norm(", "norm_rope(", "cache_write(")


def model(attn: models.Block, dtype: str = "f32") -> models.Model:
    """A dense layer and two of experts; every width a multiple of 8, as merged projections want it.

    Below fp32 every token goes to every expert: a choice could turn with a rounding.
    """
    experts = models.MoE(
        models.Router(experts=6, top_k=3 if dtype == "f32" else 6, renorm=True, bias=True, score="sigmoid"),
        models.Experts(6, 16),
        models.SwiGLU(32, name="shared"),
    )
    layers = [models.Decoder(attn, mlp) for mlp in (models.SwiGLU(24), experts, experts)]
    return models.Model(
        vocab=40, hidden=32, layers=layers, dtype=dtype, page=8, max_positions=64, name="tiny"
    )


ATTENTION: dict[str, models.Block] = {
    "mla": models.MLA(2, 16, 8, 16, 24, q_lora_rank=16, rope=models.YaRN(original=16, layout="interleaved")),
    "mla-plain-q": models.MLA(2, 16, 8, 16, 24),
    "head-norm": models.GQA(4, 2, 8, qk_norm="head", qkv_bias=True),
    "full-norm": models.GQA(4, 2, 8, qk_norm="full", clip=0.5),
}
TOLERANCE = {"f32": 2e-5, "bf16": 6e-2, "f16": 1e-2}


@pytest.mark.parametrize("dtype", sorted(TOLERANCE))
@pytest.mark.parametrize("name", ATTENTION)
def test_the_cpu_runs_what_gpus_get(name: str, dtype: str, tmp_path: Path) -> None:
    spec = model(ATTENTION[name], dtype)
    passes = print_pipeline(p for p in pipeline(2, "sm_90a") if p.phase < 2)
    plain = moec.build(spec, "cpu", tmp_path / "plain", options=moec.BuildOptions(opt_level=0))
    fused = moec.build(spec, "cpu", tmp_path / "fused", options=moec.BuildOptions(passes=passes))
    code = (fused.path / "model.py").read_text(encoding="utf-8")
    assert all(f"{'latent_' if name.startswith('mla') and 'cache' in op else ''}{op}" in code for op in FUSED)
    ids = torch.randint(0, 40, (2, 11), generator=torch.Generator().manual_seed(1))
    want, got = (moec.load(package, "random:5")(ids).float() for package in (plain, fused))
    assert float((want - got).abs().max() / want.abs().max()) < TOLERANCE[dtype]


INTERPRET = """
import json, sys, torch, moec
ids = [[1, 2, 3, 4, 5], [6, 7]]
out = []
for package, reference in zip(sys.argv[1::2], sys.argv[2::2]):
    both = [moec.load(package, "random:5", device="interpret"), moec.load(reference, "random:5")]
    whole = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    got, want = (m(whole).float() for m in both)
    texts = [[t.tolist() for t in m.generate([torch.tensor(i) for i in ids], 4)] for m in both]
    out.append([float((got - want).abs().max() / want.abs().max()), texts[0] == texts[1]])
print(json.dumps(out))
"""


def test_the_interpreter_gives_what_the_cpu_gives(tmp_path: Path) -> None:
    paths = []
    for name in ("mla", "head-norm"):
        spec = model(ATTENTION[name], "f16")
        gpu = moec.build(
            spec, "sm_90a", tmp_path / name, options=moec.BuildOptions(cache=str(tmp_path / "c"))
        )
        code = (gpu.path / "model.py").read_text(encoding="utf-8")
        assert all(op in code for op in FUSED) and "rope(" not in code.replace("norm_rope(", "")
        paths += [gpu.path, moec.build(spec, "cpu", tmp_path / f"{name}-cpu").path]
    done = subprocess.run(
        [sys.executable, "-c", INTERPRET, *paths],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for worst, same_text in json.loads(done.stdout):
        assert worst < 1e-2 and same_text
