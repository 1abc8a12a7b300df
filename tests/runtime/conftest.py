"""Tiny models, built once, and kernels compiled once for all the tests that read them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import moec
from moec import models
from moec.runtime import LanguageModel, LayerModel
from moec.runtime.checkpoint import Random
from moec.runtime.compile import Results, compile_many
from moec.runtime.kernel_cache import Cubin
from tests.runtime.kernels import REQUESTS

HIDDEN, EXPERTS = 8, 4


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> moec.Built:
    """DeepSeek-V3 in miniature. Don't change its files: copy it."""
    return moec.build("deepseek-v3-tiny", out=tmp_path_factory.mktemp("package") / "v3")


@pytest.fixture(scope="session")
def model(package: moec.Built) -> LanguageModel:
    loaded = moec.load(package, "random:0")
    assert isinstance(loaded, LanguageModel)
    return loaded


@pytest.fixture(scope="session")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """Another family: grouped queries, a sliding window."""
    loaded = moec.load(
        moec.build("mixtral-tiny", out=tmp_path_factory.mktemp("package") / "mixtral"), "random:0"
    )
    assert isinstance(loaded, LanguageModel)
    return loaded


@pytest.fixture(scope="session")
def checkpoint(package: moec.Built) -> dict[str, torch.Tensor]:
    """Every tensor that the package reads, as ``random:0`` draws them."""
    drawn = Random(0, package.manifest["checkpoint"])
    return {name: drawn.tensor(name) for name in drawn.names()}


def layer_spec(dtype: str = "f32") -> models.Layer:
    block = models.MoE(
        models.Router(experts=EXPERTS, top_k=2, renorm=True), models.Experts(count=EXPERTS, intermediate=6)
    )
    return models.Layer(block, hidden=HIDDEN, dtype=dtype, name="moe-layer")


@pytest.fixture(scope="session")
def layer_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return moec.build(layer_spec(), out=tmp_path_factory.mktemp("package") / "layer").path


@pytest.fixture(scope="session")
def layer(layer_package: Path) -> LayerModel:
    loaded = moec.load(layer_package, "random:0")
    assert isinstance(loaded, LayerModel)
    return loaded


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def first_build(cache: Path) -> Results:
    """All of REQUESTS, compiled into an empty cache."""
    return compile_many(list(REQUESTS.values()), cache)


@pytest.fixture(scope="session")
def built(first_build: Results) -> dict[str, Cubin]:
    """The cubins by the names that REQUESTS gives them."""
    return dict(zip(REQUESTS, first_build.check(), strict=True))
