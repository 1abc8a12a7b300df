"""What the tests of Triton kernels share: ops from text, kernel files with schedules of a test's choice."""

from __future__ import annotations

import hashlib
import importlib.util
import math
from pathlib import Path
from types import ModuleType
from typing import Any

from moec.codegen.kernels import KERNELS
from moec.codegen.kernels.triton import TritonKernel, kernel_file
from moec.codegen.kernels.triton_grouped import constants_of
from moec.codegen.render import render_python
from moec.codegen.schedules import Schedule
from moec.ir.devices import GPUS
from moec.ir.op import Op
from moec.ir.text import parse_module


def grouped_op(
    dtype: str,
    experts: int,
    columns: int,
    depth: int,
    *,
    gather: bool = False,
    per_row: int = 1,
    act: str | None = None,
    scatter: bool = False,
) -> Op:
    """A grouped product with ``columns`` columns of output; ``act`` means a SwiGLU epilogue."""
    rows = columns * (2 if act else 1)
    args = [f"%w: {dtype}[{experts},{rows},{depth}]", f"%off: i32[{experts + 1}]"]
    if gather:
        args += [f"%x: {dtype}[T,{depth}]", f"%slot: i32[{per_row}*T~{experts}]"]
        epilogue = f", act={act}, epilogue=swiglu" if act else ""
        line = f"gather_grouped_linear(%x, %w, %slot, %off) {{per_row={per_row}{epilogue}}}"
        type = f"{dtype}[{per_row}*T~{experts},{columns}]"
    else:
        args += [f"%x: {dtype}[R~{experts},{depth}]", *([f"%slot: i32[R~{experts}]"] if scatter else [])]
        line = f"grouped_linear(%x, %w, %off{', %slot' if scatter else ''})"
        type = f"{dtype}[R,{columns}]" if scatter else f"{dtype}[R~{experts},{columns}]"
    return op(args, line, type)


def combine_op(rows: str, w: str, to: str, k: int, width: int, slot: bool, plus: str | None) -> Op:
    """A combine of rows, weights, result and ``plus`` of those dtypes."""
    args = [f"%rows: {rows}[{k}*T,{width}]", f"%w: {w}[T,{k}]", f"%slot: i32[{k}*T]"]
    args += [f"%plus: {plus}[T,{width}]"] if plus else []
    line = f"combine(%rows, {'%slot' if slot else '_'}, %w{', %plus' if plus else ''}) {{to={to}}}"
    return op(args, line, f"{to}[T,{width}]")


def sort_op(k: int, experts: int) -> Op:
    text = f"sort_by_expert(%id) {{experts={experts}}}"
    return op([f"%id: i32[T,{k}]"], text, f"i32[{k}*T~{experts}], i32[{experts + 1}]")


def op(args: list[str], line: str, type: str) -> Op:
    types = type.split(", ")
    names = ", ".join(f"%y{i}" for i in range(len(types)))
    text = f"moec.ir 1 module @test target=sm_90a\n\nfunc @forward({', '.join(args)}) -> {type}\n"
    text += f"  {names} = {line} : {type}\n  return {names}\nend\n"
    return parse_module(text)["forward"].ops[0]


def record(op: Op) -> TritonKernel:
    return next(k for k in KERNELS if isinstance(k, TritonKernel) and k.op == op.name)


def source(op: Op, target: str = "sm_90a", schedules: list[Schedule] | None = None) -> str:
    """The kernel file of one op, its function named as the op; ``schedules``: in place of those picked."""
    kernel = record(op)
    if schedules is None:
        return kernel_file(kernel, [kernel.render(op, op.name, target)], target)
    rungs = [(float(i + 1), s) for i, s in enumerate(schedules[:-1])] + [(math.inf, schedules[-1])]
    constants = constants_of(op, GPUS[target], rungs)
    return kernel_file(kernel, [render_python(kernel.template, name=op.name, **constants)], target)


def load(text: str, folder: Path) -> ModuleType:
    """A kernel file, written to ``folder`` and imported."""
    name = "kernel_" + hashlib.sha256(text.encode()).hexdigest()[:16]
    path = folder / "kernels" / f"{name}.py"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(op: Op, text: str, folder: Path, *operands: Any) -> Any:
    """What the generated function makes of the operands that are there."""
    return getattr(load(text, folder), op.name)(*[o for o in operands if o is not None])
