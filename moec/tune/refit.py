"""Fits the analytic model's constants (``codegen/constants.py``) to what was measured on a device.

Least squares of log(model's seconds / measured seconds): a factor too high weighs as much as one too low,
whatever the size of the product. One constant after the other is set to what fits best, by a coarse look over
its range and golden sections around the best place, until no round gains anything. Constants that the
measurements don't show stay at what is assumed: leaving it costs a little.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from moec.codegen.constants import ASSUMED, SHARES, Constants
from moec.codegen.schedules import Problem, Schedule
from moec.codegen.select import terms
from moec.codegen.tuned import Tuning
from moec.ir.devices import GPU

ENOUGH = 24  # measurements, for a fit that means anything
MOST = 240  # of more, as many are taken, evenly
RANGE = 8.0  # a constant is at most so many times what is assumed, or so many times less
PRIOR = 1e-4  # what leaving the assumed value by a factor of e costs
GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Measurement:
    problem: Problem
    schedule: Schedule
    rows: float
    seconds: float


@dataclass(frozen=True)
class Fit:
    """``before`` and ``after``: the root mean square of log(model / measured), of all measurements."""

    constants: Constants
    before: float
    after: float
    measurements: int

    def about(self) -> dict[str, Any]:
        return {
            "measurements": self.measurements,
            "off_before": round(math.expm1(self.before), 4),
            "off_after": round(math.expm1(self.after), 4),
        }

    def __str__(self) -> str:
        return (
            f"the model was off by {math.expm1(self.before):.0%} (root mean square of {self.measurements} "
            f"measurements) and is by {math.expm1(self.after):.0%} with the fitted constants"
        )


def measurements(tuning: Tuning) -> list[Measurement]:
    """What the model is to say: nothing of warps with tasks of their own, which it doesn't model."""
    return [
        Measurement(problem, schedule, rows, seconds)
        for problem, points in tuning.measured.items()
        for rows, found in points.items()
        for schedule, seconds in found.items()
        if schedule.form != "specialised"
    ]


def fit(found: Sequence[Measurement], device: GPU, start: Constants = ASSUMED) -> Fit | None:
    """None where there are too few measurements."""
    if len(found) < ENOUGH:
        return None
    step = max(1, math.ceil(len(found) / MOST))
    used = found[::step]

    def loss(constants: Constants) -> float:
        moved = [math.log(getattr(constants, f.name) / getattr(start, f.name)) for f in fields(constants)]
        return error(used, device, constants) ** 2 + PRIOR * float(np.square(moved).sum())

    constants, least, width = start, loss(start), math.log(RANGE)
    for _ in range(12):
        before = least
        for field in fields(Constants):
            constants, least = _best(constants, field.name, start, width, loss)
        width = max(width / 1.5, 0.2)
        if before - least < 1e-6 + 1e-3 * least and width == 0.2:
            break
    return Fit(constants, error(found, device, start), error(found, device, constants), len(found))


def error(found: Sequence[Measurement], device: GPU, constants: Constants) -> float:
    """The root mean square of log(model's seconds / measured)."""
    model = [sum(terms(m.schedule, m.problem, device, m.rows, constants).values()) for m in found]
    return float(np.sqrt(np.mean(np.square(np.log(model) - np.log([m.seconds for m in found])))))


def _best(
    constants: Constants, name: str, start: Constants, width: float, loss: Any
) -> tuple[Constants, float]:
    """``constants`` with the best value of one, within ``width`` (a logarithm) of what it is."""
    at, assumed = math.log(getattr(constants, name)), math.log(getattr(start, name))
    low = max(at - width, assumed - math.log(RANGE))
    high = min(at + width, assumed + math.log(RANGE), 0.0 if name in SHARES else math.inf)

    def of(x: float) -> float:
        return float(loss(replace(constants, **{name: math.exp(x)})))

    grid = [*np.linspace(low, high, 5), at]
    losses = [of(x) for x in grid]
    middle = grid[int(np.argmin(losses))]
    step = (high - low) / 4
    x = _golden(of, max(low, middle - step), min(high, middle + step))
    best = min([*zip(losses, grid, strict=True), (of(x), x)])
    return replace(constants, **{name: math.exp(best[1])}), best[0]


def _golden(of: Any, low: float, high: float) -> float:
    a, b = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    at_a, at_b = of(a), of(b)
    for _ in range(8):
        if at_a < at_b:
            high, b, at_b = b, a, at_a
            a = high - GOLDEN * (high - low)
            at_a = of(a)
        else:
            low, a, at_a = a, b, at_b
            b = low + GOLDEN * (high - low)
            at_b = of(b)
    return a if at_a < at_b else b
