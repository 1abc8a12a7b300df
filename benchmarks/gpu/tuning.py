"""Peers whose Triton kernels can be told their configuration are tuned, where they bring none for a device.

The candidates are few, round what these projects' own tuning scripts search: tiles as high as an expert has
rows, two widths, 4 or 8 warps, 3 or 4 stages; blocks of fp8 scales fix the depth. The peer's own choice is
measured beside them. One that fails or gives a wrong result is left out.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from gpu.modules import attribute
from gpu.problem import BLOCK, E4M3
from gpu.shapes import Shape
from gpu.timing import Call, Clock

Config = dict[str, int]
SECONDS = 10.0  # for a peer, a shape and a number of tokens, unless told


@dataclass(frozen=True)
class Tunable:
    """``override(config)`` is in force within a ``with``; ``configured(shape, dtype)``: it brings a file."""

    override: Callable[[Config], AbstractContextManager[Any]]
    configured: Callable[[Shape, torch.dtype], bool]


def grid(shape: Shape, tokens: int, dtype: torch.dtype) -> Iterator[Config]:
    """What is tried, the likeliest first."""
    rows = tokens * shape.top_k / shape.experts
    heights = (16, 32) if rows <= 16 else (16, 32, 64) if rows <= 48 else (64, 128)
    widths = (128, 64) if rows <= 48 else (128, 256)
    depths = (BLOCK,) if dtype == E4M3 else (64, 128)
    group = 1 if rows <= 48 else 16
    for stages, warps, depth, width, height in itertools.product((3, 4), (4, 8), depths, widths, heights):
        yield {
            "BLOCK_SIZE_M": height,
            "BLOCK_SIZE_N": width,
            "BLOCK_SIZE_K": depth,
            "GROUP_SIZE_M": group,
            "num_warps": warps,
            "num_stages": stages,
        }


def tuned(
    peer: Tunable,
    candidates: Iterator[Config],
    calls: list[Call],
    right: Callable[[list[Call]], bool],
    clock: Clock,
    seconds: float,
) -> tuple[list[Call], dict[str, Any]]:
    """The calls in the fastest configuration that is ``right``, and what was found.

    ``config`` is None where nothing was faster than the peer's own.
    """
    start = time.monotonic()
    quick = Clock(clock.device, budget=clock.budget / 10)
    found: list[tuple[float, Config | None]] = []
    failed = []
    for config in itertools.chain([None], candidates):
        if config is not None and time.monotonic() - start > seconds:
            break
        try:
            found.append((quick.measure(_within(peer, config, calls)).median, config))
        except Exception as problem:  # of whatever kind: too much shared memory, a compiler's own
            failed.append({"config": config, "why": type(problem).__name__})
        if clock.device == "cuda":
            torch.cuda.empty_cache()
    own = next((taken for taken, config in found if config is None), None)
    about = {"tried": len(found) + len(failed), "failed": failed, "wrong": 0, "own_us": own and own * 1e6}
    about |= {"config": None, "best_us": about["own_us"], "seconds": time.monotonic() - start}
    for taken, config in sorted(found, key=lambda one: one[0]):
        if config is None:
            break
        told = _within(peer, config, calls)
        if right(told):
            return told, about | {"config": config, "best_us": taken * 1e6}
        about["wrong"] += 1
    return calls, about


def _within(peer: Tunable, config: Config | None, calls: list[Call]) -> list[Call]:
    if config is None:
        return calls

    def run(call: Call) -> Any:
        problem = None
        with peer.override(dict(config)):  # a copy: the peer may change it
            try:
                return call()
            except Exception as error:  # kept until after the with: vLLM's and SGLang's would stay in force
                problem = error
        raise problem

    return [partial(run, call) for call in calls]


# The peers'.
VLLM = "vllm.model_executor.layers.fused_moe"
SGLANG = "sglang.srt.layers.moe.fused_moe_triton"
SGLANG_NEW = "sglang.srt.layers.moe.moe_runner.triton_utils"


def _override(*modules: str) -> Callable[[Config], AbstractContextManager[Any]]:
    return lambda config: attribute("override_config", *modules)(config)


def _configured(*modules: str) -> Callable[[Shape, torch.dtype], bool]:
    """By the peer's own search for a file, which knows the device's name."""

    def ask(shape: Shape, dtype: torch.dtype) -> bool:
        search = attribute("get_moe_configs", *modules)
        quantised = dtype == E4M3
        how = ("fp8_w8a8", BLOCK, BLOCK) if quantised else ("float32" if dtype == torch.float32 else None,)
        return search(shape.experts, shape.intermediate, *how) is not None

    return ask


TUNABLE = {
    "vLLM": Tunable(_override(VLLM), _configured(f"{VLLM}.fused_moe")),
    "SGLang": Tunable(
        _override(SGLANG, SGLANG_NEW),
        _configured(
            f"{SGLANG}.fused_moe_triton_config",
            f"{SGLANG_NEW}.fused_moe_triton_config",
            f"{SGLANG}.fused_moe",
        ),
    ),
}
