"""Quantised values: e4m3 with an fp32 scale for each block.

A scaled value is one value of the IR, ``f8e4m3[N,K]@s1x128``: at run time a pair of tensors. The products
(``linear``, ``grouped_linear``, ``gather_grouped_linear``) take them as they are.
"""

from __future__ import annotations

from typing import Any

import torch

from moec.ir import scaled
from moec.ir.attrs import BLOCK, DTYPE, choice
from moec.ir.op import Cost, Op, Value, attr, operand, result
from moec.ir.scaled import Scaled as ScaledTensor
from moec.ir.types import DTYPES, DType, TensorType, bf16, f32, format_block

E4M3 = DTYPES["f8e4m3"]
FP8 = (E4M3, DTYPES["f8e5m2"])
SCALE_FORMAT = choice("fp32", "ue8m0")


def scaled_tensor(op: Op, value: Value) -> TensorType:
    """``value``'s type, once it's known to have scales."""
    type = op.tensor(value, scaled=True)
    if type.scale is None:
        raise op.mismatch(f"{value.text} is {type}, which has no scales")
    return type


def quantized(op: Op, value: Value, type: TensorType, block: tuple[int, ...]) -> TensorType:
    """What ``type`` becomes with scales for ``block``."""
    if not type.dtype.is_float or type.dtype.bits < 16:
        raise op.mismatch(f"{value.text} is {type}, no floats to quantise")
    if len(block) > type.rank:
        raise op.mismatch(f"blocks of {format_block(block)} don't fit {value.text}, {type}")
    return type.with_(dtype=E4M3, scale=block)


def product_types(op: Op, x: Value, w: Value) -> tuple[TensorType, TensorType]:
    """The types of two operands of a product: both plain and of one dtype, or both scaled."""
    x_type, w_type = op.tensor(x, scaled=True, min_rank=1), op.tensor(w, scaled=True)
    if not x_type.scale and not w_type.scale:
        op.same("the dtype", x_type.dtype, x, w_type.dtype, w)
        return x_type, w_type
    for value, type, other in ((x, x_type, w), (w, w_type, x)):
        if not type.scale:
            raise op.mismatch(f"{value.text} is {type}, but {other.text} has scales: both must, or neither")
        if len(type.scale) != 2 or type.dtype not in FP8:
            raise op.mismatch(f"{value.text} is {type}: a product takes fp8 with scales of rows x columns")
    if x_type.scale is not None and x_type.scale[0] > 1:
        raise op.mismatch(f"{x.text} is {x_type}: a block of x is one row or all (1x.. or *x..)")
    return x_type, w_type


def product_dtype(op: Op, x: TensorType, to: DType | None) -> DType:
    """The dtype of a product's result: ``to``, else that of x, or bf16 where x is scaled."""
    return to or (bf16 if x.scale else x.dtype)


class Quant(Op, name="quant"):
    """x in e4m3, with scales for blocks of its last axes; those before have scales of their own.

    A block's scale is s = max(amax, 1e-4) / 448 in fp32, with ``ue8m0`` the power of two from there on up;
    its values are x / s, clamped to ±448 and rounded to nearest even. NaN and ±Inf become NaN and don't count
    in amax. Blocks at the edges are partial.
    """

    x = operand("[...]")
    block = attr(BLOCK, doc="what shares a scale: `1x128` a row's tile, `1x*` a row, `*x*` the whole tensor")
    scale = attr(SCALE_FORMAT, "fp32", doc="ue8m0: powers of two, stored in fp32 too")
    y = result("[...] e4m3 with scales")

    def infer(self) -> TensorType:
        return quantized(self, self.x, self.tensor(self.x), self.block)

    def cost(self) -> Cost:
        return Cost(2 * self.x.type.numel, self.moved_bytes())

    @staticmethod
    def reference(x: torch.Tensor, *, block: tuple[int, ...], scale: str) -> ScaledTensor:
        return scaled.quantize(x, block, scale)


class Scaled(Op, name="scaled"):
    """Two tensors of a checkpoint as one scaled value: ``W = q × scale_inv`` of native FP8 checkpoints.

    ``scale_fmt`` is what their config.json says of it: fp8-cast quantises what is multiplied by W alike.
    """

    q = operand("[..., N, K] fp8")
    scale = operand("fp32, one number a block: [..., ceil(N/b0), ceil(K/b1)]")
    block = attr(BLOCK, doc="rows x columns that share a scale; edge blocks are partial")
    scale_fmt = attr(
        SCALE_FORMAT, "fp32", doc="ue8m0: scales are powers of two, as those of what q multiplies"
    )
    y = result("[..., N, K] with scales")

    launches = 0

    def infer(self) -> TensorType:
        q, scale = self.tensor(self.q), self.tensor(self.scale)
        if len(self.block) > q.rank:
            raise self.mismatch(f"blocks of {format_block(self.block)} don't fit {self.q.text}, {q}")
        if q.dtype not in FP8:
            raise self.mismatch(f"{self.q.text} is {q}, not fp8")
        y = q.with_(scale=self.block)
        wanted = TensorType(f32, y.scale_shape)
        if scale != wanted:
            raise self.mismatch(f"{self.scale.text} is {scale}, not the {wanted} that {y} asks for")
        return y

    def cost(self) -> Cost:
        return Cost()

    @staticmethod
    def reference(
        q: torch.Tensor, scale: torch.Tensor, *, block: tuple[int, ...], scale_fmt: str = "fp32"
    ) -> ScaledTensor:
        return ScaledTensor(q, scale, block)


class Dequant(Op, name="dequant"):
    """The numbers that a scaled value means: q times its block's scale in fp32, rounded once."""

    x = operand("[...] with scales")
    to = attr(DTYPE, doc="dtype of the result")
    y = result("[...]")

    def infer(self) -> TensorType:
        return scaled_tensor(self, self.x).with_(dtype=self.to, scale=None)

    def cost(self) -> Cost:
        return Cost(self.x.type.numel, self.moved_bytes())

    @staticmethod
    def reference(x: ScaledTensor, *, to: Any) -> torch.Tensor:
        return x.float().to(to.torch)


class Refine(Op, name="refine"):
    """The same value with scales for smaller blocks: each is repeated. Exact.

    A block of the result lies within one of x's, so that what cuts or joins blocks finds its places.
    """

    x = operand("[...] with scales")
    block = attr(BLOCK, doc="along each axis a divisor of x's, or anything where x's is the whole axis")
    y = result("[...] with scales")

    def infer(self) -> TensorType:
        x = scaled_tensor(self, self.x)
        old = x.scale or ()
        fits = len(old) == len(self.block) and all(
            new == was or (new > 0 and was % new == 0) for new, was in zip(self.block, old, strict=True)
        )
        if not fits:
            raise self.mismatch(f"blocks of {format_block(self.block)} don't divide those of {x}")
        return x.with_(scale=self.block)

    def cost(self) -> Cost:
        """The elements stay where they are."""
        x, y = self.x.type, self.y.type
        return Cost(0, x.nbytes - x.with_(scale=None).nbytes + y.nbytes - y.with_(scale=None).nbytes)

    @staticmethod
    def reference(x: ScaledTensor, *, block: tuple[int, ...]) -> ScaledTensor:
        return scaled.refine(x, block)
