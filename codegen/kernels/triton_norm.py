"""RMSNorm with quantisation behind it on GPUs: a row in one program, which never leaves its registers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moec.codegen.kernels import register
from moec.codegen.kernels.triton import TritonKernel, not_float, not_static, pointer, tensor
from moec.codegen.kernels.triton_quant import WIDEST
from moec.codegen.kernels.triton_scales import QUANT_BLOCK
from moec.ir.devices import GPU, GPUS
from moec.ir.op import Op
from moec.ir.types import format_block


@dataclass(frozen=True)
class Row:
    """How many warps hold a row."""

    warps: int

    @property
    def name(self) -> str:
        return f"row{self.warps}w"


def _constants(op: Op, device: GPU) -> dict[str, Any]:
    x, w = tensor(op.operands[0]), tensor(op.operands[-1])
    depth = int(x.shape[-1])
    blocks = -(-depth // 128)
    pieces = 1 << (blocks - 1).bit_length()
    return {
        "add": op.name != "rms_norm",
        "plain": op.name == "add_rms_norm_and_quant",
        "depth": depth,
        "blocks": blocks,
        "pieces": pieces,
        "eps": op.attrs["eps"],
        "ue8m0": op.attrs["scale"] == "ue8m0",
        "x_type": pointer(x.dtype),
        "w_type": pointer(w.dtype),
        "variant": Row(max(1, min(8, pieces // 8))),
    }


def _reasons(op: Op) -> list[str]:
    x, w, block = tensor(op.operands[0]), tensor(op.operands[-1]), op.attrs["quant"]
    if block is None:
        return ["the result isn't quantised"]
    depth = x.shape[-1]
    found = not_static(K=depth) + not_float(x, w)
    if block != QUANT_BLOCK:
        found.append(f"quant is {format_block(block)}: the kernel does {format_block(QUANT_BLOCK)}")
    elif not found and not 0 < depth <= WIDEST:
        found.append(f"K is {depth}: a program holds 1 to {WIDEST} columns of a row")
    return found


register(
    *(
        TritonKernel(
            op,
            "triton/norm_quant.py.jinja",
            _constants,
            _reasons,
            ("triton/quantize.py.jinja",),
            targets=tuple(name for name, device in GPUS.items() if device.fp8),
        )
        for op in ("rms_norm", "add_rms_norm", "add_rms_norm_and_quant")
    )
)
