"""Ops that move or view elements and compute nothing."""

from __future__ import annotations

from typing import Any

import torch

from moec.ir.attrs import DIMS, INT, INTS
from moec.ir.op import Cost, Op, Value, attr, operand, result
from moec.ir.scaled import Scaled
from moec.ir.types import Dim, TensorType, as_dim, block_count, format_block, format_dim, product


def _axis(op: Op, axis: int, rank: int) -> int:
    if not -rank <= axis < rank:
        raise op.mismatch(f"axis {axis} of a tensor of rank {rank}")
    return axis % rank


def _resized(x: TensorType, axis: int, size: Dim) -> TensorType:
    """x with another size of one axis; cutting or joining rows ends their grouping."""
    groups = x.groups if axis else None
    return TensorType(x.dtype, (*x.shape[:axis], size, *x.shape[axis + 1 :]), groups, x.scale)


def _block_of(x: TensorType, axis: int) -> int | None:
    """What of ``axis`` shares a scale (0: all of it); None where each index has its own."""
    number = axis - (x.rank - len(x.scale or ()))
    return x.scale[number] if x.scale and number >= 0 else None


def _between_blocks(op: Op, value: Value, x: TensorType, axis: int, sizes: list[Any], verb: str) -> None:
    """Raises unless parts of ``sizes`` along ``axis`` begin where blocks of scales do."""
    block = _block_of(x, axis)
    for size in sizes[:-1]:
        if block and (not isinstance(size, int) or size % block):
            raise op.mismatch(
                f"{value.text} is {x}: a part of {format_dim(size)} along axis {axis} would {verb} within a "
                f"block of {block}; refine the scales first"
            )


class Reshape(Op, name="reshape"):
    """The same elements in another shape, row-major. Of scaled ones every block must stay whole."""

    x = operand("[...]")
    shape = attr(DIMS)
    y = result("shape")

    launches = 0

    def infer(self) -> TensorType:
        x = self.tensor(self.x, scaled=True)
        if product(self.shape) != x.numel:
            shape = ",".join(map(format_dim, self.shape))
            raise self.mismatch(f"{self.x.text} is {x}, which has another number of elements than [{shape}]")
        groups = x.groups if self.shape[:1] == x.shape[:1] else None
        if x.scale and not _keeps_blocks(x, self.shape):
            raise self.mismatch(
                f"{self.x.text} is {x}: in shape {_shape_text(self.shape)} blocks of {format_block(x.scale)} "
                "would hold other elements; refine the scales first"
            )
        return TensorType(x.dtype, self.shape, groups, x.scale)

    def cost(self) -> Cost:
        return Cost()

    @staticmethod
    def reference(x: Any, *, shape: tuple[Any, ...]) -> Any:
        # The interpreter has replaced the symbols by numbers.
        if isinstance(x, Scaled):
            q = x.q.reshape(shape)
            lead, blocked = shape[: -len(x.block)], shape[-len(x.block) :]
            blocks = (block_count(n, b) for n, b in zip(blocked, x.block, strict=True))
            return Scaled(q, x.scale.reshape(*lead, *blocks), x.block)
        return x.reshape(shape)


def _shape_text(shape: tuple[Dim, ...]) -> str:
    return f"[{','.join(map(format_dim, shape))}]"


def _keeps_blocks(x: TensorType, shape: tuple[Dim, ...]) -> bool:
    """Whether the scales of x, reshaped in row-major order too, are those of ``shape`` in the same blocks.

    So it is where whole axes in front of the blocks change, or where an axis of blocks, all of them whole, is
    cut or joined with those in front of it.
    """
    block = x.scale or ()
    if len(shape) < len(block):
        return False
    inner = 0  # axes from the end that stay as they are
    while inner < len(block) and shape[-1 - inner] == x.shape[-1 - inner]:
        inner += 1
    if inner == len(block):
        return True
    size = block[-1 - inner]
    outer = block[: len(block) - 1 - inner]  # of the axes in front of the one that is cut
    cut = x.shape[-1 - inner], shape[-1 - inner]
    whole = size == 1 or (size > 0 and all(isinstance(n, int) and n % size == 0 for n in cut))
    return whole and all(b == 1 for b in outer)


