"""What happens to weights when a checkpoint is loaded. Functions of these ops stand in ``@weights``.

Their parameters are the checkpoint's tensors; ``bind`` says which of the model's parameters a value becomes.
"""

from __future__ import annotations

from typing import Any

import torch

from moec.ir.attrs import RANGE, STR
from moec.ir.op import Op, Param, attr, operand, result
from moec.ir.scaled import Scaled
from moec.ir.types import TensorType


class Stack(Op, name="stack"):
    """A family of tensors, one an expert, as one tensor with a new first axis."""

    family = operand("a parameter with * for the expert's number: [...] each")
    experts = attr(RANGE, doc="both ends included")
    y = result("[experts, ...]")

    def infer(self) -> TensorType:
        member = self.tensor(self.family, scaled=True)
        if not isinstance(self.family, Param) or self.family.name.count("*") != 1:
            raise self.mismatch(f"{self.family.text} is no family of parameters")
        return member.with_(shape=(len(self.experts), *member.shape))

    @staticmethod
    def reference(family: list[Any], *, experts: Any) -> Any:
        if isinstance(family[0], Scaled):
            values, scales, blocks = zip(*family, strict=True)
            return Scaled(torch.stack(values), torch.stack(scales), blocks[0])
        return torch.stack(family)


class Bind(Op, name="bind", effects=("weights",)):
    """x becomes one of the model's parameters."""

    launches = 0
    x = operand("[...]")
    param = attr(STR, doc="the parameter's name, within the scope that the function runs in")

    def infer(self) -> Any:
        self.tensor(self.x, scaled=True)
        return ()
