"""A batch in two parts, by how many new tokens its sequences have."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import sympy
import torch

from moec.ir.attrs import INT, SYMBOL
from moec.ir.op import Cost, Op, attr, operand, result
from moec.ir.types import TensorType, as_dim, symbol


class SplitBatch(Op, name="split_batch"):
    """Sequences with fewer than ``below`` new tokens, the short ones, and the others, each in their order.

    Of each part: the rows of its tokens, in order, and what describes its sequences. Rows that no sequence
    owns are among the short ones, behind theirs. ``rows`` and ``sequences`` count the short part; the long
    part is the rest.
    """

    launches = 0  # it looks at integers, once a step
    like = operand("[N, ...]: a row for each token; only their number counts")
    cu_q = operand("[B+1] offsets")
    seq_lens = operand("[B] entries of each sequence, new ones included")
    block_table = operand("[B, P] page numbers")
    below = attr(INT, doc="a sequence with fewer new tokens is short")
    rows = attr(SYMBOL, "N0", doc="the symbol that counts the short part's rows")
    sequences = attr(SYMBOL, "B0", doc="the symbol that counts its sequences")
    short_entries = attr(SYMBOL, "S0", doc="what costs call the entries of the short sequences together")
    long_entries = attr(SYMBOL, "S1", doc="what costs call those of the long ones")
    short_rows = result("[N0], increasing")
    short_cu = result("[B0+1]")
    short_lens = result("[B0]")
    short_table = result("[B0, P]")
    long_rows = result("[N-N0], increasing")
    long_cu = result("[B-B0+1]")
    long_lens = result("[B-B0]")
    long_table = result("[B-B0, P]")

    def infer(self) -> tuple[TensorType, ...]:
        tokens = self.tensor(self.like, min_rank=1).shape[0]
        cu_q, lens = self.integers(self.cu_q, 1), self.integers(self.seq_lens, 1)
        table = self.integers(self.block_table, 2)
        self.same("B", table.shape[0], self.block_table, lens.shape[0], self.seq_lens)
        self.same("B+1", cu_q.shape[0], self.cu_q, lens.shape[0] + 1, self.seq_lens)
        if self.below < 1:
            raise self.mismatch(f"below is {self.below}")
        types: list[TensorType] = []
        short_n, short_b = symbol(self.rows), symbol(self.sequences)
        for n, b in ((short_n, short_b), (tokens - short_n, lens.shape[0] - short_b)):
            types += [TensorType(cu_q.dtype, (as_dim(d),)) for d in (n, b + 1)]
            types += [TensorType(lens.dtype, (as_dim(b),)), table.with_(shape=(as_dim(b), table.shape[1]))]
        return tuple(types)

    def shares(self, sizes: Mapping[Any, Any]) -> dict[Any, int]:
        """Numbers for the symbols of the parts, where ``sizes`` has those of the batch and S; as if all
        sequences were of one length, so that one part is empty.
        """
        tokens, sequences, entries = (
            sympy.sympify(d).subs(sizes)
            for d in (self.like.type.shape[0], self.seq_lens.type.shape[0], symbol("S"))
        )
        if not all(d.is_Integer for d in (tokens, sequences, entries)):
            return {}
        short = bool(tokens < self.below * sympy.Max(1, sequences))
        n, b, few, many = (
            symbol(s) for s in (self.rows, self.sequences, self.short_entries, self.long_entries)
        )
        found = (tokens, sequences, entries, 0) if short else (0, 0, 0, entries)
        return {s: int(size) for s, size in zip((n, b, few, many), found, strict=True)}

    @staticmethod
    def reference(
        like: torch.Tensor,
        cu_q: torch.Tensor,
        seq_lens: torch.Tensor,
        block_table: torch.Tensor,
        *,
        below: int,
        rows: str,
        sequences: str,
        short_entries: str,
        long_entries: str,
    ) -> tuple[torch.Tensor, ...]:
        bounds = cu_q.tolist()
        results: list[torch.Tensor] = []
        for short in (True, False):
            own: list[int] = []
            offsets, chosen = [0], []
            for b, (first, end) in enumerate(pairwise(bounds)):
                if (end - first < below) == short:
                    own += range(first, end)
                    chosen.append(b)
                    offsets.append(len(own))
            if short:
                own += range(bounds[-1], len(like))
            results += [cu_q.new_tensor(own), cu_q.new_tensor(offsets), seq_lens[chosen], block_table[chosen]]
        return tuple(results)


class TakeRows(Op, name="take_rows"):
    """Rows of x, in the order of their numbers."""

    x = operand("[N, ...]")
    rows = operand("[M] increasing integers in [0, N)")
    y = result("[M, ...]")

    def infer(self) -> TensorType:
        x, rows = self.tensor(self.x, min_rank=1), self.integers(self.rows, 1)
        return TensorType(x.dtype, (rows.shape[0], *x.shape[1:]))

    def cost(self) -> Cost:
        return Cost(0, 2 * self.y.type.nbytes + self.rows.type.nbytes)

    @staticmethod
    def reference(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return x[rows.long()]


class MergeRows(Op, name="merge_rows"):
    """The inverse of taking: each row of a and of b at the place that its number says."""

    a = operand("[M, ...]")
    a_rows = operand("[M] increasing integers")
    b = operand("[N-M, ...]")
    b_rows = operand("[N-M] increasing integers: those of [0, N) that a_rows lacks")
    y = result("[N, ...]")

    def infer(self) -> TensorType:
        a, b = self.tensor(self.a, min_rank=1), self.tensor(self.b, min_rank=1)
        self.same("the dtype", a.dtype, self.a, b.dtype, self.b)
        self.same("a row", a.with_(shape=a.shape[1:]), self.a, b.with_(shape=b.shape[1:]), self.b)
        for part, rows in ((self.a, self.a_rows), (self.b, self.b_rows)):
            self.same("M", part.type.shape[0], part, self.integers(rows, 1).shape[0], rows)
        return TensorType(a.dtype, (as_dim(a.shape[0] + b.shape[0]), *a.shape[1:]))

    @staticmethod
    def reference(
        a: torch.Tensor, a_rows: torch.Tensor, b: torch.Tensor, b_rows: torch.Tensor
    ) -> torch.Tensor:
        y = a.new_empty(len(a) + len(b), *a.shape[1:])
        y[a_rows.long()] = a
        y[b_rows.long()] = b
        return y
