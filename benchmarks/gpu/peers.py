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
from gpu.problem import BLOCK, Weights, draw_weights
from gpu.shapes import Shape
from gpu.variants import VARIANTS, Experts, Layer, NotHere
from torch import Tensor

Adapter = Callable[[Weights, int], Experts]  # weights, choices a token
Router = Callable[[Tensor], tuple[Tensor, Tensor]]  # logits -> weights, ids


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
    function = import_module("liger_kernel.ops.fused_moe").LigerFusedMoEFunction
    return lambda x, weights, ids: function.apply(x, given.w13, given.w2, ids, weights)


def vllm(given: Weights, top_k: int) -> Experts:
    """vLLM's Triton kernels, with whatever configuration it has for this device."""
    function = import_module("vllm.model_executor.layers.fused_moe").fused_experts
    return lambda x, weights, ids: function(x, given.w13, given.w2, weights, ids)


def sglang(given: Weights, top_k: int) -> Experts:
    module = import_module("sglang.srt.layers.moe.fused_moe_triton.fused_moe")
    return lambda x, weights, ids: module.fused_experts_impl(x, given.w13, given.w2, weights, ids)


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


def deep_gemm(given: Weights, top_k: int) -> Experts:
    """DeepGEMM's contiguous grouped products in bf16: every expert's rows begin at a multiple of 128."""
    product = _first("deep_gemm", "vllm.third_party.deep_gemm").m_grouped_bf16_gemm_nt_contiguous
    return padded(given, top_k, product)


def vllm_fp8(given: Weights, top_k: int) -> Experts:
    """vLLM's Triton kernels for block scales; how these are given has changed between its versions."""
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
    module = import_module("sglang.srt.layers.moe.fused_moe_triton.fused_moe")
    scales = {"w1_scale": given.w13_scale, "w2_scale": given.w2_scale, "block_shape": [BLOCK, BLOCK]}
    return lambda x, weights, ids: module.fused_experts_impl(
        x, given.w13, given.w2, weights, ids, use_fp8_w8a8=True, **scales
    )


def deep_gemm_fp8(given: Weights, top_k: int) -> Experts:
    """DeepGEMM's contiguous grouped products in fp8, with its own quantisation before each."""
    module = _first("deep_gemm", "vllm.third_party.deep_gemm")
    quantise = _first("deep_gemm.utils", "vllm.third_party.deep_gemm.utils").per_token_cast_to_fp8

    def product(a: Tensor, w: Tensor, out: Tensor, group: Tensor) -> None:
        scale = given.w13_scale if w is given.w13 else given.w2_scale
        module.m_grouped_fp8_gemm_nt_contiguous(quantise(a, use_ue8m0=False), (w, scale), out, group)

    return padded(given, top_k, product)


def torch_router(top_k: int) -> Router:
    """As transformers' models choose."""

    def run(logits: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = logits.softmax(-1).topk(top_k, dim=-1)
        return weights / weights.sum(-1, keepdim=True), ids.to(torch.int32)

    return run


def vllm_router(top_k: int) -> Router:
    """vLLM's own kernel, which wants the hidden states for their number and device alone."""
    choose = import_module("vllm.model_executor.layers.fused_moe").fused_topk
    return lambda logits: choose(logits, logits, top_k, True)[:2]


def padded(given: Weights, top_k: int, product: Callable[..., Any], block: int = 128) -> Experts:
    """Around a ``product(a, w, out, each row's expert)`` whose experts begin at multiples of ``block``."""
    count, hidden, width = given.w2.shape
    experts = torch.arange(count, device=given.w2.device, dtype=torch.int32)

    def run(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        owner, order = ids.flatten().sort(stable=True)
        ends = torch.searchsorted(owner, experts, right=True)
        sizes = ends.diff(prepend=ends.new_zeros(1))
        room = (sizes + block - 1) // block * block
        padded_ends = room.cumsum(0)
        owner = owner.long()
        moved = (padded_ends - room - ends + sizes)[owner] + torch.arange(len(owner), device=x.device)
        most = len(owner) + min(count, len(owner)) * (block - 1)  # whatever is chosen
        rows = (most + block - 1) // block * block
        group = torch.searchsorted(padded_ends, torch.arange(rows, device=x.device), right=True)
        group = torch.where(group < count, group, -1).to(torch.int32)
        a = x.new_empty(rows, hidden).index_copy_(0, moved, x[order // top_k])
        gate_up, down = x.new_empty(rows, 2 * width), x.new_empty(rows, hidden)
        product(a, given.w13, gate_up, group)
        gate, up = gate_up.chunk(2, dim=-1)
        product(F.silu(gate) * up, given.w2, down, group)
        place = torch.empty_like(moved).index_copy_(0, order, moved)
        by_choice = down[place].view(len(x), top_k, -1).float()
        return torch.einsum("tk,tkh->th", weights, by_choice).to(x.dtype)

    return run


def _first(*modules: str) -> Any:
    """The first of these that is installed."""
    for name in modules[:-1]:
        try:
            return import_module(name)
        except ModuleNotFoundError:
            continue
    return import_module(modules[-1])


OTHERS: dict[str, Adapter] = {
    "torch grouped_mm": torch_grouped_mm,
    "transformers grouped_mm": transformers_grouped_mm,
    "Liger": liger,
    "vLLM": vllm,
    "SGLang": sglang,
    "triton_kernels": triton_kernels,
    "DeepGEMM": deep_gemm,
}
FP8_OTHERS: dict[str, Adapter] = {"vLLM": vllm_fp8, "SGLang": sglang_fp8, "DeepGEMM": deep_gemm_fp8}
ADAPTERS: dict[str, Adapter] = {name: v.experts for name, v in VARIANTS.items()} | OTHERS
FP8_ADAPTERS: dict[str, Adapter] = {name: v.experts for name, v in VARIANTS.items()} | FP8_OTHERS

ROUTERS: dict[str, Callable[[int], Router]] = {"vLLM": vllm_router}  # others choose as PyTorch does


def layer_of(name: str, adapter: Adapter, given: Weights, top_k: int) -> Layer:
    """An implementation from the router's logits on: in one call, or first its router, then its experts."""
    if name in VARIANTS:
        return VARIANTS[name].layer(given, top_k)
    experts, route = adapter(given, top_k), ROUTERS.get(name, torch_router)(top_k)
    return lambda x, logits: experts(x, *route(logits))


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
