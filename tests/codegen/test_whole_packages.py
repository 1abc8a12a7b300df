"""Packages for the cpu of drawn models, at each -O level, against the interpreter of their naive IR."""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import moec
from moec import models
from moec.passes.instruments import relative_error
from moec.passes.pipelines import LEVELS
from moec.runtime.cache import KVCache
from tests.passes.judge import Outcome, outcome
from tests.passes.whole_models import Run, caches, checkpoint, runs, whole_models

TOLERANCE = 3e-5  # of the largest magnitude, in fp32: PyTorch's sums against the interpreter's


@st.composite
def cases(draw: Any) -> tuple[models.Model, Run]:
    spec = draw(whole_models())
    return spec, draw(runs(spec.page, checked=True))


def package_outcome(model: moec.LanguageModel, run: Run) -> tuple[Outcome, KVCache]:
    """What the package gives over the run; its cache holds NaN where nothing has been written."""
    cache = KVCache(model.cache_specs, run.pages)
    for layers in cache.tensors.values():
        for tensor in layers:
            if tensor is not None:
                tensor.fill_(torch.nan)
    found = Outcome()
    routed = model.manifest["routed_layers"]
    with model.record_routing() if routed else nullcontext() as trace:
        for number, batch in enumerate(run.steps):
            hidden = model.hidden(batch, cache)
            found.outputs[f"{number}: hidden"], found.outputs[f"{number}: logits"] = (
                hidden,
                model.head(hidden),
            )
    if trace is not None:
        found.choices = [(None, w, id) for step in trace.steps for w, id in step]
    return found, cache


def rows_flipped(a: Outcome, b: Outcome) -> int:
    """Tokens that go to other experts in one of the two, over all routers."""
    pairs = [(x[2], y[2][:, : x[2].shape[1]]) for x, y in zip(a.choices, b.choices, strict=True)]
    return sum(int((x != y).any(1).sum()) for x, y in pairs)


def compare(expected: Outcome, found: Outcome, cache: KVCache, pages: int, what: str) -> None:
    for name, value in expected.outputs.items():
        error = relative_error(value, found.outputs[name])
        assert error <= TOLERANCE, f"{what}: {name} differs by {error:.1e}"
    for spec, state in zip(cache.specs, expected.caches, strict=True):
        for layer in spec.layers:
            kept = cache.tensors[spec.name][layer]
            assert kept is not None
            error = relative_error(state.layers[layer], kept[:pages].flatten(0, 1))
            assert error <= TOLERANCE, f"{what}: layer {layer}'s cache differs by {error:.1e}"


@settings(max_examples=max(6, settings.default.max_examples // 3))  # type: ignore[union-attr]
@given(case=cases())
def test_packages_of_each_level_give_what_the_interpreter_does(case: tuple[models.Model, Run]) -> None:
    spec, run = case
    naive = models.lower(spec)
    assume(caches(naive))  # without attention there are no pages
    weights = checkpoint(naive, run)
    expected = outcome(naive, weights, run)
    with tempfile.TemporaryDirectory() as folder:
        for level in LEVELS:
            options = moec.BuildOptions(opt_level=level)
            model = moec.load(moec.build(spec, "cpu", Path(folder) / str(level), options=options), weights)
            assert isinstance(model, moec.LanguageModel)
            found, cache = package_outcome(model, run)
            assert len(found.choices) == len(expected.choices)
            wanted, flips = expected, rows_flipped(expected, found)
            if flips:  # two experts scored alike: the same choices must give the same
                assert run.ties or flips == 1, f"-O{level}: {flips} tokens go to other experts"
                wanted = outcome(naive, weights, run, found.choices)
            compare(wanted, found, cache, run.pages, f"-O{level}")
