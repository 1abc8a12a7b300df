"""What the tests of Triton kernels share: ops from text, kernel files with schedules of a test's choice."""

from __future__ import annotations

import hashlib
import importlib.util
import math
from pathlib import Path
from types import ModuleType
from typing import Any

from moec.codegen.kernels import KERNELS
from moec.codegen.kernels.gluon_grouped import mixed_constants
from moec.codegen.kernels.triton import TritonKernel, kernel_file, tensor
from moec.codegen.kernels.triton_grouped import constants_of
from moec.codegen.kernels.triton_grouped_combine import combined_constants
from moec.codegen.render import render_python
from moec.codegen.schedules import Schedule
from moec.ir import DType, Function, TensorType
from moec.ir.devices import GPUS
from moec.ir.op import Op, op_class
from moec.ir.text import parse_module
from moec.ir.types import symbol


def grouped_op(
    dtype: str,
    experts: int,
    columns: int,
    depth: int,
    *,
    gather: bool = False,
    per_row: int = 1,
    act: str | None = None,
    limit: float | None = None,
    scatter: bool = False,
    scales: tuple[str, str] = ("", ""),
    quant: str = "",
    to: str = "bf16",
) -> Op:
    """A grouped product with ``columns`` columns of output; ``act``: a SwiGLU epilogue, clamped by ``limit``.

    ``scales``: the blocks of x and w in fp8 (``1x128``), whose result is ``to``, or with ``quant`` (``fp32``
    or ``ue8m0``) fp8 too.
    """
    rows = columns * (2 if act else 1)
    x_scale, w_scale = (f"@s{block}" if block else "" for block in scales)
    args = [f"%w: {dtype}[{experts},{rows},{depth}]{w_scale}", f"%off: i32[{experts + 1}]"]
    attrs, made = [], dtype
    if x_scale and not quant:
        made, attrs = to, [f"to={to}"]
    if quant:
        made, attrs = "f8e4m3", ["quant=1x128", f"scale={quant}"]
    if gather:
        args += [f"%x: {dtype}[T,{depth}]{x_scale}", f"%slot: i32[{per_row}*T~{experts}]"]
        attrs += [f"per_row={per_row}", *([f"act={act}", "epilogue=swiglu"] if act else [])]
        attrs += [f"limit={limit}"] if act and limit else []
        line = f"gather_grouped_linear(%x, %w, %slot, %off) {{{', '.join(attrs)}}}"
        type = f"{made}[{per_row}*T~{experts},{columns}]{'@s1x128' if quant else ''}"
    else:
        args += [
            f"%x: {dtype}[R~{experts},{depth}]{x_scale}",
            *([f"%slot: i32[R~{experts}]"] if scatter else []),
        ]
        line = f"grouped_linear(%x, %w, %off{', %slot' if scatter else ''})" + (
            f" {{{', '.join(attrs)}}}" if attrs else ""
        )
        type = f"{made}[R,{columns}]" if scatter else f"{made}[R~{experts},{columns}]"
    return op(args, line, type)


def fp8_op(experts: int, columns: int, depth: int, **how: Any) -> Op:
    """A grouped product of fp8 with scales as DeepSeek-V3 has them, unless ``scales`` says others."""
    return grouped_op("f8e4m3", experts, columns, depth, **{"scales": ("1x128", "128x128"), **how})


def linear_op(
    columns: int,
    depth: int,
    scales: tuple[str, str] = ("1x128", "128x128"),
    to: str = "bf16",
    bias: bool = False,
) -> Op:
    """A dense product in fp8."""
    args = [f"%x: f8e4m3[T,{depth}]@s{scales[0]}", f"%w: f8e4m3[{columns},{depth}]@s{scales[1]}"]
    args += [f"%bias: {to}[{columns}]"] if bias else []
    line = f"linear(%x, %w{', %bias' if bias else ''}) {{acc={to}}}"
    return op(args, line, f"{to}[T,{columns}]")


