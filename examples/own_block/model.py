"""A model of one's own, with a block of one's own.

    moec build examples/own_block/model.py:model --out build/own
    moec show build/own --function layer.scaledmoe
    moec verify build/own

``ScaledMoE`` is an ordinary MoE layer behind a second norm, its output scaled channel by channel. It says
what it computes, in plain ops. That its experts become two grouped products is the compiler's doing: passes
look at the structure, not at a block's name.
"""

from __future__ import annotations

from dataclasses import dataclass

from moec.ir import Builder, Value
from moec.models import GQA, Block, Decoder, Experts, Layer, Model, MoE, RMSNorm, RoPE, Router, SwiGLU

HIDDEN = 64


@dataclass(frozen=True)
class ScaledMoE(Block):
    """y = moe(norm(x)) · scale, with a learned ``output_scale.weight`` [H]."""

    moe: MoE

    def lower(self, b: Builder, x: Value) -> Value:
        """x [N, H] to [N, H]."""
        inner = RMSNorm(1e-6, "inner_norm", out="inner").lower(b, x)
        y = self.moe.lower(b, inner)
        scaled: Value = b.mul(y, b.param("output_scale.weight", (HIDDEN,)), out="scaled")
        return scaled


def model() -> Model:
    attention = GQA(heads=4, kv_heads=2, head_dim=16, rope=RoPE(theta=10000.0))
    routed = MoE(Router(experts=10, top_k=3, renorm=True), Experts(count=10, intermediate=48))
    dense = Decoder(attn=attention, mlp=SwiGLU(intermediate=160))
    sparse = Decoder(attn=attention, mlp=ScaledMoE(routed))
    layers = [dense, sparse, sparse, dense]
    return Model(name="own-block", vocab=256, hidden=HIDDEN, layers=layers, dtype="f32")


# A kernel engineer's size: one layer, compiled to forward(x).
def layer() -> Layer:
    routed = MoE(Router(experts=10, top_k=3, renorm=True), Experts(count=10, intermediate=48))
    return Layer(ScaledMoE(routed), hidden=HIDDEN, dtype="f32", name="scaled-moe")
