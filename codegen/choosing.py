"""Which schedules a build picks: the model's, measured ones where there are any, or one for all of M.

What asks is deep inside of emission and of passes, so the build says how in a context::

    with choose_by(Choosing(batch_invariant=True)):
        ...
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from statistics import median

from moec.codegen.constants import ASSUMED, Constants
from moec.codegen.ladders import Ladder
from moec.codegen.schedules import Problem, Schedule
from moec.codegen.select import ROWS, eligible, explain, ladder, least_loss
from moec.codegen.tuned import Tuning
from moec.ir.devices import GPU, GPUS

Seconds = dict[float, dict[Schedule, float]]
# A measured number of rows stands for those between half and twice of it.
STANDS_FOR = 2.0


@dataclass(frozen=True)
class Choosing:
    """``batch_invariant``: one schedule whatever M is, so that the bits of a row depend on that row alone.

    ``tuning``: measurements of a device; they play no part for another target. ``kernels``: the family whose
    records go first wherever they can (``codegen/kernels``).
    """

    batch_invariant: bool = False
    tuning: Tuning | None = None
    kernels: str | None = None


_choosing: ContextVar[Choosing] = ContextVar("choosing", default=Choosing())  # noqa: B039  # it is frozen


def choosing() -> Choosing:
    return _choosing.get()


@contextmanager
def choose_by(how: Choosing) -> Iterator[None]:
    """Schedules are picked by ``how`` within."""
    token = _choosing.set(how)
    try:
        yield
    finally:
        _choosing.reset(token)


def pick(problem: Problem, device: GPU, specialised: bool = False) -> Ladder:
    """(rows an expert below which, schedule), as ``select.ladder`` gives it.

    ``specialised``: with schedules of warps that have tasks of their own, where these were measured fastest.
    """
    how = choosing()
    if not how.batch_invariant and not measured(problem, device):
        return ladder(problem, device, model_constants(device, how))
    if GPUS.get(device.name) is device:
        return list(_pick_for_target(problem, device.name, how, specialised))
    return _pick(problem, device, how, specialised)


def measured(
    problem: Problem, device: GPU, how: Choosing | None = None
) -> Mapping[float, dict[Schedule, float]]:
    """Measured seconds of schedules, by rows an expert; empty where nothing was measured."""
    tuning = (how or choosing()).tuning
    return tuning.measured.get(problem, {}) if tuning and tuning.target == device.name else {}


def prices(problem: Problem, device: GPU) -> list[tuple[float, float]]:
    """What one schedule for all of M costs: (rows an expert, its seconds / those of the ladder's schedule).

    Seconds are the model's, where none were measured.
    """
    how = choosing()
    seconds = _seconds(problem, device, how, every=True)
    one = _one_for_all(seconds)
    rungs = _pick(problem, device, Choosing(tuning=how.tuning), specialised=True)
    return [
        (rows, known[one] / known[next(s for below, s in rungs if rows < below)])
        for rows, known in seconds.items()
    ]


@lru_cache(maxsize=4096)
def _pick_for_target(problem: Problem, target: str, how: Choosing, specialised: bool) -> Ladder:
    return _pick(problem, GPUS[target], how, specialised)


def _pick(problem: Problem, device: GPU, how: Choosing, specialised: bool) -> Ladder:
    if how.batch_invariant:
        return [(math.inf, _one_for_all(_seconds(problem, device, how, every=True)))]
    if measured(problem, device, how):
        return least_loss(_seconds(problem, device, how, specialised=specialised))
    return ladder(problem, device, model_constants(device, how))


def model_constants(device: GPU, how: Choosing | None = None) -> Constants:
    """Those of the model: fitted ones of the device's tuning file, where it has such."""
    how = how or choosing()
    fitted = how.tuning and how.tuning.target == device.name and how.tuning.constants
    return fitted or ASSUMED


def _seconds(
    problem: Problem, device: GPU, how: Choosing, every: bool = False, specialised: bool = False
) -> Seconds:
    """Seconds of schedules by rows an expert, ascending: measured ones, elsewhere the model's.

    ``every``: schedules that weren't measured at a number of rows get the model's seconds there too, times
    what measurements are of these. Of ``specialised`` ones there are the measured seconds alone.
    """
    found: Seconds = {}
    known = measured(problem, device, how)
    for rows in sorted({*ROWS, *known}):
        if every and rows * problem.experts < 1:  # fewer than one row in all
            continue
        near = min(known, key=lambda r: abs(math.log(r / rows)), default=math.inf)
        close = 1 / STANDS_FOR <= rows / near <= STANDS_FOR
        usable = {s: t for s, t in known[near].items() if eligible(s, problem, device, rows)} if close else {}
        if not every:
            usable = {s: t for s, t in usable.items() if specialised or s.form != "specialised"}
            if usable:
                found[rows] = usable
                continue
        choices = explain(problem, device, rows, model_constants(device, how))
        model = {
            c.schedule: c.seconds for c in choices if every or eligible(c.schedule, problem, device, rows)
        }
        if close and (ratios := [t / model[s] for s, t in known[near].items() if s in model]):
            factor = median(ratios)
            model = {s: known[near].get(s, seconds * factor) for s, seconds in model.items()}
        if every:
            model |= {s: t for s, t in usable.items() if s.form == "specialised"}
        found[rows] = model
    return found


def _one_for_all(seconds: Seconds) -> Schedule:
    """The schedule that loses least over all rows, Σ log(seconds / least seconds).

    None that splits K: with many rows the parts' sums would fill the memory. None of warps with tasks of
    their own: it has no seconds but where it was measured.
    """
    best = {rows: min(known.values()) for rows, known in seconds.items()}
    schedules = [s for s in next(iter(seconds.values())) if s.split == 1 and s.form != "specialised"]
    return min(
        schedules, key=lambda s: sum(math.log(known[s] / best[rows]) for rows, known in seconds.items())
    )
