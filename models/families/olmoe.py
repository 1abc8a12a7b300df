"""OLMoE (arXiv:2409.02060): q and k normed over their full width, optionally clamped; weights as scored."""

from __future__ import annotations

from moec.models.blocks import Decoder, Experts, MoE, Router
from moec.models.config import Config
from moec.models.families.common import (
    activation,
    grouped_query_attention,
    layer_count,
    model_fields,
    norm_eps,
)
from moec.models.families.registry import Family, register
from moec.models.spec import Model


def read(c: Config) -> Model:
    bias = c.flag("attention_bias", default=False)
    attn = grouped_query_attention(
        c, qkv_bias=bias, out_bias=bias, qk_norm="full", clip=c.number("clip_qkv", default=None)
    )
    count = c.integer("num_experts", "num_local_experts")
    router = Router(
        count,
        c.integer("num_experts_per_tok"),
        renorm=c.flag("norm_topk_prob", default=False),
        round_weights=True,
    )
    mlp = MoE(router, Experts(count, c.integer("intermediate_size"), activation(c)))
    return Model(layers=[Decoder(attn, mlp, norm_eps(c, 1e-5))] * layer_count(c), **model_fields(c))


OLMOE_1B_7B = {
    "model_type": "olmoe",
    "architectures": ["OlmoeForCausalLM"],
    "vocab_size": 50304,
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "attention_bias": False,
    "clip_qkv": None,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": 50279,
}

TINY = OLMOE_1B_7B | {
    "vocab_size": 256,
    "hidden_size": 48,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_experts": 7,
    "num_experts_per_tok": 3,
    "attention_bias": True,
    "clip_qkv": 0.9,
    "max_position_embeddings": 256,
    "rope_theta": 1000.0,
    "torch_dtype": "float32",
    "bos_token_id": 0,
    "eos_token_id": 1,
}

FAMILY = register(
    Family(
        name="OLMoE",
        model_types=("olmoe",),
        read=read,
        presets={"olmoe-1b-7b": OLMOE_1B_7B, "olmoe-tiny": TINY},
        tiny="olmoe-tiny",
    )
)
