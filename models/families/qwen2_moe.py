"""Qwen1.5-MoE and Qwen2-MoE: biased q, k and v; a shared expert behind a sigmoid gate."""

from __future__ import annotations

from moec.models.blocks import GQA, Decoder, Experts, MoE, Router, SwiGLU
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
    act, eps, sparse = activation(c), norm_eps(c), sparse_layers(c)
    windows = _windows(c)
    dense, moe = SwiGLU(c.integer("intermediate_size"), act), _experts(c, act)
    bias = c.flag("qkv_bias", default=True)
    attn = {w: grouped_query_attention(c, qkv_bias=bias, window=w) for w in {*windows}}
    layers = [_decoder(attn[w], moe if i in sparse else dense, eps) for i, w in enumerate(windows)]
    return Model(layers=layers, **model_fields(c))


def _decoder(attn: GQA, mlp: MoE | SwiGLU, eps: float) -> Decoder:
    kind = "moe" if isinstance(mlp, MoE) else "dense"
    return Decoder(attn, mlp, eps, name=f"{kind}.window" if attn.window else kind)


def sparse_layers(c: Config) -> set[int]:
    """Numbers of the layers that are MoE; the others are dense (Qwen2 and Qwen3)."""
    step = c.integer("decoder_sparse_step", default=1)
    dense, layers = c.items("mlp_only_layers", int), layer_count(c)
    for i in dense:
        c.need(0 <= i < layers, f"mlp_only_layers names layer {i}, but num_hidden_layers is {layers}")
    return {i for i in range(layers) if i not in dense and (i + 1) % step == 0}


def _windows(c: Config) -> list[int]:
    """Each layer's sliding window, 0 for full attention."""
    layers, on = layer_count(c), c.flag("use_sliding_window", default=False)
    width = c.integer("sliding_window", default=4096, least=0)
    last = c.integer("max_window_layers", default=28, least=0)
    derived = [
        "sliding_attention" if on and i % 2 == 0 and i < last else "full_attention" for i in range(layers)
    ]
    kinds = c.items("layer_types", str, default=derived)
    c.need(len(kinds) == layers, f"layer_types names {len(kinds)} layers, num_hidden_layers is {layers}")
    for kind in kinds:
        if kind not in ("sliding_attention", "full_attention"):
            raise c.unsupported(f"layer_types names {kind!r}: moec has full_attention and sliding_attention")
    slides = "sliding_attention" in kinds
    c.need(
        not slides or (on and width > 0),
        "layer_types asks for sliding attention, but there is no sliding_window",
    )
    return [width if kind == "sliding_attention" else 0 for kind in kinds]


def _experts(c: Config, act: str) -> MoE:
    count = c.integer("num_experts", "num_local_experts")
    router = Router(
        count,
        c.integer("num_experts_per_tok"),
        renorm=c.flag("norm_topk_prob", default=False),
        round_weights=True,
    )
    experts = Experts(count, c.integer("moe_intermediate_size"), act)
    shared = SwiGLU(c.integer("shared_expert_intermediate_size"), act, name="shared_expert")
    return MoE(router, experts, shared=shared, shared_gate="shared_expert_gate")


QWEN15 = {
    "model_type": "qwen2_moe",
    "architectures": ["Qwen2MoeForCausalLM"],
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
    "use_sliding_window": False,
    "sliding_window": 32768,
    "max_window_layers": 21,
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 151643,
    "eos_token_id": 151643,
}

QWEN2_57B = QWEN15 | {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "moe_intermediate_size": 2560,
    "shared_expert_intermediate_size": 20480,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "sliding_window": 65536,
    "max_window_layers": 28,
    "max_position_embeddings": 131072,
}

TINY = QWEN15 | {
    "vocab_size": 256,
    "hidden_size": 48,
    "intermediate_size": 56,
    "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 28,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_experts": 7,
    "num_experts_per_tok": 3,
    "mlp_only_layers": [1],
    "use_sliding_window": True,
    "sliding_window": 5,
    "max_window_layers": 4,
    "max_position_embeddings": 256,
    "rope_theta": 1000.0,
    "torch_dtype": "float32",
    "bos_token_id": 0,
    "eos_token_id": 1,
}

FAMILY = register(
    Family(
        name="Qwen2-MoE",
        model_types=("qwen2_moe",),
        read=read,
        presets={"qwen1.5-moe-a2.7b": QWEN15, "qwen2-57b-a14b": QWEN2_57B, "qwen2-moe-tiny": TINY},
        tiny="qwen2-moe-tiny",
    )
)
