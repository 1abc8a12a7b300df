"""transformers' models with experts_implementation="moec" against the same models with "eager"."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations import moe as theirs

from moec.errors import MoecError, UnsupportedModel
from moec.integrations import transformers as ours
from moec.ops import compiled
from tests.hf import _watched, build, difference, randomise
from tests.strategies import hf_cases

TOLERANCE = 1e-5  # of logits, relative to the largest

COMMON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
DEEPSEEK = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 12,
}
QWEN = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 12}
GROUPS = {"n_group": 2, "topk_group": 1}
MODELS: dict[str, dict[str, Any]] = {
    "deepseek_v2": {**DEEPSEEK, "topk_method": "group_limited_greedy", **GROUPS},
    "deepseek_v3": {**DEEPSEEK, **GROUPS},
    "glm4_moe": {
        **{k: v for k, v in DEEPSEEK.items() if "head" not in k and "rank" not in k},
        **GROUPS,
        "head_dim": 8,
    },
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "swiglu_limit": 0.5},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 3},
    "qwen2_moe": {**QWEN, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {**QWEN, "head_dim": 8},
}
IDS = torch.tensor([[1, 5, 9, 33, 2, 7, 7, 1], [4, 4, 8, 90, 0, 11, 3, 6]])

ours.register()


def tiny(family: str, **changes: Any) -> Any:
    config = AutoConfig.for_model(family, **COMMON | MODELS[family] | changes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    randomise(model, seed=0)
    return model.eval()


@contextmanager
def counted(model: nn.Module) -> Iterator[list[str]]:
    """The experts modules whose calls reached moec, while it lasts."""
    calls: list[str] = []

    def count(self: Any, *args: Tensor) -> Tensor:
        calls.append(type(self).__name__)
        return ours.experts_forward(self, *args)

    theirs.ExpertsInterface.register("moec", count)
    try:
        yield calls
    finally:
        ours.register()


def experts_of(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if hasattr(m, "is_transposed")]


@pytest.mark.parametrize("family", MODELS)
@torch.no_grad()
def test_logits_and_greedy_tokens(family: str) -> None:
    model = tiny(family)
    model.set_experts_implementation("eager")
    logits = model(IDS).logits
    tokens = model.generate(IDS, max_new_tokens=6, do_sample=False, use_cache=True)
    model.set_experts_implementation("moec")
    with counted(model) as calls:
        assert difference(model(IDS).logits, logits) < TOLERANCE
    assert len(calls) == len(experts_of(model)) > 0
    assert torch.equal(model.generate(IDS, max_new_tokens=6, do_sample=False, use_cache=True), tokens)


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
@torch.no_grad()
def test_a_model_may_be_asked_for_it_when_it_is_made(family: str) -> None:
    model = tiny(family, experts_implementation="moec")
    logits = model(IDS).logits
    model.set_experts_implementation("eager")
    assert difference(logits, model(IDS).logits) < TOLERANCE


@pytest.mark.parametrize(
    "family", ["deepseek_v2", "deepseek_v3", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe"]
)
@settings(max_examples=max(2, settings.default.max_examples // 6))
@given(st.data())
@torch.no_grad()
def test_drawn_configurations(family: str, data: st.DataObject) -> None:
    case = data.draw(hf_cases(family))
    model = build(case, case.seed)
    for prompt in case.prompts:
        ids = torch.tensor([prompt])
        model.set_experts_implementation("eager")
        with _watched(model) as near:
            logits = model(ids).logits
        model.set_experts_implementation("moec")
        assert near or difference(model(ids).logits, logits) < TOLERANCE


@torch.no_grad()
def test_torch_compile_of_a_model() -> None:
    model = tiny("qwen3_moe")
    model.set_experts_implementation("moec")
    wanted = model(IDS, use_cache=False).logits
    fast = torch.compile(model, backend="aot_eager")
    assert difference(fast(IDS, use_cache=False).logits, wanted) < TOLERANCE


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@torch.no_grad()
def test_torch_compile_takes_experts_whole(family: str) -> None:
    layer = experts_of(tiny(family, experts_implementation="moec"))[0]
    x, ids, weights = torch.randn(9, 32), torch.randint(0, 4, (9, 2)), torch.rand(9, 2)
    whole = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (9, 4):
        torch.testing.assert_close(
            whole(x[:tokens], ids[:tokens], weights[:tokens]),
            layer(x[:tokens], ids[:tokens], weights[:tokens]),
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_narrow_dtypes(dtype: torch.dtype) -> None:
    layer = experts_of(tiny("deepseek_v3"))[0]
    x, ids, weights = torch.randn(9, 32), torch.randint(0, 8, (9, 3)), torch.rand(9, 3)
    layer.config._experts_implementation = "eager"
    wanted = layer(x, ids, weights)
    layer.config._experts_implementation = "moec"
    got = layer.to(dtype)(x.to(dtype), ids, weights)  # the router's weights stay fp32
    assert got.dtype == dtype
    assert difference(got.float(), wanted) < (2e-2 if dtype == torch.bfloat16 else 3e-3)


# Experts modules alone.
def experts(family: str, name: str, **fields: Any) -> Any:
    """An experts module of a family, randomised, set to moec."""
    module = __import__(f"transformers.models.{family}.modeling_{family}", fromlist=[name])
    config = AutoConfig.for_model(family, **fields)
    config._experts_implementation = "moec"
    layer = getattr(module, name)(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return layer.requires_grad_(False)


SIZES = {"hidden_size": 16, "moe_intermediate_size": 12, "intermediate_size": 12}
ALONE = {
    "clamped gate": (
        "deepseek_v4",
        "DeepseekV4Experts",
        {**SIZES, "n_routed_experts": 4, "swiglu_limit": 0.5},
    ),
    "interleaved, transposed, biases": ("gpt_oss", "GptOssExperts", {**SIZES, "num_local_experts": 4}),
    "no gate": ("nemotron_h", "NemotronHExperts", {**SIZES, "n_routed_experts": 4, "moe_latent_size": None}),
    "plain": ("qwen3_moe", "Qwen3MoeExperts", {**SIZES, "num_experts": 4}),
    "gelu": ("qwen3_moe", "Qwen3MoeExperts", {**SIZES, "num_experts": 4, "hidden_act": "gelu"}),
    "another activation": ("qwen3_moe", "Qwen3MoeExperts", {**SIZES, "num_experts": 4, "hidden_act": "relu"}),
}


def routing(tokens: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.rand(tokens, 4, generator=generator).argsort(1)[:, :3]
    return torch.randn(tokens, 16, generator=generator), ids, torch.rand(tokens, 3, generator=generator)


@pytest.mark.parametrize("kind", ALONE)
@pytest.mark.parametrize("tokens", [1, 7])
def test_a_module_of_each_layout(kind: str, tokens: int) -> None:
    family, name, fields = ALONE[kind]
    layer = experts(family, name, **fields)
    given = routing(tokens)
    got = layer(*given)
    layer.config._experts_implementation = "eager"
    torch.testing.assert_close(got, layer(*given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ALONE)
def test_sentinels_contribute_nothing(kind: str) -> None:
    """As expert parallelism marks choices of another rank: the number past the last expert, weight 0."""
    family, name, fields = ALONE[kind]
    layer = experts(family, name, **fields)
    x, ids, weights = routing()
    ids[:, 1], ids[3] = 4, 4
    weights[ids == 4] = 0.0
    got = layer(x, ids, weights)
    assert got[3].eq(0).all()
    weights[ids == 4] = torch.nan  # whatever the weight is
    assert torch.equal(layer(x, ids, weights), got)
    ids[ids == 4], weights[weights.isnan()] = 0, 0.0
    layer.config._experts_implementation = "eager"
    torch.testing.assert_close(got, layer(x, ids, weights), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["plain", "interleaved, transposed, biases"])
def test_experts_that_nobody_chose_are_not_read(kind: str) -> None:
    family, name, fields = ALONE[kind]
    layer = experts(family, name, **fields)
    x, ids, weights = routing()
    ids[ids == 3] = 1
    clean = layer(x, ids, weights)
    for parameter in layer.parameters():
        parameter[3] = torch.nan
    assert torch.equal(layer(x, ids, weights), clean)


def test_plain_layers_are_one_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    forms = []
    known = compiled.function
    monkeypatch.setattr("moec.ops.library.function", lambda key: forms.append(key.form) or known(key))
    for kind in ("plain", "gelu", "clamped gate"):
        family, name, fields = ALONE[kind]
        experts(family, name, **fields)(*routing())
    assert forms == ["fused", "fused", "begin", "end"]


def test_prepare_moves_transposed_weights_once_and_changes_no_value() -> None:
    family, name, fields = ALONE["interleaved, transposed, biases"]
    layer = experts(family, name, **fields)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    given = routing()
    wanted = layer(*given)
    assert ours.prepare(layer) == 2
    assert layer.gate_up_proj.transpose(1, 2).is_contiguous()
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    assert torch.equal(layer(*given), wanted)
    assert ours.prepare(layer) == 0
    assert ours.prepare(experts(*ALONE["plain"][:2], **ALONE["plain"][2])) == 0


def test_a_norm_after_each_expert_is_refused() -> None:
    family, name, fields = ALONE["plain"]
    layer = experts(family, name, **fields)
    layer.has_post_expert_norm = True
    with pytest.raises(UnsupportedModel, match="Qwen3MoeExperts normalises each expert's output"):
        layer(*routing())


def test_training_says_that_it_cannot() -> None:
    model = tiny("qwen3_moe")
    model.set_experts_implementation("moec")
    loss = model(IDS, labels=IDS).loss
    with pytest.raises(MoecError, match="M0603"):
        loss.backward()
