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
from moec.runtime import LayerModel
from moec.runtime.cache import CacheSpec, KVCache
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


def test_a_layer_with_a_cache_takes_it(tmp_path: Path) -> None:
    """Attention asks for positions, offsets, pages: arguments of its forward, in the manifest's order."""
    attention = models.GQA(heads=2, kv_heads=1, head_dim=4)
    spec = models.Layer(attention, hidden=HIDDEN, dtype="f32", name="attention", page=4)
    loaded = moec.load(moec.build(spec, out=tmp_path / "x"), "random:0")
    assert isinstance(loaded, LayerModel)
    arguments = dict(loaded.manifest["entries"]["forward"]["args"])
    x = randn(3, HIDDEN)
    inputs: dict[str, Any] = {
        "x": x,
        "positions": torch.arange(3),
        "cu_seqlens": torch.tensor([0, 3], dtype=torch.int32),
        "seq_lens": torch.tensor([3], dtype=torch.int32),
        "block_table": torch.tensor([[1]], dtype=torch.int32),
        "slot_mapping": torch.tensor([4, 5, 6]),
    }
    (cache,) = (name for name in arguments if name not in inputs)
    pages = KVCache([CacheSpec("kv", "f32", (2, 4), 4, (0,))], 2).tensors["kv"]
    assert arguments[cache] == "cache<f32[2,4], page=4>"
    y = loaded(*[pages if name == cache else inputs[name] for name in arguments])

    module = read_module(loaded.package.folder / "ir" / "000_naive.moec")
    interpreter = Interpreter(module, weights_of(loaded))
    types = {a.name: a.type for a in module["forward"].args}
    empty = interpreter.new_cache(types[cache], 1, 2)
    (want, *_) = interpreter.run("forward", *[empty if name == cache else inputs[name] for name in types])
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-6)
    with pytest.raises(BadInput, match="forward takes x, "):
        loaded(x)
