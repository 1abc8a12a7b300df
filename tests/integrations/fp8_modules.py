"""transformers' fp8 experts, drawn and quantised, and their product emulated.

transformers multiplies by kernels from the hub, on GPUs alone.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.integrations import finegrained_fp8 as theirs
from transformers.integrations.moe import use_experts_implementation

from tests.moec.fp8_experts import quantise, spread

SIZES = {"hidden_size": 256, "moe_intermediate_size": 128, "num_experts": 4, "num_experts_per_tok": 2}


def emulated(x: Tensor, w: Tensor, scale: Tensor, block: Any = None, *rest: Any, **named: Any) -> Tensor:
    """``fp8_linear``: x quantised 1 x 128, as w's scales are, its product with w's values times them."""
    if block is None and scale.numel() == 2:  # a scale of gate, one of up
        scale = scale.repeat_interleave(w.shape[0] // 2, dim=0)
    quantised = quantise(x, (1, 128), scale.dtype == torch.float8_e8m0fnu)
    return (spread(*quantised) @ spread(w, scale.double().view(-1, scale.shape[-1])).T).to(x.dtype)


def experts(
    block: Any = (128, 128),
    scheme: str = "dynamic",
    scale_fmt: str = "float",
    expert_dtype: str = "fp8",
    **fields: Any,
) -> Any:
    """transformers' fp8 experts of a Qwen3-MoE, with weights drawn and quantised, set to moec."""
    config = AutoConfig.for_model("qwen3_moe", **{**SIZES, **fields})
    for name in ("swiglu_limit", "swiglu_alpha", "mlp_gate_softcap", "mlp_up_softcap"):
        if name in fields:
            setattr(config, name, fields[name])
    config._experts_implementation = "moec"
    cls = use_experts_implementation(theirs.FP8Experts, experts_interface=theirs.ALL_FP8_EXPERTS_FUNCTIONS)
    packed: dict[str, Any] = {}
    if expert_dtype != "fp8":  # earlier versions read it in the model's configuration
        config.expert_dtype = expert_dtype
        known = "expert_dtype" in signature(theirs.FP8Experts.__init__).parameters
        packed = {"expert_dtype": expert_dtype} if known else {}
    made = cls(config, block, scheme, scale_fmt, **packed)
    generator = torch.Generator().manual_seed(1)
    if expert_dtype == "fp8":
        for name in ("gate_up_proj", "down_proj"):
            fill(made, name, torch.randn(getattr(made, name).shape, generator=generator) / 8)
    return made.requires_grad_(False)


def fill(module: Any, name: str, wide: Tensor) -> None:
    weight, scale = getattr(module, name), getattr(module, f"{name}_scale_inv")
    with torch.no_grad():
        for e, matrix in enumerate(wide):
            parts = matrix.chunk(2) if module.block_size is None and scale.shape[1] == 2 else [matrix]
            pairs = [quantise(p, module.block_size or (0, 0)) for p in parts]
            q, s = (torch.cat(tensors) for tensors in zip(*pairs, strict=True))
            if scale.dtype == torch.float8_e8m0fnu:
                wide_q, s = spread(q, s), s.log2().ceil().exp2()
                q = (wide_q / spread(torch.ones_like(q.float()).to(q.dtype), s)).to(q.dtype)
            weight[e].copy_(q)
            scale[e].copy_(s)


def inputs(
    tokens: int = 9, hidden: int = 256, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.rand(tokens, 4, generator=generator).argsort(1)[:, :2]
    x = torch.randn(tokens, hidden, generator=generator)
    return x.to(dtype), ids, torch.rand(tokens, 2, generator=generator)
