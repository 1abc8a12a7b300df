"""Slots and the experts' products: naive (one expert at a time) and grouped."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch

from moec.ir.attrs import BLOCK, DTYPE, FLOAT, INT, SYMBOL, choice
from moec.ir.op import Cost, Op, OpResult, Value, attr, operand, result
from moec.ir.ops.elementwise import SwiGLU, check_limit, gated_flops
from moec.ir.ops.scaled import SCALE_FORMAT, product_dtype, product_types, quantized
from moec.ir.routing import active
from moec.ir.scaled import Scaled, matrix, product, quantize, rounds_to, take_rows
from moec.ir.types import TensorType, as_dim, f32, i32, symbol


class ExpertSlots(Op, name="expert_slots"):
    """The slots t·k + j, in order, in which token t's j-th choice is this expert."""

    id = operand("[T, k] int32")
    expert = operand("index")
    rows = attr(SYMBOL, "R", doc="the symbol that counts them")
    slot = result("[R] int32")

    def infer(self) -> TensorType:
        self.integers(self.id, 2)
        self.index(self.expert)
        return TensorType(i32, (symbol(self.rows),))

    @staticmethod
    def reference(id: torch.Tensor, expert: int, *, rows: str) -> torch.Tensor:
        return (id.flatten() == expert).nonzero().flatten().to(torch.int32)


