"""Seconds of calls: in a CUDA graph between two events, on a CPU by its clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], Any]


@dataclass(frozen=True)
class Measured:
    """Seconds a call: the median, and the 10th and 90th percentiles of the rounds."""

    median: float
    low: float
    high: float
    rounds: int
    graph: bool

    @staticmethod
    def of(seconds: Sequence[float], graph: bool) -> Measured:
        order = sorted(seconds)
        last = len(order) - 1
        low, high = order[last // 10], order[last - last // 10]
        return Measured(statistics.median(order), low, high, len(order), graph)


@dataclass(frozen=True)
class Clock:
    """``budget``: seconds that one measurement may take, roughly."""

    device: str
    budget: float

    def measure(self, calls: Sequence[Call]) -> Measured:
        """All calls one after the other, again and again; the time of one of them.

        They run as one CUDA graph; what can't be recorded, because it waits for the device, runs as it is.
        """
        for call in calls:
            call()
        replay, graph = self._graph(calls)
        replay()
        once = self._seconds(replay)
        rounds = int(min(200, max(5, self.budget / max(once, 1e-7))))
        return Measured.of([self._seconds(replay) / len(calls) for _ in range(rounds)], graph)

    def _graph(self, calls: Sequence[Call]) -> tuple[Call, bool]:
        def every() -> None:
            for call in calls:
                call()

        if self.device == "cpu":
            return every, False
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                every()
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception:
            torch.cuda.synchronize()
            return every, False
        return graph.replay, True

    def _seconds(self, run: Call) -> float:
        if self.device == "cpu":
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def cache_size(device: str) -> int:
    """Bytes of the device's last cache; on a CPU few, so that a self-test copies weights too."""
    if device == "cpu":
        return 2**16
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)
