"""Packages for GPU targets, without a GPU: what is built, and what the interpreter makes of it."""

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
from moec import models
from moec.errors import CompilerMissing, DeviceUnavailable, InterpreterOff, OutputUnwritable
from moec.runtime import nvrtc
from moec.runtime.compile import compile_many

ROOT = Path(__file__).parents[2]
HIDDEN = 64


def spec(dtype: str) -> models.Layer:
    block = models.MoE(
        models.Router(experts=6, top_k=3, renorm=True),
        models.Experts(count=6, intermediate=32),
        shared=models.SwiGLU(intermediate=32, name="shared"),
    )
    return models.Layer(block, hidden=HIDDEN, dtype=dtype, name="layer")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> moec.Built:
    options = moec.BuildOptions(cache=str(cache))
    return moec.build(spec("f16"), "sm_90a", tmp_path_factory.mktemp("gpu") / "layer", options=options)


def test_its_kernels_are_compiled_and_described(built: moec.Built) -> None:
    kernels = built.manifest["kernels"]
    assert {k["arch"] for k in kernels} == {"sm_90a"}
    assert {f"cubin/{k['kernel']}.{k['variant']}.sm_90a.cubin" for k in kernels} <= set(
        built.manifest["files"]
    )
    products = [k for k in kernels if "grouped_linear" in k["kernel"]]
    assert len(products) >= 2
    for kernel in kernels:
        facts = kernel["facts"]
        assert facts["spill_stores"] == facts["spill_loads"] == 0, kernel["kernel"]
        assert facts["shared_static"] + facts["shared_dynamic"] <= 232_448
    for kernel in products:
        if kernel["kernel"].endswith("_tokens_sum"):
            continue  # where tokens are many, the sum is a kernel of its own
        assert any(name.startswith("HGMMA") for name in kernel["facts"]["matrix"]), kernel["kernel"]


def test_without_nvrtc_there_are_tritons_routers(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvrtc.compiler_version.cache_clear()
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", None)
    monkeypatch.delattr("cuda.bindings.nvrtc", raising=False)
    given: dict[str, Any] = {"cache": str(cache), "force": True}
    with pytest.raises(CompilerMissing, match="--kernels triton"):
        moec.build(spec("f16"), "sm_90a", tmp_path / "layer", options=moec.BuildOptions(**given))
    assert not (tmp_path / "layer").exists()
    options = moec.BuildOptions(**given, kernels="triton")
    package = moec.build(spec("f16"), "sm_90a", tmp_path / "layer", options=options)
    assert any("route" in k["kernel"] for k in package.manifest["kernels"])


def test_a_fused_op_is_one_call(built: moec.Built) -> None:
    code = (built.path / "model.py").read_text(encoding="utf-8")
    for call in ("route_sort(", "gather_grouped_linear(", "grouped_linear_combine("):
        assert code.count(f"= {call}") == 1
    assert "mlp_in[" not in code and "swiglu(gu)" in code  # the shared expert's; the routed ones' is fused


def test_a_second_build_compiles_nothing(
    built: moec.Built, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []

    def watched(*args: object, **kwargs: object) -> object:
        results.append(compile_many(*args, **kwargs))  # type: ignore[arg-type]
        return results[-1]

    monkeypatch.setattr("moec.runtime.ahead.compile_many", watched)
    again = moec.build(spec("f16"), "sm_90a", tmp_path / "again", options=moec.BuildOptions(cache=str(cache)))
    assert [(r.compiled, r.reused > 0) for r in results] == [(0, True)]
    assert again.manifest["files"] == built.manifest["files"]


def test_without_a_gpu_and_without_the_interpreter(built: moec.Built, cache: Path, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(DeviceUnavailable, match="needs an NVIDIA GPU"):
            moec.load(built, "random:0")
    with pytest.raises(InterpreterOff, match="TRITON_INTERPRET=1"):
        moec.load(built, "random:0", device="interpret")
    layer = moec.build(spec("bf16"), "sm_90a", tmp_path / "bf16", options=moec.BuildOptions(cache=str(cache)))
    with pytest.raises(DeviceUnavailable, match="bf16, which Triton's interpreter multiplies wrongly"):
        moec.load(layer, "random:0", device="interpret")
    with pytest.raises(DeviceUnavailable, match="built for sm_90a and can't run on 'cpu'"):
        moec.load(built, "random:0", device="cpu")


INTERPRET = """
import json, sys, torch, moec
package, reference, text, checkpoint = sys.argv[1:5]
layer = moec.load(package, "random:3", device="interpret")
want = moec.load(reference, "random:3")
worst = 0.0
for tokens in (0, 1, 23):
    x = torch.randn(tokens, layer.manifest["hidden"], generator=torch.Generator().manual_seed(tokens)).half()
    got, expected = layer.forward(x).float(), want.forward(x).float()
    assert got.shape == expected.shape
    if tokens:
        worst = max(worst, float((got - expected).abs().max() / expected.abs().max()))
model = moec.load(text, checkpoint, device="interpret")
out = model.generate([list(b"The for")], 6)[0].tolist()
print(json.dumps({"worst": worst, "text": out}))
"""


def test_the_interpreter_gives_what_the_cpu_gives(built: moec.Built, cache: Path, tmp_path: Path) -> None:
    """A layer in fp16, and the trained example in fp32: the same text, byte for byte."""
    reference = moec.build(spec("f16"), "cpu", tmp_path / "cpu")
    checkpoint = str(ROOT / "examples" / "pydoc" / "checkpoint")
    options = moec.BuildOptions(cache=str(cache))
    text = moec.build(checkpoint, "sm_90a", tmp_path / "text", dtype="f32", options=options)
    done = subprocess.run(
        [sys.executable, "-c", INTERPRET, built.path, reference.path, text.path, checkpoint],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["worst"] < 2e-3
    on_cpu = moec.load(moec.build(checkpoint, "cpu", tmp_path / "text_cpu", dtype="f32"), checkpoint)
    assert isinstance(on_cpu, moec.LanguageModel)
    assert found["text"] == on_cpu.generate([list(b"The for")], 6)[0].tolist()


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    options = moec.BuildOptions(cache=str(tmp_path / "file"))
    with pytest.raises(OutputUnwritable, match=r"compiled kernels(.|\n)*MOEC_CACHE"):
        moec.build(spec("f16"), "sm_80", tmp_path / "x", options=options)
    assert not (tmp_path / "x").exists()
