"""Rotary position embedding (Su et al. 2021), plain or stretched beyond the positions of training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from moec.ir import Builder, Value
from moec.models.blocks.base import Declared


@dataclass(frozen=True)
class RoPE(Declared):
    """Pair i of d turns by position · theta^(-2i/d).

    layout: which elements make a pair, ``half`` (x[i], x[i + d/2]) or ``interleaved`` (x[2i], x[2i+1]).
    """

    theta: float = 10000.0
    layout: str = "half"

    def check(self) -> None:
        self.need_number("theta", above=1)  # at 1 all pairs turn alike, below it the later ones faster
        self.need(
            self.layout in ("half", "interleaved"),
            f"layout must be 'half' or 'interleaved', not {self.layout!r}",
        )

    def scaling(self) -> dict[str, Any]:
        """The attributes of ``rope_table`` beyond dim and theta."""
        return {}

    def score_scale(self) -> float:
        """What multiplies the softmax scale of an attention that follows DeepSeek."""
        return 1.0

    def table(self, b: Builder, dim: int) -> tuple[Value, Value]:
        """cos and sin [N, dim/2], made once in the entry function and shared by all layers."""
        key = f"{self!r} of {dim}"
        root = b.context.root
        if f"cos of {key}" not in root:
            cos, sin = root.builder.rope_table(
                root["positions"], dim=dim, theta=float(self.theta), out=("cos", "sin"), **self.scaling()
            )
            root[f"cos of {key}"], root[f"sin of {key}"] = cos, sin
        return b.context[f"cos of {key}"], b.context[f"sin of {key}"]

    def turn(self, b: Builder, x: Value, out: str) -> Value:
        """x [N, d] or [N, heads, d], each pair turned by its angle."""
        cos, sin = self.table(b, int(x.type.shape[-1]))  # type: ignore[union-attr]
        y: Value = b.rope(x, cos, sin, layout=self.layout, out=out)
        return y


@dataclass(frozen=True)
class LinearRoPE(RoPE):
    """Positions divided by ``factor`` (position interpolation, Chen et al. 2023)."""

    factor: float = 1.0

    def check(self) -> None:
        super().check()
        self.need_number("factor", least=1)

    def scaling(self) -> dict[str, Any]:
        return {"scaling": "linear", "factor": float(self.factor)}


@dataclass(frozen=True)
class Llama3RoPE(RoPE):
    """Llama 3.1's: long waves divided by ``factor``, short ones kept, a blend between."""

    factor: float = 8.0
    original: int = 8192
    low: float = 1.0
    high: float = 4.0

    def check(self) -> None:
        super().check()
        self.need_positive("original")
        self.need_number("factor", least=1)
        self.need_number("low", "high", above=0)
        self.need(self.low < self.high, f"low is {self.low}, not below high, {self.high}")

    def scaling(self) -> dict[str, Any]:
        return {
            "scaling": "llama3",
            "factor": float(self.factor),
            "original": self.original,
            "low": float(self.low),
            "high": float(self.high),
        }


@dataclass(frozen=True)
class YaRN(RoPE):
    """Slow pairs divided by ``factor``, fast ones kept, a blend between (Peng et al. 2023).

    original: positions of the first training. cos and sin are multiplied by ``attention_factor``; left out,
    it is m(mscale) / m(mscale_all_dim) where both are given, else m(1); m(s) = 0.1 · s · ln(factor) + 1.
    """

    factor: float = 40.0
    original: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None
    truncate: bool = True

    def check(self) -> None:
        super().check()
        self.need_positive("original")
        self.need_number("factor", least=1)
        self.need_number("beta_fast", "beta_slow", above=0)
        self.need(
            self.beta_fast >= self.beta_slow,
            f"beta_fast is {self.beta_fast}, below beta_slow, {self.beta_slow}",
        )
        self.need_number("mscale", "mscale_all_dim", least=0)
        if self.attention_factor is not None:
            self.need_number("attention_factor", above=0)
        self.need_flag("truncate")

    def _m(self, scale: float) -> float:
        return 0.1 * scale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    def magnitude(self) -> float:
        if self.attention_factor is not None:
            return float(self.attention_factor)
        if self.mscale and self.mscale_all_dim:
            return self._m(self.mscale) / self._m(self.mscale_all_dim)
        return self._m(1.0)

    def score_scale(self) -> float:
        """m(mscale_all_dim)²: once for q, once for k."""
        return self._m(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0

    def scaling(self) -> dict[str, Any]:
        return {
            "scaling": "yarn",
            "factor": float(self.factor),
            "original": self.original,
            "beta_fast": float(self.beta_fast),
            "beta_slow": float(self.beta_slow),
            "truncate": self.truncate,
            "magnitude": self.magnitude(),
        }
