"""The experts of a layer as a loop over tokens and their choices, in double precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}  # of the largest element
ACTS: dict[str, Any] = {
    "swiglu": F.silu,
    "geglu": F.gelu,
    "geglu_tanh": lambda gate: F.gelu(gate, approximate="tanh"),
}


@dataclass
class Layer:
    """Arguments of ``fused_experts``."""

    x: Tensor
    w13: Tensor
    w2: Tensor
    weights: Tensor
    ids: Tensor

    @property
    def args(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.x, self.w13, self.w2, self.weights, self.ids


def layer(
    tokens: int = 5, k: int = 2, experts: int = 4, hidden: int = 8, width: int = 6, **given: Any
) -> Layer:
    dtype, seed = given.get("dtype", torch.float32), given.get("seed", 0)
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    ids = torch.rand(tokens, experts, generator=g).argsort(1)[:, :k].to(torch.int32)
    return Layer(
        draw(tokens, hidden).to(dtype),
        (draw(experts, 2 * width, hidden) / hidden**0.5).to(dtype),
        (draw(experts, hidden, width) / width**0.5).to(dtype),
        draw(tokens, k).abs(),
        ids,
    )


def expert(
    x: Tensor, w13: Tensor, w2: Tensor, activation: str = "swiglu", limit: float | None = None
) -> Tensor:
    gate, up = (w13.double() @ x.double()).chunk(2)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return w2.double() @ (ACTS[activation](gate) * up)


def loop(one: Layer, first: int = 0, shared: Tensor | None = None, **how: Any) -> Tensor:
    y = torch.zeros(one.x.shape, dtype=torch.float64) if shared is None else shared.double().clone()
    for t, choices in enumerate(one.ids.tolist()):
        for j, e in enumerate(choices):
            if first <= e < first + len(one.w13):
                part = expert(one.x[t], one.w13[e - first], one.w2[e - first], **how)
                y[t] += one.weights[t, j].double() * part
    return y


def close(got: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == dtype and got.shape == wanted.shape
    scale = max(1.0, float(wanted.abs().max())) if wanted.numel() else 1.0
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=TOLERANCE[dtype] * scale)


def strided(tensor: Tensor) -> Tensor:
    """The same values, every other column of a wider tensor."""
    wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), 77, dtype=tensor.dtype)
    wide[..., ::2] = tensor
    return wide[..., ::2]
