"""Every -O level gives a package that runs: on the cpu, and a GPU's in Triton's interpreter."""

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
from moec.check import verify_package
from moec.passes.pipelines import LEVELS

ROOT = Path(__file__).parents[2]
EXAMPLE = str(ROOT / "examples" / "pydoc" / "checkpoint")
PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6, 5], [8]]


def tiny(dtype: str) -> models.Model:
    """Latent attention and grouped, experts and a dense layer, at sizes that the Triton kernels take."""
    router = models.Router(4, 2, score="sigmoid", renorm=True, scale=2.5, bias=True)
    moe = models.MoE(router, models.Experts(4, 32), models.SwiGLU(32, name="shared_experts"))
    latent = models.MLA(2, 16, 8, 16, 32, 24, models.YaRN(factor=4.0, original=8, layout="interleaved"))
    grouped = models.GQA(4, 2, 16, qk_norm="head")
    layers = [
        models.Decoder(latent, moe),
        models.Decoder(grouped, models.SwiGLU(48)),
        models.Decoder(latent, moe),
    ]
    return models.Model(37, 64, layers, dtype=dtype, page=4, max_positions=64, name=f"tiny-{dtype}")


@pytest.mark.parametrize("level", LEVELS)
def test_the_example_at_each_level(level: int, tmp_path: Path) -> None:
    options = moec.BuildOptions(opt_level=level)
    built = moec.build(EXAMPLE, "cpu", tmp_path / "text", dtype="f32", options=options)
    verdict = verify_package(built.path, EXAMPLE, tokens=9, decode=2)
    assert verdict.ok and verdict.same_tokens == verdict.tokens
    model = moec.load(built, EXAMPLE)
    assert isinstance(model, moec.LanguageModel)
    naive = moec.build(
        EXAMPLE, "cpu", tmp_path / "naive", dtype="f32", options=moec.BuildOptions(opt_level=0)
    )
    want = moec.load(naive, EXAMPLE)
    assert isinstance(want, moec.LanguageModel)
    prompt = [list(b"import os"), list(b"The ")]
    assert [t.tolist() for t in model.generate(prompt, 12)] == [t.tolist() for t in want.generate(prompt, 12)]


@pytest.mark.parametrize("level", LEVELS)
def test_the_example_in_fp8_at_each_level(level: int, tmp_path: Path) -> None:
    """Each choice of experts is explained by rounding; with the choices pinned the naive model is near."""
    options = moec.BuildOptions(opt_level=level, fp8=True)
    built = moec.build(EXAMPLE, "cpu", tmp_path / "text", dtype="f32", options=options)
    verdict = verify_package(built.path, EXAMPLE, tokens=40, decode=2)
    assert verdict.ok and not verdict.exact and verdict.wrong == 0
    assert min(r.sqnr for r in verdict.rows if "prefill" in r.value and r.sqnr is not None) > 15


INTERPRET = """
import json, sys, torch, moec
prompts = json.loads(sys.argv[1])
for package in sys.argv[2:]:
    model = moec.load(package, "random:5", device="interpret")
    logits = [model(torch.tensor([p]))[0].float().tolist() for p in prompts]
    print(json.dumps([logits, [t.tolist() for t in model.generate(prompts, 4)]]))
"""


@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_each_level_of_a_gpus_package_in_the_interpreter(
    dtype: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """As the naive package for the cpu; by the median in fp16, where rounding may turn an expert choice."""
    cache = str(tmp_path_factory.getbasetemp() / "kernels of test_levels")
    naive = moec.BuildOptions(opt_level=0)
    want = moec.load(moec.build(tiny(dtype), "cpu", tmp_path / "cpu", options=naive), "random:5")
    assert isinstance(want, moec.LanguageModel)
    packages = []
    for level in LEVELS:
        options = moec.BuildOptions(opt_level=level, cache=cache)
        packages.append(moec.build(tiny(dtype), "sm_90a", tmp_path / f"O{level}", options=options).path)
    done = subprocess.run(
        [sys.executable, "-c", INTERPRET, json.dumps(PROMPTS), *packages],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    expected = [want(torch.tensor([p]))[0].float() for p in PROMPTS]
    tokens = [t.tolist() for t in want.generate(PROMPTS, 4)]
    for level, line in zip(LEVELS, done.stdout.splitlines(), strict=True):
        logits, written = json.loads(line)
        errors = torch.cat(
            [
                (torch.tensor(g) - w).abs().amax(1) / w.abs().max()
                for g, w in zip(logits, expected, strict=True)
            ]
        )
        if dtype == "f32":
            assert float(errors.max()) < 1e-4, f"-O{level}"
            assert written == tokens, f"-O{level}"
        else:
            assert float(errors.median()) < 1e-2, f"-O{level}"
