"""A package whose experts are Gluon's: by an annotation in a dump, from which the build goes on."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import moec
from moec import models
from moec.errors import UnknownKernel

ROOT = Path(__file__).parents[2]
OPS = ("gather_grouped_linear", "grouped_linear_combine")


def spec() -> models.Layer:
    block = models.MoE(
        models.Router(experts=6, top_k=3, renorm=True), models.Experts(count=6, intermediate=128)
    )
    return models.Layer(block, hidden=128, dtype="f16", name="layer")


def by_name(dump: Path, to: Path) -> Path:
    """The dump with Gluon's kernels for the experts' products."""
    text = dump.read_text(encoding="utf-8")
    for op in OPS:
        text, found = re.subn(rf'kernel=triton\.{op}(.*?), schedule="[^"]*"', rf"kernel=gluon.{op}\1", text)
        assert found == 1, text
    to.write_text(text, encoding="utf-8")
    return to


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[moec.Built, moec.Built]:
    """As it is chosen, and by name; with one schedule for all of M, so that no rung of Triton's is below."""
    folder = tmp_path_factory.mktemp("gluon")
    options = moec.BuildOptions(cache=str(folder / "cache"), batch_invariant=True)
    chosen = moec.build(spec(), "sm_90a", folder / "chosen", options=options)
    dump = by_name(sorted((chosen.path / "ir").iterdir())[-1], folder / "gluon.moec")
    options = replace(options, resume=str(dump))
    return chosen, moec.build(spec(), "sm_90a", folder / "named", options=options)


def test_its_kernels_are_compiled_and_described(built: tuple[moec.Built, moec.Built]) -> None:
    chosen, named = built
    assert not any("specialised" in k["kernel"] for k in chosen.manifest["kernels"])
    kernels = {k["kernel"]: k for k in named.manifest["kernels"]}
    for op in OPS:
        kernel = kernels[f"{op}_specialised"]
        facts = kernel["facts"]
        assert kernel["warps"] == 12 and facts["spill_stores"] == facts["spill_loads"] == 0
        assert all(m.startswith("HGMMA.64x") for m in facts["matrix"]) and facts["matrix"]
        assert f"cubin/{op}_specialised.{kernel['variant']}.sm_90a.cubin" in named.manifest["files"]
    assert not any("twin" in name for name in kernels)


def test_another_target_refuses_it(built: tuple[moec.Built, moec.Built], tmp_path: Path) -> None:
    dump = by_name(sorted((built[0].path / "ir").iterdir())[-1], tmp_path / "gluon.moec")
    text = dump.read_text(encoding="utf-8")
    dump.write_text(text.replace("target=sm_90a", "target=sm_80"), encoding="utf-8")
    with pytest.raises(
        UnknownKernel, match=r"gluon\.gather_grouped_linear is for sm_90a, not sm_80"
    ) as refused:
        moec.build(spec(), "sm_80", tmp_path / "no", options=moec.BuildOptions(resume=str(dump)))
    assert str(dump) in str(refused.value)


INTERPRET = """
import json, sys, torch, moec
packages = [moec.load(path, "random:3", device="interpret") for path in sys.argv[1:3]]
reference = moec.load(sys.argv[3], "random:3")
worst = []
for tokens in (0, 1, 150):
    x = torch.randn(tokens, 128, generator=torch.Generator().manual_seed(tokens)).half()
    wanted = reference.forward(x).float()
    for layer in packages:
        got = layer.forward(x).float()
        worst.append(float((got - wanted).abs().max() / wanted.abs().max()) if tokens else len(got))
print(json.dumps(worst))
"""


def test_the_interpreter_runs_it(built: tuple[moec.Built, moec.Built], tmp_path: Path) -> None:
    reference = moec.build(spec(), "cpu", tmp_path / "cpu")
    done = subprocess.run(
        [sys.executable, "-c", INTERPRET, *(p.path for p in built), reference.path],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert max(json.loads(done.stdout)) < 2e-3
