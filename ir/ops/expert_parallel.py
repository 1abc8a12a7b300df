"""Expert parallelism: the part of the routing that is for the experts of one rank."""

from __future__ import annotations

import torch

from moec.ir.attrs import INT
from moec.ir.op import Op, attr, operand, result
from moec.ir.types import TensorType


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
