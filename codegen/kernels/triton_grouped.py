"""Products on GPUs, in two forms each: the experts', of floats or in fp8, and ``linear`` in fp8."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moec.codegen.choosing import choosing, pick
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
from moec.codegen.kernels.triton_scales import (
    QUANT_BLOCK,
    WEIGHT_BLOCK,
    Scales,
    reasons_against_scales,
    scales,
)
from moec.codegen.ladders import Ladder, parse_ladder, print_ladder
from moec.codegen.schedules import Problem, Schedule
from moec.codegen.select import band
from moec.errors import BadSchedule
from moec.ir.devices import GPU, GPUS
from moec.ir.op import Op
from moec.ir.ops.moe import GroupedLinearCombine
from moec.ir.types import DType, TensorType, format_block


@dataclass(frozen=True)
class Flags:
    """What one form's template asks."""

    experts: int
    columns: int
    depth: int
    dtype: str
    dense: bool  # all rows are multiplied by one matrix
    gather: bool  # rows are tokens, read by slot
    per_row: int
    swiglu: bool
    act: str
    limit: float | None  # gate and up are clamped to it before
    scatter: bool  # rows are stored by slot
    persistent: bool
    x_descriptor: bool
    w_descriptor: bool
    k_tail: bool
    n_tail: bool
    to: DType  # of the result
    scales: Scales | None  # of x and w, where they have any
    quant: str  # the format of the scales that the result gets; empty: it gets none
    split: bool  # several programs share a tile's K
    sums: Sums | None  # each token's rows are summed behind the product
    phase: bool  # of a kernel for the whole layer


@dataclass(frozen=True)
class Sums:
    """``top_k`` rows a token, ``step`` of their elements at once; ``plus``: something is added."""

    top_k: int
    plus: bool
    step: int = 1024  # 16 bytes of 16-bit rows a thread of four warps


@dataclass(frozen=True)
class FormOfKernel:
    """One Triton function: its name's end, its arguments' types in order, its schedules."""

    name: str
    flags: Flags
    signature: dict[str, str]
    schedules: tuple[Schedule, ...]
    bands: dict[Schedule, int]  # the height of each one's

    @property
    def signature_lines(self) -> list[str]:
        return signature_lines(self.signature)


def problem(op: Op) -> Problem:
    """The product of ``op``, as the schedules' models see it."""
    w = tensor(op.operands[1])
    experts, rows, depth = w.shape if w.rank == 3 else (1, *w.shape)
    matrices = 2 if op.attrs.get("epilogue") == "swiglu" else 1
    by = scales(tensor(op.operands[0]), w, matrices == 2, "", QUANT_BLOCK[1])
    return Problem(
        experts=experts,
        columns=rows // matrices,
        depth=depth,
        dtype=w.dtype.name,
        itemsize=w.dtype.bits // 8,
        matrices=matrices,
        gathered=op.name == "gather_grouped_linear",
        quantised=op.attrs.get("quant") is not None,
        column_scales=by is not None and by.w_steps and not by.w_uniform,
        block_scales=tensor(op.operands[0]).scale == QUANT_BLOCK and w.scale == WEIGHT_BLOCK,
        dense=op.name == "linear",
        result=product_type(op).dtype.bits // 8,
    )


def reasons(op: Op) -> list[str]:
    """Against a product of floats."""
    x = tensor(op.operands[0])
    found = not_float(x)
    if op.attrs.get("quant"):
        found.append("the result is quantised, but x has no scales")
    return found or _reasons_against_sizes(op)


def scaled_reasons(op: Op) -> list[str]:
    """Against a product of scaled values."""
    x, w, y = tensor(op.operands[0]), tensor(op.operands[1]), product_type(op)
    found = reasons_against_scales(x, w)
    if (quant := op.attrs.get("quant")) not in (None, QUANT_BLOCK):
        found.append(f"quant is {format_block(quant)}: a tile holds what {format_block(QUANT_BLOCK)} needs")
    elif quant is None:
        found += not_float(y)
    return found or _reasons_against_sizes(op)


