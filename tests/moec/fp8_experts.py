"""A layer's experts in fp8, and what they mean in double precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.moec.experts import Layer, expert, layer

E4M3 = torch.float8_e4m3fn
BLOCKS = ((128, 128), (1, 0), (0, 0))  # rows x columns of a matrix that share a scale; 0: all
X_BLOCKS = ((1, 128), (1, 0), (0, 0))  # of x
# Signal to noise in dB. Whatever lies between the products is rounded to e4m3: about 31 dB of it alone.
LEAST = 27.0


@dataclass
class FP8Layer:
    """Arguments of ``fused_experts``: ``args`` and ``scales``."""

    x: Tensor
    w13: Tensor
    w2: Tensor
    weights: Tensor
    ids: Tensor
    w13_scale: Tensor
    w2_scale: Tensor
    x_scale: Tensor | None = None

    @property
    def args(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.x, self.w13, self.w2, self.weights, self.ids

    @property
    def scales(self) -> dict[str, Tensor]:
        x_scale = self.x_scale
        if x_scale is not None and len(x_scale) != len(self.x):
            x_scale = x_scale.view(1)  # of all rows
        given = {"w13_scale": self.w13_scale, "w2_scale": self.w2_scale, "x_scale": x_scale}
        return {name: scale for name, scale in given.items() if scale is not None}

    def meant(self) -> Layer:
        """The numbers that the quantised tensors stand for, in double precision; x rounded to e4m3."""
        x, x_scale = (self.x, self.x_scale) if self.x_scale is not None else quantise(self.x, (1, 128))
        return Layer(
            spread(x, x_scale),
            spread(self.w13, self.w13_scale),
            spread(self.w2, self.w2_scale),
            self.weights,
            self.ids,
        )


def quantise(x: Tensor, block: tuple[int, int], ue8m0: bool = False) -> tuple[Tensor, Tensor]:
    """x [..., N, K] in e4m3, and the scales of blocks of its last two axes, by loops over the blocks."""
    rows, columns = (size or x.shape[axis] for size, axis in zip(block, (-2, -1), strict=True))
    q = torch.empty(x.shape, dtype=E4M3, device=x.device)
    counts = -(-x.shape[-2] // rows), -(-x.shape[-1] // columns)
    scale = torch.empty(*x.shape[:-2], *counts, device=x.device)
    for i in range(counts[0]):
        for j in range(counts[1]):
            here = ..., slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            part = x[here].float()
            s = part.abs().amax((-2, -1)).clamp(min=1e-4) / 448
            s = 2.0 ** s.double().log2().ceil() if ue8m0 else s
            q[here] = (part / s[..., None, None]).clamp(-448, 448).to(E4M3)
            scale[..., i, j] = s
    return q, scale


def spread(q: Tensor, scale: Tensor) -> Tensor:
    """q times its block's scale; what a block is follows from how many scales there are."""
    for axis in (-2, -1):
        size = 128 if scale.shape[axis] == -(-q.shape[axis] // 128) and scale.shape[axis] > 1 else None
        each = size or (1 if scale.shape[axis] == q.shape[axis] else q.shape[axis])
        scale = scale.repeat_interleave(each, dim=axis).narrow(axis, 0, q.shape[axis])
    return q.double() * scale.double()


def rounded(one: FP8Layer, formats: tuple[bool, bool], **how: Any) -> Tensor:
    """y in double precision, but for x and what lies between the products: both in e4m3, 1 x 128.

    ``formats``: whether the scales of the one and of the other are powers of two.
    """
    meant, between = one.meant(), formats[1]
    x = spread(*quantise(one.x, (1, 128), formats[0])) if one.x_scale is None else meant.x
    y = torch.zeros(x.shape, dtype=torch.float64)
    for t, choices in enumerate(one.ids.tolist()):
        for j, e in enumerate(choices):
            h = expert(x[t], meant.w13[e], torch.eye(meant.w2.shape[2]), **how)
            h = spread(*quantise(h[None].float(), (1, 128), between))[0]
            y[t] += one.weights[t, j].double() * (meant.w2[e] @ h)
    return y


def fp8_layer(
    block: tuple[int, int] = (128, 128),
    scaled_x: bool | tuple[int, int] = False,
    dtype: torch.dtype = torch.float32,
    **sizes: int,
) -> FP8Layer:
    sizes = {"tokens": 9, "k": 2, "experts": 4, "hidden": 256, "width": 128, **sizes}
    one = layer(**sizes)
    (w13, w13_scale), (w2, w2_scale) = quantise(one.w13, block), quantise(one.w2, block)
    x_block = (1, 128) if scaled_x is True else scaled_x
    x, x_scale = quantise(one.x, x_block) if x_block else (one.x.to(dtype), None)
    return FP8Layer(x, w13, w2, one.weights, one.ids, w13_scale, w2_scale, x_scale)


def ratio(found: Tensor, wanted: Tensor) -> float:
    """Signal to noise in dB."""
    noise = (found.double() - wanted.double()).square().sum()
    return float(10 * (wanted.double().square().sum() / noise.clamp(min=1e-300)).log10())
