"""Dense products and the embedding."""

from __future__ import annotations

from typing import Any

import torch

from moec.ir.attrs import DTYPE
from moec.ir.op import Cost, Op, attr, operand, result
from moec.ir.ops.scaled import product_dtype, product_types
from moec.ir.scaled import product, rounds_to
from moec.ir.types import TensorType


class Linear(Op, name="linear"):
    """x · wᵀ + bias, accumulated in fp32 and rounded once.

    ``acc`` keeps the result in a wider dtype than x: DeepSeek's router logits are fp32.

    Of scaled operands (both are, or neither) the products of e4m3 values are summed in fp32 along K up to
    where a scale of x or of w changes; that sum times the two scales is added up in fp32, then the bias.
    """

    products = True
    x = operand("[..., K]")
    w = operand("[N, K]")
    bias = operand("[N]", optional=True)
    acc = attr(DTYPE, None, doc="dtype of the result; x's own where it is left out, bf16 of scaled x")
    y = result("[..., N]")

    def infer(self) -> TensorType:
        self.tensor(self.w, 2, scaled=True)
        x, w = product_types(self, self.x, self.w)
        self.same("K", x.shape[-1], self.x, w.shape[1], self.w)
        if self.bias is not None:
            bias = self.tensor(self.bias, 1)
            self.same("N", bias.shape[0], self.bias, w.shape[0], self.w)
        return TensorType(product_dtype(self, x, self.acc), (*x.shape[:-1], w.shape[0]), x.groups)

    def cost(self) -> Cost:
        return Cost(2 * self.x.type.numel * self.w.type.shape[0], self.moved_bytes())

    @staticmethod
    def reference(x: Any, w: Any, bias: torch.Tensor | None = None, *, acc: Any = None) -> torch.Tensor:
        y = product(x, w)
        if bias is not None:
            y = y + bias.float()
        return y.to(rounds_to(x, acc))


class Embedding(Op, name="embedding"):
    """Row ids[n] of the table."""

    ids = operand("[N] integers in [0, vocab)")
    table = operand("[vocab, H]")
    h = result("[N, H]")

    def infer(self) -> TensorType:
        ids, table = self.integers(self.ids), self.tensor(self.table, 2)
        return TensorType(table.dtype, (*ids.shape, table.shape[1]))

    def cost(self) -> Cost:
        return Cost(0, self.ids.type.nbytes + 2 * self.h.type.nbytes)

    @staticmethod
    def reference(ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return table[ids.long()]
