"""Every family and preset: sizes as published, IR that reads back, dimensions checked by hand."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping

import pytest
import torch

import moec.models as m
from moec.errors import BadOption, UnknownPreset
from moec.ir import CacheType, Interpreter, Module, TensorType, parse_module, print_module
from moec.ir.cost import parameters
from moec.models.families import FAMILIES
from moec.models.families.registry import Family, register

Weights = dict[str, torch.Tensor]

TINY = sorted(name for name in m.PRESETS if name.endswith("-tiny"))

# Billions of parameters as their publishers give them, multi-token prediction left out.
PUBLISHED = {
    "deepseek-moe-16b": 16.4,
    "deepseek-v2": 236,
    "deepseek-v2-lite": 15.7,
    "deepseek-v3": 671.0,
    "deepseek-r1": 671.0,
    "kimi-k2": 1026,
    "deepseek-67b": 67.4,
    "mixtral-8x7b": 46.7,
    "mixtral-8x22b": 140.6,
    "qwen1.5-moe-a2.7b": 14.3,
    "qwen2-57b-a14b": 57.4,
    "qwen3-30b-a3b": 30.5,
    "qwen3-235b-a22b": 235.1,
    "olmoe-1b-7b": 6.92,
    "llama-2-7b": 6.74,
    "llama-2-70b": 69.0,
    "llama-3-8b": 8.03,
    "llama-3-70b": 70.6,
    "llama-3.1-8b": 8.03,
    "llama-3.1-70b": 70.6,
    "llama-3.2-1b": 1.24,
}


def total(model: m.Model) -> int:
    """Parameters of the whole model; a tied head's count once."""
    module = m.lower(model)
    return parameters(module, "step") + (0 if model.tied else parameters(module, "head"))


def per_token(model: m.Model) -> int:
    """Parameters that one token uses: k experts of each layer, not all."""
    idle = 0
    for layer in model.layers:
        if isinstance(layer.mlp, m.MoE):
            experts, k = layer.mlp.experts, layer.mlp.router.top_k
            idle += (experts.count - k) * 3 * experts.intermediate * model.hidden
    return total(model) - idle


@pytest.mark.parametrize("name", sorted(m.PRESETS))
def test_lowers_verifies_and_reads_back(name: str) -> None:
    module = m.lower(m.preset(name))  # lower verifies
    text = print_module(module)
    assert print_module(parse_module(text)) == text


def test_every_published_preset_has_its_size_checked() -> None:
    assert {*PUBLISHED} == {name for name in m.PRESETS if name not in TINY}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_parameters_are_as_published(name: str) -> None:
    digits = len(str(PUBLISHED[name]).replace(".", ""))
    assert float(f"{total(m.preset(name)) / 1e9:.{digits}g}") == PUBLISHED[name]


def test_v3_activates_a_twentieth() -> None:
    v3 = m.preset("deepseek-v3")
    assert total(v3) == 671_026_419_200  # counted by hand from the report's dimensions
    assert per_token(v3) / 1e9 == pytest.approx(37.5, abs=0.1)
    assert per_token(v3) / total(v3) == pytest.approx(0.056, abs=0.0005)


def test_every_family_has_a_tiny_preset_of_its_own() -> None:
    for family in FAMILIES.values():
        assert family.tiny in family.presets
        assert total(m.preset(family.tiny)) < 200_000


def test_a_name_registered_twice_is_refused() -> None:
    before = dict(FAMILIES)
    with pytest.raises(RuntimeError, match="deepseek-v3"):
        register(Family("mine", ("mine",), lambda c: m.preset("llama-tiny"), {"deepseek-v3": {}}, ""))
    assert before == FAMILIES


def test_v3_is_short_and_quick() -> None:
    start = time.monotonic()
    text = print_module(m.lower(m.preset("deepseek-v3")))
    assert time.monotonic() - start < 5
    assert len(text.splitlines()) < 400
    assert "call @layer.dense(" in text and "{layers=0..2, scope=model.layers.*}" in text
    assert "call @layer.moe(" in text and "{layers=3..60, scope=model.layers.*}" in text
    assert "{experts=0..255, scope=mlp.experts.*}" in text


