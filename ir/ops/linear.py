"""Dense products and the embedding."""

from __future__ import annotations

from typing import Any

import torch

from moec.ir.attrs import BOOL, DTYPE
from moec.ir.op import Cost, Op, attr, operand, result
from moec.ir.ops.scaled import product_dtype, product_types
from moec.ir.scaled import Scaled, product, rounds_to
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


class HeadLinear(Op, name="head_linear"):
    """Each head's x · wᵀ by a weight of its own, accumulated in fp32 and rounded once.

    A w with scales is multiplied as the numbers that it means, rounded to x's dtype: x itself is never
    quantised, as one head's rows of a token are too few to fill an fp8 product's tile.
    """

    products = True
    x = operand("[N, heads, K]")
    w = operand("[heads, M, K], or [heads, K, M] where it is transposed; of x's dtype, or fp8 with scales")
    transposed = attr(BOOL, False, doc="x · w: the rows of w are K")
    y = result("[N, heads, M]")

    def infer(self) -> TensorType:
        x, w = self.tensor(self.x, 3), self.tensor(self.w, 3, scaled=True)
        if not w.scale:
            self.same("the dtype", x.dtype, self.x, w.dtype, self.w)
        self.same("heads", x.shape[1], self.x, w.shape[0], self.w)
        wide, deep = (2, 1) if self.transposed else (1, 2)
        self.same("K", x.shape[2], self.x, w.shape[deep], self.w)
        return TensorType(x.dtype, (*x.shape[:2], w.shape[wide]))

    def cost(self) -> Cost:
        return Cost(2 * self.x.type.numel * self.y.type.shape[2], self.moved_bytes())

    @staticmethod
    def reference(x: torch.Tensor, w: torch.Tensor | Scaled, *, transposed: bool) -> torch.Tensor:
        form = "nhk,hkm->nhm" if transposed else "nhk,hmk->nhm"
        w = w.float().to(x.dtype) if isinstance(w, Scaled) else w
        return torch.einsum(form, x.float(), w.float()).to(x.dtype)


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
