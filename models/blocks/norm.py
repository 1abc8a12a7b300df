"""Normalisation."""

from __future__ import annotations

import re
from dataclasses import dataclass

from moec.ir import Builder, Value
from moec.models.blocks.base import Block, width


@dataclass(frozen=True)
class RMSNorm(Block):
    """x / sqrt(mean(x²) + eps) · w over the last axis (Zhang and Sennrich 2019); w is ``{name}.weight``."""

    eps: float = 1e-6
    name: str = "norm"
    out: str = ""

    def check(self) -> None:
        self.need_number("eps", above=0)
        self.need_name("name")
        self.need_name("out", empty=True)
        value = self.out or self.name
        self.need(
            re.match(r"[A-Za-z_]", value) is not None, f"no value can have the name {value!r}: give out"
        )

    def lower(self, b: Builder, x: Value) -> Value:
        weight = b.param(f"{self.name}.weight", (width(x),))
        y: Value = b.rms_norm(x, weight, eps=float(self.eps), out=self.out or self.name)
        return y