def _reasons_against_sizes(op: Op) -> list[str]:
    w = tensor(op.operands[1])
    found = not_static(**dict(zip("ENK"[-w.rank :], w.shape, strict=True)))
    if not found and w.shape[-1] * w.dtype.bits // 8 % 4:
        # No copy to shared memory is smaller than 4 bytes.
        found = [f"K is {w.shape[-1]}: rows of {w.dtype} don't start at multiples of 4 bytes"]
    return found


def constants(op: Op, device: GPU) -> dict[str, Any]:
    """The template's constants, with the variants of the op's schedules, or those picked for ``device``."""
    return constants_of(op, device, rungs(op, device))


def rungs(op: Op, device: GPU) -> Ladder:
    """(rows an expert below which, schedule): the op's own ``schedule``, else what this build picks.

    Raises BadSchedule where the op's own can't be read or run, is several and the build is to be batch
    invariant, or has rungs of warps with tasks of their own.
    """
    own = own_rungs(op, device)
    if own is None:
        return pick(problem(op), device)
    if others := [s for _, s in own if s.form == "specialised"]:
        raise refuse(
            BadSchedule, op, f"schedule {others[0].text!r} is of kernel=gluon.{op.name}, not of Triton's"
        )
    return own


def own_rungs(op: Op, device: GPU) -> Ladder | None:
    """The op's own ``schedule``, None without one. Raises BadSchedule."""
    text = op.annotations.get("schedule")
    if text is None:
        return None
    try:
        own = parse_ladder(text, problem(op), device)
    except ValueError as error:
        raise refuse(BadSchedule, op, f"schedule {error}") from None
    if choosing().batch_invariant and len({s for _, s in own}) > 1:
        raise refuse(BadSchedule, op, f"schedule {text!r} depends on M, and the build is batch invariant")
    return own


def constants_of(op: Op, device: GPU, rungs: Ladder) -> dict[str, Any]:
    """The template's constants for a ladder of schedules: (rows an expert below which, schedule)."""
    forms = forms_of(op, device, [s for _, s in rungs])
    return {
        "t": forms[0].flags,
        "forms": forms,
        "ladders": [("LADDER", shown(rungs))],
        "device": device,
        "splits": any(form.flags.split for form in forms),
    }


def shown(rungs: Ladder, sums: bool = False) -> list[tuple[str, str, Schedule]]:
    """A ladder as a kernel file has it: number of rows, name of the Triton function, schedule."""
    return [
        (f"{below:g}" if below != float("inf") else 'float("inf")', _name(s, sums), s) for below, s in rungs
    ]


def _name(s: Schedule, sums: bool) -> str:
    return s.function + "_sum" * sums


def forms_of(op: Op, device: GPU, schedules: list[Schedule], sums: Sums | None = None) -> list[FormOfKernel]:
    """The Triton functions that ``schedules`` ask for."""
    by_name: dict[str, list[Schedule]] = {}
    for s in sorted(set(schedules), key=str):
        by_name.setdefault(_name(s, sums is not None), []).append(s)
    return [form_of(op, device, name, tuple(alike), sums) for name, alike in by_name.items()]


