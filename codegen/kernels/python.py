"""Ops that become a Python function of their own, from ``templates/python/kernels``."""

from __future__ import annotations

from typing import Any

from moec.codegen.kernels import Templated, has_scales, not_fp32, quantises, register
from moec.ir.op import Op
from moec.ir.ops.rope import rope_frequencies
from moec.ir.types import TILE, CacheType, f32

PAGED = "python/kernels/paged_attention.py.jinja"


def _kernel(op: str, constants: Any = None, **kwargs: Any) -> Templated:
    return Templated(op, f"python/kernels/{op}.py.jinja", constants or _attributes, **kwargs)


def _attributes(op: Op) -> dict[str, Any]:
    return dict(op.attrs)


def _rope_table(op: Op) -> dict[str, Any]:
    attrs = dict(op.attrs)
    magnitude = attrs.pop("magnitude")
    return {"frequencies": rope_frequencies(**attrs), "magnitude": magnitude, **attrs}


def _shape(op: Op, operand: int) -> Any:
    return op.operands[operand].type.shape  # type: ignore[union-attr]


def route(op: Op) -> dict[str, Any]:
    return dict(op.attrs) | {"experts": _shape(op, 0)[1], "bias": op.operands[1] is not None}


def _swiglu(op: Op) -> dict[str, Any]:
    return dict(op.attrs) | {"split": op.operands[1] is None, "wide": op.operands[0].type.dtype.bits >= 32}  # type: ignore[union-attr]


def _attention(op: Op) -> dict[str, Any]:
    heads, kv_heads = _shape(op, 0)[1], _shape(op, 1)[1]
    return dict(op.attrs) | {
        "heads": heads,
        "kv_heads": kv_heads,
        "wide": op.operands[0].type.dtype.bits >= 32,  # type: ignore[union-attr]
        "width": _shape(op, 0)[2],
        "value_width": _shape(op, 2)[2],
    }


def gather_grouped_linear(op: Op) -> dict[str, Any]:
    width = op.results[0].type.shape[1]  # type: ignore[union-attr]
    wide = op.operands[0].type.dtype.bits >= 32  # type: ignore[union-attr]
    shown = {name: op.attrs[name] for name in ("per_row", "epilogue", "act", "limit")}
    return shown | {"width": width, "wide": wide, "quant": ""}


def _paged(op: Op) -> dict[str, Any]:
    latent, heads = op.name == "latent_attention", _shape(op, 0)[1]
    kept = cache(op)
    attrs = {key: value for key, value in op.attrs.items() if key != "rows"}
    return attrs | {
        **kept,
        "to": f"torch.{op.operands[0].type.dtype.torch_name}",  # type: ignore[union-attr]
        "latent": latent,
        "stretches": f"{op.name}_stretches_{kept['page']}",  # the same for all kernels over such pages
        "heads": heads,
        "kv_heads": 1 if latent else kept["elements"][0] // 2,
        "width": _shape(op, 0)[2],
        "value_width": op.results[0].type.shape[2],  # type: ignore[union-attr]
        "wide": op.operands[0].type.dtype.bits >= 32,  # type: ignore[union-attr]
    }


def add_rms_norm(op: Op) -> dict[str, Any]:
    wide = op.operands[0].type.dtype == f32 == op.operands[2].type.dtype  # type: ignore[union-attr]
    plain = op.name != "add_rms_norm" or op.attrs["quant"] is None
    return {"eps": op.attrs["eps"], "width": _shape(op, 2)[0], "wide": wide, "quant": "", "plain": plain}


def _combine(op: Op) -> dict[str, Any]:
    rows, slot, weights, plus = op.operands
    return combine(rows.type, weights, plus, op) | {"slot": slot is not None}  # type: ignore[union-attr]


def combine(rows: Any, weights: Any, plus: Any, op: Op) -> dict[str, Any]:
    """What the template of combine asks, of rows of that type that become the result of ``op``."""
    return {
        "top_k": weights.type.shape[1],
        "rows_dtype": rows.dtype,
        "to": op.results[0].type.dtype,  # type: ignore[union-attr]
        "plus": plus is not None,
        "plus_dtype": plus.type.dtype if plus is not None else None,
    }


def _grouped_linear_combine(op: Op) -> dict[str, Any]:
    return combine(op.product_type(), op.operands[4], op.operands[5], op)  # type: ignore[attr-defined]


def cache(op: Op) -> dict[str, Any]:
    """How entries lie in the cache, and how one of 8 bits keeps them (nothing for a plain one)."""
    type = next(v.type for v in op.operands if v is not None and isinstance(v.type, CacheType))
    form: dict[str, Any] = {}
    if type.quantised:
        rope = type.elements[0] - type.rank
        form = {"rank": type.rank, "scale": type.scale, "tiles": type.tiles, "tile": TILE, "rope": rope}
        form["bytes"] = type.entry_bytes
    return {"page": type.page, "entry": type.entry, "elements": type.elements, "form": form}


def _cache_read(op: Op) -> dict[str, Any]:
    return cache(op) | {"to": f"torch.{op.results[0].type.dtype.torch_name}"}  # type: ignore[union-attr]


def _fp32(op: Op) -> list[str]:
    return [] if not_fp32(op) else ["in fp32 PyTorch's own is as good"]


def _not_rows_of_fp32(op: Op) -> list[str]:
    return not_fp32(op) + (["x is a single row"] if len(_shape(op, 0)) < 2 else [])


def _product(op: str, constants: Any) -> tuple[Templated, Templated]:
    """A product by experts: in fp32 on the CPU through the kernel of ``linear``, else PyTorch's own."""
    return (
        _kernel(op, constants, reasons=not_fp32, calls="linear", name=f"onednn.{op}", targets=("cpu",)),
        _kernel(op, lambda op: constants(op) | {"linear": ""}, reasons=has_scales),
    )


register(
    Templated(
        "linear",
        "python/kernels/linear.py.jinja",
        reasons=_not_rows_of_fp32,
        name="onednn.linear",
        targets=("cpu",),
    ),
    *_product("grouped_linear", lambda op: {"placed": op.operands[3] is not None}),
    *_product("gather_grouped_linear", gather_grouped_linear),
    *_product("grouped_linear_combine", _grouped_linear_combine),
    _kernel(
        "rms_norm",
        lambda op: {"eps": op.attrs["eps"], "quant": ""},
        reasons=lambda op: quantises(op) + _fp32(op),
        name="torch.rms_norm_in_fp32",
    ),
    _kernel("add_rms_norm", add_rms_norm, reasons=quantises),
    _kernel("swiglu", _swiglu),
    _kernel("rope_table", _rope_table),
    _kernel(
        "rope",
        lambda op: dict(op.attrs) | {"rank": op.operands[0].type.rank, "dtype": op.operands[0].type.dtype},
    ),
    _kernel("hash_route", lambda op: dict(op.attrs) | {"experts": _shape(op, 0)[1]}),
    _kernel("route", route),
    _kernel("route_sort", route),
    _kernel("local_experts"),
    _kernel("local_sort"),
    _kernel("sort_by_expert"),
    _kernel("scatter_add"),
    _kernel("combine", _combine),
    _kernel("cache_write", cache, in_place=0),
    _kernel("cache_read", _cache_read),
    _kernel("attention", _attention),
    Templated("paged_attention", PAGED, _paged),
    Templated("latent_attention", PAGED, _paged),
    _kernel("split_batch"),
    _kernel("take_rows"),
    _kernel("merge_rows"),
)
