"""One decoder layer."""

from __future__ import annotations

from dataclasses import dataclass

from moec.ir import Builder, Value
from moec.models.blocks.base import Block, lower_stream
from moec.models.blocks.moe import MoE
from moec.models.blocks.norm import RMSNorm
from moec.models.blocks.swiglu import SwiGLU


@dataclass(frozen=True)
class Decoder(Block):
    """x + attn(norm(x)), then that + mlp(norm(that)).

    ``attn`` and ``mlp`` are any blocks. ``name`` is what the layer's function is called after ``layer.``;
    left out, it is ``moe``, ``dense`` or the name of the mlp's class.
    """

    attn: Block
    mlp: Block
    eps: float = 1e-6
    attn_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    name: str = ""

    def check(self) -> None:
        self.need_a("attn", Block)
        self.need_a("mlp", Block)
        self.need_number("eps", above=0)
        self.need_name("attn_norm", "mlp_norm")
        self.need_text("name")

    @property
    def cache_entries(self) -> tuple[tuple[int, ...], ...]:
        """What its blocks keep in the cache, each shape once."""
        entries = (self.attn.cache_entry, self.mlp.cache_entry)
        return tuple(dict.fromkeys(e for e in entries if e is not None))

    @property
    def label(self) -> str:
        if self.name:
            return self.name
        if isinstance(self.mlp, MoE):
            return "moe"
        return "dense" if isinstance(self.mlp, SwiGLU) else type(self.mlp).__name__.lower()

    def lower(self, b: Builder, x: Value) -> Value:
        """x [N, H] to [N, H]."""
        attn_in = RMSNorm(self.eps, self.attn_norm, out="attn.in").lower(b, x)
        x = b.add(x, lower_stream(self.attn, b, attn_in), out="x.attn")
        mlp_in = RMSNorm(self.eps, self.mlp_norm, out="mlp.in").lower(b, x)
        y: Value = b.add(x, lower_stream(self.mlp, b, mlp_in), out="x.mlp")
        return y
