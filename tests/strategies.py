"""Hypothesis strategies over checkpoints: tiny configurations of each family that transformers defines.

Never drawn, since transformers has no one answer: DeepSeek V3 with one expert a group or with more choices
than the groups allow; DeepSeek V2's ``norm_topk_prob``, which its class ignores; YaRN on a Mixtral without
``head_dim``; a sliding window of one token, with which transformers' KV cache sees the whole past.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from tests.hf import Case

VOCAB = 97
MAX_PROMPT, NEW_TOKENS = 10, 4
Draw = Callable[[st.SearchStrategy[Any]], Any]

_of = st.sampled_from
_flag = st.booleans()


def _rope(draw: Draw, *kinds: str, mscale: bool = False) -> dict[str, Any]:
    """``rope_parameters`` of one of ``kinds`` and the ``max_position_embeddings`` that go with them.

    The length first trained on is short, so that stretching shows within a prompt.
    """
    kind = draw(_of(kinds))
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": draw(_of([100.0, 10000.0]))}
    longest = 64
    if kind != "default":
        rope["factor"] = draw(_of([2.0, 4.0, 40.0]))
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    if kind == "yarn":
        original = draw(_of([8, 16, 32]))
        longest = int(original * rope["factor"])
        rope["original_max_position_embeddings"] = original
        rope |= draw(_of([{}, {"beta_fast": 32, "beta_slow": 1}, {"beta_fast": 4.0, "beta_slow": 0.5}]))
        if mscale:
            one = {"mscale": 0.707, "mscale_all_dim": 0.707}
            rope |= draw(_of([{}, one, {"mscale": 1.0, "mscale_all_dim": 0.5}, {"mscale_all_dim": 1.0}]))
        else:
            rope |= draw(_of([{}, {"attention_factor": 1.3}, {"truncate": False}]))
    return {"rope_parameters": rope, "max_position_embeddings": longest}


def _common(draw: Draw) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_act": draw(_of(["silu", "silu", "silu", "gelu", "gelu_pytorch_tanh"])),
        "num_hidden_layers": draw(_of([1, 2, 3])),
        "intermediate_size": draw(_of([8, 24, 40])),
        "rms_norm_eps": draw(_of([1e-6, 1e-5, 1e-2])),
        "tie_word_embeddings": draw(_flag),
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def _choices(experts: int) -> st.SearchStrategy[int]:
    """How many of ``experts`` a token goes to: powers of two or not, or all."""
    return _of(sorted({k for k in (1, 2, 3, 6, experts) if k <= experts}))


def _experts(draw: Draw) -> tuple[int, int]:
    """``E`` and ``k``."""
    count = draw(_of([2, 3, 5, 8, 12]))
    return count, draw(_choices(count))


def _heads(draw: Draw, free_width: bool) -> dict[str, Any]:
    """Query and key heads; with ``free_width`` a head is not always hidden / heads wide."""
    heads = draw(_of([1, 2, 4]))
    out = {
        "num_attention_heads": heads,
        "num_key_value_heads": draw(_of([h for h in (1, 2, 4) if h <= heads])),
        "hidden_size": draw(_of([16, 32, 48])),
    }
    if free_width:
        out["head_dim"] = draw(_of([4, 8, 10, 16]))
    return out


def _mla(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_size": draw(_of([16, 24, 48])),
        "num_attention_heads": draw(_of([1, 2, 4])),
        "q_lora_rank": draw(_of([None, 8, 20])),
        "kv_lora_rank": draw(_of([8, 12, 16])),
        "qk_nope_head_dim": draw(_of([4, 8, 12])),
        "qk_rope_head_dim": draw(_of([2, 4, 8, 10])),
        "v_head_dim": draw(_of([4, 6, 8, 16])),
        "attention_bias": draw(_flag),
    }


def _grouped(draw: Draw) -> dict[str, Any]:
    """Expert groups of two or more, and no more choices than the groups kept allow."""
    groups, width = draw(_of([1, 2, 3, 4])), draw(_of([2, 3, 4]))
    kept = draw(st.integers(1, groups))
    return {
        "n_group": groups,
        "topk_group": kept,
        "n_routed_experts": groups * width,
        "num_experts_per_tok": draw(_choices(kept * width)),
    }


def _deepseek_moe(draw: Draw, layers: int) -> dict[str, Any]:
    return {
        "moe_intermediate_size": draw(_of([6, 16])),
        "n_shared_experts": draw(_of([1, 2])),
        "first_k_dense_replace": draw(st.integers(0, layers)),
    }


def _deepseek_v3(draw: Draw) -> dict[str, Any]:
    common = _common(draw)
    return {
        **common,
        **_mla(draw),
        **_grouped(draw),
        **_deepseek_moe(draw, common["num_hidden_layers"]),
        **_rope(draw, "default", "yarn", mscale=True),
        "num_key_value_heads": None,
        "routed_scaling_factor": draw(_of([1.0, 2.5])),
        "norm_topk_prob": draw(_flag),
        "rope_interleave": draw(_flag),
    }


def _deepseek_v2(draw: Draw) -> dict[str, Any]:
    common = _common(draw)
    config = {
        **common,
        **_mla(draw),
        **_grouped(draw),
        **_deepseek_moe(draw, common["num_hidden_layers"]),
        **_rope(draw, "default", "yarn", mscale=True),
        "topk_method": draw(_of(["greedy", "group_limited_greedy"])),
        "routed_scaling_factor": draw(_of([1.0, 16.0])),
    }
    if config["topk_method"] == "greedy" and draw(_flag):
        config |= {"n_group": None, "topk_group": None}
    return config


def _deepseek_v1(draw: Draw) -> dict[str, Any]:
    common = _common(draw)
    experts, k = _experts(draw)
    return {
        **common,
        **_heads(draw, free_width=False),
        **_deepseek_moe(draw, common["num_hidden_layers"]),
        **_rope(draw, "default", "linear"),
        "n_routed_experts": experts,
        "num_experts_per_tok": k,
        "norm_topk_prob": draw(_flag),
        "attention_bias": draw(_flag),
        "moe_layer_freq": 1,
    }


def _mixtral(draw: Draw) -> dict[str, Any]:
    rope = _rope(draw, "default", "yarn", "linear")
    experts, k = _experts(draw)
    return {
        **_common(draw),
        **_heads(draw, free_width=rope["rope_parameters"]["rope_type"] == "yarn" or draw(_flag)),
        **rope,
        "num_local_experts": experts,
        "num_experts_per_tok": k,
        "sliding_window": draw(_of([None, 2, 3, 6])),
    }


def _qwen_moe(draw: Draw, layers: int) -> dict[str, Any]:
    experts, k = _experts(draw)
    return {
        "num_experts": experts,
        "num_experts_per_tok": k,
        "moe_intermediate_size": draw(_of([6, 16])),
        "norm_topk_prob": draw(_flag),
        "decoder_sparse_step": draw(_of([1, 1, 2])),
        "mlp_only_layers": sorted(draw(st.sets(st.integers(0, layers - 1), max_size=layers))),
        "use_sliding_window": draw(_flag),
        "sliding_window": draw(_of([2, 3, 6])),
    }


def _qwen2_moe(draw: Draw) -> dict[str, Any]:
    common = _common(draw)
    layers = common["num_hidden_layers"]
    return {
        **common,
        **_heads(draw, free_width=draw(_flag)),
        **_qwen_moe(draw, layers),
        **_rope(draw, "default", "yarn"),
        "max_window_layers": draw(st.integers(0, layers)),
        "shared_expert_intermediate_size": draw(_of([8, 20])),
        "qkv_bias": draw(_flag),
    }


def _qwen3_moe(draw: Draw) -> dict[str, Any]:
    common = _common(draw)
    return {
        **common,
        **_heads(draw, free_width=draw(_flag)),
        **_qwen_moe(draw, common["num_hidden_layers"]),
        **_rope(draw, "default", "yarn"),
        "attention_bias": draw(_flag),
    }


def _olmoe(draw: Draw) -> dict[str, Any]:
    experts, k = _experts(draw)
    return {
        **_common(draw),
        **_heads(draw, free_width=False),
        **_rope(draw, "default", "yarn"),
        "num_experts": experts,
        "num_experts_per_tok": k,
        "norm_topk_prob": draw(_flag),
        "clip_qkv": draw(_of([None, 0.6, 8.0])),
        "attention_bias": draw(_flag),
    }


def _llama(draw: Draw) -> dict[str, Any]:
    return {
        **_common(draw),
        **_heads(draw, free_width=draw(_flag)),
        **_rope(draw, "default", "linear", "llama3", "yarn"),
        "attention_bias": draw(_flag),
        "mlp_bias": draw(_flag),
    }


CONFIGS: dict[str, Callable[[Draw], dict[str, Any]]] = {
    "deepseek": _deepseek_v1,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
    "mixtral": _mixtral,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
    "olmoe": _olmoe,
    "llama": _llama,
}


@st.composite
def prompts(draw: Draw) -> tuple[tuple[int, ...], ...]:
    """Two or three prompts, of one length or ragged."""
    count = draw(_of([2, 3]))
    if draw(_flag):
        lengths = [draw(st.integers(2, MAX_PROMPT))] * count
    else:
        lengths = [draw(st.integers(1, MAX_PROMPT)) for _ in range(count)]
    ids = st.integers(0, VOCAB - 1)
    return tuple(tuple(draw(st.lists(ids, min_size=n, max_size=n))) for n in lengths)


@st.composite
def hf_cases(draw: Draw, family: str) -> Case:
    """A checkpoint of ``family`` and prompts for it."""
    return Case(
        family,
        CONFIGS[family](draw),
        draw(prompts()),
        new_tokens=NEW_TOKENS,
        seed=draw(st.integers(0, 2**16)),
        old=draw(_flag),
        shard=draw(_of([None, None, "20KB"])),
    )
