"""The parity tests have teeth: each planted mistake moves the logits far beyond what parity allows.

A mutant is a small change of the lowered IR, tried on a configuration in which the mutated feature is on. In
the same way, each tensor of each checkpoint matters: changed, it shows.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moec.ir import Function, Module, Op
from moec.models import from_hf, lower
from tests import hf

SEEN = 1e-3  # ten times what parity allows

_one_thread = pytest.fixture(autouse=True, scope="module")(hf.one_thread)

_COMMON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
_MLA = {
    "num_key_value_heads": None,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 6,
    "rope_parameters": _YARN | {"mscale": 1.0, "mscale_all_dim": 0.5},
    "attention_bias": True,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 3,
}
_CONFIGS: dict[str, dict[str, Any]] = {
    "deepseek": {
        "moe_intermediate_size": 16,
        "n_routed_experts": 6,
        "n_shared_experts": 1,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "first_k_dense_replace": 1,
    },
    "deepseek_v2": {
        **_MLA,
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 4.0,
        "mlp_bias": True,
    },
    "deepseek_v3": {**_MLA, "routed_scaling_factor": 2.5},
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 3, "sliding_window": 3},
    "qwen2_moe": {
        "moe_intermediate_size": 16,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "shared_expert_intermediate_size": 20,
        "use_sliding_window": True,
        "sliding_window": 3,
        "max_window_layers": 1,
    },
    "qwen3_moe": {
        "moe_intermediate_size": 16,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "head_dim": 10,
        "attention_bias": True,
        "decoder_sparse_step": 2,
        "rope_parameters": _YARN,
    },
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 3, "clip_qkv": 0.9, "attention_bias": True},
    "llama": {
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0},
    },
}
_PROMPTS = (
    (5, 17, 80, 3, 44, 5, 61, 2, 90, 33),
    (9, 9, 61, 70, 12, 8, 25, 49, 96, 0),
    (1, 30, 31, 55, 18, 7, 2, 64),
)


@functools.cache
def _case(family: str) -> tuple[hf.Reference, Module, dict[str, torch.Tensor]]:
    """transformers' answer, the lowered module, which agrees with it, and the checkpoint."""
    case = hf.Case(family, _COMMON | _CONFIGS[family], _PROMPTS, new_tokens=1, seed=3)
    with tempfile.TemporaryDirectory() as folder:
        expected = hf.reference(case, Path(folder))
        assert expected is not None
        module, weights = lower(from_hf(expected.folder)), hf.tensors(expected.folder)
    return expected, module, weights


def _error(family: str, module: Module, weights: dict[str, torch.Tensor]) -> float:
    expected = _case(family)[0]
    logits, _ = hf.interpret(module, weights, _PROMPTS, new_tokens=1)
    return max(map(hf.difference, logits, expected.logits))


@pytest.mark.parametrize("family", _CONFIGS)
def test_unmutated(family: str) -> None:
    _, module, weights = _case(family)
    assert _error(family, module, weights) < hf.TOLERANCE


# Mutations. Each is tried on every op and says whether it changed this one.
Mutation = Callable[[Function, Op], bool]


def _remake(function: Function, op: Op, operands: tuple[Any, ...] | None = None, **attrs: Any) -> bool:
    """Puts an op with other operands or attributes into ``op``'s place."""
    new = type(op)(op.operands if operands is None else operands, op.attrs | attrs, op.loc)
    function.create(new, before=op)
    for before, after in zip(op.results, new.results, strict=True):
        function.replace(before, after)
    function.erase(op)
    return True


def _set(op_name: str, out: str = "", **attrs: Any) -> Mutation:
    """Other attributes for every ``op_name``, or for those whose first result is called ``out``."""

    def change(function: Function, op: Op) -> bool:
        return _is(op, op_name, out) and _remake(function, op, **attrs)

    return change


def _drop(op_name: str, operand: int, out: str = "") -> Mutation:
    """Leaves an optional operand out."""

    def change(function: Function, op: Op) -> bool:
        if not _is(op, op_name, out) or op.operands[operand] is None:
            return False
        return _remake(function, op, (*op.operands[:operand], None, *op.operands[operand + 1 :]))

    return change


def _skip(op_name: str, out: str = "", keep: int = 0) -> Mutation:
    """Leaves an op out: one of its operands stands for its result."""

    def change(function: Function, op: Op) -> bool:
        value = op.operands[keep] if _is(op, op_name, out) else None
        if value is None:
            return False
        function.replace(op.results[0], value, keep_name=False)
        return True

    return change


def _swap(op_name: str) -> Mutation:
    """Exchanges the first two operands."""

    def change(function: Function, op: Op) -> bool:
        return _is(op, op_name) and _remake(function, op, (*op.operands[1::-1], *op.operands[2:]))

    return change


def _is(op: Op, name: str, out: str = "") -> bool:
    return type(op).name == name and (not out or op.results[0].name == out)


