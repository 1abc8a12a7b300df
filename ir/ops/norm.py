"""Normalisation."""

from __future__ import annotations

import math
from typing import Any

import torch

from moec.ir.attrs import BLOCK, FLOAT
from moec.ir.op import Cost, Op, Value, attr, operand, result
from moec.ir.ops.scaled import SCALE_FORMAT, quantized
from moec.ir.scaled import quantize
from moec.ir.types import TensorType


def check_eps(op: Op, eps: float) -> None:
    if not 0.0 <= eps < math.inf:
        raise op.mismatch(f"eps is {eps}: it must be 0 or more, and finite")


def _normed(op: Op, x: Value, type: TensorType, quant: tuple[int, ...] | None, scale: str) -> TensorType:
    """The type of normed rows of ``x``: plain, or with scales."""
    if quant is not None:
        return quantized(op, x, type, quant)
    if scale != "fp32":
        raise op.mismatch(f"scale is {scale}, but quant isn't given")
    return type


class RMSNorm(Op, name="rms_norm"):
    """x / sqrt(mean(x²) + eps) · w over the last axis, in fp32 and rounded once (Zhang and Sennrich 2019).

    With ``quant`` these rounded rows are quantised as by the op of that name.
    """

    x = operand("[..., K]")
    w = operand("[K]")
    eps = attr(FLOAT, doc="keeps the root from zero")
    quant = attr(BLOCK, None, doc="the result is quantised with scales for these blocks, `1x128`")
    scale = attr(SCALE_FORMAT, "fp32", doc="quant's: powers of two with ue8m0")
    y = result("[..., K]; with quant scaled")

    def infer(self) -> TensorType:
        x, w = self.tensor(self.x, min_rank=1), self.tensor(self.w, 1)
        self.same("K", x.shape[-1], self.x, w.shape[0], self.w)
        check_eps(self, self.eps)
        return _normed(self, self.x, x, self.quant, self.scale)

    def cost(self) -> Cost:
        return Cost((6 if self.quant else 4) * self.x.type.numel, self.moved_bytes())

    @staticmethod
    def reference(
        x: torch.Tensor,
        w: torch.Tensor,
        *,
        eps: float,
        quant: tuple[int, ...] | None = None,
        scale: str = "fp32",
    ) -> Any:
        x32 = x.float()
        y = (x32 / torch.sqrt(x32.square().mean(-1, keepdim=True) + eps) * w.float()).to(x.dtype)
        return y if quant is None else quantize(y, quant, scale)


class AddRMSNorm(Op, name="add_rms_norm"):
    """x + residual, rounded once, and the ``rms_norm`` of these rounded sums, with its ``quant``."""

    x = operand("[..., K]")
    residual = operand("[..., K]")
    w = operand("[K]")
    eps = attr(FLOAT, doc="keeps the root from zero")
    quant = attr(BLOCK, None, doc="normed is quantised with scales for these blocks, `1x128`")
    scale = attr(SCALE_FORMAT, "fp32", doc="quant's: powers of two with ue8m0")
    sum = result("[..., K]")
    normed = result("[..., K]; with quant scaled")

    def infer(self) -> tuple[TensorType, TensorType]:
        x, w = self.tensor(self.x, min_rank=1), self.tensor(self.w, 1)
        if (residual := self.tensor(self.residual)) != x:
            raise self.mismatch(f"{self.x.text} is {x} but {self.residual.text} is {residual}")
        self.same("K", x.shape[-1], self.x, w.shape[0], self.w)
        check_eps(self, self.eps)
        return x, _normed(self, self.x, x, self.quant, self.scale)

    def cost(self) -> Cost:
        return Cost((7 if self.quant else 5) * self.x.type.numel, self.moved_bytes())

    @staticmethod
    def reference(
        x: torch.Tensor,
        residual: torch.Tensor,
        w: torch.Tensor,
        *,
        eps: float,
        quant: tuple[int, ...] | None = None,
        scale: str = "fp32",
    ) -> tuple[torch.Tensor, Any]:
        total = (x.float() + residual.float()).to(x.dtype)
        return total, RMSNorm.reference(total, w, eps=eps, quant=quant, scale=scale)


class AddRMSNormAndQuant(AddRMSNorm, name="add_rms_norm_and_quant"):
    """``add_rms_norm`` with its ``quant``, and the normed rows before it: those that a router reads."""

    quant = attr(BLOCK, doc="of the blocks that share a scale, `1x128`")
    normed = result("[..., K]")
    quantised = result("[..., K], scaled")

    def infer(self) -> tuple[TensorType, ...]:  # type: ignore[override]
        total, quantised = super().infer()
        return total, total, quantised

    def cost(self) -> Cost:
        return Cost(7 * self.x.type.numel, self.moved_bytes())

    @staticmethod
    def reference(  # type: ignore[override]
        x: torch.Tensor,
        residual: torch.Tensor,
        w: torch.Tensor,
        *,
        eps: float,
        quant: tuple[int, ...],
        scale: str = "fp32",
    ) -> tuple[Any, ...]:
        total, normed = AddRMSNorm.reference(x, residual, w, eps=eps)
        return total, normed, quantize(normed, quant, scale)
