"""A pass, a model family or an error fails here until it has all that its like need."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moec import errors
from moec.codegen import TARGETS
from moec.ir import parse_module, print_module, verify
from moec.models import lower, preset
from moec.models.families import FAMILIES, Family
from moec.passes import PASSES, pipeline
from moec.passes.pipelines import BY_NAME_ONLY
from tests.strategies import CONFIGS

ROOT = Path(__file__).parents[2]
TINY = sorted({family.tiny for family in FAMILIES.values()})


@pytest.mark.parametrize("name", sorted(PASSES))
def test_a_pass_is_documented_and_has_goldens(name: str) -> None:
    assert (PASSES[name].__doc__ or "").strip(), f"{name}: `moec list passes` has nothing to say"
    goldens = {p.name for p in (ROOT / "tests" / "passes" / "golden").glob("*.moec")}
    used = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "tests" / "passes").glob("test_*.py"))
    assert goldens and f'"{name}"' in used, f"no test in tests/passes runs {name}"
    pipelines = [pipeline(level, target, fp8=True) for level in (1, 2, 3) for target in TARGETS]
    run = {p.name for passes in pipelines for p in passes}
    assert (name in run) != (name in BY_NAME_ONLY), f"no pipeline has {name}, or one that is by name only"
    assert f"`{name}`" in (ROOT / "README.md").read_text(encoding="utf-8"), f"README.md doesn't list {name}"


@pytest.mark.parametrize("tiny", TINY)
@pytest.mark.parametrize("name", sorted(PASSES))
def test_a_pass_is_right_on_its_own_and_a_no_op_when_it_runs_again(name: str, tiny: str) -> None:
    module = lower(preset(tiny))
    PASSES[name]().run(module)
    verify(module)
    once = print_module(module)
    assert print_module(parse_module(once)) == once
    assert PASSES[name]().run(module) is False
    assert print_module(module) == once


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda f: f.name)
def test_a_family_has_a_tiny_preset_and_a_parity_test(family: Family) -> None:
    assert family.tiny in family.presets
    assert preset(family.tiny).hidden <= 64
    assert set(family.model_types) & set(CONFIGS), f"tests/strategies.py draws no {family.name} checkpoint"


def test_error_codes_are_stable_and_unique() -> None:
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.MoecError)]
    codes = [c.code for c in classes]
    assert len(set(codes)) == len(codes)
    assert all(re.fullmatch(r"M0\d{3}", code) for code in codes)
