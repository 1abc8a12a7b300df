"""The schedules of a routed layer's two products where one launch computes both.

Its programs have one number of warps, and as many of them share an SM as the larger of the two tiles lets
in. So the two are picked together, by the model of ``select``: for a few tokens, each of which has k experts.
"""

from __future__ import annotations

import math
from functools import lru_cache

from moec.codegen.constants import ASSUMED, Constants
from moec.codegen.schedules import Problem, Schedule, space
from moec.codegen.select import programs_per_sm, terms
from moec.ir.devices import GPUS

MOST_TOKENS = 16  # of one launch: a program chooses for a token or two, and one of them sorts


@lru_cache(maxsize=256)
def together(
    up: Problem, down: Problem, top_k: int, target: str, constants: Constants = ASSUMED
) -> tuple[Schedule, Schedule] | None:
    """The pair that loses least over 1 to 16 tokens, Σ log(seconds / least seconds); None where none fits."""
    device = GPUS[target]
    tokens = [1 << i for i in range(MOST_TOKENS.bit_length())]
    pairs = [(a, b) for a in _taken(up, target) for b in _taken(down, target) if a.warps == b.warps]
    if not pairs:
        return None
    known: dict[tuple[Problem, Schedule, int], list[float]] = {}

    def seconds(problem: Problem, s: Schedule, programs: int) -> list[float]:
        key = (problem, s, programs)
        if key not in known:
            rows = [t * top_k / problem.experts for t in tokens]
            known[key] = [sum(terms(s, problem, device, r, constants, programs).values()) for r in rows]
        return known[key]

    def both(a: Schedule, b: Schedule) -> list[float]:
        programs = min(programs_per_sm(a, up, device), programs_per_sm(b, down, device))
        return [x + y for x, y in zip(seconds(up, a, programs), seconds(down, b, programs), strict=True)]

    taken = {pair: both(*pair) for pair in pairs}
    least = [min(each) for each in zip(*taken.values(), strict=True)]

    def loss(pair: tuple[Schedule, Schedule]) -> float:
        return sum(math.log(t / best) for t, best in zip(taken[pair], least, strict=True))

    return min(pairs, key=lambda pair: (loss(pair), str(pair[0]), str(pair[1])))


def _taken(problem: Problem, target: str) -> list[Schedule]:
    """Programs take tile after tile in any case; parts of K they don't share."""
    return [s for s in space(problem, GPUS[target]) if not s.persistent and s.split == 1]
