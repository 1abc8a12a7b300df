"""Attention whose keys and values are made of one small latent a token (DeepSeek-V2 report, section 2.1)."""

from __future__ import annotations

import sympy
import torch

from moec.ir.attrs import BOOL, FLOAT, INT
from moec.ir.op import Cost, Op, attr, operand, result
from moec.ir.ops.attention import Attention
from moec.ir.types import TensorType


class LatentAttention(Op, name="latent_attention"):
    """``attention`` over the keys [W_UK·c | k_pe] and values W_UV·c of the latent rows [c | k_pe].

    w viewed as [heads, P+V, C] holds each head's W_UK, then its W_UV; k_pe serves all heads. Sequences,
    ``causal`` and ``window`` are those of ``attention``. What is computed is the same either way:

        expanded   keys and values are made of c, then attended to
        absorbed   s = scale · ((q_nope·W_UK)·c + q_pe·k_pe); o = W_UV·(softmax(s)·c): c is never expanded
    """

    products = True
    q = operand("[N, heads, P+R]: each head's q_nope, then its q_pe")
    latent = operand("[S, C+R]: c, then k_pe")
    w = operand("[heads·(P+V), C]")
    cu_q = operand("[B+1] offsets")
    cu_k = operand("[B+1] offsets")
    nope = attr(INT, doc="P, the width of q_nope")
    value = attr(INT, doc="V, the width of a head's result")
    scale = attr(FLOAT, doc="of the scores, before the softmax")
    causal = attr(BOOL, True, doc="a query sees no later keys")
    window = attr(INT, 0, doc="how many keys a query sees; 0: all of them")
    absorb_below = attr(INT, doc="a sequence with fewer new tokens than this is computed absorbed")
    o = result("[N, heads, V]")

    def infer(self) -> TensorType:
        q, latent, w = self.tensor(self.q, 3), self.tensor(self.latent, 2), self.tensor(self.w, 2)
        self.same("the dtype", q.dtype, self.q, latent.dtype, self.latent)
        self.same("the dtype", q.dtype, self.q, w.dtype, self.w)
        cu_q, cu_k = self.integers(self.cu_q, 1), self.integers(self.cu_k, 1)
        self.same("B+1", cu_q.shape[0], self.cu_q, cu_k.shape[0], self.cu_k)
        heads, width = q.shape[1:]
        if not (isinstance(heads, int) and isinstance(width, int)):
            raise self.mismatch(f"{self.q.text} is {q}: heads and their width must be known")
        if not (1 <= self.nope <= width and self.value >= 1):
            raise self.mismatch(
                f"nope is {self.nope} and value {self.value}, of heads that are {width} wide in {self.q.text}"
            )
        rope = width - self.nope
        if w.shape[0] != heads * (self.nope + self.value):
            raise self.mismatch(
                f"{self.w.text} is {w}, but {heads} heads of {self.nope} + {self.value} rows are "
                f"{heads * (self.nope + self.value)}"
            )
        self.same("C+R", latent.shape[1], self.latent, w.shape[1] + rope, self.w)
        if self.window < 0 or self.absorb_below < 0:
            raise self.mismatch(f"window is {self.window}, absorb_below {self.absorb_below}")
        return TensorType(q.dtype, (*q.shape[:2], self.value))

    def cost(self) -> Cost:
        """That of the cheaper form, as if all sequences were of one length, and every key seen."""
        (tokens, heads, width), (keys, _) = self.q.type.shape, self.latent.type.shape
        rank, sequences = self.w.type.shape[1], self.cu_q.type.shape[0] - 1
        pairs = sympy.Integer(1) * tokens * keys / (1 if sequences == 0 else sequences)
        projection = 2 * rank * (self.nope + self.value)  # of one key to k and v, of one query and its result
        expanded = 2 * (width + self.value) * pairs + projection * keys
        absorbed = 2 * (2 * rank + width - self.nope) * pairs + projection * tokens
        return Cost(heads * sympy.Min(expanded, absorbed), self.moved_bytes())

    @staticmethod
    def reference(
        q: torch.Tensor,
        latent: torch.Tensor,
        w: torch.Tensor,
        cu_q: torch.Tensor,
        cu_k: torch.Tensor,
        *,
        nope: int,
        value: int,
        scale: float,
        causal: bool,
        window: int,
        absorb_below: int,
    ) -> torch.Tensor:
        heads, rank = q.shape[1], w.shape[1]
        c, k_pe = latent.float()[:, :rank], latent.float()[:, rank:]
        kv = (c @ w.float().T).view(-1, heads, nope + value)
        k = torch.cat([kv[:, :, :nope], k_pe[:, None].expand(-1, heads, -1)], dim=-1)
        o = Attention.reference(
            q.float(), k, kv[:, :, nope:], cu_q, cu_k, scale=scale, causal=causal, window=window
        )
        return o.to(q.dtype)
