"""How choices come of the router's logits: in plain PyTorch, and by the kernels that peers have for it.

What an adapter gives is called with (x, logits) and returns weights [T, k] and ids [T, k]. Two routers may
order equal experts differently: what is compared is y, and no input has a choice that is nearly a tie.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from gpu.modules import first
from gpu.shapes import Shape
from torch import Tensor

Route = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
MARGIN = 1e-5  # of the larger score: fp32 tells apart what is this far from it


def choose(shape: Shape, logits: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weights [T, k] in the logits' dtype, ids [T, k] int32: the definition of the shape's router."""
    scores, ranked, _ = _ranked(shape, logits, bias)
    ids = ranked.topk(shape.top_k, dim=-1).indices
    weights = scores.gather(-1, ids)
    if shape.router.renorm:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights * shape.router.scale, ids.to(torch.int32)


def clear(shape: Shape, logits: Tensor, bias: Tensor | None) -> Tensor:
    """[T] bool: neither the last expert chosen nor the last group kept is nearly tied with the next."""
    _, ranked, groups = _ranked(shape, logits.double(), bias)
    found = _apart(ranked, shape.top_k)
    return found if groups is None else found & _apart(groups, shape.router.topk_groups)


def _ranked(shape: Shape, logits: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The scores that weigh, those that choose (-inf in groups that aren't kept), and the groups' own."""
    router = shape.router
    scores = logits.softmax(-1) if router.score == "softmax" else logits.sigmoid()
    ranked = scores if bias is None else scores + bias
    if router.groups == 1:
        return scores, ranked, None
    by_group = ranked.unflatten(-1, (router.groups, -1))
    groups = by_group.topk(2 if router.biased else 1, dim=-1).values.sum(-1)
    kept = torch.zeros_like(groups, dtype=torch.bool)
    kept.scatter_(-1, groups.topk(router.topk_groups, dim=-1).indices, True)
    return scores, by_group.masked_fill(~kept[..., None], float("-inf")).flatten(-2), groups


def _apart(scores: Tensor, taken: int) -> Tensor:
    if taken == scores.shape[-1]:
        return torch.ones_like(scores[..., 0], dtype=torch.bool)
    best = scores.topk(taken + 1, dim=-1).values
    return best[..., -2] - best[..., -1] > MARGIN * best[..., -2].abs()


def torch_router(shape: Shape, bias: Tensor | None) -> Route:
    """PyTorch's operators, as transformers' models choose."""
    return lambda x, logits: choose(shape, logits, bias)


def vllm_router(shape: Shape, bias: Tensor | None) -> Route:
    """vLLM's own kernel: fused_topk, or with groups fused_grouped_topk."""
    router, layers = shape.router, "vllm.model_executor.layers.fused_moe"
    if bias is None:
        plain = import_module(layers).fused_topk
        return lambda x, logits: plain(x, logits, shape.top_k, router.renorm)[:2]
    module = first(f"{layers}.router.grouped_topk_router", f"{layers}.fused_moe")
    how = {
        "topk": shape.top_k,
        "renormalize": router.renorm,
        "e_score_correction_bias": bias,
        "num_expert_group": router.groups,
        "topk_group": router.topk_groups,
        "scoring_func": router.score,
        "routed_scaling_factor": router.scale,
    }
    grouped = module.fused_grouped_topk
    return lambda x, logits: grouped(hidden_states=x, gating_output=logits, **how)


def sglang_router(shape: Shape, bias: Tensor | None) -> Route:
    """SGLang's own kernel: fused_topk, or with groups moe_fused_gate."""
    router = shape.router
    if bias is None:
        plain = import_module("sglang.srt.layers.moe.topk").fused_topk
        how = {"topk": shape.top_k, "renormalize": router.renorm}
        return lambda x, logits: plain(hidden_states=x, gating_output=logits, **how)[:2]
    gate = first("sgl_kernel", "sglang.jit_kernel.moe_fused_gate").moe_fused_gate
    how = {
        "num_expert_group": router.groups,
        "topk_group": router.topk_groups,
        "topk": shape.top_k,
        "routed_scaling_factor": router.scale,
    }
    on_output = "apply_routed_scaling_factor_on_output"
    if on_output in inspect.signature(gate).parameters:
        return lambda x, logits: gate(logits, bias, **how, **{on_output: True})[:2]

    def scaled(x: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:  # before its kernel could
        weights, ids = gate(logits, bias, **how)[:2]
        return weights * router.scale, ids

    return scaled


def moec_router(shape: Shape, bias: Tensor | None) -> Route:
    """moec.ops.route."""
    from moec.ops import route

    how = asked(shape)
    return lambda x, logits: route(logits, bias, **how)


def fastest_router(shape: Shape, bias: Tensor | None) -> Route:
    """vLLM's kernel where it is installed, else SGLang's, else moec.ops.route."""
    for adapter in (vllm_router, sglang_router):
        try:
            return adapter(shape, bias)
        except (ImportError, AttributeError):
            continue
    return moec_router(shape, bias)


def asked(shape: Shape) -> dict[str, Any]:
    """The router in the arguments of ``moec.ops.route`` and ``routed_experts``."""
    router = shape.router
    return {
        "k": shape.top_k,
        "score": router.score,
        "renorm": router.renorm,
        "scale": router.scale,
        "groups": router.groups,
        "topk_groups": router.topk_groups,
        "group_score": router.group_score,
    }


ROUTERS: dict[str, Callable[[Shape, Tensor | None], Route]] = {  # others choose as PyTorch does
    "vLLM": vllm_router,
    "triton_kernels": vllm_router,  # which vLLM carries
    "SGLang": sglang_router,
    "DeepGEMM": fastest_router,
    "DeepGEMM masked": fastest_router,
}
