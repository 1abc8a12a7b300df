"""The routed experts in one cooperative launch while tokens are few: an op that only ``one-launch`` makes.

The phases are the kernels of the ops that it stands for: the same templates, each a function that takes tile
after tile. Between them all programs meet, so that no launch has more than fit on the device at once. What
one phase stores and the next one reads goes through L2: the counting at a meeting releases and acquires at
the scope of the device, and what was stored is read as ordinary global memory, never by tensor descriptor,
whose reads those fences don't order. With more tokens the ops' own kernels run, one after the other.

Whether it gains anything has not been measured. It saves launches, and pays for meetings.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from moec.codegen.choosing import choosing, model_constants
from moec.codegen.kernels import register
from moec.codegen.kernels.triton import TritonKernel, pointer, signature_lines, tensor
from moec.codegen.kernels.triton_grouped import (
    FormOfKernel,
    Sums,
    form_of,
    problem,
    product_type,
    reasons,
    scaled_reasons,
)
from moec.codegen.kernels.triton_grouped import constants as product_constants
from moec.codegen.kernels.triton_grouped_combine import combine_reasons
from moec.codegen.kernels.triton_grouped_combine import constants as down_constants
from moec.codegen.kernels.triton_routing import route_constants, route_reasons
from moec.codegen.render import Part, environment
from moec.codegen.together import MOST_TOKENS, together
from moec.ir.devices import GPU, GPUS
from moec.ir.op import Op
from moec.ir.ops.experts import parts_of

# A phase's names of what the launch has other ones for; a counter of the launch lies before the columns'.
UP = {"w": "w13", "w_scale": "w13_scale", "y": "h", "y_scale": "h_scale"}
DOWN = {"x": "h", "x_scale": "h_scale", "w": "w2", "w_scale": "w2_scale"}
COUNTERS = 2  # who has come to meetings, and who has chosen


def constants(op: Op, device: GPU) -> dict[str, Any]:
    """The template's constants."""
    route, up_op, down_op = parts_of(op)
    plus = down_op.operands[5] is not None
    top_k = tensor(down_op.operands[4]).shape[1]
    pair = together(problem(up_op), problem(down_op), top_k, device.name, model_constants(device))
    if pair is None:
        raise TypeError(f"{op} has no schedules for {device.name}")
    up = form_of(up_op, device, "up_tiles", pair[:1], phase=True)
    down = form_of(down_op, device, "down_tiles", pair[1:], Sums(top_k, plus), phase=True)
    of_up, of_down = _renamed(up, UP, "UP"), _renamed(down, DOWN, "DOWN")
    many = [
        Part("up", "triton/grouped_linear.py.jinja", product_constants(up_op, device)),
        Part("down", "triton/grouped_linear_combine.py.jinja", down_constants(down_op, device)),
    ]
    router, of_route = None, {}
    if route is not None:
        router = route_constants(route, device)
        many.insert(0, Part("sort", "triton/route_sort.py.jinja", router))
        of_route = {
            name: pointer(tensor(v).dtype)
            for name, v in zip(("logits", "bias"), route.operands, strict=True)
            if v is not None
        } | {"id": "*i32"}
    signature = of_up | of_down | of_route
    signature |= {"R": signature.pop("R")}  # last
    return {
        "up": up,
        "down": down,
        "route": router,
        "choose": environment().get_template("triton/choose.jinja").render(**router).rstrip()
        if router
        else "",
        "slots": _power_of_two(MOST_TOKENS * top_k),
        "arguments": _lines(signature),
        "signature_lines": signature_lines(signature),
        "up_arguments": _lines(of_up),
        "down_arguments": _lines(of_down, counters=f"counters + {COUNTERS}"),
        "variant": f"{pair[0].tile}-{pair[1].tile}",
        "top_k": top_k,
        "experts": up.flags.experts,
        "few": 0 if choosing().batch_invariant else MOST_TOKENS,
        "many": many,
        "plus": plus,
        "x_scaled": up.flags.scales is not None,
        "h_scaled": down.flags.scales is not None,
        "h_dtype": tensor(up_op.results[0]).dtype,
        "x_dtype": tensor(up_op.operands[0]).dtype,
        "w_dtype": tensor(down_op.operands[4]).dtype,
        "rows_dtype": product_type(down_op).dtype,
        "to": tensor(op.results[0]).dtype,
        "passed": _passed(signature, up, down),
    }


def _renamed(form: FormOfKernel, names: dict[str, str], prefix: str) -> dict[str, str]:
    """A phase's signature as the launch has it."""
    return {names.get(n, n): kind.replace("BLOCK", prefix) for n, kind in form.signature.items()}


def _passed(signature: dict[str, str], up: FormOfKernel, down: FormOfKernel) -> list[str]:
    """Lines of Python: what the launch is given."""
    w13, w2 = (f.flags.w_descriptor for f in (up, down))
    known = {"w2": "w2"} if w2 else {}
    if w13:  # one matrix of gate or up rows after the other
        known["w13"] = f"w13.view({2 * up.flags.experts}, {up.flags.columns}, {up.flags.depth})"
    given = (
        "x",
        "x_scale",
        "w13",
        "w13_scale",
        "w2",
        "w2_scale",
        "logits",
        "bias",
        "plus",
        "slot",
        "off",
        "weights",
    )
    whole = {name: f"{name}.contiguous()" for name in given}
    counters = f"zeroed(x.device, {COUNTERS} + columns)"
    return _lines(signature, 96, **whole | known, counters=counters, R="rows")


def _lines(names: Iterable[str], width: int = 90, **instead: str) -> list[str]:
    """Arguments as lines of text, some as other text."""
    lines: list[str] = []
    for name in names:
        text = f"{instead.get(name, name)},"
        if lines and len(lines[-1]) + len(text) < width:
            lines[-1] += f" {text}"
        else:
            lines.append(text)
    return lines


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _reasons(op: Op, scaled: bool) -> list[str]:
    """Against the record for floats, or for scaled values: against one of the parts."""
    route, up, down = parts_of(op)
    found = route_reasons(route) if route is not None else []
    found += (scaled_reasons if scaled else reasons)(up)
    found += (scaled_reasons if tensor(down.operands[0]).scale else reasons)(down)
    return found + combine_reasons(down)


def _kernel(op: str, scaled: bool) -> TritonKernel:
    return TritonKernel(
        op,
        "triton/experts.py.jinja",
        constants,
        partial(_reasons, scaled=scaled),
        helpers=(
            "triton/expert_of.py.jinja",
            "triton/grouped_tile.py.jinja",
            "triton/quantize.py.jinja",
            "triton/meeting.py.jinja",
            "triton/sort_few.py.jinja",
        ),
        targets=tuple(name for name, device in GPUS.items() if device.fp8 or not scaled),
        name=f"triton.fp8_{op}" if scaled else "",
    )


for _op in ("experts", "routed_experts"):
    register(_kernel(_op, scaled=False), _kernel(_op, scaled=True))
