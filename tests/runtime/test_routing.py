"""What a recording holds: the interpreter's choices; and what it leaves behind: nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moec
from moec.errors import BadInput, OutputUnwritable
from moec.ir import Interpreter, Op, read_module
from moec.ir.routing import read_trace
from moec.ir.types import CacheType
from moec.runtime import LanguageModel, LayerModel
from moec.runtime.batch import next_batch
from moec.runtime.cache import CachedSequence
from moec.runtime.routing import RoutingTrace
from tests.runtime.conftest import EXPERTS, HIDDEN


def interpreted(model: LanguageModel, weights: dict[str, torch.Tensor], prompts: list[list[int]]) -> Any:
    """(w, id) by layer number, of one step of the naive IR."""
    module = read_module(model.package.folder / "ir" / "000_naive.moec")
    found: dict[int, Any] = {}

    def observe(function: str, op: Op, scope: str, results: tuple[Any, ...]) -> None:
        if op.name == "route":
            found[int(scope.split(".")[2])] = results

    interpreter = Interpreter(module, weights, observe)
    cache = model.new_cache(200)
    batch = next_batch([CachedSequence(cache) for _ in prompts], prompts)
    types = [a.type for a in module["step"].args if isinstance(a.type, CacheType)]
    caches = [
        interpreter.new_cache(t, max(s.layers) + 1, cache.pages)
        for t, s in zip(types, model.cache_specs, strict=True)
    ]
    interpreter.run("step", *batch.tensors(), *caches)
    return found


def test_the_choices_are_the_naive_ir_s(model: LanguageModel, checkpoint: dict[str, torch.Tensor]) -> None:
    prompts = [[1, 2, 3, 4, 5], [6, 7]]
    expected = interpreted(model, checkpoint, prompts)
    with model.record_routing() as trace:
        model.generate(prompts, max_new_tokens=3)
    assert trace.layers == tuple(expected) == (1, 2)  # the first layer is dense
    assert len(trace.steps) == 3
    for layer, (w, id) in trace.choices(0).items():
        assert torch.equal(id, expected[layer][1])
        torch.testing.assert_close(w, expected[layer][0], rtol=1e-4, atol=1e-5)
    assert [len(id) for id in (step[0][1] for step in trace.steps)] == [7, 2, 2]


def test_nothing_is_left_behind(model: LanguageModel) -> None:
    before = dict(vars(model._code))
    alone = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4)
    with pytest.raises(ZeroDivisionError), model.record_routing() as outer, model.record_routing() as inner:
        assert torch.equal(model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4), alone)
        raise ZeroDivisionError
    assert dict(vars(model._code)) == before
    assert len(outer.steps) == len(inner.steps) == 4
    model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4)
    assert len(outer.steps) == 4


def test_the_file_is_records_of_layers_and_tokens(model: LanguageModel, tmp_path: Path) -> None:
    with model.record_routing() as trace:
        model.generate([[1, 2, 3], [4]], max_new_tokens=2)
    trace.save(tmp_path / "trace.npy")
    assert [p.name for p in tmp_path.iterdir()] == ["trace.npy"]
    found = np.load(tmp_path / "trace.npy", allow_pickle=False)
    assert found.shape == (2, 4 + 2)
    assert found["layer"].tolist() == [[1] * 6, [2] * 6]
    assert found["step"].tolist() == [[0] * 4 + [1] * 2] * 2
    ids = torch.cat([trace.steps[0][1][1], trace.steps[1][1][1]])
    assert found["id"][1].tolist() == ids.tolist()
    assert found["w"][0, 4].tolist() == trace.steps[1][0][0][0].tolist()
    assert (read_trace(tmp_path / "trace.npy") == found["id"]).all()
    with pytest.raises(OutputUnwritable, match="can't write"):
        trace.save(tmp_path / "nowhere" / "trace.npy")


def test_layers_that_choose_fewer_are_filled_up_and_broken_steps_left_out() -> None:
    def chosen(*ids: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full((1, len(ids)), 0.5), torch.tensor([ids], dtype=torch.int32)

    trace = RoutingTrace((3, 7), [[chosen(1, 2), chosen(4)], [chosen(5, 6)], [chosen(0, 1), chosen(2)]])
    found = trace.array()
    assert found["id"].tolist() == [[[1, 2], [0, 1]], [[4, -1], [2, -1]]]
    assert found["w"].tolist() == [[[0.5, 0.5]] * 2, [[0.5, 0.0]] * 2]
    assert found["step"][0].tolist() == [0, 2]
    assert RoutingTrace((3,)).array().shape == (1, 0)


def test_a_layer_alone_records_too(layer: LayerModel) -> None:
    x = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(0))
    with layer.record_routing() as trace:
        layer(x)
    ((w, id),) = trace.steps[0]
    assert trace.layers == (0,) and w.shape == id.shape == (5, 2)
    assert int(id.max()) < EXPERTS


FOLDED = "canonicalise,expert-grouping{fold_shared=true},mla-absorb"


@pytest.mark.parametrize("passes", [FOLDED, f"{FOLDED},permute-fusion{{route_sort=true}}"])
def test_experts_that_every_token_takes_are_no_choices(
    model: LanguageModel, tmp_path: Path, passes: str
) -> None:
    options = moec.BuildOptions(passes=passes)
    folded = moec.load(moec.build("deepseek-v3-tiny", out=tmp_path / "x", options=options), "random:0")
    assert isinstance(folded, LanguageModel)
    assert "shared=1" in (sorted((tmp_path / "x" / "ir").glob("*.moec"))[-1]).read_text()
    traces = []
    for each in (model, folded):
        with each.record_routing() as trace:
            each.generate([[1, 2, 3]], max_new_tokens=2)
        traces.append(trace)
    plain, without_shared = traces
    assert (plain.array()["id"] == without_shared.array()["id"]).all()


def test_a_dense_model_has_nothing_to_record(tmp_path: Path) -> None:
    dense = moec.load(moec.build("llama-tiny", out=tmp_path / "x"), "random:0")
    with pytest.raises(BadInput, match="no routed layers"), dense.record_routing():
        pass
