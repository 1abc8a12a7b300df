"""moec's experts inside transformers' models, version 5 or newer.

>>> moec.integrations.transformers.register()
>>> model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="moec")

or ``model.set_experts_implementation("moec")`` on one that is there. It serves every family whose experts
transformers lets be replaced: DeepSeek V2, V3 and V4, GLM-4-MoE, Mixtral, OLMoE, Qwen2-MoE, Qwen3-MoE,
gpt-oss, and others of their layouts:

* weights [E, 2·I, H] and [E, H, I], gate then up, SiLU or GELU (most): one ``moec.ops.fused_experts``;
* an activation of the family's own, clamped or interleaved (DeepSeek V4, gpt-oss), biases, no gate: the two
  products are moec's, what lies between them is the family's ``_apply_gate``;
* transposed weights [E, H, 2·I] (gpt-oss): read through a view on the CPU; kernels on a GPU want them laid
  out the other way, which ``prepare(model)`` does once;
* experts in fp8 (``FineGrainedFP8Config``, DeepSeek-V3's checkpoints): weights and their scales, of 128 x 128
  blocks or one a matrix, in fp32 or powers of two (``scale_fmt="ue8m0"``), go to the fp8 kernels of
  ``fused_experts``, which quantise activations 1 x 128, with powers of two where the weights have such. fp4,
  static activation scales, other blocks and other gates are refused.

Weights are used where they are, never copied. An index past the last expert, as expert parallelism marks
another rank's, contributes nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import activations
from transformers.integrations import finegrained_fp8, moe

from moec.errors import UnsupportedModel
from moec.ops import fused_experts
from moec.ops.scales import two_readings

PARAMETERS = ("gate_up_proj", "up_proj", "down_proj")


def register(name: str = "moec") -> None:
    """Makes ``experts_implementation="moec"`` (or another name) known to transformers. Twice is once."""
    moe.ExpertsInterface.register(name, experts_forward)
    if _FP8_INTERFACE is not None:
        _FP8_INTERFACE.register(name, experts_forward)


def prepare(model: nn.Module) -> int:
    """Lays transposed expert weights out as GPU kernels read them; returns how many tensors it moved.

    A tensor keeps its shape and values, its storage alone is in another order (``t.stride()`` says so). Needs
    room for one tensor more while it runs. Call it after the weights are loaded and on their device.
    """
    moved = 0
    for module in model.modules():
        if not _attribute(module, "is_transposed", False):
            continue
        for name in PARAMETERS:
            weight = getattr(module, name, None)
            if isinstance(weight, Tensor) and not weight.transpose(1, 2).is_contiguous():
                weight.data = weight.data.transpose(1, 2).contiguous().transpose(1, 2)
                moved += 1
    return moved


def experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """What transformers calls in place of an experts module's own forward.

    hidden_states [T, H], top_k_index [T, k], top_k_weights [T, k] -> [T, H] in hidden_states' dtype. Raises
    UnsupportedModel for what such a module may have and moec doesn't do, and the errors of ``fused_experts``.
    """
    if _attribute(self, "has_post_expert_norm", False):
        raise UnsupportedModel(
            f"{type(self).__name__} normalises each expert's output, which moec doesn't do"
        )
    if _is_fp8(self):
        return _fp8(self, hidden_states, top_k_index, top_k_weights)
    w1 = _weight(self, "gate_up_proj" if _attribute(self, "has_gate", True) else "up_proj")
    w2 = _weight(self, "down_proj")
    x = hidden_states.to(w1.dtype)
    top_k_weights = _fitting(top_k_weights, x)
    activation = None if _attribute(self, "has_bias", False) else _activation(self)
    if activation is None:
        y = _by_halves(self, x, w1, w2, top_k_weights, top_k_index)
    else:
        y = fused_experts(x, w1, w2, top_k_weights, top_k_index, activation=activation)
    return y.to(hidden_states.dtype)


def _fp8(module: Any, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """transformers' ``FP8Experts``: weights in e4m3 with ``weight_scale_inv``, which are multipliers."""
    activation, limit = _fp8_gate(module)
    names = ("gate_up_proj", "down_proj")
    (w13, w13_scale), (w2, w2_scale) = ((getattr(module, n), _fp8_scale(module, n)) for n in names)
    top_k_weights = _fitting(top_k_weights, x)
    routing = (top_k_weights, top_k_index)
    how: dict[str, Any] = {"activation": activation, "limit": limit}
    return fused_experts(x, w13, w2, *routing, **how, w13_scale=w13_scale, w2_scale=w2_scale)


def _is_fp8(module: Any) -> bool:
    """Whether its weights are quantised; of such a class they may be floats still."""
    weight = getattr(module, "down_proj", None)
    scaled = hasattr(module, "down_proj_scale_inv")
    return scaled and isinstance(weight, Tensor) and weight.element_size() == 1


