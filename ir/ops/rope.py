"""Rotary position embedding (Su et al. 2021) and the ways of stretching it."""

from __future__ import annotations

import math
from typing import Any

import torch

from moec.ir.attrs import BOOL, FLOAT, INT, choice
from moec.ir.op import Cost, Op, attr, operand, result
from moec.ir.types import TensorType, f32


class RopeTable(Op, name="rope_table"):
    """cos and sin of position · frequency, times ``magnitude``, in fp32.

    Pair i of ``dim`` turns with frequency theta^(-2i/dim). ``scaling`` stretches it: ``linear`` divides by
    ``factor``; ``yarn`` divides the slow pairs, keeps the fast ones and blends linearly between the pairs
    that turn ``beta_fast`` and ``beta_slow`` times over ``original`` positions (Peng et al. 2023); ``llama3``
    blends by wavelength between original/``low`` and original/``high``.
    """

    positions = operand("[N] integers")
    dim = attr(INT, doc="rotary width of a head: two for each pair")
    theta = attr(FLOAT, doc="the base of the frequencies")
    scaling = attr(choice("none", "linear", "yarn", "llama3"), "none")
    factor = attr(FLOAT, 1.0, doc="how far slow pairs are stretched")
    original = attr(INT, 0, doc="positions the model was first trained on")
    beta_fast = attr(FLOAT, 32.0, doc="yarn: pairs that turn more often are kept")
    beta_slow = attr(FLOAT, 1.0, doc="yarn: pairs that turn less often are stretched")
    truncate = attr(BOOL, True, doc="round yarn's blend limits to whole pairs")
    low = attr(FLOAT, 1.0, doc="llama3: pairs that turn less often are stretched")
    high = attr(FLOAT, 4.0, doc="llama3: pairs that turn more often are kept")
    magnitude = attr(FLOAT, 1.0, doc="multiplies cos and sin")
    cos = result("[N, dim/2] fp32")
    sin = result("[N, dim/2] fp32")

    def infer(self) -> tuple[TensorType, TensorType]:
        positions = self.integers(self.positions, 1)
        if self.dim < 2 or self.dim % 2:
            raise self.mismatch(f"dim is {self.dim}, not a positive even number")
        if self.theta <= 1 or self.factor <= 0:
            raise self.mismatch(
                f"theta is {self.theta} (it must exceed 1), factor {self.factor} (it must exceed 0)"
            )
        if self.scaling in ("yarn", "llama3") and self.original < 1:
            raise self.mismatch(
                f"{self.scaling} needs original, the positions trained on, not {self.original}"
            )
        if self.scaling == "yarn" and min(self.beta_fast, self.beta_slow) <= 0:
            raise self.mismatch(
                f"beta_fast is {self.beta_fast}, beta_slow {self.beta_slow}: both must exceed 0"
            )
        if self.scaling == "llama3" and self.low >= self.high:
            raise self.mismatch(f"low is {self.low}, not below high, {self.high}")
        table = TensorType(f32, (*positions.shape, self.dim // 2))
        return table, table

    def cost(self) -> Cost:
        return Cost(3 * self.cos.type.numel, self.moved_bytes())

    @staticmethod
    def reference(
        positions: torch.Tensor, *, magnitude: float, **how: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        frequencies = torch.tensor(rope_frequencies(**how), dtype=torch.float32, device=positions.device)
        angle = positions.to(torch.float32)[:, None] * frequencies
        return angle.cos() * magnitude, angle.sin() * magnitude


def rope_frequencies(
    *,
    dim: int,
    theta: float,
    scaling: str,
    factor: float,
    original: int,
    beta_fast: float,
    beta_slow: float,
    truncate: bool,
    low: float,
    high: float,
) -> list[float]:
    """Radians a position, one a pair, in double precision."""
    plain = [theta ** (-2 * i / dim) for i in range(dim // 2)]
    if scaling == "none":
        return plain
    if scaling == "linear":
        return [f / factor for f in plain]
    if scaling == "llama3":
        out = []
        for f in plain:
            turns = original * f / (2 * math.pi)
            keep = min(max((turns - low) / (high - low), 0.0), 1.0)
            out.append(f * keep + f / factor * (1 - keep))
        return out

    def pair_that_turns(times: float) -> float:
        return dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_that_turns(beta_fast), pair_that_turns(beta_slow)
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    width = last - first or 0.001
    stretch = [min(max((i - first) / width, 0.0), 1.0) for i in range(dim // 2)]
    return [f / factor * s + f * (1 - s) for f, s in zip(plain, stretch, strict=True)]


class Rope(Op, name="rope"):
    """Turns each pair of the last axis by its angle.

    The pairs are (x0, x1), (x2, x3), … in the ``interleaved`` layout and (x0, x[d/2]), … in the ``half``
    layout; the result keeps the operand's layout.
    """

    x = operand("[N, d] or [N, heads, d]")
    cos = operand("[N, d/2]")
    sin = operand("[N, d/2]")
    layout = attr(choice("interleaved", "half"))
    y = result("as x")

    def infer(self) -> TensorType:
        x, cos = self.tensor(self.x), self.tensor(self.cos, 2)
        self.same("the table", cos, self.cos, self.tensor(self.sin, 2), self.sin)
        if cos.dtype != f32:
            raise self.mismatch(f"the table is {cos}, not f32")
        if x.rank not in (2, 3) or x.shape[0] != cos.shape[0] or x.shape[-1] != 2 * cos.shape[1]:
            raise self.mismatch(f"{self.x.text} is {x}, which doesn't fit the table's {cos}")
        return x

    def cost(self) -> Cost:
        return Cost(3 * self.x.type.numel, self.moved_bytes())

    @staticmethod
    def reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, layout: str) -> torch.Tensor:
        if x.dim() == 3:
            cos, sin = cos[:, None], sin[:, None]
        x32 = x.float()
        if layout == "interleaved":
            a, b = x32[..., 0::2], x32[..., 1::2]
            y = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
        else:
            a, b = x32.chunk(2, dim=-1)
            y = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
        return y.to(x.dtype)
