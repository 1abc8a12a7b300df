"""Who is measured: moec, and other people's experts where they are installed.

An adapter imports its peer and says how it is called; nothing of a peer is copied here. It is given one copy
of a layer's weights and returns a function of (x, topk_weights, topk_ids) that gives y [T, H], sorting and
combining included. A peer that isn't installed, or doesn't take what it's given, is named and left out.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from gpu import deepgemm
from gpu.modules import attribute
from gpu.problem import BLOCK, Weights, draw_weights
from gpu.routers import ROUTERS, torch_router
from gpu.shapes import Shape
from gpu.variants import VARIANTS, Experts, Layer, NotHere
from torch import Tensor

Adapter = Callable[[Weights, int], Experts]  # weights, choices a token


def torch_grouped_mm(given: Weights, top_k: int) -> Experts:
    """PyTorch's grouped product, everything around it in PyTorch's own operators."""
    product: Any = getattr(F, "grouped_mm", None) or torch._grouped_mm
    w13, w2 = given.w13.transpose(1, 2), given.w2.transpose(1, 2)
    experts = torch.arange(len(w13), device=w13.device, dtype=torch.int32)

    def run(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        owner, order = ids.flatten().sort(stable=True)
        ends = torch.searchsorted(owner, experts, right=True, out_int32=True)
        gate, up = product(x[order // top_k], w13, offs=ends).chunk(2, dim=-1)
        rows = product(F.silu(gate) * up, w2, offs=ends)
        by_choice = torch.empty_like(rows).index_copy_(0, order, rows).view(len(x), top_k, -1)
        return torch.einsum("tk,tkh->th", weights, by_choice.float()).to(x.dtype)

    return run


def transformers_grouped_mm(given: Weights, top_k: int) -> Experts:
    """transformers' experts module with experts_implementation="grouped_mm"."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    experts, hidden, width = given.w2.shape
    config = Qwen3MoeConfig(
        hidden_size=hidden, moe_intermediate_size=width, num_experts=experts, num_experts_per_tok=top_k
    )
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        module = Qwen3MoeExperts(config)
    module.gate_up_proj = torch.nn.Parameter(given.w13, requires_grad=False)
    module.down_proj = torch.nn.Parameter(given.w2, requires_grad=False)
    return lambda x, weights, ids: module(x, ids.long(), weights)


def liger(given: Weights, top_k: int) -> Experts:
    """Liger's Triton kernels."""
    function = import_module("liger_kernel.ops.fused_moe").LigerFusedMoEFunction
    return lambda x, weights, ids: function.apply(x, given.w13, given.w2, ids, weights)


def vllm(given: Weights, top_k: int) -> Experts:
    """vLLM's Triton kernels, tuned where it has no configuration for this device."""
    function = import_module("vllm.model_executor.layers.fused_moe").fused_experts
    return lambda x, weights, ids: function(x, given.w13, given.w2, weights, ids)


def sglang(given: Weights, top_k: int) -> Experts:
    """SGLang's Triton kernels, tuned where it has no configuration for this device."""
    function = sglang_experts()
    return lambda x, weights, ids: function(x, given.w13, given.w2, weights, ids)


