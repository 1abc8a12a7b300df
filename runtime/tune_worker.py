"""A process that measures candidates for ``moec tune``: one request a line in, one reply a line out, in JSON.

A candidate may crash, hang, or leave a CUDA context in which nothing runs any more. So it is measured here,
and whoever asks (``moec/tune/measuring.py``) starts another worker then. The requests, each ``{"do": ...}``:

about    -> device (as CUDA names it), capability, or error where there is no GPU
operands   arguments, choices (``runtime/draw.py``): draws them; weights stay as long as theirs are the same
           -> sets
measure    package (a folder with ``forward``), budget in seconds, tolerance, reference (true: the results
           are what later ones are compared with) -> seconds, low, high, rounds, graph, difference

A reply with ``error`` says what went wrong; ``kind`` is wrong, memory or failed. Behind one with ``fatal``
the worker ends.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from moec.errors import MoecError
from moec.runtime.draw import Sets, difference
from moec.runtime.launch import preload
from moec.runtime.package import Package
from moec.runtime.timing import Clock, cache_size

COMPARED = 2  # sets of operands whose results are compared


class Measuring:
    """What a worker keeps between requests. ``device``: cuda, or cpu for kernels in Triton's interpreter."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.sets: Sets | None = None
        self.operands: list[list[Any]] = []
        self.reference: list[Any] = []

    def about(self) -> dict[str, Any]:
        if self.device == "cpu":
            return {"device": "cpu", "capability": None}
        if not torch.cuda.is_available():
            return {"error": "PyTorch finds no NVIDIA GPU here"}
        return {
            "device": torch.cuda.get_device_name(),
            "capability": list(torch.cuda.get_device_capability()),
        }

    def draw(self, arguments: list[dict[str, Any]], choices: dict[str, int]) -> dict[str, Any]:
        fixed = [a for a in arguments if a["role"] == "weights"]
        if self.sets is None or [a for a in self.sets.arguments if a["role"] == "weights"] != fixed:
            self.sets, self.operands, self.reference = None, [], []
            self._release()
            cache = cache_size(self.device) if self.device == "cuda" else 0
            self.sets = Sets(arguments, self.device, cache)
        self.operands, self.reference = [], []
        self._release()
        self.operands = self.sets.draw(arguments, choices)
        return {"sets": len(self.operands)}

    def measure(self, package: str, budget: float, tolerance: float, reference: bool) -> dict[str, Any]:
        code = Package(Path(package)).module("model")
        if self.device == "cuda":
            preload(code.__name__.rpartition(".")[0], torch.cuda.current_device())
        results = self._results(code.forward)
        if reference:
            self.reference = results
        off = max(difference(y, w) for y, w in zip(results, self.reference, strict=True))
        if not off <= tolerance:
            return {"error": f"its results are off by {off:.1e} of the largest", "kind": "wrong"}
        del results
        calls = [lambda given=given: code.forward(*given, {}) for given in self.operands]
        found = Clock(self.device, budget).measure(calls)
        self._release()
        return {
            "seconds": found.median,
            "low": found.low,
            "high": found.high,
            "rounds": found.rounds,
            "graph": found.graph,
            "difference": off,
        }

    def _results(self, forward: Any) -> list[Any]:
        """Of the first sets, in memory that was full of NaN: what isn't written shows."""
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            found = [forward(*given, {}) for given in self.operands[:COMPARED]]
        finally:
            torch.use_deterministic_algorithms(False)
        if self.device == "cuda":
            torch.cuda.synchronize()
        return found

    def _release(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        do, given = request.pop("do"), request
        methods: dict[str, Any] = {"about": self.about, "operands": self.draw, "measure": self.measure}
        try:
            with torch.inference_mode():
                reply: dict[str, Any] = methods[do](**given)
            return reply
        except torch.cuda.OutOfMemoryError:
            if do == "operands":
                self.sets, self.operands = None, []
            return {"error": "out of memory", "kind": "memory"}
        except Exception as error:  # a candidate's, of whatever kind
            text = error.message if isinstance(error, MoecError) else f"{type(error).__name__}: {error}"
            reply = {"error": text.strip().splitlines()[0][:300] if text.strip() else type(error).__name__}
            return reply | {"kind": "failed"} | ({"fatal": True} if self._broken() else {})

    def _broken(self) -> bool:
        """Whether the CUDA context is one in which nothing runs any more."""
        if self.device == "cpu":
            return False
        try:
            torch.cuda.synchronize()
            torch.zeros(1, device="cuda").item()
        except Exception:
            return True
        return False


def main() -> None:
    # What a kernel or a library prints is no reply.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    measuring = Measuring(sys.argv[1])
    for line in sys.stdin:
        reply = measuring.answer(json.loads(line))
        print(json.dumps(reply), file=replies, flush=True)
        if reply.get("fatal"):
            return


if __name__ == "__main__":
    main()
