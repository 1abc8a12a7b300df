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


def _run(dtype: str, *rows: tuple[str, int, str, float], **more: Any) -> dict[str, Any]:
    made = [
        {"shape": shape, "tokens": tokens, "implementation": name, "median_us": us} | more
        for shape, tokens, name, us in rows
    ]
    return {"dtype": dtype, "results": made}


def test_goals_are_judged_at_their_worst_tokens(gpu: Callable[[str], Any]) -> None:
    goals = gpu("goals")
    goal = goals.Goal("fp8", "v3", 8, 64, "bandwidth", 0.85)
    found = _run("fp8", *((("v3", m, "moec", 1.0)) for m in (1, 8, 64)))
    for row, share in zip(found["results"], (0.1, 0.9, 0.8), strict=True):
        row["of_bandwidth"] = share
    judged = goal.judge(found)
    assert (judged["met"], judged["worst"], judged["tokens"]) == (False, 0.8, 64)
    assert goals.lines([judged]) == [
        "goal missed: fp8 v3, M = 8 to 64: 85% of the bandwidth; at worst 0.8 at M = 64"
    ]
    found["results"][2]["of_bandwidth"] = 0.86
    assert goal.judge(found)["met"] is True
    assert goal.judge({"dtype": "bf16", "results": found["results"]})["met"] is None


def test_a_goal_beside_a_peer_is_open_without_it(gpu: Callable[[str], Any]) -> None:
    goals = gpu("goals")
    goal = goals.Goal("fp8", "v3", 4096, 8192, "DeepGEMM", 0.9)
    alone = _run("fp8", ("v3", 4096, "moec", 100.0), ("v3", 4096, "vLLM", 50.0))
    assert goal.judge(alone) == {"goal": str(goal), "met": None, "why": "DeepGEMM was not measured there"}
    both = _run("fp8", ("v3", 4096, "moec", 100.0), ("v3", 4096, "DeepGEMM", 91.0), ("v3", 8192, "moec", 1.0))
    judged = goal.judge(both)
    assert judged["met"] and judged["worst"] == pytest.approx(0.91)


def test_vllm_is_met_in_the_mean_and_nowhere_faster(gpu: Callable[[str], Any]) -> None:
    goals = gpu("goals")
    rows = [("a", 1, "moec", 10.0), ("a", 1, "vLLM", 40.0), ("a", 2, "moec", 10.0), ("a", 2, "vLLM", 10.0)]
    (one,) = goals.summary(_run("bf16", *rows))
    assert one["geometric_mean"] == pytest.approx(2.0) and (one["worst"], one["tokens"]) == (1.0, 2)
    last = goals.judge(_run("fp16", *rows))[-1]
    assert last["met"] is True
    rows[3] = ("a", 2, "vLLM", 9.9)
    assert goals.judge(_run("fp16", *rows))[-1]["met"] is False
    # moec's own other rows are nobody's peer
    assert [s["peer"] for s in goals.summary(_run("bf16", *rows, ("a", 1, "moec (x)", 1.0)))] == ["vLLM"]


def test_what_batch_invariance_costs(gpu: Callable[[str], Any]) -> None:
    goals = gpu("goals")
    rows = [("a", 1, "moec", 10.0), ("a", 2, "moec", 10.0), ("a", 2, "vLLM", 1.0), ("b", 1, "moec", 10.0)]
    found = _run("bf16", *rows)
    assert goals.invariance(found) is None
    name = "moec (batch invariant)"
    found = _run("bf16", *rows, ("a", 1, name, 40.0), ("a", 2, name, 10.0), ("c", 1, name, 99.0))
    cost = goals.invariance(found)
    assert cost["geometric_mean"] == pytest.approx(2.0) and len(cost["each"]) == 2
    assert (cost["worst"]["shape"], cost["worst"]["tokens"], cost["worst"]["times"]) == ("a", 1, 4.0)


def test_a_row_for_another_gpu_says_so(gpu: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    peers, variants = gpu("peers"), gpu("variants")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(peers, "draw_weights", lambda *given, **how: [FakeWeights()])
    mine = {name: v.experts for name, v in variants.VARIANTS.items()}
    able, reasons = peers.installed(mine, torch.bfloat16)
    assert list(able) == ["moec", "moec (batch invariant)", "moec (one launch)"]
    assert reasons == {"moec (gluon)": "it is for compute capability 9.0, and this is 8.0"}


class FakeWeights:
    """A layer's, of which nothing is read."""

    w13_scale = w2_scale = None


def test_moec_s_rows_side_by_side(gpu: Callable[[str], Any]) -> None:
    """Twice and half as fast are 1 in the mean; what batch invariance costs is no gain."""
    times = {"moec": (10.0, 10.0), "moec (gluon)": (5.0, 20.0), "moec (batch invariant)": (11.0, 11.0)}
    rows = [
        {"shape": "s", "tokens": tokens, "implementation": name, "median_us": each[i]}
        for name, each in times.items()
        for i, tokens in enumerate((1, 4096))
    ]
    (one,) = gpu("goals").variants({"results": rows})
    assert one["name"] == "moec (gluon)" and one["geometric_mean"] == pytest.approx(1.0)
    assert (one["best"], one["shape"], one["tokens"], one["measured"]) == (2.0, "s", 1, 2)
