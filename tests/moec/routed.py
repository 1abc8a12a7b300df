"""A package beside one of its dumps in the interpreter, routed alike."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

import moec
from moec.dumps import dumps
from moec.ir import Interpreter, read_module
from moec.ir.types import CacheType
from moec.routing import Injection
from moec.runtime.batch import next_batch
from moec.runtime.cache import CachedSequence
from moec.runtime.checkpoint import open_checkpoint
from moec.trial import Tensors


def sqnr(exact: torch.Tensor, got: torch.Tensor) -> float:
    noise = (got.double() - exact.double()).square().sum()
    return float(10 * torch.log10(exact.double().square().sum() / noise))


def routed_alike(
    package: Path, model: moec.LanguageModel, ids: torch.Tensor, dump: int = 0
) -> tuple[float, float]:
    """SQNR of the package's logits against one of its dumps: with its experts, with the dump's."""
    module = read_module(dumps(package)[dump])
    choices: list[dict[int, Any]] = [{}]
    if model.manifest["routed_layers"]:
        with model.record_routing() as trace:
            got = model(ids)[0]
        choices.insert(0, trace.choices(0))
    else:
        got = model(ids)[0]
    tensors = Tensors(open_checkpoint("random:0", model.manifest["checkpoint"]))
    found = []
    for given in choices:
        interpreter = Interpreter(module, tensors, alter=Injection(math.inf, given).alter)
        cache = model.new_cache(ids.numel())
        batch = next_batch([CachedSequence(cache)], [ids[0].tolist()])
        types = [a.type for a in module["step"].args if isinstance(a.type, CacheType)]
        layers = [max(s.layers) + 1 for s in model.cache_specs]
        state = [interpreter.new_cache(t, n, cache.pages) for t, n in zip(types, layers, strict=True)]
        hidden, *_ = interpreter.run("step", *batch.tensors(), *state)
        (logits,) = interpreter.run("head", hidden)
        found.append(sqnr(logits, got))
    return found[0], found[-1]
