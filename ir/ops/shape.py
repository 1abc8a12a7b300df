"""Ops that move or view elements and compute nothing."""

from __future__ import annotations

from typing import Any

import torch

from moec.ir.attrs import DIMS, INT, INTS
from moec.ir.op import Cost, Op, attr, operand, result
from moec.ir.types import Dim, TensorType, as_dim, format_dim, product


def _axis(op: Op, axis: int, rank: int) -> int:
    if not -rank <= axis < rank:
        raise op.mismatch(f"axis {axis} of a tensor of rank {rank}")
    return axis % rank


def _resized(x: TensorType, axis: int, size: Dim) -> TensorType:
    """x with another size of one axis; cutting or joining rows ends their grouping."""
    groups = x.groups if axis else None
    return TensorType(x.dtype, (*x.shape[:axis], size, *x.shape[axis + 1 :]), groups)


class Reshape(Op, name="reshape"):
    """The same elements in another shape, row-major."""

    launches = 0
    x = operand("[...]")
    shape = attr(DIMS)
    y = result("shape")

    def infer(self) -> TensorType:
        x = self.tensor(self.x)
        if product(self.shape) != x.numel:
            shape = ",".join(map(format_dim, self.shape))
            raise self.mismatch(f"{self.x.text} is {x}, which has another number of elements than [{shape}]")
        return TensorType(x.dtype, self.shape, x.groups if self.shape[:1] == x.shape[:1] else None)

    def cost(self) -> Cost:
        return Cost()

    @staticmethod
    def reference(x: torch.Tensor, *, shape: tuple[Any, ...]) -> torch.Tensor:
        # The interpreter has replaced the symbols by numbers.
        return x.reshape(shape)


class Split(Op, name="split"):
    """Consecutive parts of one axis."""

    launches = 0
    x = operand("[..., sum(sizes), ...]")
    sizes = attr(INTS, doc="of the parts; they add up to the axis")
    axis = attr(INT, -1)
    part = result("[..., size, ...], one for each size")

    def infer(self) -> tuple[TensorType, ...]:
        x = self.tensor(self.x)
        axis = _axis(self, self.axis, x.rank)
        if not self.sizes or min(self.sizes) < 1:
            raise self.mismatch(f"sizes are {list(self.sizes)}: they must be positive")
        if x.shape[axis] != sum(self.sizes):
            raise self.mismatch(
                f"axis {axis} of {self.x.text} is {x.shape[axis]}, sizes add up to {sum(self.sizes)}"
            )
        return tuple(_resized(x, axis, size) for size in self.sizes)

    def cost(self) -> Cost:
        return Cost()

    @staticmethod
    def reference(x: torch.Tensor, *, sizes: tuple[int, ...], axis: int) -> tuple[torch.Tensor, ...]:
        return tuple(part.contiguous() for part in x.split(list(sizes), dim=axis))


class Concat(Op, name="concat"):
    """Tensors one after the other along an axis."""

    xs = operand("[...], alike but for one axis", variadic=True)
    axis = attr(INT, -1)
    y = result("[..., sum of the sizes, ...]")

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
        return _resized(first, axis, total)

    @staticmethod
    def reference(*xs: torch.Tensor, axis: int) -> torch.Tensor:
        return torch.cat(xs, dim=axis)


class Broadcast(Op, name="broadcast"):
    """A new axis along which x repeats: one rotary key for all heads."""

    launches = 0
    x = operand("[...]")
    axis = attr(INT, doc="where the new axis stands in the result")
    size = attr(INT, doc="its size")
    y = result("[..., size, ...]")

    def infer(self) -> TensorType:
        x = self.tensor(self.x)
        axis = _axis(self, self.axis, x.rank + 1)
        if self.size < 1:
            raise self.mismatch(f"size is {self.size}")
        shape = (*x.shape[:axis], self.size, *x.shape[axis:])
        return TensorType(x.dtype, shape, x.groups if axis else None)

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
        n = self.integers(self.n, 1)
        return n.with_(shape=(as_dim(n.shape[0] + 1),))

    @staticmethod
    def reference(n: torch.Tensor) -> torch.Tensor:
        return torch.cat([n.new_zeros(1), n.cumsum(0).to(n.dtype)])
