"""Every example runs, as its own text says to run it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moec
from moec.check import verify_package

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
OWN_BLOCK = EXAMPLES / "own_block" / "model.py"


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_a_model_with_a_block_of_ones_own(tmp_path: Path) -> None:
    built = moec.build(f"{OWN_BLOCK}:model", out=tmp_path / "own")
    assert verify_package(built.path, "random:0", decode=2).ok
    final = built.ir_files[-1].read_text()
    assert final.count("= grouped_linear(") == 2, "its experts became two grouped products"
    assert "for_each" in built.ir_files[0].read_text() and "for_each" not in final
    model = moec.load(built, "random:0")
    assert isinstance(model, moec.LanguageModel)
    out = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4)
    assert isinstance(out, torch.Tensor) and out.shape == (1, 7)


def test_a_layer_of_ones_own(tmp_path: Path) -> None:
    built = moec.build(f"{OWN_BLOCK}:layer", out=tmp_path / "layer")
    assert verify_package(built.path, "random:0").ok
    layer = moec.load(built, "random:0")
    assert isinstance(layer, moec.LayerModel)
    x = torch.randn(5, 64)
    y = layer(x)
    assert y.shape == (5, 64) and bool(y.isfinite().all())
    scaled = moec.load(
        built, {**weights_of(layer), "output_scale.weight": 2 * layer.weights["output_scale.weight"]}
    )
    assert isinstance(scaled, moec.LayerModel)
    torch.testing.assert_close(scaled(x), 2 * y)


def weights_of(layer: moec.LayerModel) -> dict[str, torch.Tensor]:
    """The checkpoint that random:0 stands for."""
    from moec.runtime.checkpoint import open_checkpoint

    checkpoint = open_checkpoint("random:0", layer.manifest["checkpoint"])
    return {name: checkpoint.tensor(name) for name in checkpoint.names()}


def test_the_demo(tmp_path: Path) -> None:
    assert (EXAMPLES / "pydoc" / "checkpoint" / "config.json").is_file(), (
        "examples/pydoc/checkpoint is missing: the demo has no trained model to run"
    )
    command = [sys.executable, EXAMPLES / "pydoc" / "demo.py", "-n", "20", "-o", tmp_path / "pydoc", "import"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert "equal within" in done.stdout and "DIFFERENT" not in done.stdout
    assert "grouped_linear(" in done.stdout
    written = done.stdout.partition("5. Run")[2].partition("tokens/s")[0]
    assert "\nimport" in written and "\ufffd" not in written
    assert (tmp_path / "pydoc" / "manifest.json").is_file()
