"""A small package, its weights as a checkpoint, and the command line in process."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import moec
from moec import cli as command_line
from moec.models import PRESETS
from moec.runtime.checkpoint import open_checkpoint

PRESET = "deepseek-v3-tiny"


@dataclass(frozen=True)
class Result:
    """What one command did."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)

    def refused(self, code: str, *words: str) -> None:
        """A user's error of that code, which names ``words`` and prints nothing on stdout."""
        assert self.code == 1, self.err
        assert self.err.startswith(f"error[{code}] "), self.err
        assert self.out == ""
        for word in words:
            assert word in self.err, f"{word!r} isn't named in:\n{self.err}"


Cli = Callable[..., Result]


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    """These tensors are so small that threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _no_options_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in os.environ if n.startswith("MOEC_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """``cli("build", spec, "-o", out)`` as the shell would run it."""

    def run(*argv: Any) -> Result:
        capsys.readouterr()
        code = command_line.run([str(a) for a in argv])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package in f32; not to be changed."""
    return moec.build(PRESET, out=tmp_path_factory.mktemp("built") / "tiny", dtype="f32").path


@pytest.fixture
def package(built: Path, tmp_path: Path) -> Path:
    """A copy of the package to break."""
    return Path(shutil.copytree(built, tmp_path / "package"))


@pytest.fixture(scope="session")
def pristine(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder that the package fits; not to be changed."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(PRESETS[PRESET].fields))
    weights = open_checkpoint("random:3", json.loads((built / "manifest.json").read_text())["checkpoint"])
    save_file({name: weights.tensor(name) for name in weights.names()}, folder / "model.safetensors")
    return folder


@pytest.fixture
def checkpoint(pristine: Path, tmp_path: Path) -> Path:
    """A copy of the Hugging Face folder to break."""
    return Path(shutil.copytree(pristine, tmp_path / "checkpoint"))


@pytest.fixture(scope="session")
def layer_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer, compiled to forward(x); not to be changed."""
    from moec.models import Experts, Layer, MoE, Router

    block = MoE(Router(experts=6, top_k=2, renorm=True), Experts(count=6, intermediate=24))
    layer = Layer(block, hidden=32, dtype="f32", name="small")
    return moec.build(layer, out=tmp_path_factory.mktemp("layer") / "small").path
