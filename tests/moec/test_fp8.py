"""``--fp8`` from the command line to the generated text: whole models, targets without fp8, what is said."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import moec
from moec.check import verify_package
from moec.errors import BadOption
from moec.models.families import FAMILIES
from moec.runtime.values import Scaled

from .conftest import Cli

ROOT = Path(__file__).parents[2]
PYDOC = ROOT / "examples" / "pydoc" / "checkpoint"
FP8 = moec.BuildOptions(fp8=True)
# Of whole tiny models with random weights, against fp32, in dB: routers choose otherwise now and then.
FLOOR = {"deepseek-v2-tiny": 4.0, "deepseek-v3-tiny": 8.0}


def sqnr(exact: torch.Tensor, got: torch.Tensor) -> float:
    noise = (got.double() - exact.double()).square().sum()
    return float(10 * torch.log10(exact.double().square().sum() / noise))


@pytest.mark.parametrize("tiny", sorted({family.tiny for family in FAMILIES.values()}))
def test_a_whole_model_for_cpu(tiny: str, tmp_path: Path) -> None:
    plain = moec.load(moec.build(tiny, out=tmp_path / "plain", dtype="f32"), "random:0")
    built = moec.build(tiny, out=tmp_path / "fp8", dtype="f32", options=FP8)
    model = moec.load(built, "random:0")
    assert built.manifest["fp8"] == "fp8-cast" and any(isinstance(w, Scaled) for w in model.weights.values())
    assert model.weights.nbytes < 0.6 * plain.weights.nbytes
    ids = torch.arange(40).view(2, 20) % plain.vocab
    assert sqnr(plain(ids), model(ids)) > FLOOR.get(tiny, 12.0)
    kernels = "".join(p.read_text(encoding="utf-8") for p in (built.path / "kernels").glob("*.py"))
    assert "An emulation, not an fp8 kernel" in kernels


def test_the_package_computes_what_its_ir_says(tmp_path: Path) -> None:
    built = moec.build("llama-tiny", out=tmp_path / "fp8", options=FP8)
    verdict = verify_package(built.path, "random:0", tokens=6, decode=1)
    assert verdict.ok
    file = built.path / "kernels" / "quant.py"
    source = file.read_text(encoding="utf-8")
    file.write_text(source.replace("/ 448", "/ 900"), encoding="utf-8")  # half of the range saturates
    assert not verify_package(built.path, "random:0", tokens=6, decode=1, allow_edited=True).ok


def test_the_example_goes_on_writing_in_fp8(tmp_path: Path) -> None:
    plain = moec.load(moec.build(PYDOC, out=tmp_path / "plain"), PYDOC)
    model = moec.load(moec.build(PYDOC, out=tmp_path / "fp8", options=FP8), PYDOC)
    prompt = torch.tensor([list(b"Return the number of ")])
    assert sqnr(plain(prompt), model(prompt)) > 18.0
    expected, got = plain.generate(prompt, 24)[0, 21:], model.generate(prompt, 24)[0, 21:]
    text = bytes(got.tolist()).decode("utf-8", "replace")
    assert text.isprintable() or "\n" in text
    assert float((expected[:8] == got[:8]).float().mean()) > 0.7, text


def test_a_target_without_fp8_units_says_what_happens_instead(tmp_path: Path, cli: Cli) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        built = moec.build(
            "llama-tiny", "sm_80", tmp_path / "a", options=moec.BuildOptions(fp8=True, opt_level=1)
        )
    (said,) = [str(w.message) for w in caught if "fp8" in str(w.message)]
    assert said.startswith("sm_80 (A100 80GB SXM) has no fp8 units: products stay in")
    assert built.manifest["fp8"] == said and "f8e4m3" not in json.dumps(built.manifest["parameters"])
    rows = [json.loads(line) for line in (built.path / "events.jsonl").read_text().splitlines()]
    (row,) = [r for r in rows if r["event"] == "pass" and r["pass"] == "fp8-cast"]
    assert not row["changed"] and "multiplies no fp8" in row["misses"][0]["reason"]


def test_on_the_command_line(tmp_path: Path, cli: Cli) -> None:
    cli("build", "llama-tiny", "-o", tmp_path / "a", "--fp8")
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert manifest["fp8"] == "fp8-cast"
    cli("build", "llama-tiny", "-o", tmp_path / "b", "--fp8-recipe", "per-row{skip=[o_proj]}")
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())
    assert manifest["fp8"] == "fp8-cast{recipe=per-row,skip=[o_proj]}"
    refuse = cli("build", "llama-tiny", "-o", tmp_path / "c", "--fp8-recipe", "per-rwo")
    refuse.refused("M0701", "per-rwo", "did you mean per-row")
    cli("build", "llama-tiny", "-o", tmp_path / "c", "--fp8-recipe", "ops=[]").refused("M0701", "names no op")
    cli("build", "llama-tiny", "-o", tmp_path / "c", "--fp8-recipe", "skip=[no_proj]").refused(
        "M0701", "covers no parameter"
    )
    assert not (tmp_path / "c").exists()
    with pytest.raises(BadOption):
        moec.build("llama-tiny", out=tmp_path / "c", options=moec.BuildOptions(fp8="{x=1}"))


INTERPRET = """
import sys, torch, moec
plain = moec.load(sys.argv[1], "random:0")
model = moec.load(sys.argv[2], "random:0", device="interpret")
ids = torch.arange(5).view(1, 5)
a, b = plain(ids).double(), model(ids).double()
print(float(10 * torch.log10(a.square().sum() / (a - b).square().sum())))
"""


def test_a_gpu_s_package_in_the_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """f16 against the emulation for cpu: other sums turn a few roundings, and a few routers' choices."""
    cpu = moec.build("mixtral-tiny", "cpu", tmp_path / "cpu", "f16", FP8)
    gpu = moec.build("mixtral-tiny", "sm_90a", tmp_path / "gpu", "f16", FP8)
    environment = {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": str(ROOT),
        "PATH": "/usr/bin:/bin",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", INTERPRET, str(cpu.path), str(gpu.path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    assert float(run.stdout) > 12.0
