"""Routed experts as one op: both products, SwiGLU between, and the sum; with the router or without it."""

from __future__ import annotations

from functools import reduce
from operator import add
from typing import Any

import torch

from moec.errors import TypeMismatch
from moec.ir.attrs import BLOCK, DTYPE, FLOAT, choice
from moec.ir.op import Cost, Op, OpResult, Value, attr, operand, result
from moec.ir.ops.moe import GatherGroupedLinear, GroupedLinearCombine
from moec.ir.ops.route import Route, RouteSort
from moec.ir.ops.scaled import SCALE_FORMAT
from moec.ir.types import TensorType


def _part(op: Op, *names: str) -> Op:
    """``op`` with results of these names, which belong to no function. Raises as its ``infer`` does."""
    types = op.infer()
    types = types if isinstance(types, tuple) else (types,)
    op.results = tuple(
        OpResult(name, type, op, i) for i, (name, type) in enumerate(zip(names, types, strict=True))
    )
    return op


class _Fused(Op):
    """An op that computes what its parts do, one after the other."""

    products = True

    def parts(self) -> tuple[Op, ...]:
        """The ops that it stands for. What they exchange has a type but belongs to no function."""
        raise NotImplementedError

    def infer(self) -> TensorType:
        try:
            type = self.parts()[-1].results[0].type
        except TypeMismatch as error:  # it names the part
            raise self.mismatch(error.message.partition(": ")[2]) from None
        if not isinstance(type, TensorType):
            raise self.mismatch(f"the result is {type}")
        return type

    def cost(self) -> Cost:
        """The sum of the parts' costs: what they exchange still goes through memory."""
        return reduce(add, (part.cost() for part in self.parts()))


def taken_apart(op: Op) -> tuple[Op, ...]:
    """The parts of ``op`` where it has any, else ``op`` itself."""
    return op.parts() if isinstance(op, _Fused) else (op,)


def parts_of(op: Op) -> tuple[Op | None, Op, Op]:
    """The router, if it's among the parts of ``op``, and both products."""
    if not isinstance(op, _Fused):
        raise TypeError(f"{op} has no parts")
    *route, up, down = op.parts()
    return (route[0] if route else None), up, down


class Experts(_Fused, name="experts"):
    """``gather_grouped_linear`` with SwiGLU, then ``grouped_linear_combine``, in one go and bit for bit.

    y[t] = Σ_j weights[t, j] · (w2[e] · (act(gate) · up)), gate and up the two halves of w13[e] · x[t], for
    the expert e of choice j.
    """

    x = operand("[T, K]")
    w13 = operand("[E, 2·I, K]: an expert's gate rows before its up rows")
    w2 = operand("[E, N, I]")
    off = operand("[E+1] int32")
    slot = operand("[T·k~E] int32: each of 0..T·k-1 once")
    weights = operand("[T, k]")
    plus = operand("[T, N]", optional=True)
    act = attr(choice("silu", "gelu", "gelu_tanh"), "silu", doc="swiglu's; gelu_tanh: its tanh approximation")
    limit = attr(FLOAT, None, doc="swiglu's: gate is clamped to at most this, up to ± this")
    quant = attr(BLOCK, None, doc="what SwiGLU gives is quantised with scales for these blocks, `1x128`")
    quant_scale = attr(SCALE_FORMAT, "fp32", doc="quant's: powers of two with ue8m0")
    h = attr(DTYPE, None, doc="dtype of what SwiGLU gives of scaled operands, bf16 where it is left out")
    rows = attr(DTYPE, None, doc="dtype of the second products of scaled operands, bf16 where it is left out")
    order = attr(choice("slot"), "slot", doc="the order of the sum: by slot")
    to = attr(DTYPE, None, doc="dtype of the result, that of the second products where it is left out")
    y = result("[T, N]")

    def parts(self) -> tuple[Op, ...]:
        return self._products(self.off, self.slot, self.weights)

    def _products(self, off: Value, slot: Value, weights: Value) -> tuple[Op, ...]:
        per_row = self.tensor(weights, 2).shape[1]
        if not isinstance(per_row, int):
            raise self.mismatch(f"{weights.text} is {weights.type}: k isn't known")
        first = {"per_row": per_row, "epilogue": "swiglu", "to": self.attrs["h"]}
        first |= {key: self.attrs[key] for key in ("act", "limit", "quant")}
        first |= {"scale": self.attrs["quant_scale"]}
        up = _part(GatherGroupedLinear([self.x, self.w13, slot, off], first, self.loc), "h")
        second = {key: self.attrs[key] for key in ("rows", "order", "to")}
        operands = [up.results[0], self.w2, off, slot, weights, self.plus]
        return up, _part(GroupedLinearCombine(operands, second, self.loc), "y")

    @staticmethod
    def reference(
        x: Any,
        w13: Any,
        w2: Any,
        off: torch.Tensor,
        slot: torch.Tensor,
        weights: torch.Tensor,
        plus: torch.Tensor | None = None,
        *,
        act: str,
        limit: float | None,
        quant: tuple[int, ...] | None,
        quant_scale: str,
        h: Any,
        rows: Any,
        order: str,
        to: Any,
    ) -> torch.Tensor:
        how = {"act": act, "limit": limit, "quant": quant, "scale": quant_scale, "to": h}
        how |= {"epilogue": "swiglu"}
        made = GatherGroupedLinear.reference(x, w13, slot, off, per_row=weights.shape[1], **how)
        return GroupedLinearCombine.reference(
            made, w2, off, slot, weights, plus, order=order, rows=rows, to=to
        )


