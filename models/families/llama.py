"""Llama and DeepSeek 67B: the dense models that MoE models are compared with."""

from __future__ import annotations

from moec.models.blocks import Decoder, SwiGLU
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
    attn = grouped_query_attention(c, qkv_bias=bias, out_bias=bias)
    mlp = SwiGLU(c.integer("intermediate_size"), activation(c), bias=c.flag("mlp_bias", default=False))
    return Model(layers=[Decoder(attn, mlp, norm_eps(c))] * layer_count(c), **model_fields(c))


LLAMA2_7B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}

LLAMA2_70B = LLAMA2_7B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}

LLAMA3_8B = LLAMA2_7B | {
    "vocab_size": 128256,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}

LLAMA3_70B = LLAMA3_8B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}

_LLAMA31_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}

LLAMA31_8B = LLAMA3_8B | {"max_position_embeddings": 131072, "rope_scaling": _LLAMA31_ROPE}
LLAMA31_70B = LLAMA3_70B | {"max_position_embeddings": 131072, "rope_scaling": _LLAMA31_ROPE}

LLAMA32_1B = LLAMA31_8B | {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "head_dim": 64,
    "rope_scaling": _LLAMA31_ROPE | {"factor": 32.0},
    "tie_word_embeddings": True,
}

DEEPSEEK_67B = LLAMA2_70B | {
    "vocab_size": 102400,
    "intermediate_size": 22016,
    "num_hidden_layers": 95,
    "rms_norm_eps": 1e-6,
    "torch_dtype": "bfloat16",
    "bos_token_id": 100000,
    "eos_token_id": 100001,
}

TINY = LLAMA32_1B | {
    "vocab_size": 256,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "attention_bias": True,
    "mlp_bias": True,
    "max_position_embeddings": 256,
    "rope_theta": 1000.0,
    "rope_scaling": _LLAMA31_ROPE | {"factor": 4.0, "original_max_position_embeddings": 64},
    "torch_dtype": "float32",
    "bos_token_id": 0,
    "eos_token_id": 1,
}

FAMILY = register(
    Family(
        name="Llama",
        model_types=("llama",),
        read=read,
        presets={
            "llama-2-7b": LLAMA2_7B,
            "llama-2-70b": LLAMA2_70B,
            "llama-3-8b": LLAMA3_8B,
            "llama-3-70b": LLAMA3_70B,
            "llama-3.1-8b": LLAMA31_8B,
            "llama-3.1-70b": LLAMA31_70B,
            "llama-3.2-1b": LLAMA32_1B,
            "deepseek-67b": DEEPSEEK_67B,
            "llama-tiny": TINY,
        },
        tiny="llama-tiny",
    )
)
