"""Normalisation."""

from __future__ import annotations

import math

import torch

from moec.ir.attrs import FLOAT
from moec.ir.op import Cost, Op, attr, operand, result
from moec.ir.types import TensorType


def check_eps(op: Op, eps: float) -> None:
    if not 0.0 <= eps < math.inf:
        raise op.mismatch(f"eps is {eps}: it must be 0 or more, and finite")


class RMSNorm(Op, name="rms_norm"):
    """x / sqrt(mean(x²) + eps) · w over the last axis, in fp32 and rounded once (Zhang and Sennrich 2019)."""

    x = operand("[..., K]")
    w = operand("[K]")
    eps = attr(FLOAT, doc="keeps the root from zero")
    y = result("[..., K]")

    def infer(self) -> TensorType:
        x, w = self.tensor(self.x, min_rank=1), self.tensor(self.w, 1)
        self.same("K", x.shape[-1], self.x, w.shape[0], self.w)
        check_eps(self, self.eps)
        return x

    def cost(self) -> Cost:
        return Cost(4 * self.x.type.numel, self.moved_bytes())

    @staticmethod
    def reference(x: torch.Tensor, w: torch.Tensor, *, eps: float) -> torch.Tensor:
        x32 = x.float()
        return (x32 / torch.sqrt(x32.square().mean(-1, keepdim=True) + eps) * w.float()).to(x.dtype)


class AddRMSNorm(Op, name="add_rms_norm"):
    """x + residual, rounded once, and the ``rms_norm`` of these rounded sums."""

    x = operand("[..., K]")
    residual = operand("[..., K]")
    w = operand("[K]")
    eps = attr(FLOAT, doc="keeps the root from zero")
    sum = result("[..., K]")
    normed = result("[..., K]")

    def infer(self) -> tuple[TensorType, TensorType]:
        x, w = self.tensor(self.x, min_rank=1), self.tensor(self.w, 1)
        if (residual := self.tensor(self.residual)) != x:
            raise self.mismatch(f"{self.x.text} is {x} but {self.residual.text} is {residual}")
        self.same("K", x.shape[-1], self.x, w.shape[0], self.w)
        check_eps(self, self.eps)
        return x, x

    def cost(self) -> Cost:
        return Cost(5 * self.x.type.numel, self.moved_bytes())

    @staticmethod
    def reference(
        x: torch.Tensor, residual: torch.Tensor, w: torch.Tensor, *, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total = (x.float() + residual.float()).to(x.dtype)
        return total, RMSNorm.reference(total, w, eps=eps)
