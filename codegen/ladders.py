"""Ladders of schedules as text: by rows an expert, what runs an op's product."""

from __future__ import annotations

import math
import re

from moec.codegen.schedules import Form, Problem, Schedule, reasons_against, space
from moec.codegen.specialised import reasons_against_specialised, specialised
from moec.ir.devices import GPU

Ladder = list[tuple[float, Schedule]]

_RUNG = re.compile(
    r"(?:<(\S+) rows: *)?(\w+) (\d+)x(\d+)x(\d+) w(\d+) s(\d+)(?: split(\d+))?( persistent)?", re.ASCII
)


def print_ladder(rungs: Ladder) -> str:
    """``<4 rows: swapped 16x128x64 w4 s4; rows 128x128x64 w8 s3``: by rows an expert."""
    return "; ".join(f"<{below:g} rows: {s.text}" if math.isfinite(below) else s.text for below, s in rungs)


def parse_ladder(text: str, problem: Problem, device: GPU) -> Ladder:
    """The inverse of ``print_ladder``. Raises ValueError where ``problem`` on ``device`` can't have it."""
    allowed = space(problem, device) + specialised(problem, device)
    rungs: Ladder = []
    parts = [part.strip() for part in text.split(";")]
    for number, part in enumerate(parts, start=1):
        match = _RUNG.fullmatch(part)
        if match is None:
            raise ValueError(f"{part!r} is none: '<4 rows: rows 128x128x64 w8 s3' is")
        below = _bound(match[1])
        if (number == len(parts)) != math.isinf(below):
            raise ValueError(f"{part!r}: every part but the last says below how many rows it holds")
        if rungs and below <= rungs[-1][0]:
            raise ValueError(f"{part!r}: the numbers of rows must ascend")
        m, n, k, warps, stages = map(int, match.groups()[2:7])
        if min(m, n, k, warps, stages, int(match[8] or 1)) < 1:
            raise ValueError(f"{part!r}: every number is 1 or more")
        form: Form = match[2]  # type: ignore[assignment]  # another one is in no list
        s = Schedule(form, m, n, k, warps, stages, int(match[8] or 1), match[9] is not None)
        if s not in allowed:
            raise ValueError(f"{s.text!r} is not for {device.name}: {_why_not(s, allowed, problem, device)}")
        rungs.append((below, s))
    return rungs


def _bound(text: str | None) -> float:
    """The number of a rung; infinity for the last, which has none."""
    if text is None:
        return math.inf
    try:
        below = float(text) if text.isascii() else math.nan
    except ValueError:
        raise ValueError(f"{text!r} is no number of rows") from None
    if not 0 < below < math.inf:
        raise ValueError(f"{text!r} is no number of rows")
    return below


def _why_not(s: Schedule, allowed: list[Schedule], problem: Problem, device: GPU) -> str:
    against = reasons_against_specialised if s.form == "specialised" else reasons_against
    if reasons := against(s, problem, device):
        return "; ".join(reasons)
    near = sorted(allowed, key=lambda a: (a.function != s.function, a.warps != s.warps, _distance(a, s)))[:3]
    return f"it is in no list of those that compile well; near it are {', '.join(n.text for n in near)}"


def _distance(a: Schedule, b: Schedule) -> float:
    pairs = (a.block_m, b.block_m), (a.block_n, b.block_n), (a.block_k, b.block_k), (a.stages, b.stages)
    return sum(abs(math.log(x / y)) if y else math.inf for x, y in pairs)
