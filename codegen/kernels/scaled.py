"""Ops on scaled values in PyTorch. Products of fp8 are emulated: PyTorch has few with block scales."""

from __future__ import annotations

from functools import partial
from typing import Any

from moec.codegen.kernels import Templated, quantises, register
from moec.codegen.kernels.python import add_rms_norm, combine, gather_grouped_linear, route
from moec.ir.op import Op
from moec.ir.types import TensorType, format_block

FOLDER = "python/kernels"


def _type(op: Op, operand: int) -> TensorType:
    type = op.operands[operand].type  # type: ignore[union-attr]
    if not isinstance(type, TensorType):
        raise TypeError(f"{op.operands[operand]} is no tensor")
    return type


def _shown(block: tuple[int, ...]) -> str:
    return format_block(block).replace("x", "×")


def spread(scale: str, q: str, type: TensorType) -> str:
    """An expression for the scale of each element of ``q``, or something that broadcasts to it."""
    cut = []
    for axis, size, dim in _axes(type, type.scale or ()):
        whole = size == 1 or _one_block(dim, size)
        if not whole:
            scale += f".repeat_interleave({size}, dim={axis})"
        if whole or (isinstance(dim, int) and dim % size == 0):
            cut.append(":")
        else:
            cut.append(f":{dim}" if isinstance(dim, int) else f": {q}.shape[{axis}]")
    return scale if set(cut) <= {":"} else f"{scale}[..., {', '.join(cut)}]"


def _axes(type: TensorType, block: tuple[int, ...]) -> list[tuple[int, int, Any]]:
    """(axis from the end, size of its blocks, its length)."""
    return [(i - len(block), size, type.shape[i - len(block)]) for i, size in enumerate(block)]


def _one_block(dim: Any, size: int) -> bool:
    return size == 0 or (isinstance(dim, int) and 0 < dim <= size)


def _maxima(type: TensorType, block: tuple[int, ...]) -> list[str]:
    """Statements that turn ``amax``, of each element, into that of each block."""
    lines = []
    for axis, size, dim in _axes(type, block):
        pad = "0, 0, " * (-axis - 1)
        if _one_block(dim, size):
            source = "amax" if isinstance(dim, int) and dim else f"F.pad(amax, ({pad}0, 1))"  # may be empty
            lines.append(f"amax = {source}.amax({axis}, keepdim=True)")
        elif size > 1:
            whole = isinstance(dim, int) and dim % size == 0
            short = -dim % size if isinstance(dim, int) else f"-amax.shape[{axis}] % {size}"
            source = "amax" if whole else f"F.pad(amax, ({pad}0, {short}))"
            lines.append(f"amax = {source}.unflatten({axis}, (-1, {size})).amax({axis})")
    return lines


def quant_of(type: TensorType, block: tuple[int, ...], scale: str) -> dict[str, Any]:
    """The constants of the kernel that quantises ``type``."""
    result = type.with_(scale=block)
    stacked = type.rank > len(block) > 1 and all(isinstance(d, int) for d in type.shape)
    return {
        "shown": _shown(block),
        "rank": len(block),
        "stacked": stacked,
        "maxima": _maxima(type, block),
        "spread": spread("scale", "x", result),
        "ue8m0": scale == "ue8m0",
    }


def _quant(op: Op) -> dict[str, Any]:
    return quant_of(_type(op, 0), op.attrs["block"], op.attrs["scale"])


def _epilogue(op: Op) -> dict[str, Any]:
    """The constants of the quantisation that ends ``op``."""
    y = op.results[-1].type
    if not isinstance(y, TensorType):
        raise TypeError(f"{op.results[-1]} is no tensor")
    return quant_of(y.with_(scale=None), op.attrs["quant"], op.attrs["scale"])


def _sort_and_quant(sort: str, op: Op) -> dict[str, Any]:
    if sort == "route_sort":
        given, made = ["logits", *(["bias"] if op.operands[1] is not None else [])], route(op)
    else:
        given, made = [spec.name for spec in op.operand_specs[:-1]], dict(op.attrs)
    return made | {"sort": sort, "given": ", ".join(given), "quant": ""}


def _beside(op: Op) -> dict[str, Any]:
    """The constants of the quantisation of ``op``'s last operand."""
    return quant_of(_type(op, -1), op.attrs["quant"], op.attrs["quant_scale"])


def _dequant(op: Op) -> dict[str, Any]:
    x = _type(op, 0)
    return {
        "shown": _shown(x.scale or ()),
        "stacked": x.rank > len(x.scale or ()) > 1,
        "rank": len(x.scale or ()),
        "spread": spread("scale", "q", x),
        "to": op.attrs["to"],
    }


def _refine(op: Op) -> dict[str, Any]:
    x, new = _type(op, 0), op.attrs["block"]
    axes = [
        (axis, size, old)
        for axis, size, old in zip(range(-len(new), 0), new, x.scale or (), strict=True)
        if size != old
    ]
    return {"axes": axes, "old": _shown(x.scale or ()), "new": _shown(new)}


def _linear(op: Op) -> dict[str, Any]:
    x, w, y = _type(op, 0), _type(op, 1), op.results[0].type
    return {
        "x_spread": spread("x_scale", "x", x),
        "w_spread": spread("w_scale", "w", w),
        "x_block": _shown(x.scale or ()),
        "w_block": _shown(w.scale or ()),
        "to": y.dtype,  # type: ignore[union-attr]
        "bias": op.operands[2] is not None,
    }


