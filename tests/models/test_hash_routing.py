"""Routing by a table of token ids, as DeepSeek V4's first layers do it, against transformers' classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
    DeepseekV4HashRouter,
    DeepseekV4SparseMoeBlock,
)

import moec
import moec.models as m
from moec.check import verify_package
from moec.driver import pipeline_of
from moec.ir import TensorType
from moec.ir.types import f32, i64, symbol
from moec.passes import PassManager
from moec.runtime.batch import Batch
from tests.codegen.emission import agree, forward
from tests.ir.helpers import reference

HIDDEN, EXPERTS, K, VOCAB, T = 16, 12, 3, 40, 9
N = symbol("N")


def v4_config(score: str = "sqrtsoftplus") -> DeepseekV4Config:
    config = DeepseekV4Config(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        moe_intermediate_size=8,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=K,
        scoring_func=score,
        num_hidden_layers=1,
        mlp_layer_types=["hash_moe"],
        swiglu_limit=1e9,  # clamps nothing
    )
    config._experts_implementation = "eager"
    return config


def randomised(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if name.endswith("tid2eid"):
                tensor.copy_(torch.rand(VOCAB, EXPERTS, generator=generator).topk(K).indices)
            else:
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return module


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(T, HIDDEN, generator=generator), torch.randint(VOCAB, (T,), generator=generator)


@pytest.mark.parametrize("score", ["sqrtsoftplus", "sigmoid"])
def test_the_reference_is_transformers_router(score: str) -> None:
    router: Any = randomised(DeepseekV4HashRouter(v4_config(score)))
    x, tokens = inputs()
    with torch.no_grad():
        logits, w, id = router(x, tokens)
    attrs = {"score": score, "k": K, "renorm": True, "scale": router.routed_scaling_factor}
    mine = reference("hash_route", logits, router.tid2eid, tokens, **attrs)
    torch.testing.assert_close(mine[0], w)
    assert torch.equal(mine[1].long(), id) and mine[1].dtype == torch.int32


@given(
    st.lists(st.integers(-2, 6), max_size=5),
    st.lists(st.lists(st.sampled_from([-1, 0, 1, 3, 4, 99]), min_size=2, max_size=2), min_size=5, max_size=5),
    st.sampled_from(["sigmoid", "sqrtsoftplus"]),
    st.booleans(),
)
def test_the_kernel_leaves_out_what_is_no_expert(
    tokens: list[int], table: list[list[int]], score: str, renorm: bool
) -> None:
    types = TensorType(f32, (N, 4)), TensorType(i64, (5, 2)), TensorType(i64, (N,))
    module = forward(lambda b, *a: b.hash_route(*a, score=score, k=2, renorm=renorm, scale=1.5), *types)
    logits = torch.randn(len(tokens), 4, generator=torch.Generator().manual_seed(1))
    agree(module, {}, [logits, torch.tensor(table), torch.tensor(tokens, dtype=torch.int64)])


def block() -> m.MoE:
    router = m.Router(EXPERTS, K, score="sqrtsoftplus", renorm=True, scale=1.5, hash_vocab=VOCAB)
    return m.MoE(router, m.Experts(EXPERTS, 8), m.SwiGLU(8, name="shared_experts"))


def test_a_layer_is_transformers_layer(tmp_path: Path) -> None:
    theirs = randomised(DeepseekV4SparseMoeBlock(v4_config(), 0)).eval()
    x, tokens = inputs()
    with torch.no_grad():
        expected = theirs(x[None], tokens[None])[0]
    weights = {f"mlp.{name}": t for name, t in theirs.state_dict().items() if ".experts." not in f".{name}"}
    for e in range(EXPERTS):
        gate_up, down = theirs.experts.gate_up_proj[e], theirs.experts.down_proj[e]
        parts = {"gate_proj": gate_up[:8], "up_proj": gate_up[8:], "down_proj": down}
        weights |= {f"mlp.experts.{e}.{name}.weight": t for name, t in parts.items()}
    package = moec.build(m.Layer(block(), HIDDEN, dtype="f32"), out=tmp_path / "layer")
    layer = moec.load(package.path, weights=weights)
    ints = {"cu_seqlens": [0, T], "seq_lens": [T], "block_table": [[0]]}
    batch = Batch(
        ids=tokens,
        positions=torch.arange(T),
        slot_mapping=torch.full((T,), -1),
        max_new=T,
        **{name: torch.tensor(values, dtype=torch.int32) for name, values in ints.items()},
    )
    y = layer(x, batch)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def test_a_model_whose_first_layers_route_by_hash(tmp_path: Path) -> None:
    """Random tables name experts that are there; the package computes the naive model and can be recorded."""
    attn = m.GQA(heads=2, kv_heads=1, head_dim=8)
    scored = m.MoE(m.Router(EXPERTS, K, score="sqrtsoftplus", renorm=True), m.Experts(EXPERTS, 8))
    layers = [m.Decoder(attn, block()), m.Decoder(attn, block()), m.Decoder(attn, scored)]
    model = m.Model(vocab=VOCAB, hidden=HIDDEN, layers=layers, dtype="f32")
    package = moec.build(model, out=tmp_path / "model")
    assert verify_package(package.path, "random:3").ok
    loaded = moec.load(package.path, weights="random:3")
    with loaded.record_routing() as trace:
        loaded(torch.arange(12).view(2, 6))
    assert trace.layers == (0, 1, 2)
    choices = trace.choices(0)
    for layer in (0, 1):
        table = loaded.weights[f"model.layers.{layer}.mlp.gate.tid2eid"]
        assert torch.equal(choices[layer][1].long(), table[torch.arange(12)])
        assert all(len(set(row)) == K and max(row) < EXPERTS for row in table.tolist())


@pytest.mark.parametrize("fp8", [False, True])
def test_its_gate_stays_a_product_of_its_own_in_high_precision(fp8: bool) -> None:
    """As any router's: its scores weigh experts."""
    layer = m.Decoder(m.GQA(heads=2, kv_heads=1, head_dim=64), block())
    module = m.lower(m.Model(vocab=VOCAB, hidden=128, layers=[layer]))
    PassManager(pipeline_of(moec.BuildOptions(target="sm_90a", fp8=fp8))).run(module)
    (router,) = [op for f in module for op in f.ops if op.name == "hash_route"]
    gate = router.operands[0].op  # type: ignore[union-attr]
    assert gate.name == "linear" and gate.operands[1].name == "mlp.gate.weight"
    assert all(v is None or v.type.scale is None for v in gate.operands)


def test_the_table_stays_int64(tmp_path: Path) -> None:
    package = moec.build(m.Layer(block(), HIDDEN, dtype="f32"), out=tmp_path / "layer")
    layer = moec.load(package.path, weights="random:0")
    weights = {name: t for name, t in layer.weights.items() if isinstance(t, torch.Tensor)}
    assert weights["mlp.gate.tid2eid"].dtype == torch.int64


@pytest.mark.parametrize(
    "fields", [{"bias": True}, {"groups": 2}, {"score": "softmax"}, {"hash_vocab": -1}, {"hash_vocab": 1.5}]
)
def test_routers_that_choose_twice_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(moec.errors.SpecError, match="hash"):
        m.Router(**{"experts": 4, "top_k": 2, "score": "sigmoid", "hash_vocab": 9} | fields)
