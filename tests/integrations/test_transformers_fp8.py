"""transformers' fp8 experts with experts_implementation="moec", against transformers' own loop."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, FineGrainedFP8Config
from transformers.integrations import finegrained_fp8 as theirs

from moec.errors import DeviceUnavailable, UnsupportedModel
from moec.integrations import transformers as ours
from moec.ops import compiled
from tests.hf import randomise
from tests.integrations.fp8_modules import SIZES, emulated, experts, fill, inputs
from tests.moec.fp8_experts import LEAST, ratio, spread

ours.register()


@given(st.data())
def test_their_loop_over_experts_agrees(data: st.DataObject) -> None:
    draw = data.draw
    block = draw(st.sampled_from([(128, 128), None]))
    fields: dict[str, Any] = {"hidden_size": draw(st.sampled_from([128, 200, 256]))}
    fields["moe_intermediate_size"] = draw(st.sampled_from([100, 128, 256]))
    fields["hidden_act"] = draw(st.sampled_from(["silu", "gelu", "gelu_pytorch_tanh"]))
    if draw(st.booleans()):
        fields["swiglu_limit"] = 0.5
    scale_fmt = draw(st.sampled_from(["float", "ue8m0"])) if block else "float"
    layer = experts(block, scale_fmt=scale_fmt, **fields)
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    given = inputs(draw(st.sampled_from([1, 9])), fields["hidden_size"], dtype)
    with pytest.MonkeyPatch.context() as patch:
        found = layer(*given)
        layer.config._experts_implementation = "eager"
        patch.setattr(theirs, "fp8_linear", emulated)
        wanted = layer(given[0].float(), *given[1:])
    assert found.dtype == dtype
    assert ratio(found, wanted) > LEAST


@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
def test_activations_have_scales_as_the_weights(scale_fmt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same as in an emulation, but for a few that lie between two values of e4m3."""
    layer, given = experts(scale_fmt=scale_fmt), inputs()
    found = layer(*given)
    layer.config._experts_implementation = "eager"
    monkeypatch.setattr(theirs, "fp8_linear", emulated)
    assert ratio(found, layer(*given)) > 40
    monkeypatch.setattr(theirs, "fp8_linear", lambda x, w, s, *rest, **named: emulated(x, w, s.float()))
    assert (ratio(found, layer(*given)) > 40) == (scale_fmt == "float")


def test_they_run_as_one_fp8_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    forms, known = [], compiled.function
    monkeypatch.setattr("moec.ops.library.function", lambda key: forms.append(key.form) or known(key))
    experts()(*inputs())
    assert forms == ["fused_fp8"]


def test_sentinels_and_idle_experts_are_not_read() -> None:
    layer, (x, ids, weights) = experts(), inputs()
    ids[ids == 3] = 1
    ids[2] = 4
    clean = layer(x, ids, weights)
    assert clean[2].eq(0).all()
    layer.gate_up_proj_scale_inv[3], layer.down_proj_scale_inv[3] = math.nan, math.nan
    weights[2] = math.nan
    assert torch.equal(layer(x, ids, weights), clean)


@torch.no_grad()
def test_a_model_whose_experts_are_quantised(monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers makes it for a quantisation config; everything but the experts stays as it is."""
    fields = {"vocab_size": 97, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    fields |= {"head_dim": 32, "max_position_embeddings": 64, "intermediate_size": 64}
    plain, model = (
        AutoModelForCausalLM.from_config(
            AutoConfig.for_model("qwen3_moe", **SIZES, **fields),
            dtype=torch.float32,
            experts_implementation=implementation,
        )
        for implementation in ("eager", "moec")
    )
    randomise(plain, seed=0)
    model.load_state_dict(plain.state_dict())
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    theirs.replace_with_fp8_linear(model, linears, FineGrainedFP8Config(weight_block_size=(128, 128)))
    ids = torch.arange(24).view(2, 12)
    for name, module in model.named_modules():
        if isinstance(module, theirs.FP8Experts):
            module.to_empty(device="cpu").requires_grad_(False)
            wide = plain.get_submodule(name)
            for projection in ("gate_up_proj", "down_proj"):
                fill(module, projection, getattr(wide, projection))
    forms, known = [], compiled.function
    monkeypatch.setattr("moec.ops.library.function", lambda key: forms.append(key.form) or known(key))
    logits, wanted = model.eval()(ids).logits, plain.eval()(ids).logits
    assert forms == ["fused_fp8"] * 2
    assert ratio(logits, wanted) > 15  # of the unquantised model's, two layers of e4m3 in x and w
    monkeypatch.setattr(theirs, "fp8_linear", emulated)
    model.set_experts_implementation("eager")
    assert ratio(logits, model(ids).logits) > LEAST
    assert len(forms) == 2


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "fp4": ({"expert_dtype": "fp4"}, r"FP8Experts\.gate_up_proj is fp4, two in a byte: moec reads"),
    "static": (
        {"scheme": "static"},
        "FP8Experts in fp8 has activations of static scales, which",
    ),
    "blocks": ({"block": (64, 64)}, r"has scales \[4, 4, 4\] of blocks \(64, 64\): moec reads blocks of 128"),
    "rows": ({"block": (1, 128)}, r"\[4, 256, 256\] has scales \[4, 256, 2\] of blocks \(1, 128\)"),
    "halves": ({"moe_intermediate_size": 32}, r"has scales \[4, 2, 2\] of blocks \(128, 128\)"),
    "gpt-oss": ({"swiglu_alpha": 1.7, "swiglu_limit": 7.0}, r"gpt-oss's gate \(swiglu_alpha\)"),
    "soft cap": ({"mlp_gate_softcap": 5.0, "mlp_up_softcap": 5.0}, "a soft cap of its gate"),
    "relu": ({"hidden_act": "relu"}, "the activation ReLU"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_served_says_why(kind: str) -> None:
    fields, message = REFUSED[kind]
    layer = experts(**fields)
    if kind == "soft cap" and not hasattr(layer, "gate_softcap"):
        pytest.skip("this transformers knows no soft cap")
    with pytest.raises(UnsupportedModel, match=message) as raised:
        layer(*inputs())
    assert "dequantize=True" in str(raised.value)


def test_a_gate_of_a_class_of_its_own_is_refused() -> None:
    layer = experts()
    layer.__class__ = type("MyExperts", (type(layer),), {"_apply_gate": lambda self, x: x})
    with pytest.raises(UnsupportedModel, match="MyExperts in fp8 has a gate of its own"):
        layer(*inputs())
    layer = experts()
    layer.has_gate = False
    with pytest.raises(UnsupportedModel, match="has no gate"):
        layer(*inputs())


def test_weights_that_are_no_fp8_yet_are_served_as_they_are() -> None:
    layer, given = experts(), inputs()
    for name in ("gate_up_proj", "down_proj"):
        wide = spread(getattr(layer, name).data, getattr(layer, f"{name}_scale_inv").data).float()
        setattr(layer, name, nn.Parameter(wide, requires_grad=False))
    found = layer(*given)
    layer.config._experts_implementation = "eager"
    torch.testing.assert_close(found, layer(*given), rtol=1e-4, atol=1e-4)


def test_a_gpu_without_fp8_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moec.ops.library.target_of", lambda device: ("sm_80", False))
    with pytest.raises(DeviceUnavailable, match="sm_80 multiplies no fp8"):
        experts()(*inputs())
