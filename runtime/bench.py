"""Timing a loaded model: prefill of one prompt, then decode steps through its cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from moec.errors import BadInput
from moec.runtime.batch import next_batch
from moec.runtime.cache import CachedSequence
from moec.runtime.model import LanguageModel


def bench(
    model: LanguageModel,
    prefill: int = 512,
    decode: int = 32,
    batch: int = 1,
    repeats: int = 5,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Medians in seconds: ``prefill_s`` for batch × prefill tokens, ``decode_s`` for a step of ``batch``.

    Random tokens; one run that isn't counted comes first. Raises BadInput where it doesn't fit the model.
    """
    for name, value in (("prefill", prefill), ("decode", decode), ("batch", batch), ("repeats", repeats)):
        if value < 1:
            raise BadInput(f"{name} is {value}; it must be at least 1")
    if prefill + decode > model.max_positions:
        raise BadInput(
            f"{prefill} + {decode} tokens are more than the model's {model.max_positions} positions"
        )
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(model.vocab, (batch, prefill), generator=generator).tolist()
    prefill_times, decode_times = [], []
    for run in range(repeats + 1):
        first, steps = _run(model, prompts, decode)
        if run:
            prefill_times.append(first)
            decode_times += steps
        progress(run + 1, repeats + 1)
    prefill_s, decode_s = statistics.median(prefill_times), statistics.median(decode_times)
    return {
        "model": model.name,
        "target": model.manifest["target"],
        "dtype": model.manifest["dtype"],
        "threads": torch.get_num_threads(),
        "batch": batch,
        "prefill_tokens": prefill,
        "decode_steps": decode,
        "repeats": repeats,
        "prefill_s": prefill_s,
        "prefill_tokens_per_s": batch * prefill / prefill_s,
        "decode_s": decode_s,
        "decode_tokens_per_s": batch / decode_s,
        "weights_bytes": model.weights.nbytes,
        "cache_bytes_per_token": sum(s.bytes_per_token for s in model.cache_specs),
    }


def _run(model: LanguageModel, prompts: list[list[int]], decode: int) -> tuple[float, list[float]]:
    """Seconds of the prefill and of each decode step."""
    page = model.cache_specs[0].page if model.cache_specs else 1
    cache = model.new_cache(sum(len(p) + decode + page for p in prompts))
    sequences = [CachedSequence(cache) for _ in prompts]
    start = time.perf_counter()
    logits = model.step(next_batch(sequences, prompts), cache)
    first = time.perf_counter() - start
    steps = []
    for _ in range(decode):
        start = time.perf_counter()
        tokens = logits.argmax(-1).tolist()
        logits = model.step(next_batch(sequences, [[t] for t in tokens]), cache)
        steps.append(time.perf_counter() - start)
    return first, steps
