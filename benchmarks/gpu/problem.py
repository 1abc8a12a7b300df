"""One layer's weights and inputs, drawn so that no call finds in the cache what the one before it read."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from gpu.routers import choose, clear
from gpu.shapes import Shape
from torch import Tensor

E4M3 = torch.float8_e4m3fn
# Of the weights. With fp8, x and y are bf16: quantising x, and what lies between, is part of the call.
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp8": E4M3}
# Of the largest element. In fp8 every operand of both products is rounded to 4 bits.
TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 5e-3, torch.float32: 1e-4, E4M3: 1.5e-1}
CHECKED = 64  # tokens of a call that are compared; all must be finite
BLOCK = 128  # fp8's scales are of 128 x 128 weights (DeepSeek-V3)


@dataclass(frozen=True)
class Weights:
    """Every expert's: w13 [E, 2·I, H], gate rows first, and w2 [E, H, I]; with fp8 their blocks' scales.

    ``bias`` [E] fp32 is the router's, where it has one.
    """

    w13: Tensor
    w2: Tensor
    w13_scale: Tensor | None = None
    w2_scale: Tensor | None = None
    bias: Tensor | None = None

    def matrix(self, w: Tensor, e: int) -> Tensor:
        """Expert e of w13 or w2 (the one that ``w`` is) in double precision."""
        scale = self.w13_scale if w is self.w13 else self.w2_scale
        return w[e].double() if scale is None else w[e].double() * spread(scale[e], w.shape[1:])


@dataclass(frozen=True)
class Inputs:
    """What one call is given, and which copy of the weights it uses."""

    copy: int
    x: Tensor
    logits: Tensor  # [T, E] fp32, of which the shape's router in double precision makes these:
    weights: Tensor  # [T, k] fp32
    ids: Tensor  # [T, k] int32


def draw_weights(shape: Shape, dtype: torch.dtype, device: str, cache: int) -> list[Weights]:
    """Copies enough that together they hold three times the cache of ``cache`` bytes; mostly that's one."""
    size = shape.weights * dtype.itemsize
    bias = draw_bias(shape, device)
    copies = max(1, math.ceil(3 * cache / size))
    torch.manual_seed(0)
    made = []
    for _ in range(copies):
        w13 = torch.empty(shape.experts, 2 * shape.intermediate, shape.hidden, dtype=dtype, device=device)
        w2 = torch.empty(shape.experts, shape.hidden, shape.intermediate, dtype=dtype, device=device)
        if dtype == E4M3:
            made.append(Weights(w13, w2, fill_fp8(w13, shape.hidden), fill_fp8(w2, shape.intermediate), bias))
        else:
            w13.normal_(std=shape.hidden**-0.5)
            made.append(Weights(w13, w2.normal_(std=shape.intermediate**-0.5), bias=bias))
    return made


def draw_bias(shape: Shape, device: str) -> Tensor | None:
    """The same for every copy, and so small that no expert is chosen much more often than another."""
    if not shape.router.biased:
        return None
    generator = torch.Generator(device).manual_seed(1)
    return (torch.rand(shape.experts, generator=generator, device=device) - 0.5) / 100


def fill_fp8(w: Tensor, depth: int) -> Tensor:
    """Fills w [E, N, K] so that it stands for weights of a deviation of depth^-1/2; returns its scales.

    One expert at a time: in more than fp8 they wouldn't fit.
    """
    experts, rows, columns = w.shape
    scale = torch.rand(experts, -(-rows // BLOCK), -(-columns // BLOCK), device=w.device) + 0.5
    scale *= depth**-0.5 / 64
    for e in range(experts):
        wanted = torch.randn(rows, columns, device=w.device) * depth**-0.5
        w[e] = (wanted / spread(scale[e], w.shape[1:])).clamp(-448, 448).to(E4M3)
    return scale


def spread(scale: Tensor, shape: torch.Size) -> Tensor:
    """The scale of each element of a matrix."""
    wide = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return wide[: shape[0], : shape[1]]


def draw_inputs(
    shape: Shape, tokens: int, dtype: torch.dtype, device: str, cache: int, copies: int
) -> list[Inputs]:
    """Rotated through, call after call: as many as read three times the cache, at least 2, at most 32.

    No choice is a near tie, which each router would break as its own arithmetic has it.
    """
    generator = torch.Generator(device).manual_seed(tokens)
    count = min(32, max(2, copies, math.ceil(3 * cache / shape.bytes(tokens, dtype.itemsize))))
    floats = torch.bfloat16 if dtype == E4M3 else dtype
    bias = draw_bias(shape, device)
    made = []
    for number in range(count):
        x = torch.randn(tokens, shape.hidden, generator=generator, device=device).to(floats)
        logits = torch.randn(tokens, shape.experts, generator=generator, device=device)
        while len(near := (~clear(shape, logits, bias)).nonzero()[:, 0]):
            logits[near] = torch.randn(len(near), shape.experts, generator=generator, device=device)
        weights, ids = choose(shape, logits.double(), bias)
        made.append(Inputs(number % copies, x, logits, weights.float(), ids))
    return made


def difference(y: Tensor, given: Inputs, experts: Weights) -> float:
    """max|y - r| / max|r| over some tokens, r in double precision.

    Infinite where y isn't finite, in any token, or hasn't x's shape.
    """
    if y.shape != given.x.shape or not bool(torch.isfinite(y).all()):
        return math.inf
    tokens = len(given.x)
    rows = torch.linspace(0, tokens - 1, min(CHECKED, tokens), device=given.x.device).long()
    x, ids, weights = given.x[rows].double(), given.ids[rows], given.weights[rows].double()
    wanted = torch.zeros_like(x)
    for e in ids.unique().tolist():
        token, choice = (ids == e).nonzero(as_tuple=True)
        gate, up = (x[token] @ experts.matrix(experts.w13, e).T).chunk(2, dim=-1)
        part = (F.silu(gate) * up) @ experts.matrix(experts.w2, e).T
        wanted.index_add_(0, token, weights[token, choice, None] * part)
    return float((y[rows].double() - wanted).abs().max() / wanted.abs().max())
