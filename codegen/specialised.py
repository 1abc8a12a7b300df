"""Schedules of warps with tasks of their own, on Hopper: the form ``specialised``, by measurement only.

A warp loads (four, where rows are gathered), two warpgroups multiply 64 rows each, and a ring of stages in
shared memory lies between them. What that gains the analytic model (select.py) doesn't say, so ``space`` has
none of them: ``moec tune`` measures these, and a build takes one where it was the fastest.
"""

from __future__ import annotations

from functools import lru_cache

from moec.codegen.schedules import Problem, Schedule
from moec.ir.devices import GPU, GPUS

TARGET = "sm_90a"
ROWS = 128  # of a tile, half of them a warpgroup's
WARPS = 8
COLUMNS = (256, 128)
LEAST_STAGES, MOST_STAGES = 3, 8
# Rings of a tile that are measured, the deepest ones: what they leave of shared memory nobody else uses.
DEPTHS = 2
# Rows an expert from which on they are measured and used: a tile of 128 isn't mostly padding much longer, and
# products are bound by memory until there are about as many.
LEAST_ROWS = 32.0


def specialised(problem: Problem, device: GPU) -> list[Schedule]:
    """Those of ``problem`` on ``device``: the widest tile first, the deepest ring first."""
    return list(_specialised(problem)) if device.name == TARGET else []


@lru_cache(maxsize=256)
def _specialised(problem: Problem) -> tuple[Schedule, ...]:
    found: list[Schedule] = []
    for columns in COLUMNS:
        rings = [tile(problem, columns, stages) for stages in range(MOST_STAGES, LEAST_STAGES - 1, -1)]
        found += [s for s in rings if not _reasons(s, problem)][:DEPTHS]
    return tuple(found)


def tile(problem: Problem, columns: int, stages: int) -> Schedule:
    """A step along K is one swizzle atom: 128 bytes."""
    return Schedule("specialised", ROWS, columns, 128 // problem.itemsize, WARPS, stages, persistent=True)


def reasons_against_specialised(s: Schedule, problem: Problem, device: GPU) -> list[str]:
    """Why ``s`` is not for ``problem`` on ``device``; none means that it is."""
    if device.name != TARGET:
        return [f"warps with tasks of their own are for {TARGET}"]
    return _reasons(s, problem)


def _reasons(s: Schedule, problem: Problem) -> list[str]:
    if found := reasons_against_any(problem):
        return found
    if s != tile(problem, s.block_n, s.stages) or s.block_n not in COLUMNS:
        columns = " or ".join(map(str, sorted(COLUMNS)))
        found.append(
            f"its tile is of {ROWS} rows and {columns} columns, in steps of {128 // problem.itemsize}, and "
            f"its programs are persistent with {WARPS} warps that multiply"
        )
    # A thread holds 64 x columns / 128 sums of each matrix, and in fp8 a step's beside those of all steps.
    if problem.matrices * s.block_n > 256 or (problem.fp8 and s.block_n > 128):
        found.append(f"{s.block_n} columns spill registers here")
    if problem.depth % s.block_k or problem.columns % s.block_n:
        found.append(
            f"K is {problem.depth}, and there are {problem.columns} columns: tiles are of {s.block_k} and "
            f"{s.block_n}"
        )
    smem, most = problem.shared_memory(s, GPUS[TARGET]), GPUS[TARGET].smem_per_block
    if smem > most:
        found.append(f"{smem} bytes of shared memory, {TARGET} has {most} a block")
    return found


def reasons_against_any(problem: Problem) -> list[str]:
    """Why no tile at all is for ``problem``."""
    if problem.dense:
        return ["it is for products by expert"]
    if problem.itemsize == 4:
        return ["f32 has no matrix unit that is exact"]
    if problem.fp8 and not problem.block_scales:
        return ["in fp8 it takes scales of 1x128 for x and 128x128 for w"]
    return []
