"""Rows to quantise, with numbers of all sizes, NaN and infinities; and whether bits are equal."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

KINDS = ("normal", "odd", "zeros", "tiny", "huge", "each its own size", "powers of two")


def rows(dtype: torch.dtype, tokens: int, depth: int, kind: str, seed: int) -> Tensor:
    """x [tokens, depth]. ``odd`` has NaN, infinities and -0; amax / 448 is near one of ``powers of two``."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, depth, generator=generator)
    if kind == "odd":
        values = torch.tensor([torch.nan, -torch.nan, torch.inf, -torch.inf, -0.0])
        which = torch.randint(0, len(values), x.shape, generator=generator)
        x = torch.where(torch.rand(x.shape, generator=generator) < 0.1, values[which], x)
    elif kind == "zeros":
        x = x.sign() * 0.0
    elif kind == "tiny":
        x = x * 1e-5
    elif kind == "huge":
        x = x * torch.finfo(dtype).max / 8
    elif kind == "each its own size":
        x = x * torch.randint(-12, 12, x.shape, generator=generator).exp2()
    elif kind == "powers of two":
        x = x.clamp(-3.0, 3.0)
        x[:, ::128] = torch.tensor([448.0, 3.5, 448.00003, 447.99997])[torch.arange(tokens) % 4, None]
    return x.to(dtype)


def equal_bits(found: Any, wanted: Any) -> None:
    """Of values and scales, which come first in both."""
    assert torch.equal(found[0].view(torch.uint8), wanted[0].view(torch.uint8))
    torch.testing.assert_close(found[1], wanted[1], rtol=0, atol=0, equal_nan=True)
