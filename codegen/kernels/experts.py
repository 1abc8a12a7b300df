"""The routed experts as one op in PyTorch: the functions of its parts, one after the other."""

from __future__ import annotations

from typing import Any

from moec.codegen.kernels import KERNELS, Templated, register
from moec.codegen.kernels.triton import tensor
from moec.codegen.render import Part
from moec.ir.op import Op
from moec.ir.ops.experts import parts_of


def _constants(op: Op) -> dict[str, Any]:
    route, up, down = parts_of(op)
    named = {"route": route, "up": up, "down": down}
    x_scaled, h_scaled = (tensor(part.operands[0]).scale is not None for part in (up, down))
    return {
        "parts": [p for name, part in named.items() if part is not None for p in _parts(name, part)],
        "x_scaled": x_scaled,
        "h_scaled": h_scaled,
        "route": route is not None,
        "bias": route is not None and route.operands[1] is not None,
        "plus": down.operands[5] is not None,
    }


def _parts(name: str, op: Op) -> list[Part]:
    """What emits ``op`` alone, of PyTorch's own products; before it what that calls."""
    record = next(
        k
        for k in KERNELS
        if k.op == op.name and isinstance(k, Templated) and k.calls != "linear" and not k.supports(op)
    )
    found = [Part(name, record.template, record.constants(op), record.calls)]
    if record.calls:
        called = next(k for k in KERNELS if k.op == record.calls and isinstance(k, Templated))
        found.insert(0, Part(record.calls, called.template, record.called(op)))
    return found


register(
    *(Templated(op, "python/kernels/experts.py.jinja", _constants) for op in ("experts", "routed_experts"))
)
