"""DeepSeekMoE 16B (arXiv:2401.06066): Llama's attention with fine-grained experts beside shared ones.

Its checkpoint comes with code of its own; transformers has no class of it. The gate runs in fp32, as in V2.
"""

from __future__ import annotations

from moec.models.blocks import Decoder, MoE, Router, SwiGLU
from moec.models.config import Config
from moec.models.families.common import (
    activation,
    grouped_query_attention,
    layer_count,
    model_fields,
    norm_eps,
)
from moec.models.families.deepseek_v3 import routed_experts, shared_experts
from moec.models.families.registry import Family, register
from moec.models.spec import Model


def read(c: Config) -> Model:
    act, eps, layers = activation(c), norm_eps(c), layer_count(c)
    dense_layers = min(c.integer("first_k_dense_replace", default=0, least=0), layers)
    bias = c.flag("attention_bias", default=False)
    attn = grouped_query_attention(c, qkv_bias=bias, out_bias=bias)
    dense = Decoder(attn, SwiGLU(c.integer("intermediate_size"), act), eps)
    moe = Decoder(attn, _experts(c, act), eps)
    return Model(layers=[dense] * dense_layers + [moe] * (layers - dense_layers), **model_fields(c))


def _experts(c: Config, act: str) -> MoE:
    c.allow("scoring_func", ["softmax"], "this score in a V1 model", default="softmax")
    c.allow("moe_layer_freq", [1], "a dense layer between MoE layers", default=1)
    experts, k = routed_experts(c, act), c.integer("num_experts_per_tok")
    renorm = c.flag("norm_topk_prob", default=False) and k > 1
    return MoE(
        Router(experts.count, k, renorm=renorm, fp32=True), experts, shared=shared_experts(c, act, default=0)
    )


MOE_16B = {
    "model_type": "deepseek",
    "architectures": ["DeepseekForCausalLM"],
    "vocab_size": 102400,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_shared_experts": 2,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "moe_layer_freq": 1,
    "first_k_dense_replace": 1,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 100000,
    "eos_token_id": 100001,
}

TINY = MOE_16B | {
    "vocab_size": 256,
    "hidden_size": 48,
    "intermediate_size": 56,
    "moe_intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "n_routed_experts": 7,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 256,
    "torch_dtype": "float32",
    "bos_token_id": 0,
    "eos_token_id": 1,
}

FAMILY = register(
    Family(
        name="DeepSeek-V1",
        model_types=("deepseek",),
        read=read,
        presets={"deepseek-moe-16b": MOE_16B, "deepseek-v1-tiny": TINY},
        tiny="deepseek-v1-tiny",
    )
)
