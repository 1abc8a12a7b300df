"""How fast are the experts of one MoE layer on a GPU, beside other people's and beside the device's roofs?

From x and the router's logits to y: choice, sort, both products, SwiGLU, combine; ``--from choices`` leaves
the first out. A shape's router is its model's, and everybody runs it with the kernels that they have for it.
Every implementation gets the same weights and inputs. These are rotated, so that a call
doesn't find in the cache what the one before it read; a rotation is recorded as one CUDA graph and replayed;
times are medians over the replays.

In the same run every implementation is compared with double precision (one that is wrong is named and left
out), and the roofs are measured: bandwidth of a copy, FLOP/s of cuBLAS. A layer's floor is the larger of what
its FLOPs and its bytes (chosen experts once, x, y, and what passes between the products) take at these.

Peers that can be told a configuration are tuned before they are measured (``--tune-peers``).

``make bench-gpu`` runs all of it, ``--quick`` two shapes, for a first look; ``--dtype fp8`` takes experts in
fp8 with block scales, against those who have them. ``--self-test`` runs every line but the graphs and events
on a CPU, with tiny shapes: its times mean nothing. One JSON and one plot (where matplotlib is there) go to
``benchmarks/results`` or ``--out``, and to the folder OUT of the environment.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu import goals, report, self_test, tuning
from gpu.peers import (
    ADAPTERS,
    FP8_ADAPTERS,
    Adapter,
    first_line,
    installed,
    layer_of,
    made_of,
)
from gpu.problem import DTYPES, TOLERANCE, Inputs, Weights, difference, draw_inputs, draw_weights
from gpu.shapes import QUICK_SHAPES, QUICK_TOKENS, SELF_TEST_SHAPES, SELF_TEST_TOKENS, SHAPES, TOKENS, Shape
from gpu.timing import Call, Clock, Measured, Roofs, cache_size, roofs
from gpu.variants import VARIANTS

RESULTS = Path(__file__).parent / "results"


class LeftOut(Exception):
    """Why an implementation has no time for a shape."""


@dataclass(frozen=True)
class Run:
    """What stays the same over all measurements."""

    dtype: torch.dtype
    clock: Clock
    roofs: Roofs
    cache: int
    adapters: dict[str, Adapter]
    routed: bool  # from the router's logits on, else from its choices
    tunable: dict[str, tuning.Tunable]
    seconds: float | None  # that tuning may take, each time; None: where a peer brings no configuration

    def shape(self, shape: Shape, tokens: list[int], result: dict[str, Any]) -> None:
        """Measures one shape at every number of tokens; ``result`` gains what was found."""
        copies = draw_weights(shape, self.dtype, self.clock.device, self.cache)
        for number in tokens:
            given = draw_inputs(shape, number, self.dtype, self.clock.device, self.cache, len(copies))
            for name, adapter in self.adapters.items():
                if name in VARIANTS and number > (VARIANTS[name].most_tokens or number):
                    continue
                about = {"shape": shape.name, "tokens": number, "implementation": name}
                progress(f"{shape.name} M={number} {name}")
                try:
                    measured, error, about_tuning = self.one(name, adapter, shape, copies, given)
                except LeftOut as reason:
                    result["excluded"].append(about | {"reason": str(reason)})
                else:
                    result["results"].append(about | self.derived(shape, number, measured, error))
                    if about_tuning is not None:
                        result["tuning"].append(about | about_tuning)
                release(self.clock.device)

    @torch.inference_mode()
    def one(
        self, name: str, adapter: Adapter, shape: Shape, copies: list[Weights], given: list[Inputs]
    ) -> tuple[Measured, float, dict[str, Any] | None]:
        """Seconds of a call, the largest error of two calls, and what tuning found. Raises LeftOut."""
        try:
            calls: list[Call]
            if self.routed:
                layers = [layer_of(name, adapter, weights, shape) for weights in copies]
                calls = [partial(layers[i.copy], i.x, i.logits) for i in given]
            else:
                experts = [adapter(weights, shape.top_k) for weights in copies]
                calls = [partial(experts[i.copy], i.x, i.weights, i.ids) for i in given]

            def error_of(calls: list[Call]) -> float:
                pairs = zip(calls[:2], given[:2], strict=True)
                return max(difference(call(), i, copies[i.copy]) for call, i in pairs)

            calls, about = self.tuned(name, shape, len(given[0].x), calls, error_of)
            error = error_of(calls)
            if error > TOLERANCE[self.dtype]:
                raise LeftOut(f"wrong: off by {error:.1e} of the largest element")
            return self.clock.measure(calls), error, about
        except torch.cuda.OutOfMemoryError:
            raise LeftOut("out of memory") from None
        except LeftOut:
            raise
        except Exception as problem:  # a peer's own, of whatever kind: the others go on
            raise LeftOut(f"{type(problem).__name__}: {first_line(problem)}") from None

    def tuned(
        self, name: str, shape: Shape, tokens: int, calls: list[Call], error_of: Callable[[list[Call]], float]
    ) -> tuple[list[Call], dict[str, Any] | None]:
        """The calls as they are best, and what was found; None for one that isn't tuned."""
        peer = self.tunable.get(name)
        if peer is None or self.seconds == 0:
            return calls, None
        try:
            configured = peer.configured(shape, self.dtype)
        except Exception as problem:  # it looks elsewhere for them, or no longer lets itself be told
            return calls, {"untuned": f"{type(problem).__name__}: {first_line(problem)}"}
        if self.seconds is None and configured:
            return calls, {"untuned": "it brings a configuration for this shape and device"}
        right = lambda calls: error_of(calls) <= TOLERANCE[self.dtype]  # noqa: E731
        seconds = tuning.SECONDS if self.seconds is None else self.seconds
        candidates = tuning.grid(shape, tokens, self.dtype)
        calls, about = tuning.tuned(peer, candidates, calls, right, self.clock, seconds)
        return calls, about | {"configured": configured}

    def derived(self, shape: Shape, tokens: int, measured: Measured, error: float) -> dict[str, Any]:
        flops, moved = shape.flops(tokens), shape.bytes(tokens, self.dtype.itemsize)
        floor = self.roofs.floor(flops, moved)
        return {
            "median_us": measured.median * 1e6,
            "p10_us": measured.low * 1e6,
            "p90_us": measured.high * 1e6,
            "rounds": measured.rounds,
            "graph": measured.graph,
            "error": error,
            "floor_us": floor * 1e6,
            "of_roof": floor / measured.median,
            "bytes_per_s": moved / measured.median,
            "of_bandwidth": moved / measured.median / self.roofs.bandwidth,
            "flops_per_s": flops / measured.median,
        }


