"""The gated MLP (Shazeer 2020, GLU variants)."""

from __future__ import annotations

from dataclasses import dataclass

from moec.ir import Builder, Value
from moec.models.blocks.base import Block, width

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


@dataclass(frozen=True)
class SwiGLU(Block):
    """W_down · (act(W_gate·x) · W_up·x), of ``intermediate`` columns.

    limit: W_gate·x is clamped to at most this, W_up·x up to ± this, before the activation (DeepSeek V4).
    """

    intermediate: int
    act: str = "silu"
    bias: bool = False
    name: str = "mlp"
    limit: float | None = None

    def check(self) -> None:
        self.need_positive("intermediate")
        self.need_one_of("act", *ACTIVATIONS)
        self.need_flag("bias")
        self.need_number(*(["limit"] if self.limit is not None else []), above=0)
        self.need_name("name", empty=True)

    def lower(self, b: Builder, x: Value) -> Value:
        """x [N, H] to [N, H]."""
        with b.scope(self.name):
            tag = "shared." if "shared" in self.name else ""
            gate = b.project(x, "gate_proj", self.intermediate, bias=self.bias, out=f"{tag}gate")
            up = b.project(x, "up_proj", self.intermediate, bias=self.bias, out=f"{tag}up")
            h = b.swiglu(gate, up, act=self.act, limit=self.limit and float(self.limit), out=f"{tag}h")
            return b.project(h, "down_proj", width(x), bias=self.bias, out=f"{tag}down")