def cache_of(module: Module) -> CacheType:
    (cache,) = (a.type for a in module["step"].args if isinstance(a.type, CacheType))
    return cache


def test_cache_entries() -> None:
    assert cache_of(m.lower(m.preset("deepseek-v3"))).entry == (576,)  # 512 latent + 64 rotary
    assert cache_of(m.lower(m.preset("qwen3-30b-a3b"))).entry == (8, 128)  # 4 keys and 4 values of 128
    # Bytes a token over all layers in bf16.
    for name, size in {"deepseek-v2-lite": 31_104, "deepseek-v2": 69_120, "deepseek-v3": 70_272}.items():
        model = m.preset(name)
        (width,) = cache_of(m.lower(model)).entry
        assert 2 * width * len(model.layers) == size


def softmax_scales(module: Module) -> set[float]:
    return {op.attrs["scale"] for f in module for op in f.ops if op.name == "attention"}


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("deepseek-v3", 0.135234),
        ("deepseek-v2", 0.114721),
        ("deepseek-v2-lite", 0.114721),
        ("deepseek-67b", 128**-0.5),
    ],
)
def test_softmax_scale(name: str, scale: float) -> None:
    (found,) = softmax_scales(m.lower(m.preset(name)))
    assert found == pytest.approx(scale, abs=5e-7)


def rope_of(name: str) -> dict[str, object]:
    (op,) = (op for op in m.lower(m.preset(name))["step"].ops if op.name == "rope_table")
    return op.attrs


def test_yarn_multiplies_cos_and_sin_outside_deepseek_only() -> None:
    assert rope_of("deepseek-v3")["magnitude"] == 1.0  # m(mscale) / m(mscale_all_dim)
    plain = 0.1 * math.log(4.0) + 1.0
    assert rope_of("qwen3-moe-tiny")["magnitude"] == pytest.approx(plain)
    assert softmax_scales(m.lower(m.preset("qwen3-moe-tiny"))) == {10**-0.5}


def route_of(name: str) -> dict[str, object]:
    (op,) = (op for f in m.lower(m.preset(name)) for op in f.ops if op.name == "route")
    return op.attrs


def gate_dtypes(name: str) -> tuple[str, str]:
    """The dtypes of the logits and of the weights."""
    (op,) = (op for f in m.lower(m.preset(name)) for op in f.ops if op.name == "route")
    types = (op.operands[0].type, op.results[0].type)
    assert all(isinstance(t, TensorType) for t in types)
    return tuple(str(t.dtype) for t in types)


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("deepseek-moe-16b", {"score": "softmax", "k": 6, "groups": 1, "scale": 1.0, "renorm": False}),
        (
            "deepseek-v2",
            {"score": "softmax", "k": 6, "groups": 8, "topk_groups": 3, "group_score": "max", "scale": 16.0}
            | {"masked": "zero", "renorm": False},
        ),
        ("deepseek-v2-lite", {"score": "softmax", "k": 6, "groups": 1, "scale": 1.0, "renorm": False}),
        (
            "deepseek-v3",
            {
                "score": "sigmoid",
                "k": 8,
                "groups": 8,
                "topk_groups": 4,
                "group_score": "top2sum",
                "scale": 2.5,
            }
            | {"masked": "neginf", "renorm": True},
        ),
        ("kimi-k2", {"score": "sigmoid", "k": 8, "groups": 1, "scale": 2.827, "renorm": True}),
        ("mixtral-8x7b", {"score": "softmax", "k": 2, "scale": 1.0, "renorm": True}),
        ("qwen1.5-moe-a2.7b", {"score": "softmax", "k": 4, "renorm": False}),
        ("qwen3-30b-a3b", {"score": "softmax", "k": 8, "renorm": True}),
        ("olmoe-1b-7b", {"score": "softmax", "k": 8, "renorm": False}),
    ],
)
def test_routers(name: str, want: Mapping[str, object]) -> None:
    have = route_of(name)
    assert {key: have[key] for key in want} == want


