"""Ops that are one PyTorch expression."""

from __future__ import annotations

from typing import Any

from moec.codegen.kernels import Inline, has_scales, quantises, register
from moec.codegen.render import number
from moec.errors import InternalError
from moec.ir.op import Op
from moec.ir.types import DType, f32


def torch_dtype(dtype: DType) -> str:
    return f"torch.{dtype.torch_name}"


def _linear(op: Op, args: list[Any]) -> str:
    types: list[Any] = [v.type.dtype for v in op.operands if v is not None]  # type: ignore[union-attr]
    to = op.results[0].type.dtype  # type: ignore[union-attr]
    # Products of narrow values are exact in the widest dtype: nothing is rounded before the sum.
    wide = types[0] if {*types, to} == {types[0]} else f32
    given = ", ".join(
        str(arg) if dtype == wide else f"{arg}.to({torch_dtype(wide)})"
        for arg, dtype in zip([a for a in args if a], types, strict=True)
    )
    return f"F.linear({given})" + ("" if to == wide else f".to({torch_dtype(to)})")


def _head_linear(op: Op, args: list[Any]) -> str:
    w = args[1] if op.attrs["transposed"] else f"{args[1]}.mT"
    return f"torch.bmm({args[0]}.transpose(0, 1), {w}).transpose(0, 1)"


def _reshape(op: Op, args: list[Any]) -> str:
    """Symbolic axes are x's own where x has them; one other can be left for PyTorch to work out."""
    if op.results[0].type.scale:  # type: ignore[union-attr]
        return _reshape_scaled(op, args)
    x_shape = op.operands[0].type.shape  # type: ignore[union-attr]
    sizes = []
    symbolic = [d for d in op.attrs["shape"] if not isinstance(d, int)]
    for dim in op.attrs["shape"]:
        if isinstance(dim, int):
            sizes.append(str(dim))
        elif len(symbolic) == 1:
            sizes.append("-1")
        elif dim in x_shape:
            sizes.append(f"{args[0]}.shape[{x_shape.index(dim)}]")
        else:
            sizes.append("-1")
    if sizes.count("-1") > 1:
        raise InternalError(f"reshape to {op.attrs['shape']}: x doesn't show its sizes", loc=op.loc)
    return f"{args[0]}.reshape({', '.join(sizes)})"


def _split(op: Op, args: list[Any]) -> str:
    sizes, axis = list(op.attrs["sizes"]), op.attrs["axis"]
    if op.results[0].type.scale and len(sizes) > 1:  # type: ignore[union-attr]
        return _split_scaled(op, args[0], sizes)
    return f"{args[0]}.split({sizes}, dim={axis})" if len(sizes) > 1 else str(args[0])


def _split_scaled(op: Op, x: str, sizes: list[int]) -> str:
    type: Any = op.operands[0].type  # type: ignore[union-attr]
    axis = op.attrs["axis"] % type.rank
    parts = [r.type.scale_shape[axis] for r in op.results]  # type: ignore[union-attr]
    if sum(parts) == type.scale_shape[axis]:
        scales = f"{x}.scale.split({parts}, dim={axis})"
    else:  # one scale for the whole axis
        scales = f"[{x}.scale] * {len(sizes)}"
    return f"map(Scaled, {x}.q.split({sizes}, dim={axis}), {scales})"


def _reshape_scaled(op: Op, args: list[Any]) -> str:
    """Both tensors; of symbolic axes at most one, in front."""
    y: Any = op.results[0].type
    shapes = [
        ", ".join(str(d) if isinstance(d, int) else "-1" for d in dims) for dims in (y.shape, y.scale_shape)
    ]
    if any(shape.count("-1") > 1 for shape in shapes):
        raise InternalError(f"reshape to {op.attrs['shape']}: more than one size isn't a number", loc=op.loc)
    return f"Scaled({args[0]}.q.reshape({shapes[0]}), {args[0]}.scale.reshape({shapes[1]}))"


def _broadcast(op: Op, args: list[Any]) -> str:
    axis, rank = op.attrs["axis"], op.operands[0].type.rank  # type: ignore[union-attr]
    axis %= rank + 1
    sizes = ["-1"] * (rank + 1)
    sizes[axis] = str(op.attrs["size"])
    return f"{args[0]}.unsqueeze({axis}).expand({', '.join(sizes)})"


def _rms_norm(op: Op, args: list[Any]) -> str:
    width = op.operands[1].type.shape[0]  # type: ignore[union-attr]
    return f"F.rms_norm({args[0]}, ({width},), {args[1]}, {op.attrs['eps']})"


def _zeros_like(op: Op, args: list[Any]) -> str:
    return f"torch.zeros_like({args[0]}, dtype={torch_dtype(op.attrs['dtype'])})"


def _embedding(op: Op, args: list[Any]) -> str:
    return f"F.embedding({args[0]}, {args[1]})"


def _pointwise(symbol: str) -> Any:
    return lambda op, args: f"{args[0]} {symbol} {args[1]}"


def _concat(op: Op, args: list[Any]) -> str:
    dim = op.attrs["axis"]
    if op.results[0].type.scale:  # type: ignore[union-attr]
        q, scale = (", ".join(f"{arg}.{part}" for arg in args) for part in ("q", "scale"))
        return f"Scaled(torch.cat([{q}], dim={dim}), torch.cat([{scale}], dim={dim}))"
    return f"torch.cat([{', '.join(args)}], dim={dim})"


def _gather_rows(op: Op, args: list[Any]) -> str:
    x, row = args[0], f"{args[1]} // {op.attrs['per_row']}"
    block: Any = op.operands[0].type.scale  # type: ignore[union-attr]
    if block is None:
        return f"{x}[{row}]"
    scale = f"{x}.scale" if block[0] == 0 else f"{x}.scale[{row}]"
    return f"Scaled({x}.q[{row}], {scale})"


def _stack(op: Op, args: list[Any]) -> str:
    if op.results[0].type.scale:  # type: ignore[union-attr]
        return f"Scaled(*map(torch.stack, zip(*{args[0]})))"
    return f"torch.stack({args[0]})"


register(
    Inline("linear", _linear, reasons=has_scales),
    Inline("head_linear", _head_linear, reasons=has_scales),
    Inline("embedding", _embedding),
    Inline("rms_norm", _rms_norm, reasons=quantises),
    Inline("reshape", _reshape),
    Inline("split", _split),
    Inline("concat", _concat),
    Inline("broadcast", _broadcast),
    Inline("prefix_sum", lambda op, args: f"F.pad({args[0]}.cumsum(0, dtype={args[0]}.dtype), (1, 0))"),
    Inline("add", _pointwise("+")),
    Inline("mul", _pointwise("*")),
    Inline("sigmoid", lambda op, args: f"{args[0]}.sigmoid()"),
    Inline("clamp", lambda op, args: f"{args[0]}.clamp({number(op.attrs['lo'])}, {number(op.attrs['hi'])})"),
    Inline("cast", lambda op, args: f"{args[0]}.to({torch_dtype(op.attrs['to'])})"),
    Inline("zeros_like", _zeros_like),
    Inline("gather_rows", _gather_rows),
    Inline("expert_slots", lambda op, args: f"({args[0]}.flatten() == {args[1]}).nonzero().flatten()"),
    # Load time.
    Inline("stack", _stack),
    Inline("scaled", lambda op, args: f"Scaled({args[0]}, {args[1]})"),
)
