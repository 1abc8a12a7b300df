"""DeepSeek-V2 and V2-Lite (arXiv:2405.04434): latent attention, a softmax router; V2 limits it to groups."""

from __future__ import annotations

from moec.models.blocks import Decoder, MoE, Router, SwiGLU
from moec.models.config import Config
from moec.models.families.common import activation, layer_count, model_fields, norm_eps
from moec.models.families.deepseek_v3 import latent_attention, routed_experts, shared_experts
from moec.models.families.registry import Family, register
from moec.models.spec import Model


def read(c: Config) -> Model:
    act, eps, layers = activation(c), norm_eps(c), layer_count(c)
    dense_layers = min(c.integer("first_k_dense_replace", default=0, least=0), layers)
    bias = c.flag("mlp_bias", default=False)
    attn = latent_attention(c)
    dense = Decoder(attn, SwiGLU(c.integer("intermediate_size"), act, bias), eps)
    moe = Decoder(attn, _experts(c, act, bias), eps)
    return Model(layers=[dense] * dense_layers + [moe] * (layers - dense_layers), **model_fields(c))


def _experts(c: Config, act: str, bias: bool) -> MoE:
    c.allow("scoring_func", ["softmax"], "this score in a V2 model", default="softmax")
    c.allow("moe_layer_freq", [1], "a dense layer between MoE layers", default=1)
    # DeepSeek's code and transformers differ here, and no checkpoint asks for it.
    c.allow("norm_topk_prob", [False], "renormalising the weights of a V2 model", default=False)
    method = c.allow(
        "topk_method",
        ["greedy", "group_limited_greedy"],
        "this choice of experts in a V2 model",
        default="greedy",
    )
    experts = routed_experts(c, act)
    groups, kept = c.integer("n_group", default=1), c.integer("topk_group", default=1)
    if method == "greedy":
        groups, kept = 1, 1
    c.need(
        experts.count % groups == 0,
        f"n_group is {groups}, which doesn't divide n_routed_experts, {experts.count}",
    )
    router = Router(
        experts.count,
        c.integer("num_experts_per_tok"),
        scale=c.number("routed_scaling_factor", default=1.0),
        groups=groups,
        topk_groups=kept,
        group_score="max",
        masked="zero",
        fp32=True,
    )
    return MoE(router, experts, shared=shared_experts(c, act, bias, default=2))


_YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}

V2 = {
    "model_type": "deepseek_v2",
    "architectures": ["DeepseekV2ForCausalLM"],
    "vocab_size": 102400,
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 60,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_shared_experts": 2,
    "n_routed_experts": 160,
    "num_experts_per_tok": 6,
    "n_group": 8,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "routed_scaling_factor": 16.0,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "rope_scaling": _YARN,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 100000,
    "eos_token_id": 100001,
}

V2_LITE = V2 | {
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_routed_experts": 64,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "routed_scaling_factor": 1.0,
    "q_lora_rank": None,
}

TINY = V2 | {
    "vocab_size": 256,
    "hidden_size": 48,
    "intermediate_size": 56,
    "moe_intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "n_routed_experts": 12,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "kv_lora_rank": 24,
    "q_lora_rank": 20,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "max_position_embeddings": 256,
    "rope_scaling": _YARN | {"factor": 4.0, "original_max_position_embeddings": 64, "mscale": 1.0},
    "torch_dtype": "float32",
    "bos_token_id": 0,
    "eos_token_id": 1,
}

TINY_LITE = TINY | {
    "num_hidden_layers": 2,
    "q_lora_rank": None,
    "n_routed_experts": 7,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "routed_scaling_factor": 1.0,
    "rope_scaling": _YARN | {"factor": 4.0, "original_max_position_embeddings": 64},
}

FAMILY = register(
    Family(
        name="DeepSeek-V2",
        model_types=("deepseek_v2",),
        read=read,
        presets={
            "deepseek-v2": V2,
            "deepseek-v2-lite": V2_LITE,
            "deepseek-v2-tiny": TINY,
            "deepseek-v2-lite-tiny": TINY_LITE,
        },
        tiny="deepseek-v2-tiny",
    )
)
