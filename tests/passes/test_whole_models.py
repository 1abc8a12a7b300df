"""Every pass on whole models: before equals after, alone, in any legal order, twice, and at each -O level.

The registry says what is run: a pass that is added is judged here as it is. One that rounds has a floor in
ROUNDS.
"""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import Any

import pytest
import torch
from hypothesis import find, given, settings
from hypothesis import strategies as st

import moec.codegen  # noqa: F401 - select asks it for kernels
from moec import models
from moec.ir import Module, print_module, verify
from moec.passes import PASSES, Pass, pipeline
from moec.passes.pipelines import LEVELS
from tests.passes.judge import Outcome, outcome, same, sqnr
from tests.passes.whole_models import Run, checkpoint, runs, whole_models

TOLERANCE = 1e-5  # of the largest magnitude, in fp32: what another order of sums may change
# Passes that round, with the least signal-to-noise that a tiny model's outputs keep, in dB.
ROUNDS: dict[str, float] = {"fp8-cast": 8.0}
# Below that floor, a model's outputs may be off by twice what random roundings of its operands bring, in dB.
JITTER_MARGIN = 6.0
# Options at which tiny sizes show what large ones would.
SMALL: dict[str, list[dict[str, Any]]] = {
    "merge-projections": [{"align": 1}],
    "mla-absorb": [{"absorb_below": 0}, {"absorb_below": 3}],
}
TARGETS = ["cpu", "sm_90a"]
EXAMPLES = settings.default.max_examples  # type: ignore[union-attr]


def variants() -> list[list[Pass]]:
    """Each pass as it is, with each of its switches thrown, and as SMALL has it."""
    found = []
    for name, cls in sorted(PASSES.items()):
        if not cls.__module__.startswith("moec.passes."):
            continue  # a test's own
        usual = cls.Options()
        switches = [f.name for f in dataclasses.fields(usual) if isinstance(getattr(usual, f.name), bool)]
        changes = [{}, *({s: not getattr(usual, s)} for s in switches), *SMALL.get(name, [])]
        found.append([cls(dataclasses.replace(usual, **change)) for change in changes])
    return found


def apply(each: Pass, module: Module) -> bool:
    """Runs a pass twice; the second run must change nothing."""
    changed = each.run(module)
    verify(module)
    text = print_module(module, derived=False)
    assert not each.run(module), f"{each} says that it changes its own result"
    assert print_module(module, derived=False) == text, f"{each} changes its own result"
    return changed


class Judge:
    """A naive module, what it gives, and what passes make of it."""

    def __init__(self, spec: models.Model, run: Run) -> None:
        self.naive, self.run, self.hidden = models.lower(spec), run, spec.hidden
        self.weights = checkpoint(self.naive, run)
        self.before = outcome(self.naive, self.weights, run)

    def check(self, module: Module, what: str, rounded: float | None = None) -> None:
        if rounded is None:
            same(self.before, module, self.weights, self.run, TOLERANCE, what)
            return
        after = outcome(module, self.weights, self.run, self.before.choices)
        for name, value in self.before.outputs.items():
            if self.hidden == 1:  # a norm of one value is its sign: a rounding turns all of it, or nothing
                assert after.outputs[name].isfinite().equal(value.isfinite()), f"{what}: {name}"
            elif value.numel():
                found = sqnr(value, after.outputs[name])
                floor = rounded
                if found < floor:  # a model may blow up the roundings of a few numbers
                    floor = min(sqnr(value, each.outputs[name]) for each in self.jittered) - JITTER_MARGIN
                assert found >= floor, f"{what}: {name} keeps {found:.1f} of {floor:.1f} dB"

    @cached_property
    def jittered(self) -> list[Outcome]:
        """What the naive module gives where each product's operands are off by a rounding: eight draws."""
        choices = self.before.choices
        return [outcome(self.naive, self.weights, self.run, choices, jitter=seed) for seed in range(8)]


def floor_of(done: list[Pass]) -> float | None:
    return min((ROUNDS[p.name] for p in done if p.name in ROUNDS), default=None)


@st.composite
def cases(draw: Any) -> tuple[models.Model, Run]:
    spec = draw(whole_models())
    return spec, draw(runs(spec.page))


@given(case=cases())
def test_the_judge_sees_numbers(case: tuple[models.Model, Run]) -> None:
    judge = Judge(*case)
    values = [*judge.before.outputs.values()]
    assert not any(bool(v.isnan().any()) for v in values)
    assert all(v.abs().max() > 1e-3 for v in values if v.numel())


@given(case=cases())
def test_each_pass_alone(case: tuple[models.Model, Run]) -> None:
    judge = Judge(*case)
    for each in [each for one in variants() for each in one]:
        module = judge.naive.clone()
        before = print_module(module, derived=False)
        if apply(each, module):
            judge.check(module, str(each), floor_of([each]))
        else:
            assert print_module(module, derived=False) == before, f"{each} says that it changes nothing"


@given(case=cases(), data=st.data())
def test_any_legal_order(case: tuple[models.Model, Run], data: st.DataObject) -> None:
    judge = Judge(*case)
    chosen = [data.draw(st.sampled_from(one)) for one in variants()]
    again = data.draw(st.lists(st.sampled_from(chosen), max_size=3))
    order = sorted(data.draw(st.permutations([*chosen, *again])), key=lambda p: p.phase)
    module, done = judge.naive.clone(), []
    for each in order:
        done.append(each)
        if apply(each, module):
            judge.check(module, ",".join(map(str, done)), floor_of(done))


@settings(max_examples=EXAMPLES // 2)
@given(case=cases())
def test_each_level_for_each_target(case: tuple[models.Model, Run]) -> None:
    judge = Judge(*case)
    seen: set[str] = set()
    for target in TARGETS:
        for level in LEVELS:
            module, done = judge.naive.clone(), pipeline(level, target)
            module.target = target
            for each in done:
                apply(each, module)
            text = print_module(module, derived=False)
            if text not in seen:
                judge.check(module, f"-O{level} for {target}", floor_of(done))
            seen.add(text)


@pytest.mark.parametrize("tolerance", [TOLERANCE])
def test_the_judge_is_not_blind(tolerance: float) -> None:
    """It finds an error of one element, and of one entry of the cache."""
    spec = models.Model(
        13, 6, [models.Decoder(models.GQA(2, 1, 4), models.SwiGLU(3))], dtype="f32", page=2, name="one"
    )
    judge = Judge(spec, find(runs(2), lambda run: all(len(batch.ids) for batch in run.steps)))
    same(judge.before, judge.naive, judge.weights, judge.run, tolerance, "nothing")
    for spoiled in (_spoil_output(judge.before), _spoil_cache(judge.before)):
        with pytest.raises(AssertionError, match="nothing"):
            same(spoiled, judge.naive, judge.weights, judge.run, tolerance, "nothing")


def _spoil_output(found: Outcome) -> Outcome:
    outputs = {k: v.clone() for k, v in found.outputs.items()}
    last = [v for v in outputs.values() if v.numel()][-1]
    last.view(-1)[0] += 1e-3 * last.abs().max()
    return dataclasses.replace(found, outputs=outputs)


def _spoil_cache(found: Outcome) -> Outcome:
    (cache,) = found.caches
    pages = cache.layers[0].clone()
    kept = pages.isnan().logical_not().nonzero()
    pages[tuple(kept[0])] += torch.tensor(1.0)
    return dataclasses.replace(found, caches=[type(cache)(cache.page, {**cache.layers, 0: pages})])
