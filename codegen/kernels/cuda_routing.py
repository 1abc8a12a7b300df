"""Routing on GPUs in CUDA C++: choice and sort in one launch, in a grid whose blocks meet in the middle.

``route`` alone is one launch in Triton too. Here it gives the bits that ``route_sort`` gives: both are
compiled without fusing a * b + c, which could differ from one kernel to the next.
"""

from __future__ import annotations

import math
from typing import Any

from moec.codegen.kernels import register
from moec.codegen.kernels.cuda import CudaKernel
from moec.codegen.kernels.triton import FLOATS, not_float, not_static, pointer, signature_lines, tensor
from moec.ir.devices import GPU
from moec.ir.op import Op

# A lane holds every 32nd score of a token, and is one choice of it, or one group.
MOST_SCORED = 1024
MOST_CHOSEN = 32
MOST_GROUPS = 32
# Tokens a block, where there are enough multiprocessors: choosing takes a warp some 800 instructions a token,
# and a multiprocessor has four schedulers.
SPREAD = 8
# Without headers C++ has no bf16 or fp16: the templates read and write their bits.
STORED = {"f32": "float", "bf16": "unsigned short", "f16": "unsigned short"}


def _route(op: Op, device: GPU) -> dict[str, Any]:
    logits, bias = op.operands
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
    }


def _reasons(op: Op) -> list[str]:
    logits, bias = op.operands
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
)
