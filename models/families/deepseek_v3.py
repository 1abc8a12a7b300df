"""DeepSeek-V3 (report, arXiv:2412.19437), which R1 and Kimi K2 share.

Latent attention; a sigmoid router with a bias against imbalance that chooses within groups of experts.
"""

from __future__ import annotations

from moec.models.blocks import MLA, Decoder, Experts, MoE, Router, SwiGLU
from moec.models.config import Config
from moec.models.families.common import activation, layer_count, model_fields, norm_eps, rotary
from moec.models.families.registry import Family, register
from moec.models.spec import Model


def read(c: Config) -> Model:
    act, eps, layers = activation(c), norm_eps(c), layer_count(c)
    dense_layers = min(c.integer("first_k_dense_replace", default=3, least=0), layers)
    attn = latent_attention(c)
    dense = Decoder(attn, SwiGLU(c.integer("intermediate_size"), act), eps)
    moe = Decoder(attn, _experts(c, act), eps)
    fields = model_fields(c)
    fields["ignored"] += _mtp(c, layers)
    return Model(layers=[dense] * dense_layers + [moe] * (layers - dense_layers), **fields)


def latent_attention(c: Config) -> MLA:
    """MLA of V2 and V3. Their norms of the latents use eps 1e-6 whatever rms_norm_eps says."""
    heads = c.integer("num_attention_heads")
    kv_heads = c.integer("num_key_value_heads", default=heads)
    c.need(
        kv_heads == heads,
        f"num_key_value_heads is {kv_heads} but num_attention_heads {heads}: MLA has one kind of head",
    )
    rope_dim = c.integer("qk_rope_head_dim")
    c.skip("head_dim", "qk_head_dim")  # saved configs give the rope width as head_dim
    interleaved = c.flag("rope_interleave", default=True)
    return MLA(
        heads=heads,
        qk_nope_head_dim=c.integer("qk_nope_head_dim"),
        qk_rope_head_dim=rope_dim,
        v_head_dim=c.integer("v_head_dim"),
        kv_lora_rank=c.integer("kv_lora_rank"),
        q_lora_rank=c.integer("q_lora_rank", default=None),
        rope=rotary(c, layout="interleaved" if interleaved else "half"),
        bias=c.flag("attention_bias", default=False),
    )


def shared_experts(c: Config, act: str, bias: bool = False, default: int = 1) -> SwiGLU | None:
    """The shared experts, which the checkpoint keeps as one MLP of their widths together; null means none."""
    given = 0 if "n_shared_experts" in c.data else default
    count, width = c.integer("n_shared_experts", default=given, least=0), c.integer("moe_intermediate_size")
    return SwiGLU(count * width, act, bias, name="shared_experts") if count else None


def routed_experts(c: Config, act: str) -> Experts:
    return Experts(
        c.integer("n_routed_experts", "num_local_experts", "num_experts"),
        c.integer("moe_intermediate_size"),
        act,
    )


def _experts(c: Config, act: str) -> MoE:
    c.allow("scoring_func", ["sigmoid"], "this score in a V3 model", default="sigmoid")
    c.allow("topk_method", ["noaux_tc"], "this choice of experts in a V3 model", default="noaux_tc")
    c.allow("moe_layer_freq", [1], "a dense layer between MoE layers", default=1)
    experts = routed_experts(c, act)
    groups, kept = c.integer("n_group"), c.integer("topk_group")
    k = c.integer("num_experts_per_tok")
    c.need(
        experts.count % groups == 0,
        f"n_group is {groups}, which doesn't divide n_routed_experts, {experts.count}",
    )
    size = experts.count // groups
    c.need(kept <= groups, f"topk_group is {kept} but n_group {groups}")
    c.need(
        size > 1,
        f"n_group is {groups} of {experts.count} n_routed_experts: a group of one has no two best scores",
    )
    c.need(
        k <= size * kept,
        f"num_experts_per_tok is {k}, but topk_group {kept} groups of {size} hold {size * kept}",
    )
    router = Router(
        experts.count,
        k,
        score="sigmoid",
        renorm=c.flag("norm_topk_prob", default=True),
        scale=c.number("routed_scaling_factor", default=2.5),
        groups=groups,
        topk_groups=kept,
        group_score="top2sum",
        bias=True,
        fp32=True,
    )
    return MoE(router, experts, shared=shared_experts(c, act))


def _mtp(c: Config, layers: int) -> tuple[tuple[str, str], ...]:
    """Multi-token prediction: layers behind the last, for drafting. Some configs name one without tensors."""
    count = c.integer("num_nextn_predict_layers", "num_mtp_layers", default=0, least=0, most=64)
    if not count:
        return ()
    numbers = "|".join(str(layers + i) for i in range(count))
    why = "multi-token prediction: a drafting layer, not part of the model"
    return ((rf"model\.layers\.({numbers})\.", why),)


_FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}

V3 = {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 3,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "num_nextn_predict_layers": 1,
    "hidden_act": "silu",
    "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "quantization_config": _FP8,
}

KIMI_K2 = V3 | {
    "model_type": "kimi_k2",
    "vocab_size": 163840,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "n_routed_experts": 384,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.827,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
    "max_position_embeddings": 131072,
    "rope_theta": 50000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 1.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "bos_token_id": 163584,
    "eos_token_id": 163585,
}

TINY = V3 | {
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
    "first_k_dense_replace": 1,
    "kv_lora_rank": 24,
    "q_lora_rank": 20,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_scaling": V3["rope_scaling"]
    | {"factor": 4.0, "original_max_position_embeddings": 64, "mscale": 0.7},  # type: ignore[operator]
    "torch_dtype": "float32",
    "quantization_config": None,
}

FAMILY = register(
    Family(
        name="DeepSeek-V3",
        model_types=("deepseek_v3", "kimi_k2"),
        read=read,
        presets={"deepseek-v3": V3, "deepseek-r1": V3, "kimi-k2": KIMI_K2, "deepseek-v3-tiny": TINY},
        tiny="deepseek-v3-tiny",
    )
)
