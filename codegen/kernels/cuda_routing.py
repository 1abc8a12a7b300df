"""Routing on GPUs in CUDA C++: choice and sort in one launch, in a grid whose blocks meet in the middle.

With ``and_quant`` further blocks of that grid quantise what the experts are going to read.

``route`` alone is one launch in Triton too. Here it gives the bits that ``route_sort`` gives: both are
compiled without fusing a * b + c, which could differ from one kernel to the next.
"""

from __future__ import annotations

import math
from typing import Any

from moec.codegen.kernels import register
from moec.codegen.kernels.cuda import CudaKernel
from moec.codegen.kernels.scaled import quant_of
from moec.codegen.kernels.triton import FLOATS, not_float, not_static, pointer, signature_lines, tensor
from moec.codegen.kernels.triton_quant import beside_reasons
from moec.ir.devices import GPU, GPUS
from moec.ir.op import Op

# A lane holds every 32nd score of a token, and is one choice of it, or one group.
MOST_SCORED = 1024
MOST_CHOSEN = 32
MOST_GROUPS = 32
# Tokens a block, where there are enough multiprocessors: choosing takes a warp some 800 instructions a token,
# and a multiprocessor has four schedulers.
SPREAD = 8
# How often a block may quantise beside those that choose before quantising is worth a launch of its own. An
# estimate: choosing and sorting take about as long.
ROUNDS = 4
# Without headers C++ has no bf16 or fp16: the templates read and write their bits.
STORED = {"f32": "float", "bf16": "unsigned short", "f16": "unsigned short"}


def _route(op: Op, device: GPU) -> dict[str, Any]:
    logits, bias, *_ = op.operands
    types = [tensor(v) for v in (logits, bias) if v is not None]
    signature = {"logits": pointer(tensor(logits).dtype)}
    if bias is not None:
        signature["bias"] = pointer(tensor(bias).dtype)
    signature |= {"w": pointer(op.attrs["dtype"])}
    return dict(op.attrs) | {
        "experts": int(tensor(logits).shape[1]),
        "bias": bias is not None,
        "logits_dtype": tensor(logits).dtype.name,
        "bias_dtype": tensor(bias).dtype.name if bias is not None else None,
        "stored": STORED,
        "kinds": sorted({t.dtype.name for t in types}),  # what is read
        "tokens_a_block": SPREAD,
        "signature_lines": signature_lines(signature | {"id": "*i32", "tokens": "i32"}),
    }


def _route_sort(op: Op, device: GPU) -> dict[str, Any]:
    made = _route(op, device)
    own = dict.fromkeys(("slot", "off", "counts", "here"), "*i32")
    *given, tokens = made["signature_lines"]
    return made | {
        # 128 registers a thread, or 256: a lane's scores, of which it holds up to 32, must not spill.
        "warps": 16 if made["experts"] <= 256 else 8,
        "signature_lines": [*given, *signature_lines(own), tokens],
        "quant": False,
    }


def _route_sort_and_quant(op: Op, device: GPU) -> dict[str, Any]:
    made, x = _route_sort(op, device), tensor(op.operands[2])
    each = 128 // x.dtype.bits  # columns in 16 bytes
    *given, tokens = made["signature_lines"]
    own = {"x": pointer(x.dtype), "y": "*fp8e4nv", "y_scale": "*fp32", "blocks": "i32"}
    return (
        made
        | quant_of(x, op.attrs["quant"], op.attrs["quant_scale"])
        | {
            "quant": True,
            "kinds": sorted({*made["kinds"], x.dtype.name}),
            "x_dtype": x.dtype.name,
            "depth": x.shape[1],
            "pieces": -(-int(x.shape[1]) // 128),  # of a row: each has a scale
            "each": each,
            "at_once": made["warps"] * 32 * each // 128,  # pieces a block
            "rounds": ROUNDS,
            "signature_lines": [*given, *signature_lines(own), tokens],
        }
    )


def _quant_reasons(op: Op) -> list[str]:
    found, x = _reasons(op) + beside_reasons(op), tensor(op.operands[2])
    if not found and x.shape[1] % (each := 128 // x.dtype.bits):
        found.append(f"K is {x.shape[1]}, no multiple of {each}: rows don't start at multiples of 16 bytes")
    return found


def _reasons(op: Op) -> list[str]:
    logits, bias, *_ = op.operands
    types = [tensor(v) for v in (logits, bias) if v is not None]
    experts, width = types[0].shape[1], op.attrs["k"] + op.attrs["shared"]
    reasons = not_static(E=experts) + not_float(*types)
    if op.attrs["dtype"].name not in FLOATS:
        reasons.append(f"weights are {op.attrs['dtype']}")
    if isinstance(experts, int) and experts > MOST_SCORED:
        reasons.append(f"{experts} experts, more than {MOST_SCORED}")
    if width > MOST_CHOSEN:
        reasons.append(f"{width} experts a token, more than {MOST_CHOSEN}")
    if op.attrs["groups"] > MOST_GROUPS:
        reasons.append(f"{op.attrs['groups']} groups, more than {MOST_GROUPS}")
    if not math.isfinite(op.attrs["scale"]):
        reasons.append(f"scale is {op.attrs['scale']}")
    return reasons


register(
    CudaKernel("route", "cuda/route.py.jinja", "cuda/route.cu.jinja", _route, _reasons),
    CudaKernel("route_sort", "cuda/route_sort.py.jinja", "cuda/route_sort.cu.jinja", _route_sort, _reasons),
    CudaKernel(
        "route_sort_and_quant",
        "cuda/route_sort.py.jinja",
        "cuda/route_sort.cu.jinja",
        _route_sort_and_quant,
        _quant_reasons,
        targets=tuple(name for name, device in GPUS.items() if device.fp8),
    ),
)