def _experts(op: Op) -> dict[str, Any]:
    x, w, y = _type(op, 0), _type(op, 1), op.results[0].type
    one = TensorType(w.dtype, w.shape[1:], scale=w.scale)
    return {
        "x_spread": spread("x_scale", "x", x),
        "w_spread": spread("w_scale[expert]", "w", one),
        "x_block": _shown(x.scale or ()),
        "w_block": _shown(w.scale or ()),
        "width": y.shape[1],  # type: ignore[union-attr]
        "to": y.dtype,  # type: ignore[union-attr]
    }


def _grouped_linear(op: Op) -> dict[str, Any]:
    return _experts(op) | {"placed": op.operands[3] is not None}


def _grouped_linear_combine(op: Op) -> dict[str, Any]:
    rows = op.product_type()  # type: ignore[attr-defined]
    return _experts(op) | {"width": rows.shape[1]} | combine(rows, op.operands[4], op.operands[5], op)


def _gather_grouped_linear(op: Op) -> dict[str, Any]:
    shown = {name: op.attrs[name] for name in ("per_row", "epilogue", "act", "limit")}
    return {"quant": ""} | _experts(op) | shown


def _head_linear(op: Op) -> dict[str, Any]:
    x, w = _type(op, 0), _type(op, 1)
    return {
        "transposed": op.attrs["transposed"],
        "dtype": x.dtype.torch_name,
        "w_spread": spread("w_scale", "w", w),
        "w_block": _shown(w.scale or ()),
    }


# Reasons against a record.
def _plain_weights(op: Op) -> list[str]:
    return [] if _type(op, 1).scale else ["w has no scales"]


def _scaled_rows(op: Op) -> list[str]:
    return ["x has scales"] if _type(op, 0).scale else []


def _no_scaled_rows(op: Op) -> list[str]:
    return [] if _type(op, 0).scale else ["x has no scales"]


def _keeps_floats(op: Op) -> list[str]:
    return [] if op.attrs["quant"] else ["the result isn't quantised"]


SCALED_GATHER = f"{FOLDER}/gather_grouped_linear_scaled.py.jinja"

register(
    Templated("quant", f"{FOLDER}/quant.py.jinja", _quant),
    Templated("dequant", f"{FOLDER}/dequant.py.jinja", _dequant),
    Templated("refine", f"{FOLDER}/refine.py.jinja", _refine),
    Templated(
        "linear",
        f"{FOLDER}/linear_scaled.py.jinja",
        _linear,
        reasons=_no_scaled_rows,
        name="torch.emulated_fp8_linear",
    ),
    Templated(
        "head_linear",
        f"{FOLDER}/head_linear_scaled.py.jinja",
        _head_linear,
        reasons=_plain_weights,
        name="torch.fp8_weights_head_linear",
    ),
    Templated(
        "grouped_linear",
        f"{FOLDER}/grouped_linear_scaled.py.jinja",
        _grouped_linear,
        reasons=_no_scaled_rows,
        name="torch.emulated_fp8_grouped_linear",
    ),
    Templated(
        "grouped_linear_combine",
        f"{FOLDER}/grouped_linear_combine_scaled.py.jinja",
        _grouped_linear_combine,
        reasons=_no_scaled_rows,
        name="torch.emulated_fp8_grouped_linear_combine",
    ),
    Templated(
        "gather_grouped_linear",
        SCALED_GATHER,
        _gather_grouped_linear,
        reasons=lambda op: _no_scaled_rows(op) + quantises(op),
        name="torch.emulated_fp8_gather_grouped_linear",
    ),
    Templated(
        "gather_grouped_linear",
        SCALED_GATHER,
        _gather_grouped_linear,
        reasons=lambda op: _no_scaled_rows(op) + _keeps_floats(op),
        calls="quant",
        called=_epilogue,
        name="torch.emulated_fp8_gather_grouped_linear_quant",
    ),
    Templated(
        "gather_grouped_linear",
        f"{FOLDER}/gather_grouped_linear.py.jinja",
        lambda op: gather_grouped_linear(op) | {"linear": ""},
        reasons=lambda op: _scaled_rows(op) + _keeps_floats(op),
        calls="quant",
        called=_epilogue,
        name="torch.gather_grouped_linear_quant",
    ),
    Templated(
        "rms_norm",
        f"{FOLDER}/rms_norm.py.jinja",
        lambda op: {"eps": op.attrs["eps"]},
        reasons=_keeps_floats,
        calls="quant",
        called=_epilogue,
        name="torch.rms_norm_quant",
    ),
    Templated(
        "add_rms_norm",
        f"{FOLDER}/add_rms_norm.py.jinja",
        add_rms_norm,
        reasons=_keeps_floats,
        calls="quant",
        called=_epilogue,
        name="torch.add_rms_norm_quant",
    ),
    Templated(
        "add_rms_norm_and_quant",
        f"{FOLDER}/add_rms_norm.py.jinja",
        add_rms_norm,
        calls="quant",
        called=_epilogue,
    ),
    *(
        Templated(
            f"{sort}_and_quant",
            f"{FOLDER}/sort_and_quant.py.jinja",
            partial(_sort_and_quant, sort),
            calls="quant",
            called=_beside,
        )
        for sort in ("route_sort", "local_sort", "sort_by_expert")
    ),
)
