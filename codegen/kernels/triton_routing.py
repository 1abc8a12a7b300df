"""Around the experts' products on GPUs: choosing experts, sorting slots by them, combining their rows."""

from __future__ import annotations

from typing import Any

from moec.codegen.kernels import register
from moec.codegen.kernels.triton import (
    FLOATS,
    TritonKernel,
    not_float,
    not_static,
    pointer,
    signature_lines,
    tensor,
)
from moec.codegen.kernels.triton_quant import beside_reasons
from moec.ir.devices import GPU, GPUS
from moec.ir.op import Op, Value
from moec.ir.ops.expert_parallel import LocalExperts
from moec.ir.types import TensorType

# Beyond, a chunk's counts no longer fit into a program's registers.
MOST_EXPERTS = 2047
# Rows of the tiles that a program quantises beside a sort: wide copies for each of its warps.
QUANTISED_ROWS = 16
# Beyond, a token's scores take too many registers of the one program that chooses.
MOST_SCORED = 1024


def _sort(op: Op, device: GPU) -> dict[str, Any]:
    experts = op.attrs["experts"]
    # One bin an expert, one for ids that are none; a power of two, as Triton's ranges are.
    id, w = op.id, _weights(op)  # type: ignore[attr-defined]
    return {
        "quant": False,
        "experts": experts,
        "first": op.attrs.get("first", 0),
        "keep": bool(w),
        "bins": 1 << experts.bit_length(),
        "w_type": pointer(tensor(w[0]).dtype) if w else None,
        "id_type": pointer(tensor(id).dtype),
    }


def _weights(op: Op) -> list[Value]:
    """The choices' weights, where a sort takes them."""
    return [op.w] if isinstance(op, LocalExperts) else []


def _sort_reasons(op: Op) -> list[str]:
    experts = op.attrs["experts"]
    found = not_float(*(tensor(v) for v in _weights(op)))
    return found + ([f"{experts} experts, more than {MOST_EXPERTS}"] if experts > MOST_EXPERTS else [])


