"""Pointwise ops. They compute in fp32 and round once."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from moec.ir.attrs import DTYPE, FLOAT, choice
from moec.ir.op import Cost, Op, attr, operand, result
from moec.ir.types import Dim, TensorType, as_dim


class Binary(Op):
    """Pointwise over two tensors of one dtype, shapes broadcast as in NumPy."""

    a = operand("[...]")
    b = operand("[...], broadcastable")
    y = result("[...]")

    def infer(self) -> TensorType:
        a, b = self.tensor(self.a), self.tensor(self.b)
        self.same("the dtype", a.dtype, self.a, b.dtype, self.b)
        wide, narrow = (a, b) if a.rank >= b.rank else (b, a)
        pad = wide.rank - narrow.rank
        shape = list(wide.shape)
        for i, size in enumerate(narrow.shape):
            if shape[pad + i] == 1:
                shape[pad + i] = size
            elif size not in (1, shape[pad + i]):
                left, right = (self.a, self.b) if wide is a else (self.b, self.a)
                here, there = f"axis {pad + i} of {left.text}", f"axis {i} of {right.text}"
                raise self.mismatch(f"{here} is {shape[pad + i]} but {there} is {size}")
        return TensorType(a.dtype, tuple(shape), wide.groups)

    def cost(self) -> Cost:
        return Cost(self.y.type.numel, self.moved_bytes())


class Add(Binary, name="add"):
    """a + b."""

    @staticmethod
    def reference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a.float() + b.float()).to(a.dtype)


class Mul(Binary, name="mul"):
    """a · b."""

    @staticmethod
    def reference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a.float() * b.float()).to(a.dtype)


class Unary(Op):
    """Pointwise over one tensor."""

    x = operand("[...]")
    y = result("[...]")

    def infer(self) -> TensorType:
        return self.tensor(self.x)

    def cost(self) -> Cost:
        return Cost(self.y.type.numel, self.moved_bytes())


class Sigmoid(Unary, name="sigmoid"):
    """1 / (1 + exp(-x))."""

    @staticmethod
    def reference(x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(x.float()).to(x.dtype)


class Clamp(Unary, name="clamp"):
    """min(max(x, lo), hi): OLMoE's clip_qkv."""

    lo = attr(FLOAT)
    hi = attr(FLOAT)

    def infer(self) -> TensorType:
        if self.lo > self.hi:
            raise self.mismatch(f"lo is {self.lo}, above hi, {self.hi}")
        return self.tensor(self.x)

    @staticmethod
    def reference(x: torch.Tensor, *, lo: float, hi: float) -> torch.Tensor:
        return x.clamp(lo, hi)


class Cast(Unary, name="cast"):
    """x in another dtype, rounded to nearest even."""

    to = attr(DTYPE, doc="dtype of the result")

    def infer(self) -> TensorType:
        return self.tensor(self.x).with_(dtype=self.to)

    @staticmethod
    def reference(x: torch.Tensor, *, to: Any) -> torch.Tensor:
        return x.to(to.torch)


class ZerosLike(Unary, name="zeros_like"):
    """Zeros of x's shape: where a sum starts."""

    dtype = attr(DTYPE, doc="dtype of the result")

    def infer(self) -> TensorType:
        return self.tensor(self.x).with_(dtype=self.dtype)

    def cost(self) -> Cost:
        return Cost(0, self.y.type.nbytes)

    @staticmethod
    def reference(x: torch.Tensor, *, dtype: Any) -> torch.Tensor:
        return torch.zeros(x.shape, dtype=dtype.torch, device=x.device)


def check_limit(op: Op) -> None:
    """Raises unless ``op``'s limit, where it has one, is a positive number in fp32."""
    limit, known = op.attrs["limit"], torch.finfo(torch.float32)
    if limit is not None and not known.tiny <= limit <= known.max:
        raise op.mismatch(f"limit is {limit}; it must be a positive number in float32")


def gated_flops(limit: float | None) -> int:
    """FLOPs of an element of act(gate) · up, gate and up clamped where there is a ``limit``."""
    return 5 if limit is None else 7


class SwiGLU(Op, name="swiglu"):
    """act(gate) · up. With one operand its last axis holds gate, then up (Shazeer 2020, GLU variants).

    With ``limit`` act(min(gate, limit)) · min(max(up, -limit), limit): NaN stays NaN (DeepSeek V4).
    """

    gate = operand("[..., I], or [..., 2·I] as gate then up")
    up = operand("[..., I]", optional=True)
    act = attr(choice("silu", "gelu", "gelu_tanh"), "silu", doc="gelu_tanh: its tanh approximation")
    limit = attr(FLOAT, None, doc="gate is clamped to at most this, up to ± this, before the activation")
    h = result("[..., I]")

    def infer(self) -> TensorType:
        gate = self.tensor(self.gate, min_rank=1)
        check_limit(self)
        if self.up is not None:
            up = self.tensor(self.up)
            if gate != up:
                raise self.mismatch(f"{self.gate.text} is {gate} but {self.up.text} is {up}")
            return gate
        width: Dim = gate.shape[-1]
        if not isinstance(width, int) or width % 2:
            raise self.mismatch(f"{self.gate.text} is {gate}: its last axis must be even")
        return gate.with_(shape=(*gate.shape[:-1], as_dim(width // 2)))

    def cost(self) -> Cost:
        return Cost(gated_flops(self.limit) * self.h.type.numel, self.moved_bytes())

    @staticmethod
    def reference(
        gate: torch.Tensor, up: torch.Tensor | None = None, *, act: str, limit: float | None = None
    ) -> torch.Tensor:
        if up is None:
            gate, up = gate.chunk(2, dim=-1)
        gate32, up32 = gate.float(), up.float()
        if limit is not None:
            gate32, up32 = gate32.clamp(max=limit), up32.clamp(-limit, limit)
        if act == "silu":
            activated = gate32 * torch.sigmoid(gate32)
        else:
            activated = F.gelu(gate32, approximate="tanh" if act == "gelu_tanh" else "none")
        return (activated * up32).to(gate.dtype)
