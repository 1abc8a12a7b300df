"""Around the experts' products on GPUs: sorting slots by expert, and combining the experts' rows."""

from __future__ import annotations

from typing import Any

from moec.codegen.kernels import register
from moec.codegen.kernels.triton import (
    TritonKernel,
    not_float,
    not_static,
    pointer,
    signature_lines,
    tensor,
)
from moec.ir.devices import GPU
from moec.ir.op import Op

# Beyond, a chunk's counts no longer fit into a program's registers.
MOST_EXPERTS = 2047


def _sort(op: Op, device: GPU) -> dict[str, Any]:
    experts = op.attrs["experts"]
    # One bin an expert, one for ids that are none; a power of two, as Triton's ranges are.
    return {
        "experts": experts,
        "bins": 1 << experts.bit_length(),
        "id_type": pointer(tensor(op.operands[0]).dtype),
    }


def _sort_reasons(op: Op) -> list[str]:
    experts = op.attrs["experts"]
    return [f"{experts} experts, more than {MOST_EXPERTS}"] if experts > MOST_EXPERTS else []


def _combine(op: Op, device: GPU) -> dict[str, Any]:
    rows, slot, w, plus = op.operands
    y = tensor(op.results[0])
    width = y.shape[1]
    signature = {"rows": pointer(tensor(rows).dtype)}
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
        "rows_dtype": tensor(rows).dtype,
        "to": y.dtype,
    }


def _combine_reasons(op: Op) -> list[str]:
    rows, _, w, plus = op.operands
    types = [tensor(v) for v in (rows, w, plus, op.results[0]) if v is not None]
    return not_static(k=tensor(w).shape[1], H=tensor(rows).shape[1]) + not_float(*types)


register(
    TritonKernel(
        "sort_by_expert",
        "triton/sort_by_expert.py.jinja",
        _sort,
        _sort_reasons,
        ("triton/expert_of.py.jinja",),
    ),
    TritonKernel("combine", "triton/combine.py.jinja", _combine, _combine_reasons),
)
