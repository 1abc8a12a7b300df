"""Routing and the experts' products: the router's choice and the sort by expert in one."""

from __future__ import annotations

from typing import Any

import torch

from moec.ir.op import Cost, result
from moec.ir.ops.moe import Route, SortByExpert
from moec.ir.types import TensorType, i32


class RouteSort(Route, name="route_sort"):
    """``route``, and its choices' slots in the order of ``sort_by_expert``, of all E + ``shared`` experts.

    Expert e owns rows off[e]:off[e+1] of the sorted order.
    """

    launches = 2  # the order needs every token's choice
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
