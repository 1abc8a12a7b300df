"""The experts' products on Hopper with warps that have tasks of their own, written in Gluon; by name only.

A warp loads (four, where rows are gathered), two warpgroups multiply 64 rows each, and a ring in shared
memory lies between them: no warpgroup waits for an address, and in fp8 one adds up while the other one
multiplies. That is for many tokens: below the last rung of Triton's ladder, Triton's kernels run. Nothing of
it has been measured, so an op gets it only where its ``kernel`` says so.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from moec.codegen.kernels import register
from moec.codegen.kernels.triton import TritonKernel, tensor
from moec.codegen.kernels.triton_grouped import (
    Flags,
    FormOfKernel,
    constants_of,
    form_of,
    problem,
    product_type,
    reasons,
    rungs,
    scaled_reasons,
    shown,
)
from moec.codegen.kernels.triton_grouped_combine import Rungs, combine_reasons, combined_constants
from moec.codegen.schedules import Problem, Schedule
from moec.ir.devices import GPU, GPUS
from moec.ir.op import Op

TARGET = "sm_90a"
ROWS = 128  # of a tile, half of them a warpgroup's
# Registers a thread: of the second warpgroup, and of what loads; the first gets what is left of 64 Ki.
GATHERING, LOADING = (216, 72), (224, 56)


@dataclass(frozen=True)
class WarpSpecialised:
    """What the template asks, beside ``twin``: the Triton kernel of the same arguments and tiles."""

    schedule: Schedule
    twin: FormOfKernel
    groups: int  # places for the experts' last tiles, a power of two
    load_warps: int
    copying: int  # threads of it that copy by cp.async
    registers: tuple[int, int]
    store: tuple[int, int, int]  # values a thread, threads along the rows and along the columns of a warp
    descriptor_values: str  # of a step, in a row of K
    multiply_given: str  # the arguments of the partitions
    load_given: str

    @property
    def flags(self) -> Flags:
        return self.twin.flags

    @property
    def tile(self) -> str:
        s = self.schedule
        return f"{s.block_m}x{s.block_n}x{s.block_k}s{s.stages}"


def schedule(op: Op) -> Schedule:
    """The tile, as its twin has it: two warpgroups' registers hold its sums, and it fills shared memory."""
    p, size = problem(op), product_type(op).dtype.bits // 8
    columns = 256 if p.matrices == 1 and not p.fp8 and p.columns % 256 == 0 else 128
    s = Schedule("rows", ROWS, columns, 128 // p.itemsize, 8, 8, persistent=True)
    while shared_memory(p, s, size) > GPUS[TARGET].smem_per_block:
        s = replace(s, stages=s.stages - 1)
    return s


def shared_memory(p: Problem, s: Schedule, size: int) -> int:
    """Bytes at most: the ring, the results of ``size`` as they are laid out for stores, the last tiles."""
    stage = (s.block_m + p.matrices * s.block_n) * s.block_k * p.itemsize
    scales = 4 * s.block_m if p.fp8 else 0
    laid_out = s.block_m * s.block_n * (1 if size == 2 else size)  # 16 bits go in two halves
    return s.stages * (stage + scales) + laid_out + 4 * _groups(p) + 1024


def _groups(p: Problem) -> int:
    """Places for the experts' last tiles, and for that of the rows that are nobody's: a power of two."""
    return max(32, 1 << p.experts.bit_length())


def reasons_against(op: Op) -> list[str]:
    """Against a product by warps with tasks of their own."""
    x = tensor(op.operands[0])
    found = scaled_reasons(op) if x.scale is not None else reasons(op)
    if found:
        return found
    if x.dtype.bits == 32:
        return ["f32 has no matrix unit that is exact"]
    p, s = problem(op), schedule(op)
    if p.depth % s.block_k or p.columns % s.block_n:
        found.append(
            f"K is {p.depth}, and there are {p.columns} columns: tiles are of {s.block_k} and {s.block_n}"
        )
    w = tensor(op.operands[1])
    if x.scale is not None and (x.scale != (1, 128) or w.scale != (128, 128)):
        found.append("in fp8 it takes scales of 1x128 for x and 128x128 for w")
    return found


def constants(op: Op, device: GPU) -> dict[str, Any]:
    """The template's constants: Triton's for few rows, and those of the kernel for many."""
    return constants_above(op, device, rungs(op, device))


def constants_above(op: Op, device: GPU, rungs: Rungs) -> dict[str, Any]:
    """The same for Triton's ladder, whose last rung is the kernel's."""
    few, p = rungs[:-1], problem(op)
    s = schedule(op)
    twin = form_of(op, device, "twin", (s,))
    t = twin.flags
    vector = 16 // (product_type(op).dtype.bits // 8)
    across = min(32, s.block_n // vector)
    warps = 4 if t.gather else 1
    names = ["y", *["y_scale"] * bool(t.quant), *["w_scale"] * p.fp8, *["slot"] * t.scatter]
    loaded = ["x", "w", *["x_scale"] * p.fp8, *["slot"] * t.gather]
    ws = WarpSpecialised(
        schedule=s,
        twin=twin,
        groups=_groups(p),
        load_warps=warps,
        copying=32 * warps * (t.gather or p.fp8),
        registers=GATHERING if t.gather else LOADING,
        store=(vector, 32 // across, across),
        descriptor_values=("2 * BLOCK_N" if t.swiglu else "BLOCK_N") if t.gather else "(BLOCK_M + BLOCK_N)",
        multiply_given=", ".join([*names, "off", "R", "tiles", "all_tiles"]) + ",",
        load_given=", ".join([*loaded, "off", "R", "tiles"]) + ",",
    )
    made: dict[str, Any] = {"forms": [], "device": device, "splits": False}
    if few:
        made = constants_of(op, device, few)
    ladder = [*shown(few), ('float("inf")', "gluon", ws)]
    return {**made, "t": t, "ladders": [("LADDER", ladder)], "ws": ws, "itemsize": p.itemsize}


def combine_constants(op: Op, device: GPU) -> dict[str, Any]:
    """The template's constants where each token's rows are summed: in a launch of its own, for many."""
    return combined_constants(op, device, rungs(op, device), constants_above)


def _kernel(op: str) -> TritonKernel:
    combine = op == "grouped_linear_combine"
    return TritonKernel(
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
        by_name_only=True,
        name=f"gluon.{op}",
    )


register(*map(_kernel, ("gather_grouped_linear", "grouped_linear", "grouped_linear_combine")))