def form_of(
    op: Op,
    device: GPU,
    name: str,
    schedules: tuple[Schedule, ...],
    sums: Sums | None = None,
    phase: bool = False,
) -> FormOfKernel:
    """The Triton function of these schedules, which differ in nothing that a template asks.

    ``phase``: it is one of a kernel for the whole layer.
    """
    p, form, split = problem(op), schedules[0].form, schedules[0].split > 1
    dense, gather = op.name == "linear", p.gathered
    x, w = tensor(op.operands[0]), tensor(op.operands[1])
    y = product_type(op)
    slot = None if dense else op.operands[2 if gather else 3]
    flags = Flags(
        experts=p.experts,
        columns=p.columns,
        depth=p.depth,
        dtype=p.dtype,
        dense=dense,
        gather=gather,
        per_row=op.attrs.get("per_row", 1),
        swiglu=p.matrices == 2,
        act=op.attrs.get("act", ""),
        limit=op.attrs.get("limit"),
        scatter=not gather and slot is not None,
        persistent=schedules[0].persistent,
        # Rows that lie side by side come as whole tiles too. Few rows gain nothing, and a descriptor of a
        # tensor that is new in every step is work for the host.
        # And what other programs have stored in the same launch, descriptors would read past their fences.
        x_descriptor=not gather and not phase and form != "swapped" and p.descriptors(device),
        w_descriptor=p.descriptors(device),
        k_tail=any(p.depth % s.block_k for s in schedules),
        n_tail=any(p.columns % s.block_n for s in schedules),
        to=y.dtype,
        scales=scales(x, w, p.matrices == 2, "T" if gather else "R", max(s.block_n for s in schedules)),
        quant=op.attrs["scale"] if p.quantised else "",
        split=split,
        sums=sums,
        phase=phase,
    )
    element = TRITON_TYPES[p.dtype]
    signature = {"x": f"tensordesc<{element}[BLOCK_M, BLOCK_K]>" if flags.x_descriptor else f"*{element}"}
    if flags.scales:
        signature["x_scale"] = "*fp32"
    signature["w"] = f"tensordesc<{element}[1, BLOCK_N, BLOCK_K]>" if flags.w_descriptor else f"*{element}"
    if flags.scales:
        signature["w_scale"] = "*fp32"
    if slot is not None:
        signature["slot"] = pointer(tensor(slot).dtype)
    if not dense:
        signature["off"] = pointer(tensor(op.operands[3 if gather else 2]).dtype)
    if sums:
        weights, plus = op.operands[4:6]
        signature["weights"] = pointer(tensor(weights).dtype)
        if plus is not None:
            signature["plus"] = pointer(tensor(plus).dtype)
        signature["by_slot"] = pointer(y.dtype)
    signature["y"] = pointer(tensor(op.results[0]).dtype if sums else y.dtype)
    if flags.quant:
        signature["y_scale"] = "*fp32"
    if split:
        signature["parts"] = "*fp32"
    if split or sums:
        signature["counters"] = "*i32"
    signature["R"] = "i32"
    if sums and not phase:
        signature["arrivals"] = "i32"
    bands = {s: band(s, p, device) for s in schedules}
    return FormOfKernel(name, flags, signature, schedules, bands)


def product_type(op: Op) -> TensorType:
    """What the product's rows are before anything is made of them in the same op."""
    return op.product_type() if isinstance(op, GroupedLinearCombine) else tensor(op.results[0])


def dense_reasons(op: Op) -> list[str]:
    """Against a product with one matrix of scaled values."""
    return scaled_reasons(op) + (["it has a bias"] if op.operands[2] is not None else [])


def _kernel(op: str, scaled: bool) -> TritonKernel:
    dense = op == "linear"
    tile = "triton/dense_tile.py.jinja" if dense else "triton/grouped_tile.py.jinja"
    return TritonKernel(
        op,
        "triton/linear.py.jinja" if dense else "triton/grouped_linear.py.jinja",
        constants,
        dense_reasons if dense else scaled_reasons if scaled else reasons,
        helpers=(tile, *(["triton/quantize.py.jinja"] if scaled and not dense else [])),
        targets=tuple(name for name, device in GPUS.items() if device.fp8 or not scaled),
        ladder=lambda op, device: print_ladder(rungs(op, device)),
        problem=problem,
        name=f"triton.fp8_{op}" if scaled else "",
    )


for _op in ("gather_grouped_linear", "grouped_linear"):
    register(_kernel(_op, scaled=False), _kernel(_op, scaled=True))
register(_kernel("linear", scaled=True))
