"""Expert parallelism: the part of the routing that is for the experts of one rank."""

from __future__ import annotations

import torch

from moec.ir.attrs import INT
from moec.ir.op import Op, attr, operand, result
from moec.ir.ops.moe import SortByExpert
from moec.ir.types import TensorType, i32


class LocalExperts(Op, name="local_experts"):
    """The choices of experts first … first + experts - 1, numbered from 0.

    Every other choice, of another rank or of no expert, becomes number ``experts``, and its weight zero even
    where it was NaN or infinite: what comes of it can't reach a sum.
    """

    w = operand("[T, k]")
    id = operand("[T, k] integers")
    first = attr(INT, 0, doc="the number of the first expert that is here")
    experts = attr(INT, doc="how many are here")
    kept = result("[T, k]: w, zero where the choice isn't here")
    local = result("[T, k]: numbers from 0 to experts")

    def infer(self) -> tuple[TensorType, TensorType]:
        w, id = self.tensor(self.w, 2), self.integers(self.id, 2)
        self.same("T", w.shape[0], self.w, id.shape[0], self.id)
        self.same("k", w.shape[1], self.w, id.shape[1], self.id)
        if self.experts < 1 or self.first < 0:
            raise self.mismatch(f"experts is {self.experts} and first {self.first}")
        return w, id

    @staticmethod
    def reference(
        w: torch.Tensor, id: torch.Tensor, *, first: int, experts: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        here = (id >= first) & (id < first + experts)
        kept, local = torch.zeros_like(w), torch.full_like(id, experts)
        kept[here], local[here] = w[here], id[here] - first
        return kept, local


class LocalSort(LocalExperts, name="local_sort"):
    """``local_experts``, and the kept choices' slots in the order of ``sort_by_expert``.

    Expert e, numbered from 0, owns rows off[e]:off[e+1] of the sorted order; behind them come the slots of
    choices that aren't here.
    """

    slot = result("[T·k] int32")
    off = result("[experts + 1] int32")

    def infer(self) -> tuple[TensorType, ...]:  # type: ignore[override]
        kept, local = super().infer()
        slot = TensorType(i32, (local.numel,), groups=self.experts)
        return kept, local, slot, TensorType(i32, (self.experts + 1,))

    @staticmethod
    def reference(  # type: ignore[override]
        w: torch.Tensor, id: torch.Tensor, *, first: int, experts: int
    ) -> tuple[torch.Tensor, ...]:
        kept, local = LocalExperts.reference(w, id, first=first, experts=experts)
        return kept, local, *SortByExpert.reference(local, experts=experts)
