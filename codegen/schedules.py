"""Tilings of the grouped products, and which of them a device can take.

A product's tile is ``block_m`` rows of one expert by ``block_n`` of its output columns, in steps of
``block_k``. ``rows`` puts the rows on the matrix unit's M side, ``swapped`` the weights': Hopper's unit wants
64 there or falls back to the slow path, and few experts have 64 rows while decoding. ``specialised`` is
``rows`` by warps that have tasks of their own (specialised.py).

The bounds below keep the space to schedules that compile without register spills. They were found by
compiling ahead of time (Triton 3.6.0) and reading the SASS; tests/codegen repeats that for sm_90a.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import Literal

from moec.ir.devices import GPU, GPUS

Form = Literal["rows", "swapped", "specialised"]
# fp32 sums a thread may hold: with more, addresses and operands no longer fit into 255 registers.
MOST_SUMS = 128
# Into how many parts K may be split, and the fewest steps of a part: with fewer its pipeline hardly fills.
SPLITS = (2, 4, 8)
LEAST_STEPS = 4
# A block's shared memory holds the pipeline's buffers and, beside them, barriers and small exchanges.
SMEM_EXTRA = 1024


@dataclass(frozen=True)
class Schedule:
    """``warps`` a program, ``stages`` of the software pipeline. ``str()`` names the variant of the kernel.

    ``split``: so many programs share a tile's K; the last of them to end adds their sums, in order.
    ``persistent``: as many programs as the device holds at once, each of which takes tile after tile.
    Of ``specialised`` ones ``warps`` are those that multiply, and ``stages`` those of their ring.
    """

    form: Form
    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    split: int = 1
    persistent: bool = False

    def __str__(self) -> str:
        return f"{self.form}{self.tile}"

    @property
    def function(self) -> str:
        """Schedules of equal ones are variants of one function."""
        if self.form == "specialised":
            return self.form
        return self.form + "_split" * (self.split > 1) + "_persistent" * self.persistent

    @property
    def text(self) -> str:
        """As the IR writes it: ``rows 128x128x64 w8 s3``, with ``split4`` and ``persistent`` behind it."""
        tile = f"{self.form} {self.block_m}x{self.block_n}x{self.block_k} w{self.warps} s{self.stages}"
        return tile + f" split{self.split}" * (self.split > 1) + " persistent" * self.persistent

    @property
    def tile(self) -> str:
        tile = f"{self.block_m}x{self.block_n}x{self.block_k}w{self.warps}s{self.stages}"
        return tile + f"k{self.split}" * (self.split > 1) + "p" * self.persistent


@dataclass(frozen=True)
class Problem:
    """A grouped product: R rows times w[e]ᵀ, [columns, depth] an expert; two such where SwiGLU follows.

    ``dtype`` is the IR's short name, ``itemsize`` its bytes. A value of the result has ``result`` bytes: by
    default as many, and of fp8, which comes with scales, 2 where it isn't ``quantised``. ``gathered``: rows
    are read by index. ``dense``: all rows are multiplied by one matrix, and no expert is looked for.
    ``block_scales``: 1x128 of x and 128x128 of w. ``column_scales``: in each step along K the columns of a
    tile have scales of their own.
    """

    experts: int
    columns: int
    depth: int
    dtype: str
    itemsize: int
    matrices: int = 1
    gathered: bool = False
    quantised: bool = False
    column_scales: bool = False
    block_scales: bool = False
    dense: bool = False
    result: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "result", self.result or self._usual_result)

    @property
    def _usual_result(self) -> int:
        return 2 if self.fp8 and not self.quantised else self.itemsize

    @property
    def text(self) -> str:
        """``256 x [2 x 2048, 7168] bf16``: experts, matrices, columns, depth."""
        columns = f"{self.matrices} x {self.columns}" if self.matrices > 1 else str(self.columns)
        made = ", gathered" * self.gathered + ", quantised" * self.quantised
        made += f", results of {self.result} bytes" * (self.result != self._usual_result)
        experts = "" if self.dense else f"{self.experts} x "
        blocks = "@s128x128" * self.block_scales
        return f"{experts}[{columns}, {self.depth}] {self.dtype}{blocks}{made}"

    @property
    def whole_rows(self) -> bool:
        """Rows start at multiples of 16 bytes: what descriptors and 16-byte copies need."""
        return self.depth * self.itemsize % 16 == 0

    @property
    def fp8(self) -> bool:
        return self.itemsize == 1

    @property
    def bytes_per_row(self) -> int:
        """Of x and of the result."""
        return self.depth * self.itemsize + self.columns * self.result

    @property
    def groups(self) -> int:
        """A power of two, with room for each expert and for the rows that are nobody's."""
        return max(32, 1 << self.experts.bit_length())

    def descriptors(self, device: GPU) -> bool:
        """Whether the weights are read by tensor descriptor."""
        return device.tma and self.whole_rows

    def shared_memory(self, s: Schedule, device: GPU) -> int:
        """Bytes a block takes at most: both operands' tiles, and beside fp8's also scales, for each stage.

        mma.sync takes its operands from registers, so that of fp8's stages one needs no room.
        """
        if s.form == "specialised":
            return self._ring(s)
        stages = s.stages - (self.fp8 and not device.warpgroup_mma)
        # A persistent program's next loads fill the pipeline while the last tile is laid out for its stores.
        laid_out = s.block_m * s.block_n * self.result if s.persistent else 0
        return stages * self.stage_bytes(s) + laid_out + SMEM_EXTRA

    def stage_bytes(self, s: Schedule) -> int:
        rows = s.block_m + self.matrices * s.block_n
        return rows * s.block_k * self.itemsize + (4 * rows if self.fp8 else 0)

    def _ring(self, s: Schedule) -> int:
        """The ring's stages, results as they are laid out for stores, the number of each group's last tile.

        The scales of weights are read where they lie; 16 bits of results are laid out in two halves.
        """
        stage = (s.block_m + self.matrices * s.block_n) * s.block_k * self.itemsize
        scales = 4 * s.block_m if self.fp8 else 0
        laid_out = s.block_m * s.block_n * (1 if self.result == 2 else self.result)
        return s.stages * (stage + scales) + laid_out + 4 * self.groups + SMEM_EXTRA

    def sums(self, s: Schedule) -> int:
        """fp32 sums a thread holds."""
        return self.matrices * s.block_m * s.block_n // (32 * s.warps)

    def registers(self, s: Schedule) -> int:
        """A thread's registers, about, as compilation showed: the sums, a quarter more, and 32.

        fp8 has a step's sums beside those of all steps.
        """
        if self.itemsize == 4:
            return 255
        return min(255, 32 + self.sums(s) * 5 // (2 if self.fp8 else 4))


def space(problem: Problem, device: GPU) -> list[Schedule]:
    """Every schedule that the model may pick: within shared memory, and no spills."""
    known = GPUS.get(device.name) is device
    return list(_space_of_target(problem, device.name) if known else _space(problem, device))


@lru_cache(maxsize=256)  # selection asks at each number of rows
def _space_of_target(problem: Problem, target: str) -> tuple[Schedule, ...]:
    return _space(problem, GPUS[target])


def _space(problem: Problem, device: GPU) -> tuple[Schedule, ...]:
    if problem.itemsize == 4:
        candidates = _fused_multiply_add()
    elif problem.fp8:
        candidates = _fp8(device)
    elif device.warpgroup_mma:
        candidates = _warpgroup()
    else:
        candidates = _warp_mma()
    variants = [replace(s, persistent=True) for s in candidates if s.form == "rows"]
    variants += [replace(s, split=parts) for s in candidates for parts in SPLITS]
    candidates += variants
    return tuple(s for s in candidates if not reasons_against(s, problem, device))


def reasons_against(s: Schedule, problem: Problem, device: GPU) -> list[str]:
    """Why ``s`` is not for ``problem`` on ``device``; none means that it is."""
    reasons = []
    if (smem := problem.shared_memory(s, device)) > device.smem_per_block:
        reasons.append(f"{smem} bytes of shared memory, {device.name} has {device.smem_per_block} a block")
    # Where K is split, all parts' sums are on their way at once.
    most = min(_most_sums(s, problem, device), MOST_SUMS // (2 if problem.itemsize == 4 else 1) // s.split)
    if (sums := problem.sums(s)) > most:
        reasons.append(f"{sums} sums a thread, more than {most} spill registers")
    if s.persistent:
        reasons += _reasons_against_persistence(s, problem, device)
    if s.split > 1:
        reasons += _reasons_against_split(s, problem, device)
    if problem.quantised and s.block_n != 128:
        reasons.append("the result's scales are of 128 columns: a tile needs just as many")
    if not problem.fp8 and not problem.whole_rows and max(s.block_m, s.block_n) > 64:
        reasons.append(
            "rows that don't start at 16 bytes are copied in pieces: tiles above 64 spill registers"
        )
    if device.warpgroup_mma and problem.itemsize < 4:
        if (s.block_m if s.form == "rows" else s.block_n) < 64:
            reasons.append("fewer than 64 rows on the matrix unit's M side: the slow path")
    elif s.form == "swapped":
        reasons.append("swapping gains nothing here: 16 rows are enough for the M side")
    return reasons


def _reasons_against_persistence(s: Schedule, problem: Problem, device: GPU) -> list[str]:
    """What persistence gains, loads under way while a tile is stored, small tiles have from their neighbours.

    It keeps two tiles' addresses in registers; masks of tails, or scales of columns, don't fit beside them.
    """
    reasons = []
    if s.form != "rows" or s.split > 1 or s.block_n < 128:
        reasons.append("programs persist in the form rows, with tiles of 128 columns or more, and K in one")
    if not device.warpgroup_mma or problem.itemsize == 4:
        reasons.append("programs persist where the matrix unit takes 64 rows at once")
    if not problem.whole_rows or problem.depth % s.block_k or problem.columns % s.block_n:
        reasons.append(f"programs persist where {s.block_k} divides K and {s.block_n} the columns")
    if problem.column_scales:
        reasons.append("programs persist where a tile's columns share their scales, or have one for all of K")
    if problem.matrices > 1 and not problem.fp8 and device.capability[0] == 9:
        # What becomes of gate and up lies in the flattened loop, among sums that wgmma goes on with.
        reasons.append("ptxas has wgmmas of two products wait for each other where programs persist")
    return reasons


def _reasons_against_split(s: Schedule, problem: Problem, device: GPU) -> list[str]:
    """What splitting K gains, work for all SMs, products of many rows have anyway."""
    reasons = []
    steps = -(-problem.depth // s.block_k)
    part = -(-steps // s.split)
    if s.block_m > 32:
        reasons.append("K is split where rows are few, in tiles of 32 of them or fewer")
    if s.split not in SPLITS:
        reasons.append(f"K is split into {', '.join(map(str, SPLITS))} parts")
    elif part < LEAST_STEPS or (s.split - 1) * part >= steps:
        reasons.append(f"K has {steps} steps: a part is {LEAST_STEPS} or more")
    if -(-problem.columns // s.block_n) * s.split > 2 * device.sms:
        reasons.append(f"one row's tiles in so many parts are more than twice the {device.sms} SMs")
    return reasons


def _most_sums(s: Schedule, problem: Problem, device: GPU) -> int:
    if problem.itemsize == 4:
        return 32  # products by multiply-add keep many operands in registers
    if problem.fp8:  # a step's sums are added to those of all steps: there are two sets
        # Rows in pieces of less than 16 bytes have many addresses beside them.
        rows = device.warpgroup_mma and s.form == "rows" and problem.whole_rows
        return MOST_SUMS // 2 if rows else MOST_SUMS // 4
    if not device.warpgroup_mma:
        return MOST_SUMS // 2  # mma.sync holds its operands in registers too
    if problem.gathered and s.form == "rows" and s.block_m > 16 * s.warps:
        return MOST_SUMS // 2  # each thread addresses twice the rows
    return MOST_SUMS


def _warpgroup() -> list[Schedule]:
    """wgmma and tcgen05: 64 rows of M a warpgroup; 64 values of 16 bits are one swizzle atom of 128 bytes."""
    rows = [
        Schedule("rows", m, n, 64, warps, stages)
        for m, n, warps, stages in product((64, 128), (64, 128, 256), (4, 8), (3, 4))
        if m * n >= 64 * 64 * warps // 4
    ]
    swapped = [
        Schedule("swapped", m, n, 64, 4, stages) for m, n, stages in product((16, 32), (64, 128), (3, 4, 6))
    ]
    return rows + swapped


def _warp_mma() -> list[Schedule]:
    """mma.sync: 16 rows are enough for the M side; there is less shared memory, so steps of 32 as well."""
    return [
        Schedule("rows", m, n, k, warps, stages)
        for m, n, k, warps, stages in product((16, 32, 64, 128), (64, 128), (32, 64), (4, 8), (3, 4))
        if warps == 4 or m * n >= 64 * 64
    ]


def _fp8(device: GPU) -> list[Schedule]:
    """A step is one block of scales along K, 128 values: one swizzle atom of 128 bytes too."""
    rows, stages = ((64, 128), (3, 4)) if device.warpgroup_mma else ((16, 32, 64, 128), (2, 3))
    swapped = product((16, 32), (64, 128), (4, 8), (3, 4, 6)) if device.warpgroup_mma else ()
    return [
        Schedule("rows", m, n, 128, warps, s)
        for m, n, warps, s in product(rows, (64, 128), (4, 8), stages)
        if m * n >= 64 * 64 * warps // 4 or not device.warpgroup_mma
    ] + [Schedule("swapped", m, n, 128, warps, s) for m, n, warps, s in swapped if n >= 16 * warps]


def _fused_multiply_add() -> list[Schedule]:
    """fp32 in full precision has no matrix unit: right rather than fast, so a small space."""
    return [
        Schedule("rows", m, n, k, warps, 3)
        for m, n, k, warps in [(16, 32, 32, 4), (16, 64, 32, 4), (32, 64, 32, 4), (64, 64, 16, 4)]
    ]
