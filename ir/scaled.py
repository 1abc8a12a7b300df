"""Quantised tensors with the scales of their blocks, as the interpreter holds and computes with them.

The format (DeepSeek-V3 report, section 3.3): a block's scale is s = max(amax, 1e-4) / 448 in fp32, or the
next power of two (ue8m0); its values are x / s, clamped to ±448 and rounded to e4m3, ties to even. e4m3 has
no infinity: NaN and ±Inf become NaN, and take no part in amax, so that they spoil no other value of their
block.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

E4M3_MAX = 448.0
AMAX_MIN = 1e-4  # of a block: what is smaller is taken for it


class Scaled(NamedTuple):
    """``q`` times ``scale``: one fp32 number for each ``block`` of the last axes (0 is a whole axis)."""

    q: torch.Tensor
    scale: torch.Tensor
    block: tuple[int, ...]

    def float(self) -> torch.Tensor:
        """The numbers that are meant, in fp32."""
        return self.q.float() * spread(self.scale, tuple(self.q.shape), self.block)


def quantize(x: torch.Tensor, block: tuple[int, ...], scale: str = "fp32") -> Scaled:
    """x in e4m3 with scales for ``block``, as the module's docstring says; ``scale``: fp32 or ue8m0."""
    wide = x.float()
    finite = wide.isfinite()
    amax = _block_max(torch.where(finite, wide, 0.0).abs(), block)
    scales = amax.clamp(min=AMAX_MIN) / E4M3_MAX
    if scale == "ue8m0":
        scales = power_of_two(scales)
    ratio = (wide / spread(scales, tuple(x.shape), block)).clamp(-E4M3_MAX, E4M3_MAX)
    return Scaled(torch.where(finite, ratio, torch.nan).to(torch.float8_e4m3fn), scales, block)


def power_of_two(s: torch.Tensor) -> torch.Tensor:
    """2^ceil(log2 s), exact for every normal s > 0."""
    fraction, exponent = torch.frexp(s)  # s = fraction · 2^exponent, fraction in [1/2, 1)
    exponent = torch.where(fraction == 0.5, exponent - 1, exponent)
    return torch.ldexp(torch.ones_like(s), exponent)


def _block_max(x: torch.Tensor, block: tuple[int, ...]) -> torch.Tensor:
    for axis, size in zip(range(-len(block), 0), block, strict=True):
        moved = x.movedim(axis, -1)
        each = size or max(1, moved.shape[-1])
        short = -moved.shape[-1] % each if size or moved.shape[-1] else 1
        x = F.pad(moved, (0, short)).unflatten(-1, (-1, each)).amax(-1).movedim(-1, axis)
    return x


def spread(scale: torch.Tensor, shape: tuple[int, ...], block: tuple[int, ...]) -> torch.Tensor:
    """The scale of each element of a tensor of ``shape``."""
    for axis, size in zip(range(-len(block), 0), block, strict=True):
        length = shape[axis]
        scale = scale.repeat_interleave(size or length, dim=axis).narrow(axis, 0, length)
    return scale


def refine(x: Scaled, block: tuple[int, ...]) -> Scaled:
    """The same numbers with a scale for each of the smaller ``block``."""
    shape, scale = tuple(x.q.shape), x.scale
    for axis, size in zip(range(-len(block), 0), block, strict=True):
        if size != x.block[axis]:
            firsts = torch.arange(0, shape[axis], size, device=scale.device)
            scale = scale.index_select(axis, firsts // (x.block[axis] or max(1, shape[axis])))
    return Scaled(x.q, scale, block)


def product(x: torch.Tensor | Scaled, w: torch.Tensor | Scaled) -> torch.Tensor:
    """x · wᵀ in fp32, for w [N, K], both plain or both scaled.

    Of scaled ones, along K, wherever a scale of x or of w changes, the sum of products so far is multiplied
    by the two scales and added up.
    """
    if not isinstance(x, Scaled) or not isinstance(w, Scaled):
        return x.float() @ w.float().t()
    depth = x.q.shape[-1]
    y = torch.zeros(*x.q.shape[:-1], w.q.shape[0], dtype=torch.float32, device=x.q.device)
    steps = [range(0, depth, v.block[-1] or max(1, depth)) for v in (x, w)]
    for start, end in pairwise(sorted({*steps[0], *steps[1], depth})):
        part = x.q[..., start:end].float() @ w.q[:, start:end].float().t()
        y = y + part * _row_scales(x, start)[..., None] * _row_scales(w, start)
    return y


def rounds_to(x: torch.Tensor | Scaled, to: Any = None) -> torch.dtype:
    """The dtype of a product of x: ``to``, else x's own, bf16 where it is scaled."""
    if to is not None:
        return to.torch
    return torch.bfloat16 if isinstance(x, Scaled) else x.dtype


def take_rows(x: Any, rows: torch.Tensor | slice) -> Any:
    """Rows of a matrix, whose blocks are of one row or of all."""
    if not isinstance(x, Scaled):
        return x[rows]
    return Scaled(x.q[rows], x.scale if x.block[0] == 0 else x.scale[rows], x.block)


def matrix(x: Any, number: int) -> Any:
    """One of a stack of matrices."""
    return Scaled(x.q[number], x.scale[number], x.block) if isinstance(x, Scaled) else x[number]


def _row_scales(v: Scaled, column: int) -> torch.Tensor:
    """The scale of each row's block that holds ``column``."""
    scales = v.scale[..., column // v.block[-1] if v.block[-1] else 0]
    return spread(scales, tuple(v.q.shape[:-1]), v.block[:-1])
