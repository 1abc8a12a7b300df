"""Which schedule runs a grouped product: an analytic model of seconds, in named terms; no table of shapes.

The model knows the device's facts (devices.py), the shape, and how many rows an expert has on average, R / E.
It takes the router to send each row to an expert at random, so that an expert's rows are Poisson distributed:
that gives the experts with rows (whose weights move at all) and the tiles. Skew is not modelled: the true
counts never leave the device. What it assumes beside the device's facts stands in constants.py. No figure
that the model gives has been measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from moec.codegen.constants import ASSUMED, Constants
from moec.codegen.schedules import Problem, Schedule, space
from moec.codegen.specialised import LEAST_ROWS
from moec.ir.devices import GPU, GPUS

# Rows an expert, from one expert in 64 having one to far into prefill: where schedules are compared.
ROWS = [2.0**i for i in range(-6, 1)] + [float(r << s) for s in range(13) for r in (2, 3)]
# What one more variant must bring: as much as this share at one of ROWS, or a tenth of it at each of ten.
SWITCH = 0.15
# From here on a mean of that many rows is what every expert has, as far as tiles go.
MANY = 512


@dataclass(frozen=True)
class Choice:
    """A schedule and what the model takes it to cost: seconds by term; ``seconds`` is their sum."""

    schedule: Schedule
    terms: dict[str, float]

    @property
    def seconds(self) -> float:
        return sum(self.terms.values())


@cache
def row_tiles(rows: float, block: int) -> float:
    """Row tiles an expert has on average, E[⌈X / block⌉] for X ~ Poisson(rows): Σ_j P(X > j · block)."""
    if rows >= MANY:
        return rows / block + 0.5
    last = rows + 10 * math.sqrt(rows) + 10
    probability, below, tiles, x = math.exp(-rows), 0.0, 0.0, 0
    while x <= last:
        below += probability  # P(X <= x)
        if x % block == 0:
            tiles += max(0.0, 1.0 - below)
        x += 1
        probability *= rows / x
    return tiles


def terms(
    schedule: Schedule,
    problem: Problem,
    device: GPU,
    rows: float,
    constants: Constants = ASSUMED,
    programs: int | None = None,
) -> dict[str, float]:
    """Seconds by term for ``rows`` rows an expert on average; ``programs``: those of an SM, where others say.

    ``weights`` and ``activations``: their bytes through DRAM.
    ``in flight``, ``l2``, ``matrix unit``: what too few bytes on their way, the traffic between L2 and SMs,
    and the products (padding included) add to that. They run side by side: the slowest counts, and a little
    of the others.
    ``last wave``: SMs that idle in it. ``prologue``: starting and ending programs, as far as no other program
    of the SM covers it; persistent ones start once. ``parts``: where K is split, the parts' sums to L2 and
    back, and waiting for both. ``launch``.
    """
    size, matrices, depth = problem.itemsize, problem.matrices, problem.depth
    active = problem.experts * -math.expm1(-rows)  # experts with rows
    tiles = tiles_of(schedule, problem, rows)
    started = tiles * schedule.split
    programs = programs or programs_per_sm(schedule, problem, device)
    busy = min(started, device.sms * programs)  # programs at once
    sms = min(started, device.sms)

    weights = active * matrices * problem.columns * depth * size / device.bandwidth
    activations = rows * problem.experts * problem.bytes_per_row / device.bandwidth
    dram = weights + activations
    asked = busy * (schedule.stages - 1) * problem.stage_bytes(schedule)  # bytes on their way
    flight = dram * max(1.0, device.bandwidth / min(asked / constants.latency, sms * constants.sm_bandwidth))
    moved = tiles * (schedule.block_m + matrices * schedule.block_n) * depth * size
    l2 = moved / min(device.l2_bandwidth, sms * constants.sm_bandwidth)
    operations = 2 * tiles * schedule.block_m * matrices * schedule.block_n * depth
    rate = device.flops_of(problem.dtype) * constants.triton * issue_rate(schedule, problem, device)
    products = operations / (rate * sms / device.sms)

    beside = {"in flight": flight, "l2": l2, "matrix unit": products}
    slowest = max(beside, key=lambda term: beside[term])
    added = {
        t: s - dram if t == slowest else constants.shows * s for t, s in beside.items() if t != "in flight"
    }
    added["in flight"] = flight - dram if slowest == "in flight" else 0.0
    body = dram + sum(added.values())
    waves = math.ceil(started / (device.sms * programs))
    idle = waves * device.sms * programs / started - 1 if waves > 1 else 0.0
    sums = rows * problem.experts * matrices * problem.columns * 4  # bytes of a part's
    exchanged = 2 * schedule.split * sums / min(device.l2_bandwidth, sms * constants.sm_bandwidth)
    return {
        "weights": weights,
        "activations": activations,
        **{term: added[term] for term in beside},
        # Half of it: programs of one wave don't end together, so the last one has begun when the others end.
        # Persistent programs share tiles out before they know that.
        "last wave": (1.0 if schedule.persistent else 0.5) * body * idle,
        "prologue": constants.prologue
        + (constants.stores if schedule.persistent else constants.prologue) * (waves - 1) / programs,
        "parts": exchanged + 2 * constants.latency if schedule.split > 1 else 0.0,
        "launch": device.launch_s,
    }


def tiles_of(schedule: Schedule, problem: Problem, rows: float) -> float:
    """Tiles of the result for ``rows`` rows an expert on average."""
    m_tiles = problem.experts * row_tiles(rows, schedule.block_m)
    return max(1.0, m_tiles * math.ceil(problem.columns / schedule.block_n))


def programs_per_sm(schedule: Schedule, problem: Problem, device: GPU) -> int:
    """Programs that an SM holds at once. 1 KiB of shared memory is the system's in each."""
    threads = 32 * schedule.warps
    return max(
        1,
        min(
            device.smem_per_sm // (problem.shared_memory(schedule, device) + 1024),
            device.registers_per_sm // (problem.registers(schedule) * threads),
            device.threads_per_sm // threads,
        ),
    )