def progress(text: str) -> None:
    print(f"\r{text:<78}", end="", file=sys.stderr, flush=True)


def release(device: str) -> None:
    """Gives back what a graph's pool held."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two shapes, five numbers of tokens")
    parser.add_argument("--self-test", action="store_true", help="every line but the launches, on the CPU")
    parser.add_argument("--shapes", nargs="+", metavar="SHAPE", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--tokens", nargs="+", type=int, metavar="M")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"of {', '.join(ADAPTERS)}")
    parser.add_argument(
        "--from", dest="start", choices=["logits", "choices"], default="logits", help="where a call begins"
    )
    parser.add_argument(
        "--tune-peers",
        type=float,
        metavar="SECONDS",
        help="for each peer that can be told a configuration, each shape and number of tokens; 0: never "
        f"(default: {tuning.SECONDS:g}, where it brings none for this device)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--out", type=Path, help="a folder for the JSON and the plot")
    args = parser.parse_args()
    known = SELF_TEST_SHAPES if args.self_test else SHAPES
    chosen = args.shapes or (QUICK_SHAPES if args.quick and not args.self_test else list(known))
    if unknown := [name for name in chosen if name not in known]:
        parser.error(f"no shape is called {', '.join(unknown)}; there is {', '.join(known)}")
    if unknown := [name for name in args.only or () if name not in ADAPTERS]:
        parser.error(f"nobody is called {', '.join(unknown)}; there is {', '.join(ADAPTERS)}")
    if min(args.tokens or [1]) < 1:
        parser.error("--tokens: 1 or more")
    if args.tune_peers is not None and not args.tune_peers >= 0:
        parser.error("--tune-peers: 0 seconds or more")
    args.shapes = [known[name] for name in chosen]
    default = SELF_TEST_TOKENS if args.self_test else QUICK_TOKENS if args.quick else TOKENS
    args.tokens = args.tokens or default
    if not args.self_test and not torch.cuda.is_available():
        sys.exit("no NVIDIA GPU is here; --self-test runs everything but the launches on the CPU")
    return args


def folders(args: argparse.Namespace) -> list[Path]:
    """Where results go; a self-test's stay out of the repository."""
    chosen = args.out or (Path(tempfile.mkdtemp(prefix="moec-bench-")) if args.self_test else RESULTS)
    return list(dict.fromkeys([chosen, *([Path(os.environ["OUT"])] if os.environ.get("OUT") else [])]))