def triton_kernels(given: Weights, top_k: int) -> Experts:
    """OpenAI's triton_kernels as vLLM carries them, by vLLM's own conversion of ids to routing data."""
    vllm_side = import_module("vllm.model_executor.layers.fused_moe.gpt_oss_triton_kernels_moe")
    product = vllm_side.matmul_ogs
    w13, w2 = given.w13.transpose(1, 2), given.w2.transpose(1, 2)

    def run(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        routing, gather, scatter = vllm_side.make_routing_data(ids, weights, len(w13))
        gate, up = product(x, w13, None, routing, gather_indx=gather).chunk(2, dim=-1)
        y: Tensor = product(
            F.silu(gate) * up, w2, None, routing, scatter_indx=scatter, gammas=routing.gate_scal
        )
        return y

    return run


def vllm_fp8(given: Weights, top_k: int) -> Experts:
    """vLLM's Triton kernels for block scales, tuned where it has no configuration for this device.

    How the scales are given has changed between its versions.
    """
    function = import_module("vllm.model_executor.layers.fused_moe").fused_experts
    scales = {"w1_scale": given.w13_scale, "w2_scale": given.w2_scale, "block_shape": [BLOCK, BLOCK]}
    try:
        config = import_module("vllm.model_executor.layers.fused_moe.config").fp8_w8a8_moe_quant_config
    except (ModuleNotFoundError, AttributeError):
        how = {"use_fp8_w8a8": True, **scales}
    else:
        how = {"quant_config": config(**scales)}
    return lambda x, weights, ids: function(x, given.w13, given.w2, weights, ids, **how)


def sglang_fp8(given: Weights, top_k: int) -> Experts:
    """SGLang's Triton kernels for block scales, tuned where it has no configuration for this device."""
    function = sglang_experts()
    scales = {"w1_scale": given.w13_scale, "w2_scale": given.w2_scale, "block_shape": [BLOCK, BLOCK]}
    return lambda x, weights, ids: function(x, given.w13, given.w2, weights, ids, use_fp8_w8a8=True, **scales)


def sglang_experts() -> Any:
    """Its function of everything; newer versions read the settings of a server that serves nothing."""
    moe = "sglang.srt.layers.moe"
    modules = (f"{moe}.fused_moe_triton.fused_moe", f"{moe}.moe_runner.triton_utils.fused_moe")
    function = attribute("fused_experts_impl", *modules)
    try:
        settings = import_module("sglang.srt.server_args")
        settings.set_global_server_args_for_scheduler(settings.ServerArgs(model_path="dummy"))
    except (ModuleNotFoundError, AttributeError):
        pass  # it has none yet
    return function


DEEP_GEMM: dict[str, Adapter] = {"DeepGEMM": deepgemm.contiguous, "DeepGEMM masked": deepgemm.masked}
OTHERS: dict[str, Adapter] = {
    "torch grouped_mm": torch_grouped_mm,
    "transformers grouped_mm": transformers_grouped_mm,
    "Liger": liger,
    "vLLM": vllm,
    "SGLang": sglang,
    "triton_kernels": triton_kernels,
    **DEEP_GEMM,
}
FP8_OTHERS: dict[str, Adapter] = {"vLLM": vllm_fp8, "SGLang": sglang_fp8, **DEEP_GEMM}
ADAPTERS: dict[str, Adapter] = {name: v.experts for name, v in VARIANTS.items()} | OTHERS
FP8_ADAPTERS: dict[str, Adapter] = {name: v.experts for name, v in VARIANTS.items()} | FP8_OTHERS


def layer_of(name: str, adapter: Adapter, given: Weights, shape: Shape) -> Layer:
    """An implementation from the router's logits on: in one call, or first its router, then its experts."""
    if name in VARIANTS:
        return VARIANTS[name].layer(given, shape)
    experts, route = adapter(given, shape.top_k), ROUTERS.get(name, torch_router)(shape, given.bias)
    return lambda x, logits: experts(x, *route(x, logits))


def made_of(name: str, adapter: Adapter) -> dict[str, str]:
    """What a row is composed of, in words: for those who read its times."""
    if name in VARIANTS:
        return {"experts": "moec.ops.fused_experts", "layer": "moec.ops.routed_experts"}
    experts, router = (first_paragraph(f) for f in (adapter, ROUTERS.get(name, torch_router)))
    return {"experts": experts, "router": router}


def first_paragraph(function: Any) -> str:
    return " ".join((function.__doc__ or function.__name__).partition("\n\n")[0].split())


PEERS = ("transformers", "liger_kernel", "vllm", "sglang", "deep_gemm")  # by the name that is imported


def installed(adapters: dict[str, Adapter], dtype: torch.dtype) -> tuple[dict[str, Adapter], dict[str, str]]:
    """Those that can be asked for experts of ``dtype`` here, and why the others can't."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    (probe,) = draw_weights(Shape("probe", 2, 16, 16, 1), dtype, device, cache=0)
    able, reasons = {}, {}
    for name, adapter in adapters.items():
        try:
            adapter(probe, 1)
        except ModuleNotFoundError as error:
            reasons[name] = "not installed" if error.name in PEERS else f"{error.name} is not installed"
        except NotHere as reason:
            reasons[name] = str(reason)
        except Exception as error:
            reasons[name] = f"{type(error).__name__}: {first_line(error)}"
        else:
            able[name] = adapter
    return able, reasons


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:160]