def _quantised(op: Op) -> dict[str, Any]:
    """What the templates ask of x, the last operand, to quantise it beside a sort."""
    x = tensor(op.operands[-1])
    return {
        "quant": True,
        "x_type": pointer(x.dtype),
        "depth": x.shape[1],
        "pieces": -(-int(x.shape[1]) // 128),  # of a row: each has a scale
        "block_m": QUANTISED_ROWS,
        "ue8m0": op.attrs["quant_scale"] == "ue8m0",
    }


def route_constants(op: Op, device: GPU) -> dict[str, Any]:
    """What the templates of routers ask."""
    logits, bias, *_ = op.operands
    experts = tensor(logits).shape[1]
    groups = op.attrs["groups"]
    size = experts // groups
    every = experts + op.attrs["shared"]
    padded = _power_of_two(groups) * _power_of_two(size)
    return dict(op.attrs) | {
        "quant": False,
        "experts": experts,
        "size": size,
        "bins": 1 << every.bit_length(),
        "bias": bias is not None,
        "bias_type": pointer(tensor(bias).dtype) if bias is not None else None,
        "logits_type": pointer(tensor(logits).dtype),
        "w_type": pointer(op.attrs["dtype"]),
        "group_slots": _power_of_two(groups),
        "size_slots": _power_of_two(size),
        "slots": _power_of_two(op.attrs["k"] + op.attrs["shared"]),
        "warps": 1 if padded <= 512 else 4,
    }


def _power_of_two(n: int) -> int:
    """The next, n itself included: Triton's ranges are such."""
    return 1 << max(0, n - 1).bit_length()


def route_reasons(op: Op) -> list[str]:
    """Against a router."""
    logits, bias, *_ = op.operands
    types = [tensor(v) for v in (logits, bias) if v is not None]
    reasons = not_static(E=types[0].shape[1]) + not_float(*types)
    if op.attrs["dtype"].name not in FLOATS:
        reasons.append(f"weights are {op.attrs['dtype']}")
    experts = types[0].shape[1]
    if isinstance(experts, int) and experts + op.attrs["shared"] > MOST_SCORED:
        shared = f" and {op.attrs['shared']} shared" if op.attrs["shared"] else ""
        reasons.append(f"{experts} experts{shared}, more than {MOST_SCORED}")
    return reasons


def _hash_route(op: Op, device: GPU) -> dict[str, Any]:
    logits, table, tokens = (tensor(v) for v in op.operands)
    slots = _power_of_two(op.attrs["k"])
    return dict(op.attrs) | {
        "experts": logits.shape[1],
        "vocab": table.shape[0],
        "logits_type": pointer(logits.dtype),
        "table_type": pointer(table.dtype),
        "tokens_type": pointer(tokens.dtype),
        "w_type": pointer(op.attrs["dtype"]),
        "slots": slots,
        "block": max(1, 128 // slots),  # a choice or two a thread
        "warps": 2,
    }


def _hash_route_reasons(op: Op) -> list[str]:
    logits, table = tensor(op.operands[0]), tensor(op.operands[1])
    reasons = not_static(E=logits.shape[1], vocab=table.shape[0]) + not_float(logits)
    return reasons + ([] if op.attrs["dtype"].name in FLOATS else [f"weights are {op.attrs['dtype']}"])


def _combine(op: Op, device: GPU) -> dict[str, Any]:
    rows, slot, w, plus = op.operands
    return combine_constants(tensor(rows), slot, w, plus, tensor(op.results[0]))


def combine_constants(
    rows: TensorType, slot: Value | None, w: Value | None, plus: Value | None, y: TensorType
) -> dict[str, Any]:
    """What combine's template asks, of rows [T·k, H] that become y [T, H]."""
    width = y.shape[1]
    signature = {"rows": pointer(rows.dtype)}
    if slot is not None:
        signature["place"] = "*i32"
    signature["w"] = pointer(tensor(w).dtype)
    if plus is not None:
        signature["plus"] = pointer(tensor(plus).dtype)
    return {
        "top_k": tensor(w).shape[1],
        "width": width,
        # 8 columns a thread of 16-bit values: copies of 16 bytes.
        "block": min(1024, 1 << max(0, width - 1).bit_length()),
        "slot": slot is not None,
        "slot_type": pointer(tensor(slot).dtype) if slot is not None else None,
        "plus": plus is not None,
        "signature_lines": signature_lines(signature | {"y": pointer(y.dtype)}),
        "rows_dtype": rows.dtype,
        "to": y.dtype,
    }


def _combine_reasons(op: Op) -> list[str]:
    rows, _, w, plus = op.operands
    types = [tensor(v) for v in (rows, w, plus, op.results[0]) if v is not None]
    return not_static(k=tensor(w).shape[1], H=tensor(rows).shape[1]) + not_float(*types)


QUANTISING = ("triton/expert_of.py.jinja", "triton/quantize.py.jinja")
FP8 = tuple(name for name, device in GPUS.items() if device.fp8)

register(
    TritonKernel("route", "triton/route.py.jinja", route_constants, route_reasons),
    TritonKernel(
        "route_sort",
        "triton/route_sort.py.jinja",
        route_constants,
        route_reasons,
        ("triton/expert_of.py.jinja",),
    ),
    TritonKernel(
        "route_sort_and_quant",
        "triton/route_sort.py.jinja",
        lambda op, device: route_constants(op, device) | _quantised(op),
        lambda op: route_reasons(op) + beside_reasons(op),
        QUANTISING,
        FP8,
    ),
    *(
        TritonKernel(
            f"{op}_and_quant",
            "triton/sort_by_expert.py.jinja",
            lambda op, device: _sort(op, device) | _quantised(op),
            lambda op: _sort_reasons(op) + beside_reasons(op),
            QUANTISING,
            FP8,
        )
        for op in ("sort_by_expert", "local_sort")
    ),
    TritonKernel("hash_route", "triton/hash_route.py.jinja", _hash_route, _hash_route_reasons),
    *(
        TritonKernel(
            op, "triton/sort_by_expert.py.jinja", _sort, _sort_reasons, ("triton/expert_of.py.jinja",)
        )
        for op in ("sort_by_expert", "local_sort")
    ),
    TritonKernel("combine", "triton/combine.py.jinja", _combine, _combine_reasons),
)
