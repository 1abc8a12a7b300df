"""config.json: what becomes of good ones, and that bad ones are refused by file and field."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import moec.models as m
from moec.errors import ConfigContradiction, ConfigUnreadable, MoecError, UnsupportedModel
from moec.models.config import Config
from moec.models.families import FAMILIES, preset_fields, read_model

Read = Callable[..., m.Model]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """read("llama-tiny", hidden_size=8): the model of that preset's config.json with fields changed.

    A field that is set to ``...`` is left out. Unknown fields fail.
    """
    folder = tmp_path / "checkpoint"
    folder.mkdir()

    def read(preset: str, **changes: Any) -> m.Model:
        fields = {k: v for k, v in (preset_fields(preset) | changes).items() if v is not ...}
        (folder / "config.json").write_text(json.dumps(fields))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return m.from_hf(folder)

    return read


def refused(error: MoecError, *parts: str) -> bool:
    """The error points at config.json and says all of this."""
    assert error.loc is not None and error.loc.file.endswith("checkpoint/config.json")
    return all(part in error.message for part in parts)


# What is read.
@pytest.mark.parametrize("name", sorted(m.PRESETS))
def test_a_presets_config_reads_as_the_preset(read: Read, name: str) -> None:
    want, have = m.preset(name), read(name)
    assert have.name == "checkpoint"
    assert (have.layers, have.vocab, have.ignored) == (want.layers, want.vocab, want.ignored)
    assert have.quantization == want.quantization


def test_a_folder_its_config_and_resolve_agree(read: Read, tmp_path: Path) -> None:
    model = read("llama-tiny")
    assert m.from_hf(tmp_path / "checkpoint" / "config.json") == model
    assert m.resolve(str(tmp_path / "checkpoint")) == model
    assert m.resolve(tmp_path / "checkpoint" / "config.json") == model


def test_rope_in_both_spellings(read: Read) -> None:
    old = {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "mscale": 1,
        "mscale_all_dim": 1,
    }
    new = old | {"rope_theta": 10000.0, "rope_type": "yarn"}
    want = read("deepseek-v3", rope_scaling=old)
    assert read("deepseek-v3", rope_scaling=..., rope_theta=..., rope_parameters=new).layers == want.layers
    assert read("deepseek-v3", rope_scaling=old, rope_parameters=new).layers == want.layers
    assert read("deepseek-v3", rope_scaling=old | {"factor": 20}).layers != want.layers
    plain = read("llama-tiny", rope_scaling=..., rope_theta=777.0)
    assert plain.layers[0].attn.rope == m.RoPE(777.0)
    same = read(
        "llama-tiny",
        rope_scaling=...,
        rope_theta=...,
        rope_parameters={"rope_type": "default", "rope_theta": 777},
    )
    assert same.layers == plain.layers


def test_rope_defaults(read: Read) -> None:
    assert read("llama-tiny", rope_scaling=..., rope_theta=...).layers[0].attn.rope.theta == 1e4
    assert read("mixtral-tiny", rope_theta=...).layers[0].attn.rope.theta == 1e6
    # Without an original length, YaRN takes the longest; a field outside the scaling goes first.
    yarn = {"rope_type": "yarn", "factor": 2.0}
    assert read("llama-tiny", rope_scaling=yarn).layers[0].attn.rope.original == 256
    outside = read("llama-tiny", rope_scaling=yarn, original_max_position_embeddings=32)
    assert outside.layers[0].attn.rope.original == 32
    linear = read("llama-tiny", rope_scaling={"type": "linear", "factor": 2})
    assert linear.layers[0].attn.rope == m.LinearRoPE(1000.0, factor=2.0)


def test_rope_layout(read: Read) -> None:
    assert read("deepseek-v3-tiny").layers[0].attn.rope.layout == "interleaved"
    assert read("deepseek-v3-tiny", rope_interleave=False).layers[0].attn.rope.layout == "half"
    assert read("llama-tiny").layers[0].attn.rope.layout == "half"


def test_null_means_left_out_but_for_q_lora_rank_and_shared_experts(read: Read) -> None:
    assert read("mixtral-tiny", head_dim=None).layers[0].attn.head_dim == 8
    assert read("deepseek-v3-tiny", q_lora_rank=None).layers[0].attn.q_lora_rank is None
    assert read("deepseek-v3-tiny", n_shared_experts=None).layers[1].mlp.shared is None
    assert read("deepseek-v3-tiny", n_shared_experts=2).layers[1].mlp.shared.intermediate == 40


def test_spellings_of_one_field(read: Read) -> None:
    model = read("qwen3-moe-tiny", num_experts=..., num_local_experts=9)
    assert model.layers == read("qwen3-moe-tiny").layers
    assert read("llama-tiny", torch_dtype=..., dtype="bfloat16").dtype == "bf16"
    assert read("llama-tiny", torch_dtype=...).dtype == "bf16"


def test_which_layers_are_dense(read: Read) -> None:
    def sparse(model: m.Model) -> list[int]:
        return [i for i, layer in enumerate(model.layers) if isinstance(layer.mlp, m.MoE)]

    assert sparse(read("deepseek-v3-tiny")) == [1, 2]
    assert sparse(read("deepseek-v3-tiny", first_k_dense_replace=0)) == [0, 1, 2]
    assert sparse(read("deepseek-v3-tiny", first_k_dense_replace=7)) == []
    assert sparse(read("qwen3-moe-tiny")) == [1, 3]  # decoder_sparse_step 2
    assert sparse(read("qwen3-moe-tiny", mlp_only_layers=[3])) == [1]
    assert sparse(read("qwen2-moe-tiny")) == [0, 2, 3, 4]  # mlp_only_layers [1]


def test_sliding_windows(read: Read) -> None:
    def windows(model: m.Model) -> list[int]:
        return [layer.attn.window for layer in model.layers]

    assert windows(read("mixtral-tiny")) == [5, 5]
    assert windows(read("mixtral-tiny", sliding_window=None)) == [0, 0]
    assert windows(read("qwen2-moe-tiny")) == [5, 0, 5, 0, 0]  # even layers before max_window_layers
    assert windows(read("qwen2-moe-tiny", use_sliding_window=False)) == [0] * 5
    kinds = ["full_attention", "sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    assert windows(read("qwen2-moe-tiny", layer_types=kinds)) == [0, 5, 0, 0, 5]
    assert windows(read("qwen3-moe-tiny")) == [5] * 4
    assert windows(read("qwen3-moe-tiny", use_sliding_window=False)) == [0] * 4


def test_biases(read: Read) -> None:
    def biases(model: m.Model) -> set[str]:
        module = m.lower(model)
        return {p for f in module for p in f.params if p.endswith(".bias")}

    assert biases(read("deepseek-v3-tiny")) == set()
    assert biases(read("deepseek-v3-tiny", attention_bias=True)) == {
        "self_attn.q_a_proj.bias",
        "self_attn.kv_a_proj_with_mqa.bias",
        "self_attn.o_proj.bias",
    }
    assert biases(read("qwen2-moe-tiny")) == {f"self_attn.{p}_proj.bias" for p in "qkv"}
    assert biases(read("qwen2-moe-tiny", qkv_bias=False)) == set()
    assert {"mlp.down_proj.bias", "self_attn.o_proj.bias"} < biases(read("llama-tiny"))


def test_what_a_checkpoint_may_hold_unused(read: Read) -> None:
    v3 = read("deepseek-v3")
    assert "multi-token prediction" in (v3.ignores("model.layers.61.eh_proj.weight") or "")
    assert v3.ignores("model.layers.60.mlp.gate.weight") is None
    assert v3.ignores("model.layers.610.mlp.gate.weight") is None
    assert read("deepseek-v3", num_nextn_predict_layers=0).ignores("model.layers.61.eh_proj.weight") is None
    assert "rotary" in (v3.ignores("model.layers.3.self_attn.rotary_emb.inv_freq") or "")
    assert "tied" in (read("llama-tiny").ignores("lm_head.weight") or "")
    assert read("llama-tiny", tie_word_embeddings=False).ignores("lm_head.weight") is None


def test_eos(read: Read, tmp_path: Path) -> None:
    assert read("llama-tiny", eos_token_id=7).eos == (7,)
    assert read("llama-tiny", eos_token_id=[7, 9]).eos == (7, 9)
    assert read("llama-tiny", eos_token_id=None).eos == ()
    (tmp_path / "checkpoint" / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    assert read("llama-tiny", eos_token_id=7).eos == (1, 2)
    (tmp_path / "checkpoint" / "generation_config.json").write_text("{}")
    assert read("llama-tiny", eos_token_id=7).eos == (7,)


def test_native_fp8(read: Read) -> None:
    fp8 = {
        "quant_method": "fp8",
        "weight_block_size": [16, 32],
        "modules_to_not_convert": ["lm_head", "q_proj"],
    }
    assert read("llama-tiny", quantization_config=fp8).quantization == m.BlockFP8(
        (16, 32), ("lm_head", "q_proj")
    )
    assert read("llama-tiny").quantization is None
    for said, meant in (("ue8m0", "ue8m0"), ("float", "fp32"), (None, "fp32")):
        how = read("llama-tiny", quantization_config=fp8 | {"scale_fmt": said}).quantization
        assert how is not None and how.scale_fmt == meant
    with pytest.raises(UnsupportedModel, match="scale_fmt is 'e8m7': this format of scales"):
        read("llama-tiny", quantization_config=fp8 | {"scale_fmt": "e8m7"})
    some = fp8 | {"modules_to_not_convert": ["model.layers.1.mlp"]}
    with pytest.raises(UnsupportedModel, match="quantised in some layers and plain in others"):
        m.lower(read("llama-tiny", quantization_config=some))


def test_unknown_fields_are_named_in_a_warning(read: Read) -> None:
    read("llama-tiny", use_cache=True, initializer_range=0.02, _name_or_path="x")
    with pytest.raises(UserWarning, match=r"config\.json: colour is unknown"):
        read("llama-tiny", colour="blue")
    read("llama-tiny", colour=None)


# What is refused. Each preset without the change reads, as tested above.
@pytest.mark.parametrize(
    ("preset", "changes", "parts"),
    [
        ("llama-tiny", {"model_type": "gpt2"}, ["model_type is 'gpt2'", "moec reads"]),
        ("llama-tiny", {"model_type": "lama"}, ["did you mean llama"]),
        ("deepseek-v3-tiny", {"model_type": "deepseek_v4"}, ["did you mean", "deepseek_v3"]),
        ("llama-tiny", {"model_type": ...}, ["there is no model_type"]),
        (
            "llama-tiny",
            {"architectures": ["LlamaForSequenceClassification"]},
            ["Classification"],
        ),
        ("llama-tiny", {"hidden_act": "relu"}, ["hidden_act is 'relu'", "silu"]),
        ("llama-tiny", {"torch_dtype": "int8"}, ["dtype is 'int8'"]),
        ("llama-tiny", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor is 0.5"]),
        ("llama-tiny", {"attn_logit_softcapping": 30.0}, ["attn_logit_softcapping", "soft capping"]),
        (
            "llama-tiny",
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            ["rope_type is 'dynamic'"],
        ),
        (
            "llama-tiny",
            {"rope_scaling": {"rope_type": "longrope", "factor": 2}},
            ["longrope", "yarn"],
        ),
        (
            "llama-tiny",
            {"rope_scaling": {"type": "linear", "factor": 2, "mrope_section": 1}},
            ["mrope_section"],
        ),
        (
            "qwen2-moe-tiny",
            {"rope_parameters": {"sliding_attention": {"rope_type": "default"}}},
            ["rope_parameters has parts for sliding_attention"],
        ),
        (
            "qwen2-moe-tiny",
            {"layer_types": ["linear_attention"] * 5},
            ["'linear_attention'"],
        ),
        ("deepseek-v3-tiny", {"scoring_func": "softmax"}, ["scoring_func is 'softmax'"]),
        ("deepseek-v3-tiny", {"topk_method": "greedy"}, ["topk_method is 'greedy'"]),
        ("deepseek-v3-tiny", {"moe_layer_freq": 2}, ["moe_layer_freq is 2"]),
        ("deepseek-v2-tiny", {"norm_topk_prob": True}, ["norm_topk_prob is True"]),
        ("deepseek-v2-tiny", {"topk_method": "noaux_tc"}, ["topk_method is 'noaux_tc'"]),
        ("deepseek-v3-tiny", {"index_topk": 2048}, ["index_topk", "sparse attention"]),
        ("llama-tiny", {"quantization_config": {"quant_method": "awq"}}, ["quant_method is 'awq'"]),
        ("llama-tiny", {"quantization_config": {"quant_method": "fp8"}}, ["weight_block_size is missing"]),
        (
            "llama-tiny",
            {"quantization_config": {"quant_method": "fp8", "fmt": "e5m2", "weight_block_size": [8, 8]}},
            ["quantization_config.fmt is 'e5m2'"],
        ),
        (
            "llama-tiny",
            {
                "quantization_config": {
                    "quant_method": "fp8",
                    "activation_scheme": "static",
                    "weight_block_size": [8, 8],
                }
            },
            ["activation_scheme is 'static'"],
        ),
    ],
)
def test_unsupported(read: Read, preset: str, changes: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        read(preset, **changes)
    assert refused(caught.value, *parts), caught.value


@pytest.mark.parametrize(
    ("preset", "changes", "parts"),
    [
        ("llama-tiny", {"hidden_size": ...}, ["hidden_size is missing"]),
        ("llama-tiny", {"hidden_size": ..., "hiden_size": 48}, ["did you mean hiden_size"]),
        ("llama-tiny", {"hidden_size": "48"}, ["hidden_size must be an integer", "'48'"]),
        ("llama-tiny", {"hidden_size": True}, ["hidden_size must be an integer"]),
        ("llama-tiny", {"num_hidden_layers": 0}, ["num_hidden_layers must be an integer of 1"]),
        ("llama-tiny", {"num_hidden_layers": 10**9}, ["num_hidden_layers", "1000000000"]),
        ("llama-tiny", {"rms_norm_eps": -1}, ["rms_norm_eps must be a number above 0"]),
        ("llama-tiny", {"rms_norm_eps": float("inf")}, ["rms_norm_eps must be a number"]),
        ("llama-tiny", {"mlp_bias": 1}, ["mlp_bias must be true or false"]),
        ("llama-tiny", {"hidden_act": 3}, ["hidden_act must be a text"]),
        ("llama-tiny", {"eos_token_id": [1, "a"]}, ["eos_token_id must be a token id"]),
        ("llama-tiny", {"rope_scaling": [1]}, ["rope_scaling must be an object"]),
        ("llama-tiny", {"head_dim": None, "hidden_size": 50}, ["hidden_size is 50", "6 num_attention_heads"]),
        ("llama-tiny", {"num_key_value_heads": 4}, ["num_attention_heads is 6", "num_key_value_heads 4"]),
        ("llama-tiny", {"head_dim": 9}, ["head_dim is 9"]),
        (
            "llama-tiny",
            {"rope_scaling": {"rope_type": "llama3", "factor": 2}},
            ["low_freq_factor is missing"],
        ),
        (
            "llama-tiny",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}, "rope_scaling": None},
            ["rope_theta is 1000, but 5 in rope_parameters"],
        ),
        (
            "llama-tiny",
            {"rope_parameters": {"rope_type": "default"}},
            ["rope_parameters and rope_scaling contradict each other"],
        ),
        ("deepseek-v3-tiny", {"num_key_value_heads": 1}, ["num_key_value_heads is 1", "MLA"]),
        ("deepseek-v3-tiny", {"qk_rope_head_dim": 7}, ["qk_rope_head_dim is 7"]),
        ("deepseek-v3-tiny", {"n_group": 5}, ["n_group is 5", "12"]),
        ("deepseek-v3-tiny", {"n_group": 12}, ["n_group is 12", "group of one"]),
        ("deepseek-v3-tiny", {"topk_group": 5}, ["topk_group is 5"]),
        ("deepseek-v3-tiny", {"num_experts_per_tok": 7}, ["num_experts_per_tok is 7", "hold 6"]),
        (
            "deepseek-v3-tiny",
            {"num_local_experts": 11},
            ["n_routed_experts is 12", "experts is 11"],
        ),
        ("mixtral-tiny", {"num_experts_per_tok": 6}, ["top_k is 6 of 5 experts"]),
        ("qwen2-moe-tiny", {"layer_types": ["full_attention"]}, ["layer_types names 1 layers"]),
        (
            "qwen2-moe-tiny",
            {"layer_types": ["sliding_attention"] * 5, "use_sliding_window": False},
            ["layer_types asks for sliding attention"],
        ),
        ("qwen2-moe-tiny", {"mlp_only_layers": ["a"]}, ["mlp_only_layers must be a list of int"]),
        (
            "llama-tiny",
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [8]}},
            ["weight_block_size must be two positive integers"],
        ),
        (
            "llama-tiny",
            {
                "quantization_config": {
                    "quant_method": "fp8",
                    "weight_block_size": [8, 8],
                    "modules_to_not_convert": ["("],
                }
            },
            ["'(' in keep is no regex"],
        ),
    ],
)
def test_contradictions(read: Read, preset: str, changes: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigContradiction) as caught:
        read(preset, **changes)
    assert refused(caught.value, *parts), caught.value


@pytest.mark.parametrize(
    ("content", "message", "line"),
    [
        (b"", "it is no JSON", 1),
        (b'{\n"a": 1,\n}', "it is no JSON", 3),
        (b"[1]", "it holds a list, not an object", 1),
        (b"\xff\xfe{}", "it is no UTF-8 text", 0),
        (b"[" * 100_000, "it is no JSON", 0),
        (b'{"a": ' + b"1" * 5000 + b"}", "it is no JSON", 0),
    ],
)
def test_unreadable(tmp_path: Path, content: bytes, message: str, line: int) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(ConfigUnreadable, match=message) as caught:
        m.from_hf(tmp_path)
    assert (caught.value.loc.file, caught.value.loc.line) == (str(file), line)


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigUnreadable, match=r"the folder has no config\.json") as caught:
        m.from_hf(tmp_path)
    assert caught.value.loc.file == str(tmp_path)
    with pytest.raises(ConfigUnreadable, match="can't read it: No such file"):
        m.from_hf(tmp_path / "other.json")


def test_a_folder_of_any_name_becomes_a_module(tmp_path: Path) -> None:
    folder = tmp_path / "8x22B (mine) ü"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(preset_fields("llama-tiny")))
    assert m.lower(m.from_hf(folder)).name == "_8x22B_mine_"


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_field_of_a_tiny_config_is_known(family: str) -> None:
    """A field that a family forgets to read would be a silent difference."""
    name = FAMILIES[family].tiny
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_model(Config(preset_fields(name), name))
