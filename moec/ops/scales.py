"""The scales of experts in fp8: what they may be, and what they make of a call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from moec.errors import BadInput
from moec.ops.inputs import E4M3, FLOATS, check_experts, describe

# The second holds powers of two, which is what activations then get too.
OF_WEIGHTS = {torch.float32: "fp32", torch.float8_e8m0fnu: "ue8m0"}
Block: TypeAlias = tuple[int, int]


class Scales:
    """What scales of weights and of x make of a call: constants of its key, and its last arguments.

    The weights' become float32 and contiguous: they are a 16384th of them, or less.
    """

    def __init__(
        self,
        x: Tensor,
        w13: Tensor,
        w2: Tensor,
        w13_scale: Tensor | None,
        w2_scale: Tensor | None,
        x_scale: Tensor | None,
    ) -> None:
        self.constants: dict[str, Any] = {}
        self.weights: dict[str, Tensor] = {}
        self.arguments: list[Tensor] = []
        if w13_scale is None or w2_scale is None:
            return
        self.weights = {"w13_scale": w13_scale, "w2_scale": w2_scale}
        weights = zip((w13, w2), self.weights.items(), strict=True)
        self.constants["blocks"] = tuple(scale_block(name, w, s) for w, (name, s) in weights)
        self.constants["formats"] = tuple(OF_WEIGHTS[s.dtype] for s in self.weights.values())
        self.arguments = [aligned(s.to(torch.float32).contiguous()) for s in self.weights.values()]
        if x_scale is not None:
            self.constants["x_block"] = x_block(x, x_scale)
            self.arguments.append(aligned(x_scale if x_scale.dim() == 2 else x_scale.view(1, 1)))

    def form(self, name: str) -> str:
        return f"{name}_fp8" if self.weights else name

    def check(self, experts: Tensor) -> None:
        """Those of ``experts``, which are read, are finite; x's may be NaN where x was. Raises BadInput."""
        for name, scale in self.weights.items():
            check_scale_values(name, scale, experts)


def aligned(scale: Tensor) -> Tensor:
    """``scale`` where it may be read 16 bytes at a time: some experts' cut from those of all are copied."""
    return scale if scale.data_ptr() % 16 == 0 else scale.clone()


def check_scaled_experts(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    contiguous: bool,
    w13_scale: Tensor | None,
    w2_scale: Tensor | None,
    x_scale: Tensor | None,
    name: str = "x",
) -> None:
    """As ``check_experts``, of experts in e4m3, and all scales. Raises BadInput."""
    floats = FLOATS if x_scale is None else [E4M3]
    check_experts(x, w13, w2, contiguous, name, floats, E4M3)
    for scaled, w, scale in (("w13_scale", w13, w13_scale), ("w2_scale", w2, w2_scale)):
        if scale is None:
            raise BadInput(f"{scaled} is missing: {scaled.removesuffix('_scale')} is {describe(w)}")
        scale_block(scaled, w, scale)
    if x_scale is not None:
        x_block(x, x_scale)


def scale_block(name: str, w: Tensor, scale: Tensor) -> Block:
    """What of each of the matrices w [E, N, K] shares a scale, 0 being all: told by the scales' shape.

    Raises BadInput for one that is none of blocks', rows', matrices' or, of w13, its gate's and its up's.
    """
    experts, rows, columns = w.shape
    shapes = {
        "128 x 128 blocks": ((128, 128), (experts, -(-rows // 128), -(-columns // 128))),
        "rows": ((1, 0), (experts, rows, 1)),
        "whole experts": ((0, 0), (experts, 1, 1)),
    }
    if name == "w13_scale":
        shapes["gate and up"] = ((rows // 2, 0), (experts, 2, 1))
        if two_readings(rows, columns) and scale.shape == (experts, 2, 1):
            raise BadInput(
                f"{name} [E, 2, 1] may be of gate and up or of 128 x 128 blocks of w13 {list(w.shape)}: "
                f"give each row its own, [E, {rows}, 1]"
            )
    return _block(name, scale, shapes, *OF_WEIGHTS)


def two_readings(rows: int, columns: int) -> bool:
    """Whether scales [E, 2, 1] of w13 [E, rows, columns] mean one thing by halves and another by blocks."""
    return columns <= 128 < rows < 256


def x_block(x: Tensor, scale: Tensor) -> Block:
    """What of x [T, H] shares a scale. Raises BadInput for one that is none of blocks', rows' or x's."""
    shapes = {
        "1 x 128 blocks": ((1, 128), (x.shape[0], -(-x.shape[1] // 128))),
        "rows": ((1, 0), (x.shape[0], 1)),
        "all of x": ((0, 0), (1,)),
    }
    return _block("x_scale", scale, shapes, torch.float32)


def _block(
    name: str, scale: Tensor, shapes: Mapping[str, tuple[Block, tuple[int, ...]]], *dtypes: torch.dtype
) -> Block:
    for block, shape in shapes.values():
        if scale.shape == shape and scale.dtype in dtypes:
            return block
    names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
    known = ", ".join(f"{list(shape)} ({what})" for what, (_, shape) in shapes.items())
    raise BadInput(f"{name} must be {names}, one of {known}, not {describe(scale)}")


def check_scale_values(name: str, scale: Tensor, experts: Tensor) -> None:
    """The scales of ``experts`` are finite, where that can be read without waiting. Raises BadInput."""
    if scale.device.type != "cpu":
        return
    bad = (~scale[experts].float().isfinite()).nonzero()
    if len(bad):
        index = [int(experts[bad[0, 0]]), *bad[0, 1:].tolist()]
        value = float(scale[tuple(index)])
        raise BadInput(f"{name}{index} is {value}: the scales of experts that are chosen must be finite")
