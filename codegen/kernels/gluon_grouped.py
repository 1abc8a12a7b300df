"""The experts' products on Hopper with warps that have tasks of their own, written in Gluon.

A warp loads (four, where rows are gathered), two warpgroups multiply 64 rows each, and a ring in shared
memory lies between them: no warpgroup waits for an address, and in fp8 one adds up while the other one
multiplies. An op gets it where measurements found it fastest at some numbers of rows, or where its ``kernel``
or ``schedule`` says so; at other numbers Triton's kernels run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from moec.codegen.choosing import pick
from moec.codegen.kernels import register
from moec.codegen.kernels.record import refuse
from moec.codegen.kernels.triton import GluonKernel, tensor
from moec.codegen.kernels.triton_grouped import (
    Flags,
    FormOfKernel,
    constants_of,
    form_of,
    own_rungs,
    problem,
    reasons,
    scaled_reasons,
    shown,
)
from moec.codegen.kernels.triton_grouped_combine import combine_reasons, combined_constants
from moec.codegen.ladders import Ladder, print_ladder
from moec.codegen.schedules import Schedule
from moec.codegen.specialised import (
    TARGET,
    reasons_against_any,
    reasons_against_specialised,
    specialised,
    tile,
)
from moec.errors import BadSchedule
from moec.ir.devices import GPU, GPUS
from moec.ir.op import Op

# Registers a thread: of the second warpgroup, and of what loads; the first gets what is left of 64 Ki.
GATHERING, LOADING = (216, 72), (224, 56)


@dataclass(frozen=True)
class WarpSpecialised:
    """What the template asks, beside ``twin``: the Triton kernel of the same arguments and schedules."""

    twin: FormOfKernel
    groups: int  # places for the last tiles of experts and of nobody's rows, a power of two
    load_warps: int
    copying: int  # threads of it that copy by cp.async
    registers: tuple[int, int]
    vector: int  # values of the result in 16 bytes, which a thread stores at once
    descriptor_values: str  # of a step, in a row of K
    multiply_given: str  # the arguments of the partitions
    load_given: str

    @property
    def flags(self) -> Flags:
        return self.twin.flags

    @property
    def schedules(self) -> tuple[Schedule, ...]:
        return self.twin.schedules


def rungs(op: Op, device: GPU) -> Ladder:
    """(rows an expert below which, schedule): the op's own ``schedule``, else what this build picks.

    Where it picks none of these, because none was measured as fastest, the last rung becomes one: the op got
    this record by name. Raises BadSchedule, also for a ``schedule`` that has none.
    """
    own = own_rungs(op, device)
    found = pick(problem(op), device, specialised=True) if own is None else own
    if _any(found):
        return found
    if own is not None:
        text = print_ladder([(math.inf, specialised(problem(op), device)[0])])
        raise refuse(BadSchedule, op, f"schedule {op.annotations['schedule']!r} has no rung like {text!r}")
    return [*found[:-1], (math.inf, specialised(problem(op), device)[0])]


def wanted(op: Op, device: GPU) -> bool:
    """Whether the op's own schedules, or those picked, have any of these."""
    own = own_rungs(op, device)
    return _any(pick(problem(op), device, specialised=True) if own is None else own)


def _any(rungs: Ladder) -> bool:
    return any(s.form == "specialised" for _, s in rungs)


def reasons_against(op: Op) -> list[str]:
    """Against a product by warps with tasks of their own."""
    x = tensor(op.operands[0])
    if found := scaled_reasons(op) if x.scale is not None else reasons(op):
        return found
    p, device = problem(op), GPUS[TARGET]
    if found := reasons_against_any(p):
        return found
    return [] if specialised(p, device) else reasons_against_specialised(tile(p, 128, 3), p, device)


def constants(op: Op, device: GPU) -> dict[str, Any]:
    """The template's constants, with the variants of the op's schedules, or those picked for ``device``."""
    return mixed_constants(op, device, rungs(op, device))


def mixed_constants(op: Op, device: GPU, rungs: Ladder) -> dict[str, Any]:
    """The same for a ladder in which some schedules are Triton's."""
    tritons = [(below, s) for below, s in rungs if s.form != "specialised"]
    made: dict[str, Any] = {"forms": [], "device": device, "splits": False}
    if tritons:
        made = constants_of(op, device, tritons)
    if not _any(rungs):
        return made
    p, schedules = problem(op), {s for _, s in rungs if s.form == "specialised"}
    twin = form_of(op, device, "twin", tuple(sorted(schedules, key=str)))
    t = twin.flags
    warps = 4 if t.gather else 1
    names = ["y", *["y_scale"] * bool(t.quant), *["w_scale"] * p.fp8, *["slot"] * t.scatter]
    loaded = ["x", "w", *["x_scale"] * p.fp8, *["slot"] * t.gather]
    ws = WarpSpecialised(
        twin=twin,
        groups=p.groups,
        load_warps=warps,
        copying=32 * warps * (t.gather or p.fp8),
        registers=GATHERING if t.gather else LOADING,
        vector=16 // p.result,
        descriptor_values=("2 * BLOCK_N" if t.swiglu else "BLOCK_N") if t.gather else "(BLOCK_M + BLOCK_N)",
        multiply_given=", ".join([*names, "off", "R", "tiles", "all_tiles"]) + ",",
        load_given=", ".join([*loaded, "off", "R", "tiles"]) + ",",
    )
    return {**made, "t": t, "ladders": [("LADDER", shown(rungs))], "ws": ws, "itemsize": p.itemsize}


def combine_constants(op: Op, device: GPU) -> dict[str, Any]:
    """The template's constants where each token's rows are summed: in a launch of its own, for many."""
    return combined_constants(op, device, rungs(op, device), mixed_constants)


def _kernel(op: str) -> GluonKernel:
    combine = op == "grouped_linear_combine"
    return GluonKernel(
        op,
        f"gluon/{op if combine else 'grouped_linear'}.py.jinja",
        combine_constants if combine else constants,
        (lambda op: reasons_against(op) + combine_reasons(op)) if combine else reasons_against,
        helpers=(
            "triton/grouped_tile.py.jinja",
            "triton/quantize.py.jinja",
            "gluon/tiles.py.jinja",
            "gluon/quantize.py.jinja",
        ),
        targets=(TARGET,),
        wanted=wanted,
        ladder=lambda op, device: print_ladder(rungs(op, device)),
        problem=problem,
    )


register(*map(_kernel, ("gather_grouped_linear", "grouped_linear", "grouped_linear_combine")))