def main() -> None:
    args = arguments()
    device = "cpu" if args.self_test else "cuda"
    if args.self_test:
        os.environ["TRITON_INTERPRET"] = "1"  # for the kernels between DeepGEMM's products
    everybody = (FP8_ADAPTERS if args.dtype == "fp8" else ADAPTERS) | (
        self_test.STAND_INS if args.self_test else {}
    )
    adapters, unavailable = installed(everybody, DTYPES[args.dtype])
    if args.only:
        adapters = {name: adapters[name] for name in adapters if name in args.only}
        unavailable = {name: unavailable[name] for name in unavailable if name in args.only}
    clock = Clock(device, budget=0.002 if args.self_test else 0.05 if args.quick else 0.3)
    progress("roofs")
    found = roofs(clock, DTYPES[args.dtype])
    tunable = self_test.TUNABLE if args.self_test else tuning.TUNABLE
    run = Run(
        DTYPES[args.dtype],
        clock,
        found,
        self_test.CACHE if args.self_test else cache_size(device),
        adapters,
        args.start == "logits",
        tunable,
        args.tune_peers,
    )
    result = report.header(device, args.dtype) | {
        "from": args.start,
        "roofs": asdict(found),
        "shapes": {shape.name: asdict(shape) for shape in args.shapes},
        "implementations": {name: made_of(name, adapter) for name, adapter in adapters.items()},
        "unavailable": unavailable,
        "tune_peers": "where they bring none" if args.tune_peers is None else args.tune_peers,
        "tuning": [],
        "results": [],
        "excluded": [],
    }
    where = folders(args)
    marks = [args.dtype] * (args.dtype != "bf16") + [args.start] * (args.start != "logits")
    marks += ["quick"] * args.quick
    stem = report.file_stem(device, *marks)
    for shape in args.shapes:
        run.shape(shape, args.tokens, result)
        result |= {"summary": goals.summary(result), "goals": goals.judge(result)}
        result |= {"batch_invariance": goals.invariance(result)}
        written = report.write(result, where, stem)  # after each: a run that is cut short leaves what it has
        release(device)
    progress("")
    print("\r" + "\n".join(report.table(result)))
    print(f"written to {', '.join(map(str, written))}")
    if not any(file.suffix == ".png" for file in written):
        print("no plot: matplotlib is not installed, or nothing was measured")
    if any(e["implementation"] == "moec" for e in result["excluded"]):
        sys.exit("moec failed or was wrong: see above")


if __name__ == "__main__":
    main()
