"""Mixtral (Jiang et al. 2024): two of eight experts a token, renormalised, no shared one."""

from __future__ import annotations

from moec.models.blocks import Decoder, Experts, MoE, Router
from moec.models.config import Config
from moec.models.families.common import (
    activation,
    grouped_query_attention,
    layer_count,
    model_fields,
    norm_eps,
    rotary,
)
from moec.models.families.registry import Family, register
from moec.models.spec import Model


def read(c: Config) -> Model:
    attn = grouped_query_attention(
        c, rope=rotary(c, theta=1e6), window=c.integer("sliding_window", default=None) or 0
    )
    c.allow("norm_topk_prob", [True], "weights that aren't renormalised in a Mixtral model", default=True)
    count = c.integer("num_local_experts", "num_experts", default=8)
    router = Router(count, c.integer("num_experts_per_tok", default=2), renorm=True)
    experts = Experts(count, c.integer("intermediate_size"), activation(c), weights=("w1", "w3", "w2"))
    mlp = MoE(router, experts, name="block_sparse_moe")
    return Model(layers=[Decoder(attn, mlp, norm_eps(c))] * layer_count(c), **model_fields(c))


M8X7B = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "sliding_window": None,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}

M8X22B = M8X7B | {
    "hidden_size": 6144,
    "intermediate_size": 16384,
    "num_hidden_layers": 56,
    "num_attention_heads": 48,
    "max_position_embeddings": 65536,
}

TINY = M8X7B | {
    "vocab_size": 256,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "num_local_experts": 5,
    "num_experts_per_tok": 3,
    "sliding_window": 5,
    "max_position_embeddings": 256,
    "rope_theta": 1000.0,
    "torch_dtype": "float32",
}

FAMILY = register(
    Family(
        name="Mixtral",
        model_types=("mixtral",),
        read=read,
        presets={"mixtral-8x7b": M8X7B, "mixtral-8x22b": M8X22B, "mixtral-tiny": TINY},
        tiny="mixtral-tiny",
    )
)
