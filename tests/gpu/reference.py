"""A layer's experts in double precision, one expert at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.moec.experts import Layer


def experts(one: Layer, first: int = 0, shared: Tensor | None = None) -> Tensor:
    """What ``fused_experts`` should give, [T, H] in double precision, on the layer's device."""
    y = torch.zeros(one.x.shape, dtype=torch.float64, device=one.x.device)
    if shared is not None:
        y += shared.double()
    for e in range(len(one.w13)):
        token, choice = (one.ids == first + e).nonzero(as_tuple=True)
        rows = rows_of(one, one.x[token], e)
        y.index_add_(0, token, one.weights[token, choice].double()[:, None] * rows)
    return y


def grouped(one: Layer, x: Tensor, off: Tensor) -> Tensor:
    """What ``grouped_experts`` should give for rows sorted by expert; rows past the last are zeros."""
    y = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    bounds = off.tolist()
    for e in range(len(one.w13)):
        mine = slice(bounds[e], bounds[e + 1])
        y[mine] = rows_of(one, x[mine], e)
    return y


def rows_of(one: Layer, x: Tensor, e: int) -> Tensor:
    """Expert ``e`` of every row of x."""
    gate, up = (x.double() @ one.w13[e].double().T).chunk(2, dim=-1)
    return (F.silu(gate) * up) @ one.w2[e].double().T