MUTANTS: dict[str, tuple[str, Mutation]] = {
    "no router bias": ("deepseek_v3", _drop("route", 1)),
    "no group limit, V3": ("deepseek_v3", _set("route", groups=1, topk_groups=1)),
    "no group limit, V2": ("deepseek_v2", _set("route", groups=1, topk_groups=1)),
    "one group more": ("deepseek_v3", _set("route", topk_groups=3)),
    "groups by their best": ("deepseek_v3", _set("route", group_score="max")),
    "masked as zero": ("deepseek_v3", _set("route", masked="zero")),
    "softmax for sigmoid": ("deepseek_v3", _set("route", score="softmax")),
    "no routed scale, V3": ("deepseek_v3", _set("route", scale=1.0)),
    "no routed scale, V2": ("deepseek_v2", _set("route", scale=1.0)),
    "no renorm, V1": ("deepseek", _set("route", renorm=False)),
    "no renorm, V3": ("deepseek_v3", _set("route", renorm=False)),
    "no renorm, Mixtral": ("mixtral", _set("route", renorm=False)),
    "no renorm, Qwen2": ("qwen2_moe", _set("route", renorm=False)),
    "no renorm, Qwen3": ("qwen3_moe", _set("route", renorm=False)),
    "renorm, OLMoE": ("olmoe", _set("route", renorm=True)),
    "gate and up swapped": ("mixtral", _swap("swiglu")),
    "gelu for silu": ("mixtral", _set("swiglu", act="gelu")),
    "no shared expert, V1": ("deepseek", _skip("add", "mlp")),
    "no shared expert, V3": ("deepseek_v3", _skip("add", "mlp")),
    "no shared expert, Qwen2": ("qwen2_moe", _skip("add", "mlp")),
    "no gate of the shared expert": ("qwen2_moe", _skip("mul", "shared", keep=1)),
    "half-split RoPE, V3": ("deepseek_v3", _set("rope", layout="half")),
    "half-split RoPE, V2": ("deepseek_v2", _set("rope", layout="half")),
    "interleaved RoPE, Llama": ("llama", _set("rope", layout="interleaved")),
    "interleaved RoPE, Mixtral": ("mixtral", _set("rope", layout="interleaved")),
    "no RoPE on the shared key": ("deepseek_v3", _skip("rope", "k_pe.rope")),
    "YaRN as plain RoPE, V3": ("deepseek_v3", _set("rope_table", scaling="none")),
    "YaRN as plain RoPE, Qwen3": ("qwen3_moe", _set("rope_table", scaling="none")),
    "YaRN without its magnitude": ("qwen3_moe", _set("rope_table", magnitude=1.0)),
    "YaRN without the ratio of its mscales": ("deepseek_v3", _set("rope_table", magnitude=1.0)),
    "linear scaling as plain RoPE": ("llama", _set("rope_table", scaling="none")),
    "scale by the latent's width": ("deepseek_v3", _set("attention", scale=(16 + 8) ** -0.5)),
    "scale without mscale": ("deepseek_v3", _set("attention", scale=(8 + 8) ** -0.5)),
    "scale by the hidden size": ("qwen3_moe", _set("attention", scale=(32 // 4) ** -0.5)),
    "not causal": ("llama", _set("attention", causal=False)),
    "sliding window ignored": ("mixtral", _set("attention", window=0)),
    "sliding window one short": ("mixtral", _set("attention", window=2)),
    "sliding window ignored in one layer": ("qwen2_moe", _set("attention", window=0)),
    "no clip_qkv": ("olmoe", _skip("clamp")),
    "no bias of q, k, v": ("qwen2_moe", _drop("linear", 2)),
    "no bias of the MLP": ("deepseek_v2", _drop("linear", 2, "gate")),
    "no input norm": ("mixtral", _skip("rms_norm", "attn.in")),
    "no norm before the MLP": ("mixtral", _skip("rms_norm", "mlp.in")),
    "no final norm": ("mixtral", _skip("rms_norm", "h.norm")),
    "no q_a norm": ("deepseek_v3", _skip("rms_norm", "q_a.norm")),
    "no kv_a norm": ("deepseek_v3", _skip("rms_norm", "c.norm")),
    "no q norm, Qwen3": ("qwen3_moe", _skip("rms_norm", "q.norm")),
    "no k norm, OLMoE": ("olmoe", _skip("rms_norm", "k.norm")),
    "rms_norm_eps for the q_a norm": ("deepseek_v3", _set("rms_norm", "q_a.norm", eps=1e-2)),
    "rms_norm_eps for the kv_a norm": ("deepseek_v2", _set("rms_norm", "c.norm", eps=1e-2)),
    "1e-6 for rms_norm_eps": ("llama", _set("rms_norm", eps=1e-6)),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_fails(name: str) -> None:
    family, mutation = MUTANTS[name]
    _, module, weights = _case(family)
    mutant = module.clone()
    changed = [op for function in mutant for op in function.ops if mutation(function, op)]
    assert changed, "the mutant changes nothing"
    assert _error(family, mutant, weights) > SEEN


@pytest.mark.parametrize("family", _CONFIGS)
def test_every_tensor_matters(family: str) -> None:
    """A tensor that could be anything would test nothing."""
    _, module, weights = _case(family)
    generator = torch.Generator().manual_seed(0)
    unseen = []
    for name, tensor in weights.items():
        moved = tensor + 0.5 * tensor.std() * torch.randn(tensor.shape, generator=generator)
        if _error(family, module, weights | {name: moved}) < SEEN:
            unseen.append(name)
    assert not unseen