@pytest.mark.parametrize(
    ("name", "dtypes"),
    [
        ("deepseek-moe-16b", ("f32", "f32")),
        ("deepseek-v2", ("f32", "f32")),
        ("deepseek-v3", ("f32", "f32")),
        ("mixtral-8x7b", ("bf16", "f32")),
        ("qwen1.5-moe-a2.7b", ("bf16", "bf16")),
        ("qwen3-30b-a3b", ("bf16", "bf16")),
        ("olmoe-1b-7b", ("bf16", "bf16")),
    ],
)
def test_gate_dtype_and_rounding(name: str, dtypes: tuple[str, str]) -> None:
    assert gate_dtypes(name) == dtypes


def test_latent_norms_keep_their_own_eps() -> None:
    """rms_norm_eps is 1e-5 in the tiny V3, whose q_a and kv_a norms use 1e-6 all the same."""
    layer = m.lower(m.preset("deepseek-v3-tiny"))["layer.moe"]
    eps = {op.operands[1].name: op.attrs["eps"] for op in layer.ops if op.name == "rms_norm"}
    assert eps == {
        "input_layernorm.weight": 1e-5,
        "post_attention_layernorm.weight": 1e-5,
        "self_attn.q_a_layernorm.weight": 1e-6,
        "self_attn.kv_a_layernorm.weight": 1e-6,
    }


# Execution.
def random_weights(module: Module, model: m.Model, seed: int = 0) -> Weights:
    """A checkpoint with every tensor random, quantised ones included."""
    generator = torch.Generator().manual_seed(seed)
    weights: Weights = {}

    def walk(name: str, prefix: str) -> None:
        if name not in module:
            return
        for param in module[name].params.values():
            assert isinstance(param.type, TensorType)
            shape = [int(d) for d in param.type.shape]
            value = torch.randn(shape, generator=generator) / (math.sqrt(shape[-1]) if len(shape) > 1 else 3)
            value = value + 1 if "norm" in param.name else value.abs() if "scale" in param.name else value
            weights.setdefault(prefix + param.name, value.to(param.type.dtype.torch))
        for op in module[name].ops:
            if "callee" in op.attrs:
                for number in op.range:
                    walk(op.attrs["callee"], prefix + op.prefix(number))

    for entry in ("weights", "step", "head"):
        walk(entry, "")
    return weights