def band(schedule: Schedule, problem: Problem, device: GPU) -> int:
    """Row tiles of a band: an expert's tiles go through all its columns band by band.

    Programs that run at once work on neighbouring tiles. As long as a band's rows of x stay in L2, each band
    reads them once and the expert's weights once, so the higher the better: up to half of L2, for weights,
    results and the next band pass through it too. Where K is so long that few row tiles fit, L2 holds no more
    than what programs read together, step by step along K: then a wave reads least whose tiles are about
    square in bytes, h of rows by programs / h of columns. A band of half that, if it stays, reads no more.
    """
    row_tile = schedule.block_m * problem.depth * problem.itemsize
    staying = device.l2_bytes // 2 // row_tile
    wave = device.sms * programs_per_sm(schedule, problem, device)
    square = round(math.sqrt(wave * problem.matrices * schedule.block_n / schedule.block_m))
    return staying if staying > square // 2 else max(1, square)


def issue_rate(schedule: Schedule, problem: Problem, device: GPU) -> float:
    """The share of the matrix unit's rate that the tile's shape lets through.

    A warpgroup's instruction takes 64 rows of M by N by 16 and reads both operands from shared memory, 128
    bytes a cycle, while it could multiply 2048 pairs a cycle: N of 64 balances the two. (fp8: 32 values in as
    many bytes, at twice the rate.)
    mma.sync takes its operands from registers; the smaller the tile, the more often they are loaded.
    """
    if problem.itemsize == 4:
        return 1.0
    m, n = schedule.block_m, schedule.block_n
    if device.warpgroup_mma:
        beside = m if schedule.form == "swapped" else n
        rate = min(1.0, 2 * beside / (64 + beside))
    else:
        rate = min(1.0, 2 * m * n / (m + n) / 64)
    if problem.fp8:  # while a step's product is added to the sum, the program's matrix unit waits
        rate /= 1 + device.flops_of(problem.dtype) / (schedule.block_k * device.flops_of("f32"))
    return rate


def explain(problem: Problem, device: GPU, rows: float, constants: Constants = ASSUMED) -> list[Choice]:
    """All schedules of the space, the fastest first; of equal ones the deepest pipeline."""
    choices = [Choice(s, terms(s, problem, device, rows, constants)) for s in space(problem, device)]
    return sorted(choices, key=lambda c: (c.seconds, -c.schedule.stages, str(c.schedule)))


def choose(problem: Problem, device: GPU, rows: float, constants: Constants = ASSUMED) -> Choice:
    """The schedule that the model takes to be fastest for ``rows`` rows an expert on average."""
    choices = explain(problem, device, rows, constants)
    return next(c for c in choices if eligible(c.schedule, problem, device, rows))


def eligible(schedule: Schedule, problem: Problem, device: GPU, rows: float) -> bool:
    """K isn't split where a product's tiles are enough for all SMs: its parts take memory and a wait.

    Warps have tasks of their own where an expert has rows for a good part of a tile.
    """
    if schedule.form == "specialised":
        return rows >= LEAST_ROWS
    return schedule.split == 1 or tiles_of(schedule, problem, rows) < device.sms


def ladder(problem: Problem, device: GPU, constants: Constants = ASSUMED) -> list[tuple[float, Schedule]]:
    """(rows an expert, schedule), ascending: below the first number the first schedule, and so on up to inf.

    What the host picks a variant by, from R / E. Of all ways to give each of ROWS a schedule, the one that
    loses least against the best of each, Σ log(seconds / least seconds), where a change of schedule costs
    SWITCH. Layers share their problems: each is solved once.
    """
    known = GPUS.get(device.name) is device
    if known:
        return list(_ladder_of_target(problem, device.name, constants))
    return _ladder(problem, device, constants)


@cache
def _ladder_of_target(problem: Problem, target: str, constants: Constants) -> list[tuple[float, Schedule]]:
    return _ladder(problem, GPUS[target], constants)


def _ladder(problem: Problem, device: GPU, constants: Constants) -> list[tuple[float, Schedule]]:
    seconds = {}
    for rows in [rows for rows in ROWS if rows * problem.experts >= 1]:
        choices = explain(problem, device, rows, constants)
        seconds[rows] = {
            c.schedule: c.seconds for c in choices if eligible(c.schedule, problem, device, rows)
        }
    return least_loss(seconds)


def least_loss(seconds: Mapping[float, Mapping[Schedule, float]]) -> list[tuple[float, Schedule]]:
    """The ladder over these rows an expert, ascending, by seconds of each schedule at each (see ``ladder``).

    A schedule that has no seconds at some rows isn't taken there.
    """
    # By its last schedule: the loss so far, and a schedule for each of ROWS so far.
    paths: dict[Schedule, tuple[float, list[Schedule]]] = {}
    for known in seconds.values():
        best = min(known.values())
        loss, path = min(paths.values(), key=lambda p: p[0], default=(-SWITCH, []))
        switched = (loss + SWITCH, path)
        paths = {
            schedule: (before[0] + math.log(taken / best), [*before[1], schedule])
            for schedule, taken in known.items()
            for before in [min(paths.get(schedule, switched), switched, key=lambda p: p[0])]
        }
    _, path = min(paths.values(), key=lambda p: p[0])
    rows = list(seconds)
    ends = [i for i, s in enumerate(path) if i + 1 == len(path) or path[i + 1] != s]
    return [(rows[i + 1] if i + 1 < len(rows) else math.inf, path[i]) for i in ends]
