"""Multi-head latent attention (DeepSeek-V2 report, section 2.1)."""

from __future__ import annotations

from dataclasses import dataclass

from moec.ir import Builder, Value
from moec.models.blocks.base import Block, tensor, width
from moec.models.blocks.cache import attend, through_cache
from moec.models.blocks.norm import RMSNorm
from moec.models.blocks.rope import RoPE


@dataclass(frozen=True)
class MLA(Block):
    """Attention whose keys and values are W_UK·c and W_UV·c of one small latent c a token.

    The cache keeps c after its norm and the rotary key, shared by all heads, after RoPE: kv_lora_rank +
    qk_rope_head_dim elements. Lowered expanded: c becomes full keys and values, then ordinary attention.

    q_lora_rank   None: q is projected in one step, without a norm
    bias          on q_a_proj, kv_a_proj_with_mqa and o_proj
    scale         of the scores; left out, (nope + rope)^-0.5, times m² with YaRN
    eps           of the two latent norms: 1e-6 in every DeepSeek model, whatever the others use
    """

    heads: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    kv_lora_rank: int
    q_lora_rank: int | None = None
    rope: RoPE = RoPE(layout="interleaved")  # noqa: RUF009 - frozen
    bias: bool = False
    scale: float | None = None
    eps: float = 1e-6
    name: str = "self_attn"

    def check(self) -> None:
        self.need_positive("heads", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank")
        if self.q_lora_rank is not None:
            self.need_positive("q_lora_rank")
        self.need(
            self.qk_rope_head_dim % 2 == 0, f"qk_rope_head_dim is {self.qk_rope_head_dim}: RoPE turns pairs"
        )
        self.need_a("rope", RoPE)
        self.need_flag("bias")
        self.need_number("eps", *([] if self.scale is None else ["scale"]), above=0)
        self.need_name("name", empty=True)

    @property
    def cache_entry(self) -> tuple[int, ...]:  # type: ignore[override]
        return (self.kv_lora_rank + self.qk_rope_head_dim,)

    @property
    def softmax_scale(self) -> float:
        """(P + R)^-0.5 · m²: the expanded head's width, never the latent's."""
        if self.scale is not None:
            return float(self.scale)
        return float((self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5) * self.rope.score_scale()

    def lower(self, b: Builder, x: Value) -> Value:
        """x [N, H] to [N, H]."""
        P, R, V = self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim
        with b.scope(self.name):
            q = self._queries(b, x)  # [N, heads, P+R]
            seen = through_cache(b, self._latent(b, x))  # [S, C+R]
            c, k_pe = b.split(seen, sizes=(self.kv_lora_rank, R), out=("c.all", "k_pe.all"))
            kv = b.project(c, "kv_b_proj", self.heads * (P + V), out="kv_b")
            kv = b.reshape(kv, shape=(tensor(kv).shape[0], self.heads, P + V), out="kv_b.heads")
            k_nope, v = b.split(kv, sizes=(P, V), out=("k_nope", "v"))
            k_pe = b.broadcast(k_pe, axis=1, size=self.heads, out="k_pe.heads")
            k = b.concat(k_nope, k_pe, axis=-1, out="k")  # [S, heads, P+R]
            o = attend(b, q, k, v, scale=self.softmax_scale)
            o = b.reshape(o, shape=(tensor(x).shape[0], self.heads * V), out="o.flat")
            return b.project(o, "o_proj", width(x), bias=self.bias, out="attn")

    def _queries(self, b: Builder, x: Value) -> Value:
        P, R = self.qk_nope_head_dim, self.qk_rope_head_dim
        if self.q_lora_rank is None:
            q = b.project(x, "q_proj", self.heads * (P + R), out="q.flat")
        else:
            q_a = b.project(x, "q_a_proj", self.q_lora_rank, bias=self.bias, out="q_a")
            q_a = RMSNorm(self.eps, "q_a_layernorm", out="q_a.norm").lower(b, q_a)
            q = b.project(q_a, "q_b_proj", self.heads * (P + R), out="q.flat")
        q = b.reshape(q, shape=(tensor(x).shape[0], self.heads, P + R), out="q.heads")
        q_nope, q_pe = b.split(q, sizes=(P, R), out=("q_nope", "q_pe"))
        q_pe = self.rope.turn(b, q_pe, out="q_pe.rope")
        both: Value = b.concat(q_nope, q_pe, axis=-1, out="q")
        return both

    def _latent(self, b: Builder, x: Value) -> Value:
        """The cache's entry [N, C+R]: c after the norm, k_pe after RoPE."""
        C, R = self.kv_lora_rank, self.qk_rope_head_dim
        kv_a = b.project(x, "kv_a_proj_with_mqa", C + R, bias=self.bias, out="kv_a")
        c, k_pe = b.split(kv_a, sizes=(C, R), out=("c", "k_pe"))
        c = RMSNorm(self.eps, "kv_a_layernorm", out="c.norm").lower(b, c)
        k_pe = self.rope.turn(b, k_pe, out="k_pe.rope")
        latent: Value = b.concat(c, k_pe, axis=-1, out="latent")
        return latent
