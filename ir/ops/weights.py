"""What happens to weights when a checkpoint is loaded. Functions of these ops stand in ``@weights``.

Their parameters are the checkpoint's tensors; ``bind`` says which of the model's parameters a value becomes.
"""

from __future__ import annotations

from typing import Any

import torch

from moec.ir.attrs import BLOCK, DTYPE, RANGE, STR
from moec.ir.op import Op, Param, attr, operand, result
from moec.ir.types import TensorType, f32


class Stack(Op, name="stack"):
    """A family of tensors, one an expert, as one tensor with a new first axis."""

    family = operand("a parameter with * for the expert's number: [...] each")
    experts = attr(RANGE, doc="both ends included")
    y = result("[experts, ...]")

    def infer(self) -> TensorType:
        member = self.tensor(self.family)
        if not isinstance(self.family, Param) or self.family.name.count("*") != 1:
            raise self.mismatch(f"{self.family.text} is no family of parameters")
        return member.with_(shape=(len(self.experts), *member.shape))

    @staticmethod
    def reference(family: list[torch.Tensor], *, experts: Any) -> torch.Tensor:
        return torch.stack(family)


class Dequant(Op, name="dequant"):
    """q times its block's scale: ``W = q × scale_inv`` of native FP8 checkpoints; edge blocks are partial."""

    q = operand("[..., N, K] fp8")
    scale = operand("[..., ceil(N/b0), ceil(K/b1)] fp32")
    block = attr(BLOCK, doc="rows x columns that share a scale")
    to = attr(DTYPE, doc="dtype of the result")
    y = result("[..., N, K]")

    def infer(self) -> TensorType:
        q, scale = self.tensor(self.q), self.tensor(self.scale)
        if len(self.block) != 2 or q.rank < 2:
            raise self.mismatch(f"a block of {len(self.block)} axes for {self.q.text}, {q}: both need two")
        blocks = (-(-d // b) for d, b in zip(q.shape[-2:], self.block, strict=True))
        wanted = TensorType(f32, (*q.shape[:-2], *blocks))
        if scale != wanted:
            raise self.mismatch(f"{self.scale.text} is {scale}, not the {wanted} that {q} asks for")
        return TensorType(self.to, q.shape)

    @staticmethod
    def reference(q: torch.Tensor, scale: torch.Tensor, *, block: tuple[int, ...], to: Any) -> torch.Tensor:
        wide = scale.repeat_interleave(block[0], dim=-2).repeat_interleave(block[1], dim=-1)
        return (q.float() * wide[..., : q.shape[-2], : q.shape[-1]]).to(to.torch)


class Bind(Op, name="bind", effects=("weights",)):
    """x becomes one of the model's parameters."""

    launches = 0
    x = operand("[...]")
    param = attr(STR, doc="the parameter's name, within the scope that the function runs in")

    def infer(self) -> Any:
        self.tensor(self.x)
        return ()
