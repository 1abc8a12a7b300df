"""Which candidates are measured, in which order, and for how long.

Time is shared out: among products by the root of how many weights they have, the largest first, and of each
evenly among numbers of tokens. At each number the schedule that a build picks without a tuning file comes
first: its results are what all others are compared with. Then come those that the model doesn't know, of
warps with tasks of their own where an expert has rows enough, and those that it takes to be fastest, until
the time is over or several of these in a row have brought nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from moec.codegen.schedules import Schedule
from moec.codegen.select import eligible, explain, ladder
from moec.codegen.specialised import specialised
from moec.ir.devices import GPU
from moec.tune.compiling import Compiling
from moec.tune.measuring import Failed, Measurer
from moec.tune.products import Product

MOST = 24  # candidates at a number of tokens
PATIENCE = 6  # so many in a row that bring less than GAIN end the search there
GAIN = 0.01
MEASUREMENT = 0.1  # s of replays

Say = Callable[[str], None]


@dataclass
class Point:
    """What was found for one product and number of tokens: ``rows`` an expert on average."""

    tokens: int
    rows: float
    analytic: Schedule
    measured: dict[Schedule, float] = field(default_factory=dict)
    excluded: dict[Schedule, str] = field(default_factory=dict)
    skipped: str = ""  # why nothing was measured

    @property
    def best(self) -> Schedule | None:
        return min(self.measured, key=lambda s: self.measured[s], default=None)

    @property
    def speedup(self) -> float | None:
        """The analytic choice's seconds over the best one's."""
        if self.best is None or self.analytic not in self.measured:
            return None
        return self.measured[self.analytic] / self.measured[self.best]


@dataclass
class Found:
    product: Product
    points: list[Point]


@dataclass
class Search:
    """``seconds`` is the budget of all, ``keep`` is called with all that was found so far."""

    device: GPU
    measurer: Measurer
    compiling: Compiling
    seconds: float
    say: Say
    keep: Callable[[list[Found]], None]
    clock: Callable[[], float] = time.monotonic

    def run(self, products: Sequence[Product], tokens: Sequence[int]) -> list[Found]:
        """What was found. Whatever ends this early (Ctrl-C), what there is has been kept."""
        end = self.clock() + self.seconds
        todo = [(product, self._points(product, tokens)) for product in products]
        for product, points in todo:
            orders = [self._candidates(product, point) for point in points]
            ranks = range(max((len(o) for o in orders), default=0))
            self.compiling.want([(product, o[rank]) for rank in ranks for o in orders if rank < len(o)])
        found: list[Found] = []
        try:
            for number, (product, points) in enumerate(todo):
                now = self.clock()
                if now >= end:
                    break
                found.append(Found(product, points))
                share = product.importance / sum(p.importance for p, _ in todo[number:])
                self._product(product, points, now + (end - now) * share, found)
                self.compiling.drop(product)
        finally:
            self.keep(found)
        return found

    def _points(self, product: Product, tokens: Sequence[int]) -> list[Point]:
        """One for each number of rows an expert."""
        rungs = ladder(product.problem, self.device)
        made: dict[float, Point] = {}
        for count in sorted(set(tokens)):
            rows = product.rows(count)
            made.setdefault(rows, Point(count, rows, next(s for below, s in rungs if rows < below)))
        return list(made.values())

    def _candidates(self, product: Product, point: Point) -> list[Schedule]:
        problem, rows = product.problem, point.rows
        order = [c.schedule for c in explain(problem, self.device, rows)]
        order = specialised(problem, self.device) + order
        order = [s for s in order if eligible(s, problem, self.device, rows)]
        return list(dict.fromkeys([point.analytic, *order]))[:MOST]

    def _product(self, product: Product, points: list[Point], end: float, found: list[Found]) -> None:
        bad: dict[Schedule, str] = {}  # what crashed, hung or was wrong at one number of tokens
        for number, point in enumerate(points):
            now = self.clock()
            if now >= end:
                break
            try:
                _At(self, product, point, now + (end - now) / (len(points) - number), bad).run()
            except Failed as failure:
                point.skipped = failure.reason
            self.keep(found)


class _At:
    """The search at one number of tokens."""

    def __init__(
        self, search: Search, product: Product, point: Point, end: float, bad: dict[Schedule, str]
    ) -> None:
        self.search, self.product, self.point, self.end, self.bad = search, product, point, end, bad
        self.reference: Schedule | None = None  # whose results the worker has
        self.wrong = 0

    def run(self) -> None:
        """Raises Failed where no operands can be drawn."""
        point, best, idle = self.point, math.inf, 0
        self._draw()
        for schedule in self.search._candidates(self.product, point):
            if self.search.clock() >= self.end or idle >= PATIENCE:
                break
            self._tell()
            if schedule in self.bad:
                point.excluded[schedule] = self.bad[schedule]
                continue
            try:
                seconds = self._measure(schedule)
            except Failed as failure:
                if failure.kind == "late":
                    break
                point.excluded[schedule] = failure.reason
                if failure.kind != "memory":
                    self.bad[schedule] = failure.reason
                self.wrong += failure.kind == "wrong"
                if failure.died:
                    self._recover()
                continue
            point.measured[schedule] = seconds
            if seconds < (1 - GAIN) * best:
                idle = 0
            elif schedule.form != "specialised":
                idle += 1
            best = min(best, seconds)
        if self.wrong > 1 and len(point.measured) == 1:
            (lonely,) = point.measured
            del point.measured[lonely]
            point.skipped = (
                f"all others' results differ from those of {lonely.text}, which may be wrong itself"
            )

    def _draw(self) -> None:
        product, tokens = self.product, self.point.tokens
        self.search.measurer.operands(product.arguments(tokens), product.choices(tokens))

    def _measure(self, schedule: Schedule) -> float:
        package = self.search.compiling.package(self.product, schedule, self.end - self.search.clock())
        first = self.reference is None
        reply = self.search.measurer.measure(package, MEASUREMENT, self.product.tolerance, first)
        if first:
            self.reference = schedule
        return float(reply["seconds"])

    def _recover(self) -> None:
        """A new worker needs operands, and the results to compare with. Raises Failed."""
        self._draw()
        if (schedule := self.reference) is not None:
            self.reference = None
            self._measure(schedule)

    def _tell(self) -> None:
        point, left = self.point, max(0.0, self.end - self.search.clock())
        gain = f", {point.speedup:.2f} times as fast as the model's" if point.speedup else ""
        self.search.say(
            f"{self.product.op.name} of {self.product.problem.text}, {point.tokens} tokens: "
            f"{len(point.measured)} measured{gain}; {left:.0f} s left here"
        )
