"""Ops that move or view elements and compute nothing."""

from __future__ import annotations

from typing import Any

import sympy
import torch

from moec.ir.attrs import DIMS, INT, INTS
from moec.ir.op import Cost, Op, attr, operand, result
from moec.ir.types import Dim, TensorType, as_dim, product


def _axis(op: Op, axis: int, rank: int) -> int:
    if not -rank <= axis < rank:
        raise op.mismatch(f"axis {axis} of a tensor of rank {rank}")
    return axis % rank


class Reshape(Op, name="reshape"):
    """The same elements in another shape, row-major."""

    x = operand("[...]")
    shape = attr(DIMS)
    y = result("shape")

    def infer(self) -> TensorType:
        x = self.tensor(self.x)
        if sympy.expand(product(self.shape) - x.numel) != 0:
            raise self.mismatch(
                f"{self.x.text} is {x}, which has another number of elements than {list(self.shape)}"
            )
        return TensorType(x.dtype, self.shape, x.groups if self.shape[:1] == x.shape[:1] else None)

    def cost(self) -> Cost:
        return Cost()

    @staticmethod
    def reference(x: torch.Tensor, *, shape: tuple[Any, ...]) -> torch.Tensor:
        # The interpreter has replaced the symbols by numbers.
        return x.reshape(shape)


class Split(Op, name="split"):
    """Consecutive parts of one axis."""

    x = operand("[..., sum(sizes), ...]")
    sizes = attr(INTS)
    axis = attr(INT, -1)
    part = result()

    def infer(self) -> tuple[TensorType, ...]:
        x = self.tensor(self.x)
        axis = _axis(self, self.axis, x.rank)
        if x.shape[axis] != sum(self.sizes):
            raise self.mismatch(
                f"axis {axis} of {self.x.text} is {x.shape[axis]}, sizes add up to {sum(self.sizes)}"
            )
        return tuple(x.with_(shape=(*x.shape[:axis], size, *x.shape[axis + 1 :])) for size in self.sizes)

    def cost(self) -> Cost:
        return Cost()

    @staticmethod
    def reference(x: torch.Tensor, *, sizes: tuple[int, ...], axis: int) -> tuple[torch.Tensor, ...]:
        return tuple(part.contiguous() for part in x.split(list(sizes), dim=axis))


class Concat(Op, name="concat"):
    """Tensors one after the other along an axis."""

    xs = operand("[...], alike but for one axis", variadic=True)
    axis = attr(INT, -1)
    y = result()

    def infer(self) -> TensorType:
        if not self.xs:
            raise self.mismatch("needs at least one operand")
        first = self.tensor(self.xs[0])
        axis = _axis(self, self.axis, first.rank)
        total: Dim = 0
        for value in self.xs:
            t = self.tensor(value, first.rank)
            self.same("the dtype", first.dtype, self.xs[0], t.dtype, value)
            for i in range(first.rank):
                if i != axis:
                    self.same(f"axis {i}", first.shape[i], self.xs[0], t.shape[i], value)
            total = as_dim(total + t.shape[axis])
        return first.with_(shape=(*first.shape[:axis], total, *first.shape[axis + 1 :]))

    @staticmethod
    def reference(*xs: torch.Tensor, axis: int) -> torch.Tensor:
        return torch.cat(xs, dim=axis)


class Broadcast(Op, name="broadcast"):
    """A new axis along which x repeats: one rotary key for all heads."""

    x = operand("[...]")
    axis = attr(INT)
    size = attr(INT)
    y = result("[..., size, ...]")

    def infer(self) -> TensorType:
        x = self.tensor(self.x)
        axis = _axis(self, self.axis, x.rank + 1)
        return x.with_(shape=(*x.shape[:axis], self.size, *x.shape[axis:]))

    def cost(self) -> Cost:
        return Cost()

    @staticmethod
    def reference(x: torch.Tensor, *, axis: int, size: int) -> torch.Tensor:
        wide = x.unsqueeze(axis)
        shape = list(wide.shape)
        shape[axis] = size
        return wide.expand(shape)


class PrefixSum(Op, name="prefix_sum"):
    """0, n0, n0+n1, …: lengths to offsets."""

    n = operand("[B] integers")
    offsets = result("[B+1]")

    def infer(self) -> TensorType:
        n = self.tensor(self.n, 1)
        return n.with_(shape=(as_dim(n.shape[0] + 1),))

    @staticmethod
    def reference(n: torch.Tensor) -> torch.Tensor:
        return torch.cat([n.new_zeros(1), n.cumsum(0).to(n.dtype)])