class SortByExpert(Op, name="sort_by_expert"):
    """All slots t·k + j, sorted by expert and within one by slot; ids outside [0, E) are left out at the end.

    Expert e owns rows off[e]:off[e+1] of the sorted order.
    """

    id = operand("[T, k] int32")
    experts = attr(INT, doc="E")
    slot = result("[T·k] int32")
    off = result("[E+1] int32")

    def infer(self) -> tuple[TensorType, TensorType]:
        id = self.integers(self.id, 2)
        if self.experts < 1:
            raise self.mismatch(f"experts is {self.experts}")
        return TensorType(i32, (id.numel,), groups=self.experts), TensorType(i32, (self.experts + 1,))

    @staticmethod
    def reference(id: torch.Tensor, *, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
        flat = id.flatten().long()
        flat = torch.where((flat < 0) | (flat >= experts), experts, flat)
        slot = flat.sort(stable=True).indices.to(torch.int32)
        count = torch.bincount(flat, minlength=experts + 1)[:experts]
        return slot, torch.cat([count.new_zeros(1), count.cumsum(0)]).to(torch.int32)


class GatherRows(Op, name="gather_rows"):
    """Row slot // per_row of x for each slot: each token once for each of its experts."""

    x = operand("[T, H]")
    slot = operand("[R] int32")
    per_row = attr(INT, doc="slots a token: k")
    rows = result("[R, H]")

    def infer(self) -> TensorType:
        x, slot = self.tensor(self.x, 2, scaled=True), self.integers(self.slot, 1)
        if self.per_row < 1:
            raise self.mismatch(f"per_row is {self.per_row}")
        if x.scale and (len(x.scale) != 2 or x.scale[0] > 1):
            raise self.mismatch(f"{self.x.text} is {x}: rows that share scales can't be gathered one by one")
        return TensorType(x.dtype, (slot.shape[0], x.shape[1]), slot.groups, x.scale)

    def cost(self) -> Cost:
        return Cost(0, self.moved_bytes())

    @staticmethod
    def reference(x: Any, slot: torch.Tensor, *, per_row: int) -> Any:
        return take_rows(x, slot.long() // per_row)


class ScatterAdd(Op, name="scatter_add"):
    """acc with w[slot] · row added at row slot // per_row, in fp32."""

    acc = operand("[T, H] fp32")
    rows = operand("[R, H]")
    slot = operand("[R] int32")
    w = operand("[T, k]")
    per_row = attr(INT, doc="slots a token: k")
    out = result("[T, H] fp32")

    def infer(self) -> TensorType:
        acc, rows = self.tensor(self.acc, 2), self.tensor(self.rows, 2)
        w = self.tensor(self.w, 2)
        self.same("R", rows.shape[0], self.rows, self.integers(self.slot, 1).shape[0], self.slot)
        self.same("H", acc.shape[1], self.acc, rows.shape[1], self.rows)
        self.same("T", acc.shape[0], self.acc, w.shape[0], self.w)
        if acc.dtype != f32:
            raise self.mismatch(f"{self.acc.text} is {acc}, but sums are f32")
        if w.shape[1] != self.per_row:
            raise self.mismatch(f"per_row is {self.per_row} but {self.w.text} is {w}")
        return acc

    def cost(self) -> Cost:
        """The sums are updated in place: only the rows that are added to move, there and back."""
        rows, slot, w = self.rows.type, self.slot.type, self.w.type
        sums = 2 * rows.with_(dtype=f32).nbytes
        weights = TensorType(w.dtype, slot.shape).nbytes
        return Cost(2 * rows.numel, rows.nbytes + sums + slot.nbytes + weights)

    @staticmethod
    def reference(
        acc: torch.Tensor, rows: torch.Tensor, slot: torch.Tensor, w: torch.Tensor, *, per_row: int
    ) -> torch.Tensor:
        slot = slot.long()
        weighted = rows.float() * w.float().flatten()[slot][:, None]
        return acc.index_add(0, slot // per_row, weighted.to(acc.dtype))


class Choices(NamedTuple):
    """Each of ``tokens`` chose ``k`` of ``experts``, and takes ``shared`` more that all take."""

    experts: Any
    k: Any
    tokens: Any
    shared: int


class ExpertProduct(Op):
    """Expert e owns rows off[e]:off[e+1]; what no expert owns comes out as zeros. Scaled: as ``linear``."""

    products = True
    x: Any
    w: Any
    off: Any

    def expert_weights(self, sorted: Value, to: Any) -> TensorType:
        """The type of w, once it fits x, off and the groups that ``sorted`` is in; ``to``: of the result."""
        self.tensor(self.x, 2, scaled=True)
        self.tensor(self.w, 3, scaled=True)
        (x, w), off = product_types(self, self.x, self.w), self.integers(self.off, 1)
        self.same("K", x.shape[1], self.x, w.shape[2], self.w)
        self.same("E+1", as_dim(w.shape[0] + 1), self.w, off.shape[0], self.off)
        groups = self.tensor(sorted, scaled=True).groups
        if groups is not None:
            self.same("the number of groups", groups, sorted, w.shape[0], self.w)
        if to not in (None, x.dtype) and not x.scale:
            raise self.mismatch(f"to is {to}, but only a product of scaled operands leaves their dtype")
        return w

    def choices(self) -> Choices | None:
        """What each token chose of the experts, as what made ``off`` knows; else None."""
        sorter = self.off.op if isinstance(self.off, OpResult) else None
        ids = getattr(sorter, "id", None)
        if not isinstance(ids, Value) or not isinstance(ids.type, TensorType):
            return None
        tokens, k = ids.type.shape
        router = ids.op if isinstance(ids, OpResult) else None
        shared = router.attrs.get("shared", 0) if router is not None else 0
        return Choices(self.w.type.shape[0] - shared, k - shared, tokens, shared)

    def product_cost(self, rows: Any) -> Cost:
        """Weights of experts without rows needn't move."""
        w = self.w.type
        chosen = self.choices() or Choices(w.shape[0], 1, rows, 0)
        running = active(chosen.experts, chosen.k, chosen.tokens) + chosen.shared
        read = running / w.shape[0] if w.shape[0] else 0
        return Cost(2 * rows * w.shape[1] * w.shape[2], self.moved_bytes() - w.nbytes + w.nbytes * read)


class GroupedLinear(ExpertProduct, name="grouped_linear"):
    """Each row of x times its expert's weights; with ``slot``, row r is stored at place slot[r]."""

    x = operand("[R~E, K]")
    w = operand("[E, N, K]")
    off = operand("[E+1] int32")
    slot = operand("[R] int32: each of 0..R-1 once", optional=True)
    to = attr(DTYPE, None, doc="dtype of the result of scaled operands, bf16 where it is left out")
    y = result("[R~E, N]; with slot [R, N], in the order of the slots")

    def infer(self) -> TensorType:
        w, x = self.expert_weights(self.x, self.to), self.tensor(self.x, scaled=True)
        y = TensorType(product_dtype(self, x, self.to), (x.shape[0], w.shape[1]), w.shape[0])
        if self.slot is None:
            return y
        slot = self.integers(self.slot, 1)
        self.same("R", x.shape[0], self.x, slot.shape[0], self.slot)
        return y.with_(groups=None)

    def cost(self) -> Cost:
        return self.product_cost(self.x.type.shape[0])

    @staticmethod
    def reference(
        x: Any, w: Any, off: torch.Tensor, slot: torch.Tensor | None = None, *, to: Any = None
    ) -> torch.Tensor:
        y = _segments(x, w, off, [slice(int(a), int(b)) for a, b in pairwise(off.tolist())])
        if slot is not None:
            y = torch.zeros_like(y).index_copy(0, slot.long(), y)
        return y.to(rounds_to(x, to))


def _segments(x: Any, w: Any, off: torch.Tensor, rows: list[Any], total: int | None = None) -> torch.Tensor:
    """[R, N] fp32: each expert's ``rows`` of x times its weights; zeros where no expert owns a row."""
    values = w.q if isinstance(w, Scaled) else w
    total = len(x.q if isinstance(x, Scaled) else x) if total is None else total
    y = torch.zeros(total, values.shape[1], dtype=torch.float32, device=values.device)
    for e, (start, end) in enumerate(pairwise(off.tolist())):
        y[start:end] = product(take_rows(x, rows[e]), matrix(w, e))
    return y


class GatherGroupedLinear(ExpertProduct, name="gather_grouped_linear"):
    """Row slot[r] // per_row of x times the weights of the expert that owns r, in one go with what follows.

    The epilogue works on the product in fp32, which is then rounded once. For ``swiglu`` an expert's weights
    hold its gate rows, then its up rows: act(gate) · up, clamped before as by ``swiglu`` where ``limit`` is
    given. With ``quant`` what comes of that, still in fp32, is quantised as by the op of that name.
    """

    x = operand("[T, K]")
    w = operand("[E, N, K]")
    slot = operand("[R~E] int32")
    off = operand("[E+1] int32")
    per_row = attr(INT, doc="slots a token: k")
    epilogue = attr(choice("none", "swiglu"), "none", doc="what is applied to the product")
    act = attr(choice("silu", "gelu", "gelu_tanh"), "silu", doc="swiglu's; gelu_tanh: its tanh approximation")
    limit = attr(FLOAT, None, doc="swiglu's: gate is clamped to at most this, up to ± this")
    quant = attr(BLOCK, None, doc="the result is quantised with scales for these blocks, `1x128`")
    scale = attr(SCALE_FORMAT, "fp32", doc="quant's: powers of two with ue8m0")
    to = attr(DTYPE, None, doc="dtype of the result of scaled operands, bf16 where it is left out")
    y = result("[R~E, N]; with swiglu [R~E, N/2]; with quant scaled")

    def infer(self) -> TensorType:
        slot = self.integers(self.slot, 1)
        w = self.expert_weights(self.slot, self.to)
        if self.per_row < 1:
            raise self.mismatch(f"per_row is {self.per_row}")
        width = w.shape[1]
        if self.epilogue == "swiglu":
            if not isinstance(width, int) or width % 2:
                raise self.mismatch(f"{self.w.text} is {w}: gate and up need an even number of rows")
            width //= 2
            check_limit(self)
        elif self.limit is not None:
            raise self.mismatch(f"limit is {self.limit}, but no epilogue applies it")
        elif self.act != "silu":
            raise self.mismatch(f"act is {self.act}, but no epilogue applies it")
        y = TensorType(product_dtype(self, w, self.to), (slot.shape[0], width), w.shape[0])
        if self.quant is None:
            if self.scale != "fp32":
                raise self.mismatch(f"scale is {self.scale}, but quant isn't given")
            return y
        if self.to is not None:
            raise self.mismatch(f"to is {self.to}, but quant makes the result fp8")
        return quantized(self, self.x, y, self.quant)

    def cost(self) -> Cost:
        each = (gated_flops(self.limit) if self.epilogue == "swiglu" else 0) + (2 if self.quant else 0)
        return self.product_cost(self.slot.type.shape[0]) + Cost(each * self.y.type.numel)

    @staticmethod
    def reference(
        x: Any,
        w: Any,
        slot: torch.Tensor,
        off: torch.Tensor,
        *,
        per_row: int,
        epilogue: str,
        act: str,
        limit: float | None = None,
        quant: tuple[int, ...] | None = None,
        scale: str = "fp32",
        to: Any = None,
    ) -> Any:
        token = slot.long() // per_row
        y = _segments(x, w, off, [token[a:b] for a, b in pairwise(off.tolist())], len(slot))
        if epilogue == "swiglu":
            y = SwiGLU.reference(y, act=act, limit=limit)  # of fp32, in fp32
        return y.to(rounds_to(x, to)) if quant is None else quantize(y, quant, scale)


class Combine(Op, name="combine"):
    """y[t] = Σ_j w[t, j] · the row of slot t·k + j, summed in the order of j in fp32 and rounded once.

    Row r is that of slot[r]; without ``slot`` rows are in the order of the slots. ``plus`` is added before
    the rounding: the shared expert's output.
    """

    rows = operand("[T·k~E, H]; without slot [T·k, H]")
    slot = operand("[T·k] int32: each of 0..T·k-1 once", optional=True)
    w = operand("[T, k]")
    plus = operand("[T, H]", optional=True)
    order = attr(choice("slot"), "slot", doc="the order of the sum: by slot")
    to = attr(DTYPE, None, doc="dtype of the result, that of rows where it is left out")
    y = result("[T, H]")

    def infer(self) -> TensorType:
        rows, w = self.tensor(self.rows, 2), self.tensor(self.w, 2)
        self.same("T·k", rows.shape[0], self.rows, w.numel, self.w)
        if self.slot is not None:
            self.same("T·k", rows.shape[0], self.rows, self.integers(self.slot, 1).shape[0], self.slot)
        elif rows.groups is not None:
            raise self.mismatch(
                f"{self.rows.text} is {rows}, by expert, but no slot says whose rows they are"
            )
        y = TensorType(self.to or rows.dtype, (w.shape[0], rows.shape[1]))
        if self.plus is not None and self.tensor(self.plus).shape != y.shape:
            raise self.mismatch(f"{self.plus.text} is {self.plus.type} but the result {y}")
        return y

    def cost(self) -> Cost:
        return Cost(2 * self.rows.type.numel, self.moved_bytes())

    @staticmethod
    def reference(
        rows: torch.Tensor,
        slot: torch.Tensor | None,
        w: torch.Tensor,
        plus: torch.Tensor | None = None,
        *,
        order: str,
        to: Any,
    ) -> torch.Tensor:
        tokens, k = w.shape
        by_slot = rows.float()
        if slot is not None:
            by_slot = torch.zeros_like(by_slot).index_copy(0, slot.long(), by_slot)
        by_slot = by_slot.view(tokens, k, rows.shape[1])
        y = torch.zeros(tokens, rows.shape[1], dtype=torch.float32, device=rows.device)
        for j in range(k):
            y = y + w[:, j, None].float() * by_slot[:, j]
        if plus is not None:
            y = y + plus.float()
        return y.to(to.torch if to is not None else rows.dtype)


class GroupedLinearCombine(ExpertProduct, name="grouped_linear_combine"):
    """``grouped_linear`` with ``slot``, then ``combine`` without, in one go and bit for bit.

    y[t] = Σ_j weights[t, j] · (the row of slot t·k + j times its expert's weights), in the order of j in
    fp32, rounded once; each product is rounded to ``rows`` before it is weighted. A slot that no expert owns
    counts as zeros. ``plus`` is added before the last rounding.
    """

    x = operand("[T·k~E, K]")
    w = operand("[E, N, K]")
    off = operand("[E+1] int32")
    slot = operand("[T·k] int32: each of 0..T·k-1 once; row r is that of slot[r]")
    weights = operand("[T, k]")
    plus = operand("[T, N]", optional=True)
    order = attr(choice("slot"), "slot", doc="the order of the sum: by slot")
    rows = attr(DTYPE, None, doc="dtype of the products of scaled operands, bf16 where it is left out")
    to = attr(DTYPE, None, doc="dtype of the result, that of the products where it is left out")
    y = result("[T, N]")

    def infer(self) -> TensorType:
        rows, of_token = self.product_type(), self.tensor(self.weights, 2)
        self.same("T·k", self.x.type.shape[0], self.x, of_token.numel, self.weights)
        y = TensorType(self.to or rows.dtype, (of_token.shape[0], rows.shape[1]))
        if self.plus is not None and self.tensor(self.plus).shape != y.shape:
            raise self.mismatch(f"{self.plus.text} is {self.plus.type} but the result {y}")
        return y

    def product_type(self) -> TensorType:
        """Of the products, [T·k, N], in the order of the slots."""
        w, x = self.expert_weights(self.x, self.rows), self.tensor(self.x, scaled=True)
        slot = self.integers(self.slot, 1)
        self.same("R", x.shape[0], self.x, slot.shape[0], self.slot)
        return TensorType(product_dtype(self, x, self.rows), (x.shape[0], w.shape[1]))

    def cost(self) -> Cost:
        """The products still go through memory: they are written, then read by who sums them."""
        rows = self.product_type()
        return self.product_cost(rows.shape[0]) + Cost(2 * rows.numel, 2 * rows.nbytes)

    @staticmethod
    def reference(
        x: Any,
        w: Any,
        off: torch.Tensor,
        slot: torch.Tensor,
        weights: torch.Tensor,
        plus: torch.Tensor | None = None,
        *,
        order: str,
        rows: Any,
        to: Any,
    ) -> torch.Tensor:
        products = GroupedLinear.reference(x, w, off, slot, to=rows)
        return Combine.reference(products, None, weights, plus, order=order, to=to)
