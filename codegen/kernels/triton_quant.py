"""Quantising activations on GPUs: fp8 with a scale for every 128 columns of a row, or for the row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moec.codegen.kernels import register
from moec.codegen.kernels.triton import TritonKernel, not_float, not_static, pointer, tensor
from moec.codegen.kernels.triton_scales import QUANT_BLOCK
from moec.ir.devices import GPU, GPUS
from moec.ir.op import Op
from moec.ir.types import format_block

WIDEST = 16384  # columns of a row that one program holds in registers
FEW = 64  # rows: with more, programs of 16 rows fill the chip


@dataclass(frozen=True)
class Tile:
    """How many rows a program quantises, with how many warps."""

    block_m: int
    warps: int

    @property
    def name(self) -> str:
        return f"{self.block_m}w{self.warps}"


def _constants(op: Op, device: GPU) -> dict[str, Any]:
    x, block = tensor(op.operands[0]), op.attrs["block"]
    depth = x.shape[-1]
    whole = block[-1] == 0
    width = 1 << (depth - 1).bit_length() if whole else block[-1]
    return {
        "depth": depth,
        "whole": whole,
        "width": width,
        "blocks": 1 if whole else -(-depth // width),
        "tail": depth % width > 0,
        "ue8m0": op.attrs["scale"] == "ue8m0",
        "shown": format_block(block),
        "x_type": pointer(x.dtype),
        "variants": [Tile(1, max(1, min(8, width // 1024)))] if whole else [Tile(1, 1), Tile(16, 4)],
        "few": FEW,
    }


def _reasons(op: Op) -> list[str]:
    x, block = tensor(op.operands[0]), op.attrs["block"]
    depth = x.shape[-1]
    found = not_static(K=depth) + not_float(x)
    if block not in (QUANT_BLOCK, (1, 0)):
        found.append(f"block is {format_block(block)}: the kernel does {format_block(QUANT_BLOCK)} and 1x*")
    elif not found and block == (1, 0) and not 0 < depth <= WIDEST:
        found.append(f"K is {depth}: a program holds 1 to {WIDEST} columns of a row")
    elif not found and depth == 0:
        found.append("K is 0")
    return found


def beside_reasons(op: Op) -> list[str]:
    """Against quantising x, an operand of ``op``, as that op's ``quant`` says, beside what else it does."""
    x, block = tensor(op.x), op.attrs["quant"]  # type: ignore[attr-defined]
    found = not_static(K=x.shape[1]) + not_float(x)
    if block != QUANT_BLOCK:
        found.append(f"quant is {format_block(block)}: the kernel does {format_block(QUANT_BLOCK)}")
    elif not found and x.shape[1] == 0:
        found.append("K is 0")
    return found


register(
    TritonKernel(
        "quant",
        "triton/quant.py.jinja",
        _constants,
        _reasons,
        ("triton/quantize.py.jinja",),
        targets=tuple(name for name, device in GPUS.items() if device.fp8),
    )
)
