"""config.json: what a family doesn't read but would change the result, and values no model can have."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import moec.models as m
from moec.errors import ConfigContradiction, ConfigUnreadable, MoecError, SpecError, UnsupportedModel
from moec.models.config import REFUSED
from moec.models.families import preset_fields

Read = Callable[..., m.Model]
FP8 = {"quant_method": "fp8", "weight_block_size": [8, 8]}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.fixture
def read(tmp_path: Path) -> Read:
    def read(preset: str, **changes: Any) -> m.Model:
        fields = {k: v for k, v in (preset_fields(preset) | changes).items() if v is not ...}
        (tmp_path / "config.json").write_text(json.dumps(fields))
        return m.from_hf(tmp_path)

    return read


def points_at(error: MoecError, tmp_path: Path) -> bool:
    return error.loc is not None and error.loc.file == str(tmp_path / "config.json")


# Fields that change the result, and values of them that don't.
@pytest.mark.parametrize(
    ("preset", "changes", "same", "message"),
    [
        (
            "mixtral-tiny",
            {"swiglu_limit": 7.0},
            {"swiglu_limit": None},
            "swiglu_limit is 7.0: a clamped SwiGLU",
        ),
        ("deepseek-v3-tiny", {"num_hash_layers": 3}, {"num_hash_layers": 0}, "num_hash_layers is 3"),
        ("olmoe-tiny", {"sliding_window": 5}, {"sliding_window": None}, "sliding_window is 5"),
        ("llama-tiny", {"sliding_window": 5}, {"use_sliding_window": False}, "sliding_window is 5"),
        (
            "llama-tiny",
            {"num_local_experts": 8},
            {"num_local_experts": None},
            "num_local_experts is 8: a mix",
        ),
        ("llama-tiny", {"clip_qkv": 1.0}, {"clip_qkv": None}, "clip_qkv is 1.0"),
        ("mixtral-tiny", {"attention_bias": True}, {"attention_bias": False}, "attention_bias is True"),
        ("mixtral-tiny", {"norm_topk_prob": False}, {"norm_topk_prob": True}, "norm_topk_prob is False"),
        (
            "olmoe-tiny",
            {"routed_scaling_factor": 2.5},
            {"routed_scaling_factor": 1.0},
            "routed_scaling_factor",
        ),
        (
            "qwen3-moe-tiny",
            {"scoring_func": "sigmoid"},
            {"scoring_func": "softmax"},
            "scoring_func is 'sigmoid'",
        ),
        (
            "qwen3-moe-tiny",
            {"layer_types": ["full_attention"] * 4},
            {"layer_types": ["sliding_attention"] * 4},
            r"layer_types\[0\] is 'full_attention': the other fields make it 'sliding_attention'",
        ),
        (
            "mixtral-tiny",
            {"layer_types": ["sliding_attention", "full_attention"]},
            {"layer_types": ["sliding_attention"] * 2},
            r"layer_types\[1\] is 'full_attention'",
        ),
        (
            "llama-tiny",
            {"layer_types": ["chunked_attention"] * 2},
            {"layer_types": ["full_attention"] * 2},
            r"layer_types\[0\] is 'chunked_attention'",
        ),
        (
            "deepseek-v3-tiny",
            {"mlp_layer_types": ["sparse"] * 3},
            {"mlp_layer_types": ["dense", "sparse", "sparse"]},
            r"mlp_layer_types\[0\] is 'sparse': the other fields make it 'dense'",
        ),
        (
            "llama-tiny",
            {"quantization_config": FP8 | {"ignored_layers": ["lm_head"]}},
            {"quantization_config": FP8 | {"ignored_layers": []}},
            r"quantization_config.ignored_layers is \['lm_head'\], which means nothing to moec",
        ),
        (
            "llama-tiny",
            {"quantization_config": FP8 | {"bits": 4}},
            {"quantization_config": FP8 | {"dequantize": False, "scale_fmt": "ue8m0"}},
            "quantization_config.bits is 4",
        ),
    ],
)
def test_what_changes_the_result_is_refused(
    read: Read, tmp_path: Path, preset: str, changes: dict[str, Any], same: dict[str, Any], message: str
) -> None:
    assert read(preset, **same).layers == read(preset).layers
    with pytest.raises(UnsupportedModel, match=message) as caught:
        read(preset, **changes)
    assert points_at(caught.value, tmp_path)


@pytest.mark.parametrize("field", sorted(REFUSED))
def test_every_refused_field_is_refused_by_a_family_that_does_not_read_it(read: Read, field: str) -> None:
    preset = "mixtral-tiny" if field in ("attention_bias", "mlp_bias") else "llama-tiny"
    with pytest.raises(UnsupportedModel, match=f"{field} is 7: .* isn't supported in a"):
        read(preset, **{field: 7})


# Values.
@pytest.mark.parametrize(
    ("preset", "changes", "good", "parts"),
    [
        (
            "llama-tiny",
            {
                "rope_scaling": None,
                "rope_theta": None,
                "rope_parameters": {"rope_type": "default", "rope_theta": 0.5},
            },
            {
                "rope_scaling": None,
                "rope_theta": None,
                "rope_parameters": {"rope_type": "default", "rope_theta": 50},
            },
            ["rope_parameters.rope_theta must be a number above 1"],
        ),
        ("llama-tiny", {"rope_theta": 1}, {"rope_theta": 2}, ["rope_theta must be a number above 1"]),
        (
            "llama-tiny",
            {"rope_scaling": YARN | {"beta_fast": 1, "beta_slow": 32}},
            {"rope_scaling": YARN | {"beta_fast": 32, "beta_slow": 1}},
            ["rope_scaling.beta_fast is 1, below beta_slow, 32"],
        ),
        (
            "llama-tiny",
            {"rope_scaling": YARN | {"factor": 0.5}},
            {"rope_scaling": YARN | {"factor": 1}},
            ["rope_scaling.factor must be a number of 1 or more, not 0.5"],
        ),
        (
            "llama-tiny",
            {"rope_scaling": {"type": "linear", "factor": 0.5}},
            {"rope_scaling": {"type": "linear", "factor": 1.5}},
            ["rope_scaling.factor must be a number of 1 or more"],
        ),
        (
            "llama-tiny",
            {"eos_token_id": 256},
            {"eos_token_id": 255},
            ["eos_token_id names 256", "vocab_size is 256"],
        ),
        (
            "qwen2-moe-tiny",
            {"mlp_only_layers": [99]},
            {"mlp_only_layers": [4]},
            ["mlp_only_layers names layer 99", "num_hidden_layers is 5"],
        ),
        (
            "qwen3-moe-tiny",
            {"mlp_only_layers": [-1]},
            {"mlp_only_layers": [0]},
            ["mlp_only_layers names layer -1"],
        ),
        (
            "deepseek-v3-tiny",
            {"num_nextn_predict_layers": 1_000_000_000},
            {"num_nextn_predict_layers": 64},
            ["num_nextn_predict_layers must be an integer of 0 to 64"],
        ),
    ],
)
def test_values_out_of_range(
    read: Read, tmp_path: Path, preset: str, changes: dict[str, Any], good: dict[str, Any], parts: list[str]
) -> None:
    m.lower(read(preset, **good))
    with pytest.raises(ConfigContradiction) as caught:
        read(preset, **changes)
    assert points_at(caught.value, tmp_path)
    assert all(part in caught.value.message for part in parts), caught.value


def test_drafting_layers_of_any_number_are_one_pattern(read: Read) -> None:
    model = read("deepseek-v3-tiny", num_nextn_predict_layers=12)
    assert sum("multi-token" in why for _, why in model.ignored) == 1
    assert model.ignores("model.layers.3.x") and model.ignores("model.layers.14.x")
    assert not model.ignores("model.layers.15.x") and not model.ignores("model.layers.30.x")


def test_ids_of_generation_config(read: Read, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 300]}')
    with pytest.raises(ConfigContradiction, match="eos_token_id names 300") as caught:
        read("llama-tiny")
    assert caught.value.loc.file == str(tmp_path / "generation_config.json")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 255]}')
    assert read("llama-tiny").eos == (1, 255)


def test_blocks_of_a_config_point_at_it(read: Read, tmp_path: Path) -> None:
    model = read("llama-tiny")
    for part in (model, model.layers[0], model.layers[0].attn, model.layers[0].attn.rope):
        assert part.loc is not None and part.loc.file == str(tmp_path / "config.json")
    with pytest.raises(SpecError) as caught:
        m.RoPE(theta=0)  # not from the config any more
    assert caught.value.loc.file == __file__


# The file.
def test_a_byte_order_mark_is_taken(read: Read, tmp_path: Path) -> None:
    model = read("llama-tiny")
    file = tmp_path / "config.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert m.from_hf(tmp_path) == model


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ('{"model_type": "llama", "a": 1, "a": 1}', "a"),
        ('{"rope_scaling": {"factor": 1, "factor": 2}}', "factor"),
    ],
)
def test_a_field_given_twice_is_refused(tmp_path: Path, text: str, name: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigUnreadable, match=f"{name} is given twice") as caught:
        m.from_hf(tmp_path)
    assert points_at(caught.value, tmp_path)
