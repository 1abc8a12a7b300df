"""The analytic model fitted to measurements: constants that made-up measurements were made with are found."""

from __future__ import annotations

import math
import random
from dataclasses import fields

import pytest

from moec.codegen.constants import ASSUMED, Constants
from moec.codegen.schedules import Problem
from moec.codegen.select import explain
from moec.ir.devices import GPUS
from moec.tune.refit import ENOUGH, SHARES, Measurement, error, fit

PROBLEMS = [
    Problem(256, 2048, 7168, "bf16", 2, matrices=2, gathered=True),
    Problem(256, 7168, 2048, "bf16", 2),
    Problem(128, 768, 2048, "bf16", 2, matrices=2, gathered=True),
    Problem(1, 7168, 2048, "f8e4m3", 1),
]
ROWS = [2.0**i for i in range(-5, 11, 2)]
TRUE = Constants(latency=1.6e-6, prologue=3.5e-6, sm_bandwidth=70e9, triton=0.62, shows=0.25)


def measured(constants: Constants, target: str, noise: float) -> list[Measurement]:
    generator = random.Random(0)
    return [
        Measurement(problem, choice.schedule, rows, choice.seconds * generator.lognormvariate(0, noise))
        for problem in PROBLEMS
        if not problem.fp8 or GPUS[target].fp8
        for rows in ROWS
        for choice in explain(problem, GPUS[target], rows, constants)[:12]
    ]


@pytest.mark.parametrize("target", ["sm_90a", "sm_80"])
def test_what_measurements_were_made_with_is_found(target: str) -> None:
    found = fit(measured(TRUE, target, noise=0.0), GPUS[target])
    assert found is not None and found.before > 0.1 and found.after < 0.03
    if target == "sm_90a":  # there every constant shows
        for name in ("latency", "prologue", "sm_bandwidth", "triton", "shows"):
            assert getattr(found.constants, name) == pytest.approx(getattr(TRUE, name), rel=0.1), name


def test_noise_is_tolerated() -> None:
    found = fit(measured(TRUE, "sm_90a", noise=0.05), GPUS["sm_90a"])
    assert found is not None and 0.03 < found.after < 0.07
    assert found.constants.triton == pytest.approx(TRUE.triton, rel=0.1)
    assert found.constants.prologue == pytest.approx(TRUE.prologue, rel=0.2)
    assert "off by" in str(found) and found.about()["measurements"] == found.measurements


def test_what_the_measurements_don_t_show_stays_as_assumed() -> None:
    """Large products: nothing but the matrix unit's rate counts."""
    big = Problem(8, 14336, 4096, "bf16", 2)
    given = [
        Measurement(big, c.schedule, rows, c.seconds)
        for rows in (4096.0, 8192.0)
        for c in explain(big, GPUS["sm_90a"], rows, Constants(triton=0.5))[:16]
    ]
    found = fit(given, GPUS["sm_90a"])
    assert found is not None and found.constants.triton == pytest.approx(0.5, rel=0.05)
    assert found.constants.latency == pytest.approx(ASSUMED.latency, rel=0.05)


def test_a_fit_of_what_the_model_says_changes_nothing() -> None:
    found = fit(measured(ASSUMED, "sm_90a", noise=0.0), GPUS["sm_90a"])
    assert found is not None and found.before == 0 and found.after < 1e-3
    for field in fields(Constants):
        assert getattr(found.constants, field.name) == pytest.approx(getattr(ASSUMED, field.name), rel=0.02)


def test_too_few_are_no_fit() -> None:
    assert fit(measured(TRUE, "sm_90a", 0.0)[: ENOUGH - 1], GPUS["sm_90a"]) is None


def test_constants_stay_possible() -> None:
    """Measurements a hundred times faster than anything: shares stay below 1, the error is what remains."""
    given = [Measurement(m.problem, m.schedule, m.rows, m.seconds / 100) for m in measured(TRUE, "sm_90a", 0)]
    found = fit(given, GPUS["sm_90a"])
    assert found is not None and found.after <= found.before
    assert all(0 < getattr(found.constants, name) <= 1.0001 for name in SHARES)
    assert error(given, GPUS["sm_90a"], found.constants) == pytest.approx(found.after)
    assert math.isfinite(found.after)
