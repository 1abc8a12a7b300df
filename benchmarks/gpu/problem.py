"""One layer's weights and inputs, drawn so that no call finds in the cache what the one before it read."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from gpu.shapes import Shape
from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 5e-3, torch.float32: 1e-4}  # of the largest element
CHECKED = 64  # tokens of a call that are compared; all must be finite


@dataclass(frozen=True)
class Weights:
    """Every expert's: w13 [E, 2·I, H], gate rows first, and w2 [E, H, I]."""

    w13: Tensor
    w2: Tensor


@dataclass(frozen=True)
class Inputs:
    """What one call is given, and which copy of the weights it uses."""

    copy: int
    x: Tensor
    weights: Tensor  # [T, k] fp32
    ids: Tensor  # [T, k] int32


def draw_weights(shape: Shape, dtype: torch.dtype, device: str, cache: int) -> list[Weights]:
    """Copies enough that together they hold three times the cache of ``cache`` bytes; mostly that's one."""
    size = shape.weights * dtype.itemsize
    copies = max(1, math.ceil(3 * cache / size))
    torch.manual_seed(0)
    made = []
    for _ in range(copies):
        w13 = torch.empty(shape.experts, 2 * shape.intermediate, shape.hidden, dtype=dtype, device=device)
        w2 = torch.empty(shape.experts, shape.hidden, shape.intermediate, dtype=dtype, device=device)
        made.append(Weights(w13.normal_(std=shape.hidden**-0.5), w2.normal_(std=shape.intermediate**-0.5)))
    return made


def draw_inputs(
    shape: Shape, tokens: int, dtype: torch.dtype, device: str, cache: int, copies: int
) -> list[Inputs]:
    """Rotated through, call after call: as many as read three times the cache, at least 2, at most 32."""
    generator = torch.Generator(device).manual_seed(tokens)
    count = min(32, max(2, copies, math.ceil(3 * cache / shape.bytes(tokens, dtype.itemsize))))
    made = []
    for number in range(count):
        x = torch.randn(tokens, shape.hidden, generator=generator, device=device).to(dtype)
        scores = torch.rand(tokens, shape.experts, generator=generator, device=device)
        top, ids = scores.topk(shape.top_k, dim=1)
        weights = top / top.sum(1, keepdim=True)
        made.append(Inputs(number % copies, x, weights, ids.to(torch.int32)))
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
        gate, up = (x[token] @ experts.w13[e].double().T).chunk(2, dim=-1)
        part = (F.silu(gate) * up) @ experts.w2[e].double().T
        wanted.index_add_(0, token, weights[token, choice, None] * part)
    return float((y[rows].double() - wanted).abs().max() / wanted.abs().max())
