"""Sorting and quantising side by side: slots by expert, and the rows that the experts are going to read."""

from __future__ import annotations

from typing import Any

import torch

from moec.ir.attrs import BLOCK
from moec.ir.op import Cost, Op, Value, attr, operand, result
from moec.ir.ops.expert_parallel import LocalSort
from moec.ir.ops.moe import SortByExpert
from moec.ir.ops.route import RouteSort
from moec.ir.ops.scaled import SCALE_FORMAT, quantized
from moec.ir.scaled import quantize

_BLOCK = "of the blocks of x that share a scale, `1x128`"
_FORMAT = "x's scales: powers of two with ue8m0"


class _AndQuant(Op):
    """Neither part reads what the other makes. They are one op because they fit into one launch, of which
    some blocks sort while others quantise.
    """

    x: Any
    quant: Any

    def infer(self) -> Any:
        sorted = super().infer()
        by_token: Value = self.operands[0]  # type: ignore[assignment]
        x, tokens = self.tensor(self.x, 2), self.tensor(by_token).shape[0]
        self.same("T", tokens, by_token, x.shape[0], self.x)
        return *sorted, quantized(self, self.x, x, self.quant)

    def cost(self) -> Cost:
        return super().cost() + Cost(2 * self.x.type.numel)


class RouteSortAndQuant(_AndQuant, RouteSort, name="route_sort_and_quant"):
    """``route_sort``, and the ``quant`` of x: bit for bit as by these two."""

    x = operand("[T, K]: what the experts read")
    quant = attr(BLOCK, doc=_BLOCK)
    quant_scale = attr(SCALE_FORMAT, "fp32", doc=_FORMAT)
    quantised = result("[T, K], scaled")

    @staticmethod
    def reference(  # type: ignore[override]
        logits: torch.Tensor,
        bias: torch.Tensor | None,
        x: torch.Tensor,
        *,
        quant: tuple[int, ...],
        quant_scale: str,
        **how: Any,
    ) -> tuple[Any, ...]:
        return *RouteSort.reference(logits, bias, **how), quantize(x, quant, quant_scale)


class LocalSortAndQuant(_AndQuant, LocalSort, name="local_sort_and_quant"):
    """``local_sort``, and the ``quant`` of x: bit for bit as by these two."""

    x = operand("[T, K]: what the experts read")
    quant = attr(BLOCK, doc=_BLOCK)
    quant_scale = attr(SCALE_FORMAT, "fp32", doc=_FORMAT)
    quantised = result("[T, K], scaled")

    @staticmethod
    def reference(  # type: ignore[override]
        w: torch.Tensor,
        id: torch.Tensor,
        x: torch.Tensor,
        *,
        quant: tuple[int, ...],
        quant_scale: str,
        **how: Any,
    ) -> tuple[Any, ...]:
        return *LocalSort.reference(w, id, **how), quantize(x, quant, quant_scale)


class SortByExpertAndQuant(_AndQuant, SortByExpert, name="sort_by_expert_and_quant"):
    """``sort_by_expert``, and the ``quant`` of x: bit for bit as by these two."""

    x = operand("[T, K]: what the experts read")
    quant = attr(BLOCK, doc=_BLOCK)
    quant_scale = attr(SCALE_FORMAT, "fp32", doc=_FORMAT)
    quantised = result("[T, K], scaled")

    @staticmethod
    def reference(  # type: ignore[override]
        id: torch.Tensor, x: torch.Tensor, *, quant: tuple[int, ...], quant_scale: str, **how: Any
    ) -> tuple[Any, ...]:
        return *SortByExpert.reference(id, **how), quantize(x, quant, quant_scale)