class RoutedExperts(_Fused, name="routed_experts"):
    """``route_sort``, then ``experts`` of what it chose: a routed layer in one go and bit for bit.

    The router's E experts and the ``shared`` ones behind them are those of w13 and w2.
    """

    x = operand("[T, K]")
    w13 = operand("[E + shared, 2·I, K]: an expert's gate rows before its up rows")
    w2 = operand("[E + shared, N, I]")
    logits = operand("[T, E] fp32 or the model's dtype")
    bias = operand("[E] fp32", optional=True)
    plus = operand("[T, N]", optional=True)
    score, k, renorm, scale = Route.score, Route.k, Route.renorm, Route.scale
    groups, topk_groups = Route.groups, Route.topk_groups
    group_score, masked, dtype, shared = Route.group_score, Route.masked, Route.dtype, Route.shared
    act, limit = Experts.act, Experts.limit
    quant, quant_scale, h = Experts.quant, Experts.quant_scale, Experts.h
    rows, order, to = Experts.rows, Experts.order, Experts.to
    y = result("[T, N]")

    def parts(self) -> tuple[Op, ...]:
        router = {key: self.attrs[key] for key in RouteSort.attr_specs}
        route = _part(RouteSort([self.logits, self.bias], router, self.loc), "w", "id", "slot", "off")
        w, _, slot, off = route.results
        every = self.logits.type.shape[1] + self.attrs["shared"]
        self.same("E + shared", every, self.logits, self.tensor(self.w13, 3, scaled=True).shape[0], self.w13)
        how = {key: self.attrs[key] for key in Experts.attr_specs}
        experts = Experts([self.x, self.w13, self.w2, off, slot, w, self.plus], how, self.loc)
        return route, *experts.parts()

    @staticmethod
    def reference(
        x: Any,
        w13: Any,
        w2: Any,
        logits: torch.Tensor,
        bias: torch.Tensor | None = None,
        plus: torch.Tensor | None = None,
        **how: Any,
    ) -> torch.Tensor:
        router = {key: how.pop(key) for key in RouteSort.attr_specs}
        w, _, slot, off = RouteSort.reference(logits, bias, **router)
        return Experts.reference(x, w13, w2, off, slot, w, plus, **how)
