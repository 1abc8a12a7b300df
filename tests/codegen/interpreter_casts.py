"""Casts and products in Triton's interpreter as a GPU does them.

The interpreter (3.6 and 3.9) truncates where fp32 becomes bf16, rounds fp8 wrongly, doesn't saturate it, and
multiplies bf16 as if its bits were integers. ``install()`` replaces these three places for the whole process:
casts are PyTorch's, fp8 saturates as ``cvt.rn.satfinite`` does, products are those of fp32 operands.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from moec.runtime.triton_mode import INEXACT, WRONG

TORCH = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e5": torch.float8_e5m2,
}
STORED_AS_BITS = ("bf16", "fp8e4nv", "fp8e5")
original = {
    "convert": interpreter._convert_float,
    "cast": InterpreterBuilder.cast_impl,
    "dot": InterpreterBuilder.create_dot,
}


def install() -> None:
    """Replaces the interpreter's own, once and for all; what refused these dtypes takes them then."""
    WRONG.clear()
    INEXACT.clear()
    interpreter._convert_float = convert
    InterpreterBuilder.cast_impl = cast
    InterpreterBuilder.create_dot = dot


def convert(data: Any, source: Any, target: Any, rounding: Any) -> Any:
    """Bits of ``source`` as bits of ``target``, to nearest even."""
    if rounding == interpreter._ir.ROUNDING_MODE.RTZ or not {source.name, target.name} <= TORCH.keys():
        return original["convert"](data, source, target, rounding)
    stored = torch.from_numpy(np.array(data).view(f"int{source.primitive_bitwidth}"))
    wide = stored.view(TORCH[source.name]).float()
    kind, bits = TORCH[target.name], target.primitive_bitwidth
    if bits == 8:
        most = torch.finfo(kind).max
        wide = wide.clamp(-most, most)  # NaN stays NaN
    return wide.to(kind).view(getattr(torch, f"int{bits}")).numpy().view(f"uint{bits}")


def cast(builder: Any, source: Any, type: Any) -> Any:
    """Values of one dtype as another's; what is stored as bits is spelt out first."""
    from_, to = source.dtype.scalar, type.scalar
    if from_.name in TORCH and to.name in TORCH:
        bits = convert(source.data, from_, to, None)
        return TensorHandle(bits.view(interpreter._get_np_dtype(to)), to)
    if from_.name in STORED_AS_BITS:
        source = TensorHandle(convert(source.data, from_, tl.float32, None).view(np.float32), tl.float32)
    if to.name in STORED_AS_BITS:
        floats = source.data.astype(np.float32)
        return TensorHandle(convert(floats, tl.float32, to, None), to)
    return original["cast"](builder, source, type)


def dot(builder: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    """a · b + d with operands that are stored as bits made fp32."""
    wide = [
        TensorHandle(convert(v.data, v.dtype.scalar, tl.float32, None).view(np.float32), tl.float32)
        if v.dtype.scalar.name in STORED_AS_BITS
        else v
        for v in (a, b)
    ]
    return original["dot"](builder, *wide, d, input_precision, max_num_imprecise_acc)


def in_order(builder: Any, a: Any, b: Any, d: Any, *how: Any) -> Any:
    """a · b + d, one k after the other: NumPy's own product of a row depends on where in the tile it lies."""
    total = np.zeros_like(d.data)
    for k in range(a.data.shape[1]):
        total += a.data[:, k, None].astype(np.float32) * b.data[None, k].astype(np.float32)
    return TensorHandle(total + d.data, d.dtype.scalar)