def run_prompt(
    module: Module, weights: Mapping[str, torch.Tensor], ids: torch.Tensor, layers: int
) -> torch.Tensor:
    """Hidden states of one fresh prompt [N, H]."""
    interpreter = Interpreter(module, weights)
    caches = [a.type for a in module["step"].args if isinstance(a.type, CacheType)]
    pages = -(-len(ids) // caches[0].page)
    out = interpreter.run(
        "step",
        ids,
        torch.arange(len(ids)),
        torch.tensor([0, len(ids)], dtype=torch.int32),
        torch.tensor([len(ids)], dtype=torch.int32),
        torch.arange(pages, dtype=torch.int32)[None],
        torch.arange(len(ids)),
        *(interpreter.new_cache(cache, layers, pages) for cache in caches),
    )
    return out[0]


@pytest.mark.parametrize("name", TINY)
def test_parsed_text_executes_bit_for_bit(name: str) -> None:
    model = dataclasses.replace(m.preset(name), page=4)
    module = m.lower(model)
    weights = random_weights(module, model)
    ids = torch.arange(9) * 37 % model.vocab
    again = parse_module(print_module(module))
    have = run_prompt(module, weights, ids, len(model.layers))
    assert torch.isfinite(have).all()
    assert torch.equal(have, run_prompt(again, weights, ids, len(model.layers)))
    other = random_weights(module, model, seed=1)
    assert not torch.equal(have, run_prompt(again, other, ids, len(model.layers)))


def stored_in_blocks(
    weights: dict[str, torch.Tensor], block: int
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The checkpoint with its linear weights in FP8 blocks, and plainly what they then stand for."""
    stored, plain = dict(weights), dict(weights)
    for name, w in weights.items():
        if w.dim() != 2 or name.endswith(("gate.weight", "embed_tokens.weight")) or name == "lm_head.weight":
            continue
        rows, columns = w.shape
        scale = torch.rand(-(-rows // block), -(-columns // block)) + 0.5
        wide = scale.repeat_interleave(block, 0)[:rows].repeat_interleave(block, 1)[:, :columns]
        q = (w / wide).to(torch.float8_e4m3fn)
        stored[name], stored[f"{name}_scale_inv"] = q, scale
        plain[name] = q.float() * wide
    return stored, plain


def test_native_fp8_loads_as_what_it_stands_for() -> None:
    model = m.preset("deepseek-v3-tiny")
    weights = random_weights(m.lower(model), model)
    stored, plain = stored_in_blocks(weights, block=16)  # 20 and 56 columns: partial blocks
    quantised = m.lower(dataclasses.replace(model, quantization=m.BlockFP8((16, 16))))
    ids = torch.arange(9) * 37 % model.vocab
    want = run_prompt(m.lower(model), plain, ids, 3)
    assert torch.equal(run_prompt(quantised, stored, ids, 3), want)
    assert not torch.equal(run_prompt(m.lower(model), weights, ids, 3), want)
    needed = {*random_weights(quantised, model)}
    assert needed == {*stored}


def test_native_fp8_keeps_gates_and_what_it_is_told_to() -> None:
    model = m.preset("deepseek-v3-tiny")

    def scaled(keep: tuple[str, ...]) -> set[str]:
        module = m.lower(dataclasses.replace(model, quantization=m.BlockFP8((16, 16), keep)))
        return {n for n in random_weights(module, model) if n.endswith("_scale_inv")}

    everything = scaled(())
    assert not any("mlp.gate.weight" in n or "lm_head" in n or "norm" in n for n in everything)
    assert "model.layers.2.mlp.experts.11.down_proj.weight_scale_inv" in everything
    without = scaled(("self_attn.o_proj", "lm_head"))
    assert {n for n in everything if "o_proj" in n} == everything - without


# Parts of a model.
def test_layers_keep_their_numbers() -> None:
    model = m.preset("deepseek-v3").with_layers("2-4")
    text = print_module(m.lower(model))
    assert "call @layer.dense(" in text and "layers=2..2" in text
    assert "call @layer.moe(" in text and "layers=3..4" in text
    assert model.ignores("model.layers.5.mlp.gate.weight") is not None
    assert model.ignores("model.layers.60.mlp.gate.weight") is not None
    assert model.ignores("model.layers.4.mlp.gate.weight") is None
    assert len(m.preset("deepseek-v3").with_layers(4).layers) == 4


@pytest.mark.parametrize("which", ["0", "62", "3-61", "5-3", "a", "1-2-3", "-1"])
def test_layers_that_are_not_there(which: str) -> None:
    with pytest.raises(BadOption, match="layers"):
        m.preset("deepseek-v3").with_layers(which)


def test_with_dtype() -> None:
    model = m.preset("deepseek-v3-tiny").with_dtype("bfloat16")
    assert cache_of(m.lower(model)).dtype.name == "bf16"
    assert cache_of(m.lower(model, "f16")).dtype.name == "f16"
    with pytest.raises(BadOption, match="f8e4m3"):
        model.with_dtype("f8e4m3")


def test_alternating_layers_share_their_functions() -> None:
    module = m.lower(m.preset("qwen2-moe-tiny"))
    calls = [(op.attrs["callee"], str(op.attrs["layers"])) for op in module["step"].ops if op.name == "call"]
    assert calls == [
        ("layer.moe.window", "0..0"),
        ("layer.dense", "1..1"),
        ("layer.moe.window", "2..2"),
        ("layer.moe", "3..4"),
    ]


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(UnknownPreset, match="did you mean deepseek-v3"):
        m.preset("deepseek-v33")
