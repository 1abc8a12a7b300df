"""Packages built for the device that is here, against the same model's package for the CPU."""

from __future__ import annotations

import math
from itertools import chain
from pathlib import Path

import pytest
import torch

import moec
from moec import models
from moec.runtime import LanguageModel, LayerModel
from moec.runtime.batch import next_batch
from moec.runtime.cache import CachedSequence
from moec.runtime.dtypes import DTYPES
from tests.gpu.device import Device

HIDDEN, EXPERTS = 72, 10
TOLERANCE = {"f32": 1e-4, "f16": 1e-2, "bf16": 4e-2}  # of the largest element


@pytest.mark.parametrize("tokens", [0, 1, 19, 300])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_layer(dtype: str, tokens: int, device: Device, layers: dict[str, list[LayerModel]]) -> None:
    here, cpu = layers[dtype]
    x = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(0)).to(DTYPES[dtype])
    got, wanted = here(x.to(device.type)), cpu(x)
    assert got.dtype == x.dtype and got.shape == x.shape and got.device.type == device.type
    assert torch.equal(here(x.to(device.type)), got)
    if tokens:
        away = (got.cpu().double() - wanted.double()).abs().amax(1) > TOLERANCE[dtype] * wanted.abs().max()
        # In 16 bits a router near a tie may choose another expert: in few tokens, never in fp32.
        assert float(away.double().mean()) <= (0 if dtype == "f32" else 0.03)


@pytest.fixture(scope="module")
def layers(device: Device, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[LayerModel]]:
    """Of each dtype: the layer here, the layer on the CPU."""
    block = models.MoE(
        models.Router(experts=EXPERTS, top_k=3, renorm=True), models.Experts(count=EXPERTS, intermediate=40)
    )
    folder = tmp_path_factory.mktemp("layers")
    made: dict[str, list[LayerModel]] = {}
    for dtype in TOLERANCE:
        spec = models.Layer(block, hidden=HIDDEN, dtype=dtype, name="moe-layer")
        for side, target in (("here", device.target), ("cpu", "cpu")):
            built = moec.build(spec, target=target, out=folder / dtype / side)
            loaded = device.load(built.path) if side == "here" else moec.load(built.path, "random:0")
            assert isinstance(loaded, LayerModel)
            made.setdefault(dtype, []).append(loaded)
    return made


@pytest.fixture(scope="module", params=["deepseek-v3-tiny", "mixtral-tiny"])
def language(
    request: pytest.FixtureRequest, device: Device, tmp_path_factory: pytest.TempPathFactory
) -> tuple[LanguageModel, LanguageModel]:
    """A whole model in fp32: here, on the CPU."""
    folder: Path = tmp_path_factory.mktemp("models")
    made = []
    for side, target in (("here", device.target), ("cpu", "cpu")):
        built = moec.build(request.param, target=target, out=folder / side, dtype="f32")
        loaded = device.load(built.path) if side == "here" else moec.load(built.path, "random:0")
        assert isinstance(loaded, LanguageModel)
        made.append(loaded)
    return made[0], made[1]


IDS = torch.tensor([[1, 5, 9, 33, 2, 7, 7, 1], [4, 4, 8, 90, 0, 11, 3, 6]])


def test_logits(language: tuple[LanguageModel, LanguageModel]) -> None:
    here, cpu = language
    got, wanted = here(IDS).cpu(), cpu(IDS)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))


def test_greedy_tokens(language: tuple[LanguageModel, LanguageModel]) -> None:
    here, cpu = language
    got, wanted = (m.generate(IDS, max_new_tokens=8) for m in (here, cpu))
    assert isinstance(got, torch.Tensor) and isinstance(wanted, torch.Tensor)
    assert torch.equal(got.cpu(), wanted)


def test_steps_over_a_cache(language: tuple[LanguageModel, LanguageModel]) -> None:
    """A prefill of uneven prompts and two decode steps; unused pages hold NaN on both sides."""
    logits = []
    for model in language:
        cache = model.new_cache(64 * model.page)
        for pages in chain.from_iterable(cache.tensors.values()):
            if pages is not None:
                pages.fill_(math.nan)
        sequences = [CachedSequence(cache) for _ in range(2)]
        logits.append(
            [
                model.step(next_batch(sequences, new), cache).cpu()
                for new in ([[3, 1, 4, 1, 5], [9, 2]], [[6], [5]], [[3], [5]])
            ]
        )
    for got, wanted in zip(*logits, strict=True):
        assert not wanted.isnan().any()
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))
