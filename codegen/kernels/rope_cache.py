"""Norm, rotary embedding and cache write in one, as PyTorch."""

from __future__ import annotations

import math
from typing import Any

from moec.codegen.kernels import Templated, register
from moec.codegen.kernels.python import cache
from moec.ir.op import Op, Value
from moec.ir.types import TensorType, f32


def _type(value: Value | None) -> TensorType:
    if value is None or not isinstance(value.type, TensorType):
        raise TypeError(f"{value} is no tensor")
    return value.type


def _heads(op: Op, x: Value | None, w: Value | None, cos: Value | None) -> dict[str, Any]:
    """What the template's part for heads must know; ``op`` there."""
    attrs, type = op.attrs, _type(x)
    return {key: attrs[key] for key in ("norm", "eps", "lo", "hi", "layout", "start")} | {
        "heads": type.shape[1],
        "width": type.shape[2],
        "rotary": 2 * _type(cos).shape[1],
        "w": w is not None,
        "wide": type.dtype == f32,
        "wide_w": w is None or _type(w).dtype == f32,
        "clamps": (attrs["lo"], attrs["hi"]) != (-math.inf, math.inf),
    }


def _norm_rope(op: Op) -> dict[str, Any]:
    x, cos, _, w, before = op.operands
    return {"op": _heads(op, x, w, cos), "before": before is not None}


def _kv_cache_write(op: Op) -> dict[str, Any]:
    _, _, k, _, cos, _, _, w = op.operands
    return {"op": _heads(op, k, w, cos), "clamp_v": op.attrs["clamp_v"], "form": cache(op)["form"]}


def _latent_cache_write(op: Op) -> dict[str, Any]:
    kv_a, w, cos = (_type(v) for v in op.operands[2:5])
    return {
        "rank": w.shape[0],
        "rotary": 2 * cos.shape[1],
        "wide": kv_a.dtype == f32,
        "wide_w": w.dtype == f32,
        "eps": op.attrs["eps"],
        "layout": op.attrs["layout"],
        "form": cache(op)["form"],
    }


register(
    Templated("norm_rope", "python/kernels/norm_rope.py.jinja", _norm_rope),
    Templated("kv_cache_write", "python/kernels/kv_cache_write.py.jinja", _kv_cache_write, in_place=0),
    Templated(
        "latent_cache_write", "python/kernels/latent_cache_write.py.jinja", _latent_cache_write, in_place=0
    ),
)
