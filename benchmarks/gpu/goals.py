"""What moec's experts are to reach on an H100, and whether a run's results do."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Result = dict[str, Any]
INVARIANT = "moec (batch invariant)"  # whose times are the cost of that, not a gain


@dataclass(frozen=True)
class Goal:
    """At least so much at every measured number of tokens in a range.

    ``of``: ``bandwidth`` (a share of the measured one), ``TFLOP/s``, or a peer's name: times as fast as it.
    """

    dtype: str
    shape: str
    first: int
    last: int
    of: str
    least: float

    def __str__(self) -> str:
        tokens = f"M = {self.first}" if self.first == self.last else f"M = {self.first} to {self.last}"
        return f"{self.dtype} {self.shape}, {tokens}: {_shown(self.of, self.least)}"

    def judge(self, result: Result) -> Result:
        """What the run says of it; ``met`` is None where it says nothing, and ``why`` then says why."""
        found = _ours(result, self)
        about: Result = {"goal": str(self), "met": None}
        if result["dtype"] != self.dtype or not found:
            return about | {"why": "moec was not measured there"}
        values = {tokens: _value(self.of, ours, result) for tokens, ours in found.items()}
        known = {tokens: value for tokens, value in values.items() if value is not None}
        if not known:
            return about | {"why": f"{self.of} was not measured there"}
        worst = min(known, key=lambda tokens: known[tokens])
        return about | {"met": known[worst] >= self.least, "worst": known[worst], "tokens": worst}


GOALS = [
    Goal("fp8", "deepseek-v3", 8, 1024, "bandwidth", 0.85),
    Goal("fp8", "deepseek-v3", 1, 1, "bandwidth", 0.60),
    Goal("fp8", "deepseek-v3", 4096, 16384, "DeepGEMM", 0.9),
    Goal("bf16", "sonic-n2048", 32768, 32768, "TFLOP/s", 600),
]
AGAINST_VLLM = 1.3  # in geometric mean over all shapes and tokens, and nowhere below 1


def judge(result: Result) -> list[Result]:
    """Every goal of the run's dtype, and that against vLLM's kernels, which is of all."""
    return [goal.judge(result) for goal in GOALS if goal.dtype == result["dtype"]] + [_against_vllm(result)]


def lines(judged: list[Result]) -> list[str]:
    """One for each, to be read."""
    return [f"goal {_verdict(one)}: {one['goal']}{_detail(one)}" for one in judged]


def ratios(result: Result) -> dict[str, list[tuple[float, str, int]]]:
    """By peer: times as fast as it, with shape and tokens, wherever both were measured."""
    times: dict[tuple[str, int], dict[str, float]] = {}
    for one in result["results"]:
        times.setdefault((one["shape"], one["tokens"]), {})[one["implementation"]] = one["median_us"]
    found: dict[str, list[tuple[float, str, int]]] = {}
    for (shape, tokens), by_name in times.items():
        if (ours := by_name.get("moec")) is None:
            continue
        for name, theirs in by_name.items():
            if not name.startswith("moec"):
                found.setdefault(name, []).append((theirs / ours, shape, tokens))
    return found


def invariance(result: Result) -> Result | None:
    """What batch invariance costs: times as long as without, by shape and tokens. None: not measured."""
    times = {
        (one["shape"], one["tokens"], one["implementation"]): one["median_us"] for one in result["results"]
    }
    found = [
        {"shape": shape, "tokens": tokens, "times": taken / times[shape, tokens, "moec"]}
        for (shape, tokens, name), taken in times.items()
        if name == INVARIANT and (shape, tokens, "moec") in times
    ]
    if not found:
        return None
    worst = max(found, key=lambda one: one["times"])
    mean = statistics.geometric_mean(one["times"] for one in found)
    return {"geometric_mean": mean, "worst": worst, "each": found}


def variants(result: Result) -> list[Result]:
    """moec's other rows beside moec: the geometric mean of times as fast as it, and where it's most."""
    found: dict[str, list[tuple[float, str, int]]] = {}
    ours = {
        (r["shape"], r["tokens"]): r["median_us"] for r in result["results"] if r["implementation"] == "moec"
    }
    for one in result["results"]:
        name, where = one["implementation"], (one["shape"], one["tokens"])
        if name.startswith("moec (") and name != INVARIANT and where in ours:
            found.setdefault(name, []).append((ours[where] / one["median_us"], *where))
    return [
        {
            "name": name,
            "measured": len(each),
            "geometric_mean": statistics.geometric_mean(r for r, *_ in each),
            "best": max(each)[0],
            "shape": max(each)[1],
            "tokens": max(each)[2],
        }
        for name, each in found.items()
    ]


def summary(result: Result) -> list[Result]:
    """Against each peer: the geometric mean of the ratios, and the worst of them."""
    return [
        {
            "peer": peer,
            "measured": len(found),
            "geometric_mean": statistics.geometric_mean(r for r, *_ in found),
            "worst": min(found)[0],
            "shape": min(found)[1],
            "tokens": min(found)[2],
        }
        for peer, found in ratios(result).items()
    ]


def _against_vllm(result: Result) -> Result:
    about: Result = {
        "goal": f"{result['dtype']}, all shapes: {AGAINST_VLLM} × vLLM in geometric mean, nowhere below 1",
        "met": None,
    }
    one = next((s for s in summary(result) if s["peer"] == "vLLM"), None)
    if one is None:
        return about | {"why": "vLLM was not measured"}
    met = one["geometric_mean"] >= AGAINST_VLLM and one["worst"] >= 1
    return about | {"met": met, **{k: one[k] for k in ("geometric_mean", "worst", "shape", "tokens")}}


def _ours(result: Result, goal: Goal) -> dict[int, Result]:
    return {
        one["tokens"]: one
        for one in result["results"]
        if one["implementation"] == "moec"
        and one["shape"] == goal.shape
        and goal.first <= one["tokens"] <= goal.last
    }


def _value(of: str, ours: Result, result: Result) -> float | None:
    read: dict[str, Callable[[], float]] = {
        "bandwidth": lambda: ours["of_bandwidth"],
        "TFLOP/s": lambda: ours["flops_per_s"] / 1e12,
    }
    if of in read:
        return read[of]()
    where = ours["shape"], ours["tokens"]
    return next((r for r, *at in ratios(result).get(of, []) if tuple(at) == where), None)


def _shown(of: str, value: float) -> str:
    if of == "bandwidth":
        return f"{value:.0%} of the bandwidth"
    return f"{value:.0f} TFLOP/s" if of == "TFLOP/s" else f"{value:.2f} × {of}"


def _verdict(one: Result) -> str:
    return {True: "met", False: "missed", None: "open"}[one["met"]]


def _detail(one: Result) -> str:
    if one["met"] is None:
        return f"; {one['why']}"
    mean = f"; {one['geometric_mean']:.2f} in the mean" if "geometric_mean" in one else ""
    where = f"{one['shape']} " if "shape" in one else ""
    return f"{mean}; at worst {one['worst']:.3g} at {where}M = {one['tokens']}"