def quant_op(dtype: str, depth: int, block: str = "1x128", scale: str = "fp32") -> Op:
    line = f"quant(%x) {{block={block}, scale={scale}}}"
    return op([f"%x: {dtype}[T,{depth}]"], line, f"f8e4m3[T,{depth}]@s{block}")


def norm_op(
    dtype: str, depth: int, add: bool, scale: str = "fp32", w: str = "f32", plain: bool = False
) -> Op:
    """A norm with quant, of a sum where it is to ``add``, beside the ``plain`` rows."""
    row = f"{dtype}[T,{depth}]"
    args = [f"%x: {row}", *([f"%residual: {row}"] if add else []), f"%w: {w}[{depth}]"]
    name, operands = ("add_rms_norm", "%x, %residual, %w") if add else ("rms_norm", "%x, %w")
    name += "_and_quant" * plain
    line = f"{name}({operands}) {{eps=1e-06, quant=1x128, scale={scale}}}"
    return op(args, line, f"{row}, " * (add + plain) + f"f8e4m3[T,{depth}]@s1x128")


def combine_op(rows: str, w: str, to: str, k: int, width: int, slot: bool, plus: str | None) -> Op:
    """A combine of rows, weights, result and ``plus`` of those dtypes."""
    args = [f"%rows: {rows}[{k}*T,{width}]", f"%w: {w}[T,{k}]", f"%slot: i32[{k}*T]"]
    args += [f"%plus: {plus}[T,{width}]"] if plus else []
    line = f"combine(%rows, {'%slot' if slot else '_'}, %w{', %plus' if plus else ''}) {{to={to}}}"
    return op(args, line, f"{to}[T,{width}]")


def grouped_combine_op(
    dtype: str,
    experts: int,
    columns: int,
    depth: int,
    k: int,
    *,
    scales: tuple[str, str] = ("", ""),
    rows: str = "bf16",
    weights: str = "f32",
    to: str = "",
    plus: str | None = None,
) -> Op:
    """A grouped product whose rows are summed by token; with ``scales`` ``rows`` is their dtype."""
    x_scale, w_scale = (f"@s{block}" if block else "" for block in scales)
    args = [
        f"%x: {dtype}[{k}*T~{experts},{depth}]{x_scale}",
        f"%w: {dtype}[{experts},{columns},{depth}]{w_scale}",
    ]
    args += [f"%off: i32[{experts + 1}]", f"%slot: i32[{k}*T~{experts}]", f"%weights: {weights}[T,{k}]"]
    args += [f"%plus: {plus}[T,{columns}]"] if plus else []
    made = rows if x_scale else dtype
    attrs = [f"rows={rows}"] * bool(x_scale) + [f"to={to}"] * bool(to)
    line = f"grouped_linear_combine(%x, %w, %off, %slot, %weights{', %plus' if plus else ''})"
    return op(args, line + (f" {{{', '.join(attrs)}}}" if attrs else ""), f"{to or made}[T,{columns}]")


def experts_op(
    dtype: str,
    experts: int,
    inner: int,
    width: int,
    k: int,
    *,
    scales: tuple[str, str] = ("", ""),
    quant: str = "",
    rows: str = "bf16",
    h: str = "bf16",
    weights: str = "f32",
    to: str = "",
    act: str = "silu",
    limit: float | None = None,
    plus: str | None = None,
) -> Op:
    """``experts``: tokens of ``width`` values, ``inner`` between the products.

    ``scales``: as for ``grouped_op``; ``rows`` and ``h`` are the dtypes of what scaled operands make.
    """
    args = [*_weights(dtype, experts, inner, width, scales, quant, h)]
    args += [f"%off: i32[{experts + 1}]", f"%slot: i32[{k}*T~{experts}]", f"%weights: {weights}[T,{k}]"]
    args += [f"%plus: {plus}[T,{width}]"] if plus else []
    attrs, made = _epilogue(dtype, scales, quant, rows, h, to, act, limit)
    line = f"experts(%x, %w13, %w2, %off, %slot, %weights{', %plus' if plus else ''}) {{{', '.join(attrs)}}}"
    return op(args, line, f"{made}[T,{width}]")


