"""``moec.build`` from Python: levels, layers, determinism, and what an import and a large model cost."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import moec
from moec.errors import BadOption, MoecError, OutputExists, UnknownPreset
from moec.models import resolve
from moec.runtime.checkpoint import expand

from .conftest import PRESET, Cli

GB = 1_000_000_000
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def test_build_takes_what_names_a_model(tmp_path: Path, pristine: Path) -> None:
    a = moec.build(PRESET, out=tmp_path / "name", dtype="f32")
    b = moec.build(resolve(PRESET), out=tmp_path / "object", dtype="f32")
    c = moec.build(pristine, out=tmp_path / "folder", dtype="f32", weights=pristine)
    d = moec.build(pristine / "config.json", out=tmp_path / "file", dtype="f32")
    assert a.manifest["files"] == b.manifest["files"]
    assert c.manifest["files"] == d.manifest["files"]
    assert c.manifest["checkpoint"] == a.manifest["checkpoint"]


def test_what_was_built(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    made = moec.build(PRESET, dtype="f32", progress=said.append)
    assert made.path == Path("build") / PRESET
    assert [f.name for f in made.ir_files][:2] == ["000_naive.moec", "002_expert-grouping.moec"]
    assert {f.name for f in made.sources} >= {"model.py", "weights.py", "route.py"}
    assert said[0] == f"lowering {PRESET}" and "pass expert-grouping" in said
    assert isinstance(moec.load(made, "random:0"), moec.LanguageModel)
    listed = json.loads((made.path / "manifest.json").read_text())["files"]
    there = {f.relative_to(made.path).as_posix() for f in made.path.rglob("*") if f.is_file()}
    assert there - {"manifest.json", "events.jsonl"} == set(listed)


@pytest.mark.parametrize(("name", "folder"), [("a b/c", "a-b-c"), ("../up", "up"), (".", "model")])
def test_a_models_name_as_a_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, folder: str
) -> None:
    monkeypatch.chdir(tmp_path)
    spec = replace(resolve("mixtral-tiny"), name=name)
    assert moec.build(spec, options=moec.BuildOptions(opt_level=0)).path == Path("build") / folder
    assert [p.name for p in tmp_path.iterdir()] == ["build"]


def test_the_same_build_is_the_same_package(built: Path, tmp_path: Path) -> None:
    again = moec.build(PRESET, out=tmp_path / "again", dtype="f32").path
    for file in sorted(built.rglob("*")):
        if file.is_file() and file.name != "events.jsonl":  # which holds times
            assert (again / file.relative_to(built)).read_bytes() == file.read_bytes()


def test_all_levels_compute_the_same(tmp_path: Path) -> None:
    logits = []
    for level in range(4):
        options = moec.BuildOptions(opt_level=level)
        made = moec.build(PRESET, out=tmp_path / str(level), dtype="f32", options=options)
        model = moec.load(made, "random:5")
        assert isinstance(model, moec.LanguageModel)
        logits.append(model(IDS))
        assert ("grouped_linear" in (made.path / "model.py").read_text()) == (level >= 2)
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], rtol=1e-4, atol=1e-5)


def test_layers(tmp_path: Path, pristine: Path, cli: Cli) -> None:
    tensors: list[set[str]] = []
    for which in ("1", "1-2"):
        done = cli(
            "build", pristine, "-o", tmp_path / which, "--layers", which, "--weights", pristine, "--json"
        )
        assert done.code == 0, "the checkpoint's other layers are no surplus"
        tensors.append({name for entry in done.json()["manifest"]["checkpoint"] for name in expand(entry)})
    first, rest = tensors
    numbers = [{n.split(".")[2] for n in names if n.startswith("model.layers.")} for names in tensors]
    assert numbers == [{"0"}, {"1", "2"}]
    whole = moec.build(pristine, out=tmp_path / "whole").manifest
    assert first | rest == {name for entry in whole["checkpoint"] for name in expand(entry)}
    with pytest.raises(BadOption, match="layers 4 of a model of 3"):
        moec.build(PRESET, out=tmp_path / "no", options=moec.BuildOptions(layers="4"))


def test_errors_are_moecs(tmp_path: Path) -> None:
    with pytest.raises(UnknownPreset) as caught:
        moec.build("mixtrall", out=tmp_path / "no")
    assert isinstance(caught.value, moec.MoecError) and moec.MoecError is MoecError
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    with pytest.raises(OutputExists):
        moec.build(PRESET, out=tmp_path / "there")
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


@pytest.mark.parametrize(
    ("argument", "value", "words"),
    [
        ("target", 3, "target is 3"),
        ("dtype", 3, "dtype is 3"),
        ("dtype", torch.int8, r"dtype is torch\.int8"),
        ("out", 3, "out is a folder, not int"),
        ("out", "", "out is ''"),
        ("options", {}, r"options is a moec\.BuildOptions, not dict"),
        ("weights", {"a": torch.zeros(1)}, "weights is a folder, not dict"),
    ],
)
def test_arguments_of_the_wrong_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argument: str, value: Any, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadOption, match=words):
        moec.build("mixtral-tiny", **{argument: value})
    assert list(tmp_path.iterdir()) == []


def test_a_dtype_of_pytorch_s(tmp_path: Path) -> None:
    made = moec.build("mixtral-tiny", out=tmp_path / "x", dtype=torch.bfloat16)
    assert made.manifest["dtype"] == made.manifest["options"]["dtype"] == "bf16"


def test_importing_moec_and_asking_for_help_load_no_torch() -> None:
    script = (
        "import sys, moec, moec.cli, moec.config, moec.errors\n"
        "assert moec.cli.run(['--help']) == 0\n"
        "heavy = {'torch', 'triton', 'networkx', 'sympy', 'jinja2', 'rich', 'transformers'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, f"loaded: {done.stderr}"
    assert "Commands:" in done.stdout


def test_deepseek_v3_at_its_true_size(tmp_path: Path) -> None:
    """671 G parameters, of which a build holds none. The time is printed, not judged."""
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "build_v3.py"
    command = [sys.executable, script, "--warm", "0", "--out", tmp_path / "v3"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(f"built in {found['cold_seconds']} s, peak {found['peak_bytes'] / GB:.2f} GB")
    assert found["peak_bytes"] < GB
    assert found["parameters"] == pytest.approx(671e9, rel=0.001)
    final = sorted((tmp_path / "v3" / "ir").glob("*.moec"))[-1].read_text()
    assert len(final.splitlines()) < 400
    assert "{layers=3..60" in final
