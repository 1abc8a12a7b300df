"""benchmarks/gpu: what it counts, against hand calculations; how it times, with a stand-in for a GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """The modules of benchmarks/gpu by name, as its scripts import them."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield lambda name: import_module(f"gpu.{name}")
    for name in [n for n in sys.modules if n == "gpu" or n.startswith("gpu.")]:
        del sys.modules[name]


@pytest.fixture
def shapes(gpu: Callable[[str], Any]) -> Any:
    return gpu("shapes")


def test_the_floor_of_deepseek_v3(shapes: Any) -> None:
    """One expert is 44.04M weights; 64 tokens choose 222.4 of 256 experts; 0.7 GFLOP a token."""
    v3 = shapes.SHAPES["deepseek-v3"]
    assert v3.expert == 44_040_192
    assert v3.active(1) == pytest.approx(8)
    assert v3.active(64) == pytest.approx(222.4, abs=0.05)
    assert v3.active(4096) == pytest.approx(256)
    assert v3.flops(1) == 2 * 8 * 44_040_192
    activations = 2 * 64 * (7168 + 8 * 2048)
    assert v3.bytes(64, 2) == pytest.approx(2 * (v3.active(64) * 44_040_192 + activations))


def test_a_slice_is_a_part(shapes: Any) -> None:
    whole, slice4 = shapes.SHAPES["deepseek-v3"], shapes.SHAPES["deepseek-v3-tp4"]
    assert whole.weights == 4 * slice4.weights


class Graph:
    """Stands in for torch.cuda.CUDAGraph; a replay takes 6 ms of the stand-in's clock."""

    now = 0.0

    def replay(self) -> None:
        Graph.now += 6.0


class Event:
    """Stands in for torch.cuda.Event."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = Graph.now

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at


@pytest.mark.parametrize("recordable", [True, False])
def test_a_rotation_is_one_graph(
    recordable: bool, gpu: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def recording(graph: Graph) -> Iterator[None]:
        if not recordable:
            raise RuntimeError("operation not permitted when stream is capturing")
        yield

    for name, value in {"CUDAGraph": Graph, "Event": Event, "graph": recording}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    called: list[int] = []
    measured = (
        gpu("timing").Clock("cuda", budget=0.06).measure([lambda i=i: called.append(i) for i in range(3)])
    )
    assert measured.graph == recordable
    if recordable:  # a warm-up and the recording, no call after
        assert called == [0, 1, 2] * 2
        assert measured.median == pytest.approx(0.002) and measured.rounds == 10
    else:
        assert len(called) > 6
