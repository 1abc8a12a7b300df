"""A router whose choices a table makes, by the token alone: DeepSeek V4's first layers."""

from __future__ import annotations

from typing import Any

import torch

from moec.ir.attrs import BOOL, DTYPE, FLOAT, INT, choice
from moec.ir.op import Cost, Op, attr, operand, result
from moec.ir.ops.route import scores_of
from moec.ir.types import TensorType, f32, i32


class HashRoute(Op, name="hash_route"):
    """Each token's row of a table names its experts; the gate's scores weigh them (Roller et al. 2021).

    An entry outside 0 … E - 1, and each choice of a token that the table has no row for, is no expert: its
    number becomes E and its weight 0.
    """

    logits = operand("[T, E] fp32 or the model's dtype")
    table = operand("[vocab, k] integers: experts")
    tokens = operand("[T] integers: rows of the table")
    score = attr(choice("sigmoid", "sqrtsoftplus"), doc="turns each logit into a score, in fp32")
    k = attr(INT, doc="experts a token")
    renorm = attr(BOOL, False, doc="divide the weights by their sum + 1e-20")
    scale = attr(FLOAT, 1.0, doc="multiplies the weights last")
    dtype = attr(DTYPE, f32, doc="what the weights are rounded to")
    w = result("[T, k] weights, in the table's order")
    id = result("[T, k] int32 expert ids")

    def infer(self) -> tuple[TensorType, TensorType]:
        logits, table, tokens = self.tensor(self.logits, 2), self.integers(self.table, 2), self.tokens
        self.same("T", logits.shape[0], self.logits, self.integers(tokens, 1).shape[0], tokens)
        if table.shape[1] != self.k or self.k < 1:
            raise self.mismatch(
                f"k is {self.k}, but {self.table.text} names {table.shape[1]} experts a token"
            )
        chosen = (logits.shape[0], self.k)
        return TensorType(self.dtype, chosen), TensorType(i32, chosen)

    def cost(self) -> Cost:
        """Of each token a row of the table is read, and the logits of its experts."""
        chosen, table, logits = self.id.type.numel, self.table.type, self.logits.type
        read = chosen * ((table.dtype.bits + logits.dtype.bits) // 8)
        return Cost(8 * chosen, read + self.tokens.type.nbytes + self.w.type.nbytes + self.id.type.nbytes)

    @staticmethod
    def reference(
        logits: torch.Tensor,
        table: torch.Tensor,
        tokens: torch.Tensor,
        *,
        score: str,
        k: int,
        renorm: bool,
        scale: float,
        dtype: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        experts, scores = logits.shape[1], scores_of(logits, score)
        w = torch.zeros(len(tokens), k, device=logits.device)
        id = torch.full((len(tokens), k), experts, dtype=torch.int32, device=logits.device)
        for t, token in enumerate(tokens.tolist()):
            row = table[token].tolist() if 0 <= token < len(table) else []
            for j, expert in enumerate(row):
                if 0 <= expert < experts:
                    w[t, j], id[t, j] = scores[t, expert], expert
        if renorm:
            w = w / (w.sum(-1, keepdim=True) + 1e-20)
        return (w * scale).to(dtype.torch), id
