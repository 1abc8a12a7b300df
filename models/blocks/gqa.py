"""Grouped-query attention (Ainslie et al. 2023). As many key heads as query heads: MHA; one: MQA."""

from __future__ import annotations

from dataclasses import dataclass

from moec.ir import Builder, Value
from moec.models.blocks.base import Block, tensor, width
from moec.models.blocks.cache import attend, through_cache
from moec.models.blocks.norm import RMSNorm
from moec.models.blocks.rope import RoPE


@dataclass(frozen=True)
class GQA(Block):
    """softmax(q·kᵀ · scale)·v with ``heads`` query heads that share ``kv_heads`` key heads.

    The cache keeps each token's keys, after RoPE, then its values: [2 · kv_heads, head_dim].

    qkv_bias, out_bias  biases of q_proj, k_proj, v_proj and of o_proj
    qk_norm             None, ``head`` (Qwen3: over each head) or ``full`` (OLMoE: over all heads at once)
    window              keys that a query sees, its own included; 0: all
    clip                q, k and v are clamped to ±clip before RoPE (OLMoE's clip_qkv); None: not at all
    scale               of the scores; left out, head_dim^-0.5
    """

    heads: int
    kv_heads: int
    head_dim: int
    rope: RoPE = RoPE()  # noqa: RUF009 - frozen
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: str | None = None
    window: int = 0
    clip: float | None = None
    scale: float | None = None
    eps: float = 1e-6
    name: str = "self_attn"

    def check(self) -> None:
        self.need_positive("heads", "kv_heads", "head_dim")
        self.need(
            self.heads % self.kv_heads == 0,
            f"{self.heads} query heads can't share {self.kv_heads} key heads equally",
        )
        self.need(self.head_dim % 2 == 0, f"head_dim is {self.head_dim}: RoPE turns pairs")
        self.need(
            self.qk_norm in (None, "head", "full"), f"qk_norm is None, 'head' or 'full', not {self.qk_norm!r}"
        )
        self.need_flag("qkv_bias", "out_bias")
        self.need_natural("window")
        self.need_number("eps", *(n for n in ("clip", "scale") if getattr(self, n) is not None), above=0)
        self.need_a("rope", RoPE)
        self.need_name("name", empty=True)

    @property
    def cache_entry(self) -> tuple[int, ...]:  # type: ignore[override]
        return (2 * self.kv_heads, self.head_dim)

    @property
    def softmax_scale(self) -> float:
        return float(self.head_dim**-0.5) if self.scale is None else float(self.scale)

    def lower(self, b: Builder, x: Value) -> Value:
        """x [N, H] to [N, H]."""
        with b.scope(self.name):
            q = self._heads(b, x, "q", self.heads)  # [N, heads, D]
            k = self._heads(b, x, "k", self.kv_heads)
            v = self._heads(b, x, "v", self.kv_heads)
            q, k = self.rope.turn(b, q, out="q.rope"), self.rope.turn(b, k, out="k.rope")
            seen = through_cache(b, b.concat(k, v, axis=1, out="k_v"))  # [S, 2·kv_heads, D]
            k, v = b.split(seen, sizes=(self.kv_heads, self.kv_heads), axis=1, out=("k.all", "v.all"))
            o = attend(b, q, k, v, scale=self.softmax_scale, window=self.window)
            o = b.reshape(o, shape=(tensor(x).shape[0], self.heads * self.head_dim), out="o.flat")
            return b.project(o, "o_proj", width(x), bias=self.out_bias, out="attn")

    def _heads(self, b: Builder, x: Value, which: str, heads: int) -> Value:
        """q, k or v of each head, [N, heads, D]: projected, normed and clamped as the family does."""
        y = b.project(x, f"{which}_proj", heads * self.head_dim, bias=self.qkv_bias, out=f"{which}.flat")
        norm = RMSNorm(self.eps, f"{which}_norm", out=f"{which}.norm") if which != "v" else None
        if norm and self.qk_norm == "full":
            y = norm.lower(b, y)
        if self.clip is not None:
            y = b.clamp(y, lo=-float(self.clip), hi=float(self.clip), out=f"{which}.clip")
        y = b.reshape(y, shape=(tensor(x).shape[0], heads, self.head_dim), out=which)
        return norm.lower(b, y) if norm and self.qk_norm == "head" else y
