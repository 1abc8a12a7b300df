"""Routers: a token's experts and their weights, alone or with the sort by expert."""

from __future__ import annotations

from typing import Any

import torch

from moec.ir.attrs import BOOL, DTYPE, FLOAT, INT, choice
from moec.ir.op import Cost, Op, attr, operand, result
from moec.ir.ops.moe import SortByExpert
from moec.ir.types import TensorType, f32, i32

SCORES = ("softmax", "sigmoid", "sqrtsoftplus")


def scores_of(logits: torch.Tensor, score: str) -> torch.Tensor:
    """[T, E] fp32: softmax over the experts, or of each alone sigmoid (V3) or sqrt(ln(1 + e^x)) (V4)."""
    x = logits.float()
    if score == "softmax":
        return x.softmax(-1)
    return x.sigmoid() if score == "sigmoid" else torch.nn.functional.softplus(x).sqrt()


class Route(Op, name="route"):
    """Scores the experts of each token and picks k; equal scores go to the lower id.

    The bias takes part in choosing, not in the weights (Wang et al. 2024, loss-free balancing). With
    ``groups`` > 1 the choice is among the experts of the ``topk_groups`` best groups (DeepSeek V2 and V3).
    Behind its choices every token takes the experts E … E + ``shared`` - 1, with weight 1.
    """

    logits = operand("[T, E] fp32 or the model's dtype")
    bias = operand("[E] fp32", optional=True)
    score = attr(
        choice(*SCORES), doc="turns logits into scores, in fp32; sqrtsoftplus is sqrt(ln(1 + e^x)) (V4)"
    )
    k = attr(INT, doc="experts a token")
    renorm = attr(BOOL, False, doc="divide the chosen weights by their sum + 1e-20")
    scale = attr(FLOAT, 1.0, doc="multiplies the weights last")
    groups = attr(INT, 1, doc="equal runs of experts")
    topk_groups = attr(INT, 1, doc="groups that may be chosen from")
    group_score = attr(
        choice("max", "top2sum"), "max", doc="a group's score: its best, or its two best summed"
    )
    masked = attr(
        choice("zero", "neginf"), "neginf", doc="what experts of other groups score (V2: 0, V3: -inf)"
    )
    dtype = attr(DTYPE, f32, doc="what the weights are rounded to")
    shared = attr(INT, 0, doc="experts beyond E that every token takes")
    w = result("[T, k + shared] weights, best first")
    id = result("[T, k + shared] int32 expert ids")

    def infer(self) -> tuple[TensorType, TensorType]:
        logits = self.tensor(self.logits, 2)
        tokens, experts = logits.shape
        if self.bias is not None:
            self.same("E", experts, self.logits, self.tensor(self.bias, 1).shape[0], self.bias)
        if not isinstance(experts, int) or not 0 < self.k <= experts:
            raise self.mismatch(f"k is {self.k} of {experts} experts")
        if self.groups < 1 or experts % self.groups or not 0 < self.topk_groups <= self.groups:
            raise self.mismatch(
                f"can't part {experts} experts into {self.groups} groups and keep {self.topk_groups}"
            )
        if self.group_score == "top2sum" and self.groups > 1 and experts // self.groups < 2:
            raise self.mismatch("a group of one expert has no two best")
        if self.masked == "neginf" and self.k > experts // self.groups * self.topk_groups:
            raise self.mismatch(
                f"k is {self.k}, but the groups allow {experts // self.groups * self.topk_groups}"
            )
        if self.shared < 0:
            raise self.mismatch(f"shared is {self.shared}")
        chosen = (tokens, self.k + self.shared)
        return TensorType(self.dtype, chosen), TensorType(i32, chosen)

    def cost(self) -> Cost:
        return Cost(6 * self.logits.type.numel, self.moved_bytes())

    @staticmethod
    def reference(
        logits: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        score: str,
        k: int,
        renorm: bool,
        scale: float,
        groups: int,
        topk_groups: int,
        group_score: str,
        masked: str,
        dtype: Any,
        shared: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scores = scores_of(logits, score)
        choice = scores if bias is None else scores + bias.float()
        tokens, experts = scores.shape
        if groups > 1:
            by_group = choice.view(tokens, groups, experts // groups)
            best = by_group.sort(dim=-1, descending=True).values
            group = best[..., :2].sum(-1) if group_score == "top2sum" else best[..., 0]
            kept = group.sort(dim=-1, descending=True, stable=True).indices[:, :topk_groups]
            allowed = torch.zeros(tokens, groups, dtype=torch.bool, device=logits.device)
            allowed = allowed.scatter(1, kept, True)
            allowed = allowed.repeat_interleave(experts // groups, dim=1)
            if masked == "zero":
                scores = scores.masked_fill(~allowed, 0.0)
            choice = choice.masked_fill(~allowed, 0.0 if masked == "zero" else -torch.inf)
        ids = choice.sort(dim=-1, descending=True, stable=True).indices[:, :k]
        weights = scores.gather(1, ids)
        if renorm:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        w, ids = (weights * scale).to(dtype.torch), ids.to(torch.int32)
        always = torch.arange(experts, experts + shared, dtype=torch.int32, device=ids.device)
        return (
            torch.cat([w, w.new_ones(tokens, shared)], dim=1),
            torch.cat([ids, always.expand(tokens, shared)], dim=1),
        )


class RouteSort(Route, name="route_sort"):
    """``route``, and its choices' slots in the order of ``sort_by_expert``, of all E + ``shared`` experts.

    Expert e owns rows off[e]:off[e+1] of the sorted order.
    """

    slot = result("[T·(k + shared)] int32")
    off = result("[E + shared + 1] int32")

    def infer(self) -> tuple[TensorType, ...]:  # type: ignore[override]
        w, id = super().infer()
        experts = int(self.tensor(self.logits).shape[1]) + self.shared
        return w, id, TensorType(i32, (id.numel,), groups=experts), TensorType(i32, (experts + 1,))

    def cost(self) -> Cost:
        return Cost(6 * self.logits.type.numel, self.moved_bytes())

    @staticmethod
    def reference(  # type: ignore[override]
        logits: torch.Tensor, bias: torch.Tensor | None = None, **how: Any
    ) -> tuple[torch.Tensor, ...]:
        w, id = Route.reference(logits, bias, **how)
        return w, id, *SortByExpert.reference(id, experts=logits.shape[1] + how["shared"])
