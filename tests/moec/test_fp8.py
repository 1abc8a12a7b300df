"""``--fp8`` from the command line to the generated text: whole models, targets without fp8, what is said."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import moec
from moec.dumps import dumps
from moec.errors import BadOption
from moec.models.families import FAMILIES
from moec.runtime.values import Scaled

from .conftest import Cli
from .routed import routed_alike, sqnr
from .test_levels import tiny

ROOT = Path(__file__).parents[2]
PYDOC = ROOT / "examples" / "pydoc" / "checkpoint"
FP8 = moec.BuildOptions(fp8=True)
# Of whole tiny models with random weights, against fp32 routed alike, in dB: about 2 below what was measured.
FLOOR = {"deepseek-v2-tiny": 7.5, "deepseek-v3-tiny": 10.5}
OTHERS = 12.5


@pytest.mark.parametrize("tiny", sorted({family.tiny for family in FAMILIES.values()}))
def test_a_whole_model_for_cpu(tiny: str, tmp_path: Path) -> None:
    plain = moec.load(moec.build(tiny, out=tmp_path / "plain", dtype="f32"), "random:0")
    built = moec.build(tiny, out=tmp_path / "fp8", dtype="f32", options=FP8)
    model = moec.load(built, "random:0")
    assert isinstance(model, moec.LanguageModel)
    assert built.manifest["fp8"] == "fp8-cast" and any(isinstance(w, Scaled) for w in model.weights.values())
    assert model.weights.nbytes < 0.6 * plain.weights.nbytes
    alike, otherwise = routed_alike(built.path, model, torch.arange(40).view(1, 40) % plain.vocab)
    assert alike > FLOOR.get(tiny, OTHERS), "the price of fp8, without that of other experts"
    assert otherwise <= alike + 0.1
    kernels = "".join(p.read_text(encoding="utf-8") for p in (built.path / "kernels").glob("*.py"))
    assert "An emulation, not an fp8 kernel" in kernels


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
import sys, torch
from pathlib import Path
from tests.codegen import interpreter_casts
from tests.moec.routed import routed_alike
import moec

interpreter_casts.install()
package = Path(sys.argv[1])
model = moec.load(package, "random:0", device="interpret")
for dump in (-1, 0):
    print(routed_alike(package, model, torch.arange(7).view(1, 7), dump)[0])
"""


@pytest.mark.parametrize(("level", "latent"), [(2, False), (3, True)])
def test_a_gpu_s_package_in_the_interpreter(level: int, latent: bool, tmp_path: Path) -> None:
    """f16, routed alike: its last dump but for a few roundings that other sums turn, and the naive IR."""
    spec = tiny("f16") if latent else "mixtral-tiny"
    options = moec.BuildOptions(fp8=True, opt_level=level)
    package = moec.build(spec, "sm_90a", tmp_path / "gpu", "f16", options).path
    assert not latent or "latent_attention" in dumps(package)[-1].read_text(encoding="utf-8")
    environment = {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": str(ROOT),
        "PATH": "/usr/bin:/bin",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", INTERPRET, str(package)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-2000:]
    to_last, to_naive = map(float, run.stdout.split())
    assert to_last > 30.0 and to_naive > 12.0, run.stdout


def test_a_failed_build_says_how_to_get_at_its_ir(tmp_path: Path, cli: Cli) -> None:
    """Its own dumps are gone. What it says works, typed as it stands."""
    recipe = "skip=[nosuchparam]"
    failed = cli("build", "llama-tiny", "-o", tmp_path / "a", "--fp8-recipe", recipe)
    assert failed.code == 1 and not (tmp_path / "a").exists()
    number = re.search(r"build with --stop-after (\d+) --out DIR, then moec opt DIR/(\S+) -p", failed.err)
    assert number is not None, failed.err
    made = cli("build", "llama-tiny", "-o", tmp_path / "b", "--stop-after", number[1])
    assert made.code == 0 and (tmp_path / "b" / number[2]).is_file()
