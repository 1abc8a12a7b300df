"""Which experts a token goes to, and with what weights."""

from __future__ import annotations

from dataclasses import dataclass

from moec.ir import Builder, Value
from moec.ir.ops.route import SCORES
from moec.ir.types import f32, i64
from moec.models.blocks.base import Declared, width


@dataclass(frozen=True)
class Router(Declared):
    """Scores of a linear gate, the best ``top_k`` of ``experts``.

    score          ``softmax`` over all experts; of each alone ``sigmoid`` (V3) or ``sqrtsoftplus`` (V4)
    renorm         the chosen weights are divided by their sum
    scale          multiplies the weights last
    groups         the experts are that many equal runs, of which the best ``topk_groups`` may be chosen from
    group_score    a group's best score (V2: ``max``) or the sum of its two best (V3: ``top2sum``)
    masked         what the other groups' experts count as when choosing: ``zero`` (V2) or ``neginf`` (V3)
    bias           ``e_score_correction_bias`` [experts] fp32 takes part in choosing, not in the weights (V3)
    fp32           logits in fp32 (DeepSeek), not in the model's dtype
    round_weights  weights rounded to the model's dtype (Qwen, OLMoE), not kept in fp32
    hash_vocab     above 0, a token's experts stand in its row of ``tid2eid`` [hash_vocab, top_k] int64;
                   scores only weigh them (V4's first layers)
    """

    experts: int
    top_k: int
    score: str = "softmax"
    renorm: bool = False
    scale: float = 1.0
    groups: int = 1
    topk_groups: int = 1
    group_score: str = "max"
    masked: str = "neginf"
    bias: bool = False
    fp32: bool = False
    round_weights: bool = False
    hash_vocab: int = 0
    name: str = "gate"

    def check(self) -> None:
        self.need_positive("experts", "top_k", "groups", "topk_groups")
        self.need(self.top_k <= self.experts, f"top_k is {self.top_k} of {self.experts} experts")
        self.need_one_of("score", *SCORES)
        self.need_one_of("group_score", "max", "top2sum")
        self.need_one_of("masked", "zero", "neginf")
        self.need_number("scale")
        self.need_flag("renorm", "bias", "fp32", "round_weights")
        self.need_name("name", empty=True)
        self.need(
            self.experts % self.groups == 0, f"{self.experts} experts don't make {self.groups} equal groups"
        )
        self.need(
            self.topk_groups <= self.groups, f"topk_groups is {self.topk_groups} of {self.groups} groups"
        )
        size = self.experts // self.groups
        self.need(
            self.groups == 1 or size > 1 or self.group_score == "max", "a group of one expert has no two best"
        )
        self.need(
            self.groups == 1 or self.masked == "zero" or self.top_k <= size * self.topk_groups,
            f"top_k is {self.top_k}, but {self.topk_groups} groups of {size} allow {size * self.topk_groups}",
        )

        self.need_natural("hash_vocab")
        self.need(
            not self.hash_vocab or (self.groups == 1 and not self.bias and self.score != "softmax"),
            "hash_vocab: what a table chooses has no groups, bias or softmax",
        )

    def lower(self, b: Builder, x: Value) -> tuple[Value, Value]:
        """x [N, H] to the weights [N, k], best first, and the experts' ids [N, k] int32."""
        with b.scope(self.name):
            weight = b.param("weight", (self.experts, width(x)))
            logits = b.linear(x, weight, acc=f32 if self.fp32 else None, out="logits")
            if self.hash_vocab:
                return self._by_hash(b, logits, b.param("tid2eid", (self.hash_vocab, self.top_k), i64))
            bias = b.param("e_score_correction_bias", (self.experts,), f32) if self.bias else None
        w, id = b.route(
            logits,
            bias,
            score=self.score,
            k=self.top_k,
            renorm=self.renorm,
            scale=float(self.scale),
            dtype=b.dtype if self.round_weights else f32,
            out=("w", "id"),
            **self._grouping(),
        )
        return w, id

    def _by_hash(self, b: Builder, logits: Value, table: Value) -> tuple[Value, Value]:
        w, id = b.hash_route(
            logits,
            table,
            b.context["ids"],
            score=self.score,
            k=self.top_k,
            renorm=self.renorm,
            scale=float(self.scale),
            dtype=b.dtype if self.round_weights else f32,
            out=("w", "id"),
        )
        return w, id

    def _grouping(self) -> dict[str, object]:
        if self.groups == 1:
            return {}
        return {
            "groups": self.groups,
            "topk_groups": self.topk_groups,
            "group_score": self.group_score,
            "masked": self.masked,
        }