def routed_experts_op(
    router: Op,
    dtype: str,
    inner: int,
    width: int,
    *,
    scales: tuple[str, str] = ("", ""),
    quant: str = "",
    rows: str = "bf16",
    to: str = "",
    plus: str | None = None,
) -> Op:
    """``routed_experts``, chosen as ``router`` does."""
    logits, bias = (tensor(v) if v is not None else None for v in router.operands)
    assert logits
    experts = logits.shape[1] + router.attrs["shared"]
    args = [*_weights(dtype, experts, inner, width, scales, quant, rows), f"%logits: {logits}"]
    args += [f"%bias: {bias}"] if bias else []
    args += [f"%plus: {plus}[T,{width}]"] if plus else []
    attrs, made = _epilogue(dtype, scales, quant, rows, rows, to, "silu", None)
    attrs += [
        f"{name}={str(value).lower()}"
        for name, value in router.attrs.items()
        if value != type(router).attr_specs[name].default
    ]
    operands = f"%x, %w13, %w2, %logits, {'%bias' if bias else '_'}{', %plus' if plus else ''}"
    return op(args, f"routed_experts({operands}) {{{', '.join(attrs)}}}", f"{made}[T,{width}]")


def _weights(
    dtype: str, experts: int, inner: int, width: int, scales: tuple[str, str], quant: str, h: str
) -> list[str]:
    x, w = (f"@s{block}" if block else "" for block in scales)
    second = f"{dtype}[{experts},{width},{inner}]{w}" if quant or not x else f"{h}[{experts},{width},{inner}]"
    return [
        f"%x: {dtype}[T,{width}]{x}",
        f"%w13: {dtype}[{experts},{2 * inner},{width}]{w}",
        f"%w2: {second}",
    ]


def _epilogue(
    dtype: str,
    scales: tuple[str, str],
    quant: str,
    rows: str,
    h: str,
    to: str,
    act: str,
    limit: float | None,
) -> tuple[list[str], str]:
    """Attributes, and the dtype of the result."""
    attrs = [f"act={act}"] * (act != "silu") + [f"limit={limit}"] * (limit is not None)
    attrs += [f"to={to}"] * bool(to)
    if quant:
        attrs += ["quant=1x128", f"quant_scale={quant}", f"rows={rows}"]
    elif scales[0]:
        attrs.append(f"h={h}")
    return attrs, to or (rows if quant else h if scales[0] else dtype)


def sort_op(k: int, experts: int) -> Op:
    text = f"sort_by_expert(%id) {{experts={experts}}}"
    return op([f"%id: i32[T,{k}]"], text, f"i32[{k}*T~{experts}], i32[{experts + 1}]")


def local_sort_op(k: int, experts: int, first: int, dtype: str = "f32", ids: str = "i32") -> Op:
    args, text = [f"%w: {dtype}[T,{k}]", f"%id: {ids}[T,{k}]"], f"{{experts={experts}, first={first}}}"
    type = f"{dtype}[T,{k}], {ids}[T,{k}], i32[{k}*T~{experts}], i32[{experts + 1}]"
    return op(args, f"local_sort(%w, %id) {text}", type)


def route_op(
    name: str,
    experts: int,
    k: int,
    dtype: str = "f32",
    bias: str | bool = False,
    to: str = "f32",
    **attrs: Any,
) -> Op:
    """``route`` or ``route_sort`` of logits and a bias of these dtypes (True: f32), weights of ``to``."""
    shared = attrs.get("shared", 0)
    bias_type = "f32" if bias is True else bias
    args = [f"%logits: {dtype}[T,{experts}]", *([f"%bias: {bias_type}[{experts}]"] if bias else [])]
    attrs |= {"dtype": to} if to != "f32" else {}
    given = ", ".join(f"{key}={str(v).lower()}" for key, v in sorted({"k": k, **attrs}.items()))
    width, every = k + shared, experts + shared
    type = f"{to}[T,{width}], i32[T,{width}]"
    type += f", i32[{width}*T~{every}], i32[{every + 1}]" if name == "route_sort" else ""
    return op(args, f"{name}(%logits{', %bias' if bias else ''}) {{{given}}}", type)


