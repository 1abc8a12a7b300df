"""transformers' models on the GPU: experts_implementation="moec" against "eager"."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.gpu.device import Device
from tests.moec.fp8_experts import LEAST, ratio

transformers = pytest.importorskip("transformers", minversion="5", reason="transformers 5 is not installed")
ours = pytest.importorskip("moec.integrations.transformers")
hf = pytest.importorskip("tests.hf")

COMMON = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
MODELS: dict[str, dict[str, Any]] = {
    "deepseek_v3": {
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
        "moe_intermediate_size": 24,
        "n_group": 2,
        "topk_group": 1,
    },
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "swiglu_limit": 0.5},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "head_dim": 16},
}
IDS = torch.tensor([[1, 5, 9, 33, 2, 7, 7, 1], [4, 4, 8, 90, 0, 11, 3, 6]])


@pytest.mark.parametrize("family", MODELS)
@torch.no_grad()
def test_logits_and_greedy_tokens(family: str, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32; cuBLAS's products are PyTorch's default, which is IEEE's."""
    calls: list[str] = []
    forward = ours.experts_forward

    def counted(self: Any, *args: torch.Tensor) -> torch.Tensor:
        calls.append(type(self).__name__)
        y: torch.Tensor = forward(self, *args)
        return y

    monkeypatch.setattr(ours, "experts_forward", counted)
    ours.register()
    config = transformers.AutoConfig.for_model(family, **COMMON | MODELS[family])
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    )
    hf.randomise(model, seed=0)
    model.eval().to(device.type)
    ours.prepare(model)
    ids = IDS.to(device.type)
    found = {}
    for name in ("eager", "moec"):
        model.set_experts_implementation(name)
        logits = model(ids).logits
        found[name] = logits, model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=True)
    assert calls, "no call reached moec"
    (wanted, tokens), (got, ours_tokens) = found["eager"], found["moec"]
    assert hf.difference(got, wanted) < 1e-4
    assert torch.equal(ours_tokens, tokens)


@pytest.mark.parametrize("block", [(128, 128), None], ids=["blocks", "matrices"])
@pytest.mark.parametrize("tokens", [1, 200])
@torch.no_grad()
def test_experts_in_fp8(
    tokens: int, block: tuple[int, int] | None, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers' own loop over experts, its product, a kernel from the hub, emulated."""
    fp8 = pytest.importorskip("tests.integrations.fp8_modules")
    ours.register()
    experts = fp8.experts(block, hidden_size=384, moe_intermediate_size=256, swiglu_limit=1.0).to(device.type)
    x, ids, weights = (t.to(device.type) for t in fp8.inputs(tokens, 384, torch.bfloat16))
    found = experts(x, ids, weights)
    assert found.dtype == torch.bfloat16
    experts.config._experts_implementation = "eager"
    monkeypatch.setattr(fp8.theirs, "fp8_linear", fp8.emulated)
    assert ratio(found, experts(x.float(), ids, weights)) > LEAST
