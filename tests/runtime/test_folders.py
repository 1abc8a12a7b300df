"""Which files of a weight folder are read, and what is said of those that can't be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import moec
from moec.errors import BadInput, WeightsUnreadable
from moec.runtime.checkpoint import Folder, InMemory

from .test_weights import NORM, Tensors, save, save_shards

INDEX = "model.safetensors.index.json"
FIRST, SECOND = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))


def test_an_adapter_beside_the_model_is_not_read(
    package: moec.Built, checkpoint: Tensors, tmp_path: Path
) -> None:
    folder = save(tmp_path / "w", checkpoint)
    save(tmp_path / "a", {"base_model.lora_A.weight": torch.zeros(2)})
    (tmp_path / "a" / "model.safetensors").rename(folder / "adapter_model.safetensors")
    assert moec.load(package, folder).name


@pytest.mark.parametrize("gone", [True, False])
def test_a_single_file_goes_before_an_index_that_does_not_list_it(
    gone: bool, checkpoint: Tensors, tmp_path: Path
) -> None:
    """As in transformers. The index is stale; its shards may be there still."""
    folder = save_shards(tmp_path / "w", {name: tensor * 0 for name, tensor in checkpoint.items()})
    save(folder, checkpoint)
    if gone:
        (folder / FIRST).unlink()
    assert torch.equal(Folder(folder).tensor(NORM), checkpoint[NORM])


def test_an_index_of_the_single_file(checkpoint: Tensors, tmp_path: Path) -> None:
    folder = save(tmp_path / "w", checkpoint)
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(checkpoint, "model.safetensors")}))
    assert set(Folder(folder).names()) == set(checkpoint)


@pytest.mark.parametrize("name", ["no.such.tensor", NORM])
def test_an_index_that_is_wrong_about_a_tensor(name: str, checkpoint: Tensors, tmp_path: Path) -> None:
    folder = save_shards(tmp_path / "w", checkpoint)
    listed = json.loads((folder / INDEX).read_text())["weight_map"]
    listed[name] = FIRST if listed.get(name) == SECOND else SECOND
    (folder / INDEX).write_text(json.dumps({"weight_map": listed}))
    with pytest.raises(WeightsUnreadable, match=rf"M0401.*{name} is in {listed[name]}, but it isn't"):
        Folder(folder)


@pytest.mark.parametrize("file", ["model.safetensors", "part.safetensors", FIRST])
def test_what_is_no_file_is_called_what_it_is(file: str, checkpoint: Tensors, tmp_path: Path) -> None:
    folder = save_shards(tmp_path / "w", checkpoint)
    if file != FIRST:
        (folder / INDEX).unlink()
    (folder / file).unlink(missing_ok=True)
    (folder / file).symlink_to(tmp_path / "nowhere")
    with pytest.raises(WeightsUnreadable, match=rf"{file} is a link to nothing, no safetensors file"):
        Folder(folder)
    (folder / file).unlink()
    (folder / file).mkdir()
    with pytest.raises(WeightsUnreadable, match=rf"{file} is a folder, no safetensors file"):
        Folder(folder)


def test_random_needs_a_seed(package: moec.Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match="have a seed, as in 'random:0'"):
        moec.load(package, "random")
    (tmp_path / "random").mkdir()
    with pytest.raises(WeightsUnreadable):
        moec.load(package, "random")


def test_tensors_without_values() -> None:
    with pytest.raises(BadInput, match="weights: a is on the meta device"):
        InMemory({"a": torch.zeros(2, device="meta")})
    with pytest.raises(BadInput, match="weights: a is not dense"):
        InMemory({"a": torch.eye(2).to_sparse()})


def test_a_mapping_s_tensors_are_shared(package: moec.Built, checkpoint: Tensors) -> None:
    """Documented: an engine that holds the weights doesn't pay for them twice."""
    mine = {name: tensor.clone() for name, tensor in checkpoint.items()}
    loaded = moec.load(package, mine)
    mine[NORM].fill_(2.0)
    assert torch.equal(loaded.weights[NORM], mine[NORM])