def _fp8_gate(module: Any) -> tuple[str, float | None]:
    """The activation and limit of ``fused_experts``. Raises UnsupportedModel for what it has no kernel of."""
    act = _activation_of(getattr(module, "act_fn", None))
    own = getattr(type(module), "_apply_gate", None) is getattr(_FP8_CLASS, "_apply_gate", object())
    reasons = {
        "activations of static scales": getattr(module, "activation_scheme", "dynamic") != "dynamic",
        "no gate": not _attribute(module, "has_gate", True),
        "biases": _attribute(module, "has_bias", False),
        "a gate of its own": not own,
        "a soft cap of its gate": getattr(module, "gate_softcap", None) is not None,
        "gpt-oss's gate (swiglu_alpha)": getattr(module, "swiglu_alpha", None) is not None,
        f"the activation {type(getattr(module, 'act_fn', None)).__name__}": act is None,
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if act is None or found:
        raise UnsupportedModel(
            f"{type(module).__name__} in fp8 has {', '.join(found)}, which moec doesn't do",
            notes=[_FP8_ADVICE],
        )
    return act, getattr(module, "limit", None)


def _fp8_scale(module: Any, name: str) -> Tensor:
    """The scales of a weight, of 128 x 128 blocks, or one a matrix. Raises UnsupportedModel for any other."""
    weight: Tensor = getattr(module, name)
    scale: Tensor = getattr(module, f"{name}_scale_inv")
    shown, block = f"{type(module).__name__}.{name}", getattr(module, "block_size", None)
    if weight.dtype != torch.float8_e4m3fn:
        what = "fp4, two in a byte" if weight.dtype == torch.int8 else str(weight.dtype)
        raise UnsupportedModel(f"{shown} is {what}: moec reads float8_e4m3fn", notes=[_FP8_ADVICE])
    experts, rows, columns = weight.shape
    if block is None:
        known = [(experts, 1, 1), (experts, 2, 1)]  # of two joined projections, each has its own
    else:
        known = [(experts, -(-rows // 128), -(-columns // 128))] if tuple(block) == (128, 128) else []
    if tuple(scale.shape) not in known:
        wanted = (
            " or ".join(str(list(shape)) for shape in known) or "blocks of 128 x 128, or a scale a matrix"
        )
        raise UnsupportedModel(
            f"{shown} {list(weight.shape)} has scales {list(scale.shape)} of blocks {block}: "
            f"moec reads {wanted}",
            notes=[_FP8_ADVICE],
        )
    if scale.shape[1:] == (2, 1) and two_readings(rows, columns):  # as rows' there is no doubt
        return scale.repeat_interleave(rows // 2 if block is None else 128, 1)[:, :rows]
    return scale


def _fitting(weights: Tensor, x: Tensor) -> Tensor:
    """Routing weights as ``fused_experts`` takes them: float32 or x's dtype."""
    return weights if weights.dtype in (torch.float32, x.dtype) else weights.float()


def _by_halves(
    module: Any, x: Tensor, w1: Tensor, w2: Tensor, top_k_weights: Tensor, top_k_index: Tensor
) -> Tensor:
    """The products by moec, biases and activation by PyTorch between them."""
    rows, weights, ids, slot, off = torch.ops.moec.experts_begin(x, w1, top_k_weights, top_k_index)
    gated, biased = _attribute(module, "has_gate", True), _attribute(module, "has_bias", False)
    if biased:
        bias = _with_zero(module.gate_up_proj_bias if gated else module.up_proj_bias)
        rows = rows + bias[ids.flatten()[slot.long()].long()]
    h = module._apply_gate(rows) if gated else module.act_fn(rows)
    plus = None
    if biased:  # of a sum of weighted rows: the weighted sum of the biases
        bias = _with_zero(module.down_proj_bias)[ids.long()]  # [T, k, H]
        plus = (weights.float().unsqueeze(-1) * bias.float()).sum(1)
    y: Tensor = torch.ops.moec.experts_end(h, w2, weights, slot, off, plus)
    return y


def _with_zero(bias: Tensor) -> Tensor:
    """bias [E, N] and a row of zeros: that of a choice of no expert, whose number is E."""
    return F.pad(bias, (0, 0, 0, 1))


def _weight(module: nn.Module, name: str) -> Tensor:
    """The weights as [E, out, in]: a view of those that are stored transposed."""
    weight: Tensor = getattr(module, name)
    if not _attribute(module, "is_transposed", False):
        return weight
    weight = weight.transpose(1, 2)
    if weight.device.type == "cuda" and not weight.is_contiguous():
        raise UnsupportedModel(
            f"{type(module).__name__}.{name} is stored transposed, which GPU kernels don't read",
            notes=["moec.integrations.transformers.prepare(model) lays it out anew, once"],
        )
    return weight


def _activation(module: Any) -> str | None:
    """The activation of ``fused_experts`` that the module's gate is, None for any other."""
    if (
        not _attribute(module, "has_gate", True)
        or getattr(type(module), "_apply_gate", None) is not _PLAIN_GATE
    ):
        return None
    return _activation_of(module.act_fn)


def _activation_of(act: Any) -> str | None:
    if isinstance(act, _SILU):
        return "swiglu"
    if isinstance(act, nn.GELU):
        return "geglu_tanh" if act.approximate == "tanh" else "geglu"
    if isinstance(act, _GELU):
        return "geglu"
    return "geglu_tanh" if isinstance(act, _GELU_TANH) else None


def _attribute(module: Any, name: str, default: bool) -> bool:
    """What ``use_experts_implementation`` sets; earlier versions lack some."""
    return bool(getattr(module, name, default))


def _classes(*names: str) -> tuple[type[nn.Module], ...]:
    """transformers' activations of these names, where this version has them."""
    return tuple(getattr(activations, name) for name in names if hasattr(activations, name))


# Of transformers' fp8 experts, where this version has them.
_FP8_INTERFACE: Any = getattr(finegrained_fp8, "FP8ExpertsInterface", None)
_FP8_CLASS: Any = getattr(finegrained_fp8, "FP8Experts", None)
_FP8_ADVICE = "FineGrainedFP8Config(dequantize=True) loads such weights in bfloat16, which moec serves"

# transformers' own gate: act_fn(gate) * up of [gate; up].
_PLAIN_GATE = getattr(moe, "_default_apply_gate", object())
_SILU: tuple[type[nn.Module], ...] = (nn.SiLU, *_classes("SiLUActivation"))
_GELU = _classes("GELUActivation")
_GELU_TANH = _classes("GELUTanh", "NewGELUActivation", "PytorchGELUTanh")