class Split(Op, name="split"):
    """Consecutive parts of one axis; of scaled ones, cut between blocks."""

    x = operand("[..., sum(sizes), ...]")
    sizes = attr(INTS, doc="of the parts; they add up to the axis")
    axis = attr(INT, -1)
    part = result("[..., size, ...], one for each size")

    launches = 0

    def infer(self) -> tuple[TensorType, ...]:
        x = self.tensor(self.x, scaled=True)
        axis = _axis(self, self.axis, x.rank)
        if not self.sizes or min(self.sizes) < 1:
            raise self.mismatch(f"sizes are {list(self.sizes)}: they must be positive")
        if x.shape[axis] != sum(self.sizes):
            raise self.mismatch(
                f"axis {axis} of {self.x.text} is {x.shape[axis]}, sizes add up to {sum(self.sizes)}"
            )
        _between_blocks(self, self.x, x, axis, list(self.sizes), "end")
        return tuple(_resized(x, axis, size) for size in self.sizes)

    def cost(self) -> Cost:
        return Cost()

    @staticmethod
    def reference(x: Any, *, sizes: tuple[int, ...], axis: int) -> tuple[Any, ...]:
        if isinstance(x, Scaled):
            block = Split._block(x, axis)
            blocks = [block_count(size, block) for size in sizes]
            scales = [x.scale] * len(sizes) if block == 0 else x.scale.split(blocks, dim=axis)
            parts = zip(x.q.split(list(sizes), dim=axis), scales, strict=True)
            return tuple(Scaled(q.contiguous(), s.contiguous(), x.block) for q, s in parts)
        return tuple(part.contiguous() for part in x.split(list(sizes), dim=axis))

    @staticmethod
    def _block(x: Scaled, axis: int) -> int:
        """What of ``axis`` shares a scale."""
        number = axis % x.q.dim() - (x.q.dim() - len(x.block))
        return x.block[number] if number >= 0 else 1


class Concat(Op, name="concat"):
    """Tensors one after the other along an axis; scaled ones where blocks end."""

    xs = operand("[...], alike but for one axis", variadic=True)
    axis = attr(INT, -1)
    y = result("[..., sum of the sizes, ...]")

    def infer(self) -> TensorType:
        if not self.xs:
            raise self.mismatch("needs at least one operand")
        first = self.tensor(self.xs[0], scaled=True)
        axis = _axis(self, self.axis, first.rank)
        total: Dim = 0
        for number, value in enumerate(self.xs):
            t = self.tensor(value, first.rank, scaled=True)
            self.same("the dtype", first.dtype, self.xs[0], t.dtype, value)
            blocks = (format_block(type.scale) if type.scale else "none" for type in (first, t))
            self.same("the block of scales", next(blocks), self.xs[0], next(blocks), value)
            for i in range(first.rank):
                if i != axis:
                    self.same(f"axis {i}", first.shape[i], self.xs[0], t.shape[i], value)
            total = as_dim(total + t.shape[axis])
            if number + 1 < len(self.xs):
                _between_blocks(self, value, t, axis, [t.shape[axis], 0], "end")
        if len(self.xs) > 1 and _block_of(first, axis) == 0:
            raise self.mismatch(
                f"{self.xs[0].text} is {first}: parts with a scale each, along axis {axis}, can't share one; "
                "refine the scales first"
            )
        return _resized(first, axis, total)

    @staticmethod
    def reference(*xs: Any, axis: int) -> Any:
        if isinstance(xs[0], Scaled):
            q, scale, blocks = zip(*xs, strict=True)
            return Scaled(torch.cat(q, dim=axis), torch.cat(scale, dim=axis), blocks[0])
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