def and_quant(sort: Op, dtype: str, depth: int, scale: str = "fp32", block: tuple[int, ...] = (1, 128)) -> Op:
    """``sort`` with the quantisation of x [T, depth] beside it."""
    function = Function("forward")
    given = [None if v is None else function.add_argument(v.name, v.type) for v in sort.operands]
    x = function.add_argument("x", TensorType(DType.of(dtype), (symbol("T"), depth)))
    how = dict(sort.attrs) | {"quant": block, "quant_scale": scale}
    return function.create(op_class(f"{sort.name}_and_quant")([*given, x], how))


def hash_route_op(
    experts: int, k: int, vocab: int, dtype: str = "f32", table: str = "i64", **attrs: Any
) -> Op:
    args = [f"%logits: {dtype}[T,{experts}]", f"%table: {table}[{vocab},{k}]", "%tokens: i64[T]"]
    given = ", ".join(f"{key}={str(v).lower()}" for key, v in sorted({"k": k, **attrs}.items()))
    types = f"{attrs.get('dtype', 'f32')}[T,{k}], i32[T,{k}]"
    return op(args, f"hash_route(%logits, %table, %tokens) {{{given}}}", types)


def op(args: list[str], line: str, type: str) -> Op:
    types = type.split(", ")
    names = ", ".join(f"%y{i}" for i in range(len(types)))
    text = f"moec.ir 1 module @test target=sm_90a\n\nfunc @forward({', '.join(args)}) -> {type}\n"
    text += f"  {names} = {line} : {type}\n  return {names}\nend\n"
    return parse_module(text)["forward"].ops[0]


def record(op: Op) -> TritonKernel:
    """The Triton record of ``op``, which may refuse it; of two, the second is for scaled operands."""
    scaled = tensor(op.operands[0]).scale is not None
    records = [k for k in KERNELS if type(k) is TritonKernel and k.op == op.name]
    return records[-1] if scaled else records[0]


def source(op: Op, target: str = "sm_90a", schedules: list[Schedule] | None = None) -> str:
    """The kernel file of one op, its function named as the op; ``schedules``: in place of those picked."""
    kernel = record(op)
    if schedules is None:
        return kernel_file([kernel], [kernel.render(op, op.name, target)], target)
    rungs = _ladder(schedules)
    made = combined_constants if op.name == "grouped_linear_combine" else constants_of
    constants = made(op, GPUS[target], rungs)
    return kernel_file([kernel], [render_python(kernel.template, name=op.name, **constants)], target)


def gluon_source(op: Op, schedules: list[Schedule] | None = None) -> str:
    """The kernel file of one op as Gluon's record renders it; ``schedules`` as for ``source``."""
    kernel = next(k for k in KERNELS if isinstance(k, TritonKernel) and k.name == f"gluon.{op.name}")
    assert not kernel.supports(op)
    if schedules is None:
        return kernel_file([kernel], [kernel.render(op, op.name, "sm_90a")], "sm_90a")
    device, rungs = GPUS["sm_90a"], _ladder(schedules)
    if op.name == "grouped_linear_combine":
        constants = combined_constants(op, device, rungs, mixed_constants)
    else:
        constants = mixed_constants(op, device, rungs)
    return kernel_file([kernel], [render_python(kernel.template, name=op.name, **constants)], "sm_90a")


def _ladder(schedules: list[Schedule]) -> list[tuple[float, Schedule]]:
    return [(float(i + 1), s) for i, s in enumerate(schedules[:-1])] + [(math.inf, schedules[-1])]


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
    """What the generated function makes of the operands that are there; of a scaled one, of both tensors."""
    given = [part for o in operands if o is not None for part in (o[:2] if isinstance(o, tuple) else [o])]
    return getattr(load(text, folder), op.name)(*given)
