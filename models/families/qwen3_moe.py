"""Qwen3-MoE (arXiv:2505.09388): q and k normed head by head, many experts, no shared one."""

from __future__ import annotations

from moec.models.blocks import Decoder, Experts, MoE, Router, SwiGLU
from moec.models.config import Config
from moec.models.families.common import (
    activation,
    grouped_query_attention,
    layer_count,
    model_fields,
    norm_eps,
)
from moec.models.families.qwen2_moe import sparse_layers
from moec.models.families.registry import Family, register
from moec.models.spec import Model


def read(c: Config) -> Model:
    act, eps, sparse = activation(c), norm_eps(c), sparse_layers(c)
    bias = c.flag("attention_bias", default=False)
    attn = grouped_query_attention(c, qkv_bias=bias, out_bias=bias, qk_norm="head", window=_window(c))
    dense = Decoder(attn, SwiGLU(c.integer("intermediate_size"), act), eps)
    moe = Decoder(attn, _experts(c, act), eps)
    return Model(layers=[moe if i in sparse else dense for i in range(layer_count(c))], **model_fields(c))


def _window(c: Config) -> int:
    """One sliding window for all layers, 0 for full attention."""
    c.skip("max_window_layers")
    width: int = c.integer("sliding_window", default=4096, least=0)
    return width if c.flag("use_sliding_window", default=False) else 0


def _experts(c: Config, act: str) -> MoE:
    count = c.integer("num_experts", "num_local_experts")
    router = Router(
        count,
        c.integer("num_experts_per_tok"),
        renorm=c.flag("norm_topk_prob", default=False),
        round_weights=True,
    )
    return MoE(router, Experts(count, c.integer("moe_intermediate_size"), act))


QWEN3_30B = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "attention_bias": False,
    "use_sliding_window": False,
    "sliding_window": None,
    "max_window_layers": 48,
    "hidden_act": "silu",
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}

QWEN3_235B = QWEN3_30B | {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 94,
    "num_attention_heads": 64,
    "max_window_layers": 94,
}

TINY = QWEN3_30B | {
    "vocab_size": 256,
    "hidden_size": 48,
    "intermediate_size": 56,
    "moe_intermediate_size": 20,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "num_experts": 9,
    "num_experts_per_tok": 3,
    "decoder_sparse_step": 2,
    "use_sliding_window": True,
    "sliding_window": 5,
    "max_position_embeddings": 256,
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "rope_theta": 1000.0,
    "torch_dtype": "float32",
    "bos_token_id": 0,
    "eos_token_id": 1,
}

FAMILY = register(
    Family(
        name="Qwen3-MoE",
        model_types=("qwen3_moe",),
        read=read,
        presets={"qwen3-30b-a3b": QWEN3_30B, "qwen3-235b-a22b": QWEN3_235B, "qwen3-moe-tiny": TINY},
        tiny="qwen3-moe-tiny",
    )
)
