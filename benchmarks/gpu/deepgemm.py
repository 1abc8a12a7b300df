"""A layer of DeepGEMM's two grouped products, with all that must stand around them in kernels.

Six launches and a fill: tokens are quantised once, before they are copied to their experts' rows; SwiGLU and
the second quantisation are one kernel, combining another (``gpu/glue.py``). Scales are written in the layout
that the products want; those of the weights are in it beforehand, on Hopper as the checkpoint has them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from gpu.modules import first
from gpu.problem import E4M3, Weights
from gpu.variants import Experts, NotHere
from torch import Tensor

FEW = 256  # tokens: the masked layout has room for all of them with every expert
MASKED_ALIGN = 128  # rows: the products' largest tile in that layout


def contiguous(given: Weights, top_k: int) -> Experts:
    """Fill, quantise + rank, scatter, contiguous product, SwiGLU + quantise, contiguous product, combine."""
    return Composed(given, top_k, module(), masked=False)


def masked(given: Weights, top_k: int) -> Experts:
    """Fill, quantise + rank, scatter, masked product, SwiGLU + quantise, masked product, combine."""
    return Composed(given, top_k, module(), masked=True)


def module() -> Any:
    return first("deep_gemm", "vllm.third_party.deep_gemm")


@dataclass
class Composed:
    """``deep_gemm`` is that module, or one with its functions. In bf16 nothing is quantised."""

    given: Weights
    top_k: int
    deep_gemm: Any
    masked: bool
    many: int = 1024  # tokens from which on a program copies a whole row: each sums up all experts' sizes

    def __post_init__(self) -> None:
        kind = "fp8" if self.quantise else "bf16"
        names = [f"m_grouped_{kind}_gemm_nt_{'masked' if self.masked else 'contiguous'}"]
        if self.masked:  # as some releases call it
            names.append(f"{kind}_m_grouped_gemm_nt_masked")
        self.product = _attribute(self.deep_gemm, *names)
        aligned = ("get_mk_alignment_for_contiguous_layout", "get_m_alignment_for_contiguous_layout")
        self.align = MASKED_ALIGN if self.masked else int(_attribute(self.deep_gemm, *aligned)())

    @property
    def quantise(self) -> bool:
        return self.given.w13.dtype == E4M3

    def __call__(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """y [T, H] in x's dtype. Raises NotHere for more tokens than the layout is for."""
        import triton
        from gpu import glue

        tokens, hidden = x.shape
        experts, _, width = self.given.w2.shape
        if self.masked and tokens > FEW:
            raise NotHere(f"its layout is for few tokens, here up to {FEW}")
        most = tokens * self.top_k + min(experts, tokens * self.top_k) * (self.align - 1)
        rows = _up(tokens if self.masked else most, self.align)  # of each expert, or of all
        shape = (experts, rows) if self.masked else (rows,)
        dtype = E4M3 if self.quantise else x.dtype
        deep, middle = -(-hidden // 128), -(-width // 128)
        across = -(-deep // glue.WIDE)

        counts = torch.zeros(experts, dtype=torch.int32, device=x.device)
        ranks, places = torch.empty_like(ids), torch.empty_like(ids)
        small, scales = x, x
        if self.quantise:
            small = x.new_empty(tokens, hidden, dtype=dtype)
            scales = x.new_empty(tokens, deep, dtype=torch.float32)
        chosen = triton.next_power_of_2(self.top_k)
        glue.rank[tokens, across if self.quantise else 1](
            x, small, scales, ids, counts, ranks, hidden, deep, self.top_k, chosen, glue.WIDE, self.quantise
        )
        a, a_scale = x.new_empty(*shape, hidden, dtype=dtype), self.scales(x, shape, deep)
        owner = counts if self.masked else counts.new_empty(rows)
        wide = min(64, triton.next_power_of_2(deep)) if tokens >= self.many else glue.WIDE
        glue.scatter[tokens + (0 if self.masked else rows // self.align), -(-deep // wide)](
            small,
            scales,
            ids,
            ranks,
            counts,
            a,
            a_scale,
            owner,
            places,
            tokens,
            experts,
            hidden,
            deep,
            rows,
            self.top_k,
            triton.next_power_of_2(experts),
            self.align,
            wide,
            self.masked,
            self.quantise,
        )
        last = (counts, -(-tokens * self.top_k // experts)) if self.masked else (owner,)
        gate_up = x.new_empty(*shape, 2 * width)
        self.product(self.pair(a, a_scale), self.pair(self.given.w13, self.given.w13_scale), gate_up, *last)
        b, b_scale = x.new_empty(*shape, width, dtype=dtype), self.scales(x, shape, middle)
        glue.swiglu[tokens * self.top_k, -(-middle // glue.WIDE)](
            gate_up, places, b, b_scale, width, middle, rows, glue.WIDE, self.quantise
        )
        down, y = x.new_empty(*shape, hidden), torch.empty_like(x)
        self.product(self.pair(b, b_scale), self.pair(self.given.w2, self.given.w2_scale), down, *last)
        glue.combine[tokens, -(-hidden // 1024)](down, places, weights, y, hidden, self.top_k, 1024)
        return y

    def scales(self, x: Tensor, shape: tuple[int, ...], groups: int) -> Tensor:
        """[·, rows, groups] fp32, column-major; rows are a multiple of the 4 that TMA wants."""
        if not self.quantise:
            return x
        return x.new_empty(*shape[:-1], groups, shape[-1], dtype=torch.float32).transpose(-1, -2)

    def pair(self, values: Tensor, scale: Tensor | None) -> Any:
        return (values, scale) if self.quantise else values


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _attribute(module: Any, *names: str) -> Any:
    """The first of these that the module has. Raises AttributeError."""
    for name in names[:-1]:
        if hasattr(module, name):
            return getattr(module, name)
    return getattr(module, names[-1])
