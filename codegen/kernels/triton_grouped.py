"""The experts' products on GPUs: ``gather_grouped_linear`` and ``grouped_linear``, in two forms each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moec.codegen.kernels import register
from moec.codegen.kernels.record import refuse
from moec.codegen.kernels.triton import (
    TRITON_TYPES,
    TritonKernel,
    not_float,
    not_static,
    pointer,
    signature_lines,
    tensor,
)
from moec.codegen.schedules import Problem, Schedule, parse_ladder, print_ladder
from moec.codegen.select import ladder
from moec.errors import BadSchedule
from moec.ir.devices import GPU
from moec.ir.op import Op


@dataclass(frozen=True)
class Flags:
    """What one form's template asks."""

    experts: int
    columns: int
    depth: int
    dtype: str
    gather: bool  # rows are tokens, read by slot
    per_row: int
    swiglu: bool
    act: str
    scatter: bool  # rows are stored by slot
    x_descriptor: bool
    w_descriptor: bool
    k_tail: bool
    n_tail: bool


@dataclass(frozen=True)
class FormOfKernel:
    """One Triton function: its name's end, its arguments' types in order, its schedules."""

    name: str
    flags: Flags
    signature_lines: list[str]
    schedules: tuple[Schedule, ...]


def problem(op: Op) -> Problem:
    """The product of ``op``, as the schedules' models see it."""
    w = tensor(op.operands[1])
    experts, rows, depth = w.shape
    matrices = 2 if op.attrs.get("epilogue") == "swiglu" else 1
    return Problem(
        experts=experts,
        columns=rows // matrices,
        depth=depth,
        dtype=w.dtype.name,
        itemsize=w.dtype.bits // 8,
        matrices=matrices,
        gathered=op.name == "gather_grouped_linear",
    )


def reasons(op: Op) -> list[str]:
    x, w = tensor(op.operands[0]), tensor(op.operands[1])
    found = not_static(E=w.shape[0], N=w.shape[1], K=w.shape[2]) + not_float(x)
    if op.attrs.get("quant"):
        found.append("the result is quantised: the kernels store floats")
    if not found and w.shape[2] * w.dtype.bits // 8 % 4:
        # No copy to shared memory is smaller than 4 bytes.
        found = [f"K is {w.shape[2]}: rows of {w.dtype} don't start at multiples of 4 bytes"]
    return found


def constants(op: Op, device: GPU) -> dict[str, Any]:
    """The template's constants, with the variants of the op's schedules, or those picked for ``device``."""
    return constants_of(op, device, rungs(op, device))


def rungs(op: Op, device: GPU) -> list[tuple[float, Schedule]]:
    """(rows an expert below which, schedule): the op's own ``schedule``, else what the model picks.

    Raises BadSchedule where the op's own can't be read or run.
    """
    text = op.annotations.get("schedule")
    if text is None:
        return ladder(problem(op), device)
    try:
        return parse_ladder(text, problem(op), device)
    except ValueError as error:
        raise refuse(BadSchedule, op, f"schedule {error}") from None


def constants_of(op: Op, device: GPU, rungs: list[tuple[float, Schedule]]) -> dict[str, Any]:
    """The template's constants for a ladder of schedules: (rows an expert below which, schedule)."""
    schedules = sorted({s for _, s in rungs}, key=str)
    forms = [
        _form(op, device, form, tuple(s for s in schedules if s.form == form))
        for form in dict.fromkeys(s.form for s in schedules)
    ]
    shown = [(f"{below:g}" if below != float("inf") else 'float("inf")', s) for below, s in rungs]
    return {"t": forms[0].flags, "forms": forms, "ladder": shown, "device": device}


def _form(op: Op, device: GPU, form: str, schedules: tuple[Schedule, ...]) -> FormOfKernel:
    p = problem(op)
    gather = p.gathered
    slot = op.operands[2 if gather else 3]
    flags = Flags(
        experts=p.experts,
        columns=p.columns,
        depth=p.depth,
        dtype=p.dtype,
        gather=gather,
        per_row=op.attrs.get("per_row", 1),
        swiglu=p.matrices == 2,
        act=op.attrs.get("act", ""),
        scatter=not gather and slot is not None,
        # Rows that lie side by side come as whole tiles too. Few rows gain nothing, and a descriptor of a
        # tensor that is new in every step is work for the host.
        x_descriptor=not gather and form == "rows" and p.descriptors(device),
        w_descriptor=p.descriptors(device),
        k_tail=any(p.depth % s.block_k for s in schedules),
        n_tail=any(p.columns % s.block_n for s in schedules),
    )
    element = TRITON_TYPES[p.dtype]
    signature = {
        "x": f"tensordesc<{element}[BLOCK_M, BLOCK_K]>" if flags.x_descriptor else f"*{element}",
        "w": f"tensordesc<{element}[1, BLOCK_N, BLOCK_K]>" if flags.w_descriptor else f"*{element}",
    }
    if slot is not None:
        signature["slot"] = pointer(tensor(slot).dtype)
    off = tensor(op.operands[3 if gather else 2])
    signature |= {"off": pointer(off.dtype), "y": f"*{element}", "R": "i32"}
    return FormOfKernel(form, flags, signature_lines(signature), schedules)


def _kernel(op: str) -> TritonKernel:
    return TritonKernel(
        op,
        "triton/grouped_linear.py.jinja",
        constants,
        reasons,
        helpers=("triton/grouped_tile.py.jinja",),
        ladder=lambda op, device: print_ladder(rungs(op, device)),
    )


register(_kernel("gather_grouped_linear"), _kernel("grouped_linear"))
