"""A single compiled block: ``forward(x)``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import moec
from moec import models
from moec.errors import BadInput
from moec.ir import Interpreter, read_module
from moec.ir.types import CacheType
from moec.runtime import LayerModel
from moec.runtime.batch import next_batch
from moec.runtime.cache import CachedSequence
from moec.runtime.checkpoint import Random
from tests.runtime.conftest import HIDDEN, layer_spec


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weights_of(loaded: LayerModel) -> dict[str, torch.Tensor]:
    drawn = Random(0, loaded.manifest["checkpoint"])
    return {name: drawn.tensor(name) for name in drawn.names()}


def naive(loaded: LayerModel, *args: Any) -> torch.Tensor:
    """The interpreter on the IR from before the first pass."""
    module = read_module(loaded.package.folder / "ir" / "000_naive.moec")
    out: torch.Tensor = Interpreter(module, weights_of(loaded)).run("forward", *args)[0]
    return out


@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_a_layer_is_its_naive_ir(tokens: int, layer: LayerModel) -> None:
    x = randn(tokens, HIDDEN)
    torch.testing.assert_close(layer.forward(x), naive(layer, x), rtol=1e-5, atol=1e-6)
    assert torch.equal(layer(x), layer.forward(x))


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_a_layer_in_16_bits(dtype: str, torch_dtype: torch.dtype, tmp_path: Path) -> None:
    loaded = moec.load(moec.build(layer_spec(dtype), out=tmp_path / "x"), "random:0")
    assert isinstance(loaded, LayerModel)
    x = randn(5, HIDDEN).to(torch_dtype)
    y = loaded(x)
    assert y.dtype == torch_dtype
    torch.testing.assert_close(y, naive(loaded, x), rtol=2e-2, atol=2e-3)
    with pytest.raises(BadInput, match=f"x must be {dtype}"):
        loaded(x.float())


@pytest.mark.parametrize(
    "x",
    [
        randn(HIDDEN),
        randn(1, 2, HIDDEN),
        randn(3, HIDDEN + 1),
        randn(3, HIDDEN).double(),
        torch.zeros(3, HIDDEN).long(),
        None,
        [[0.0] * HIDDEN],
    ],
    ids=range(7),
)
def test_what_a_layer_does_not_take(x: Any, layer: LayerModel) -> None:
    with pytest.raises(BadInput, match=r"M0601.*x must be"):
        layer(x)


def test_the_caller_s_x_is_not_changed(layer: LayerModel) -> None:
    x = randn(4, HIDDEN)
    before = x.clone()
    layer(x)
    assert torch.equal(x, before)


def test_it_says_what_it_is(layer: LayerModel) -> None:
    assert repr(layer).startswith("<LayerModel moe-layer for cpu, ")


@pytest.fixture(scope="module")
def attention(tmp_path_factory: pytest.TempPathFactory) -> LayerModel:
    block = models.GQA(heads=2, kv_heads=1, head_dim=4)
    spec = models.Layer(block, hidden=HIDDEN, dtype="f32", name="attention", page=4)
    loaded = moec.load(moec.build(spec, out=tmp_path_factory.mktemp("layer") / "x"), "random:0")
    assert isinstance(loaded, LayerModel)
    return loaded


def test_a_layer_with_a_cache_takes_it(attention: LayerModel) -> None:
    """Two steps of two sequences: the second attends to what the first left in the cache."""
    module = read_module(attention.package.folder / "ir" / "000_naive.moec")
    names = [a.name for a in module["forward"].args]
    assert [c.entry for c in attention.cache_specs] == [(2, 4)]
    cache = attention.new_cache(40)
    sequences = [CachedSequence(cache), CachedSequence(cache)]
    interpreter = Interpreter(module, weights_of(attention))
    (cache_type,) = (a.type for a in module["forward"].args if isinstance(a.type, CacheType))
    state: Any = interpreter.new_cache(cache_type, 1, cache.pages)
    for new in ([[0] * 6, [0]], [[0], [0] * 3]):
        batch = next_batch(sequences, new)
        x = randn(len(batch.ids), HIDDEN, seed=len(batch.ids))
        given = [x if n == "x" else state if n == "kv" else getattr(batch, n) for n in names]
        want, state = interpreter.run("forward", *given)
        torch.testing.assert_close(attention(x, batch, cache), want, rtol=1e-5, atol=1e-6)


def test_what_a_layer_with_a_cache_lacks(attention: LayerModel) -> None:
    cache = attention.new_cache(40)
    batch = next_batch([CachedSequence(cache)], [[0, 0]])
    with pytest.raises(BadInput, match=r"attention uses positions, .*: forward needs a batch"):
        attention(randn(2, HIDDEN))
    with pytest.raises(BadInput, match="keeps a KV cache"):
        attention(randn(2, HIDDEN), batch)
    with pytest.raises(BadInput, match=r"batch must be a moec\.Batch, not list"):
        attention(randn(2, HIDDEN), [0, 0], cache)
    with pytest.raises(BadInput, match="cache must be one that new_cache made, not dict"):
        attention(randn(2, HIDDEN), batch, cache.tensors)
    with pytest.raises(BadInput, match="x has 3 rows, the batch 2 tokens"):
        attention(randn(3, HIDDEN), batch, cache)
