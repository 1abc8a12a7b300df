"""Warps with tasks of their own, from a measurement to a package: tuned with a made-up clock, then built."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import moec
from moec.codegen.choosing import Choosing, choose_by, pick, prices
from moec.codegen.ladders import parse_ladder
from moec.codegen.schedules import Problem
from moec.codegen.specialised import LEAST_ROWS, specialised
from moec.codegen.tuned import Tuning, read_tuning
from moec.errors import UnknownKernel
from moec.ir import read_module
from moec.tune.refit import measurements

from .conftest import Cli
from .test_tune import H100, Plan, layer, of, package, plan, true, tune, uncompiled

__all__ = ["package", "plan", "uncompiled"]  # fixtures, which pytest finds by name

FAST = 0.3
OPS = ("gather_grouped_linear", "grouped_linear_combine")


@pytest.fixture
def file(package: Path, tmp_path: Path, plan: Plan) -> Path:
    """A tuning file of a device on which they are far faster, at 0.25, 16, 64 and 512 rows an expert."""
    plan(specialised=FAST)
    path: Path = tune(package, tmp_path, (1, 64, 256, 2048), out=tmp_path / "fast.json").file
    return path


def build(tmp_path: Path, file: Path, **options: Any) -> moec.Built:
    given = moec.BuildOptions(tuning=str(file), cache=str(tmp_path / "cache"), force=True, **options)
    return moec.build(layer(), "sm_90a", tmp_path / "built", options=given)


def annotations(built: moec.Built) -> dict[str, dict[str, str]]:
    module = read_module(built.ir_files[-1])
    return {op.name: op.annotations for f in module for op in f.ops if op.name in OPS}


@pytest.fixture
def uncompiled_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moec.driver.compiler", lambda *given: None)


def test_they_are_measured_where_experts_have_rows(package: Path, tmp_path: Path, plan: Plan) -> None:
    """With the package of Gluon's record; and where they bring nothing the search goes on as without."""
    log = plan()
    outcome = tune(package, tmp_path, (1, 64, 256, 2048))
    for one in outcome.found:
        mine = specialised(one.product.problem, H100)
        assert mine
        for point in one.points:
            assert (
                set(mine) <= point.measured.keys()
                if point.rows >= LEAST_ROWS
                else not (set(mine) & point.measured.keys())
            )
            seconds = true(one.product, point.rows)
            assert point.measured == pytest.approx({s: seconds[s] for s in point.measured})
            others = [s for s in point.measured if s.form != "specialised"]
            assert len(others) > 6 and next(iter(point.measured)) == point.analytic
    requests = [json.loads(line) for line in log.read_text().splitlines()]
    assert sum(r["do"] == "measure" for r in requests) == sum(
        len(point.measured) for one in outcome.found for point in one.points
    )


def test_a_candidate_s_package_runs_gluon_s_record(package: Path, tmp_path: Path) -> None:
    for number, product in enumerate(of(package)):
        for s in specialised(product.problem, H100):
            product.write(folder := tmp_path / f"{number} {s}", s, "sm_90a")
            sources = "".join(f.read_text() for f in (folder / "kernels").glob("*.py"))
            assert f"{product.op.name}_specialised" in sources and f'"{s.tile}": Variant' in sources
            assert "_SWAPPED" not in sources and "_FEW" not in sources


def test_a_build_takes_them_where_they_were_faster(
    file: Path, tmp_path: Path, uncompiled_build: None
) -> None:
    tuning = read_tuning(file, pytest.fail)
    built = build(tmp_path, file)
    found = annotations(built)
    assert {name: a["kernel"] for name, a in found.items()} == {op: f"gluon.{op}" for op in OPS}
    for problem, name in zip(tuning.measured, OPS, strict=True):
        rungs = parse_ladder(found[name]["schedule"], problem, H100)
        at = {rows: next(s for below, s in rungs if rows < below) for rows in (0.25, 16.0, 64.0, 512.0)}
        assert [at[r].form == "specialised" for r in at] == [False, False, True, True], at
        assert found[name]["tuned"].startswith("NVIDIA H100")
        source = (built.path / "kernels" / f"{name}.py").read_text()
        assert f"{name.upper()}_SPECIALISED" in source and f"{name.upper()}_SWAPPED" in source
    assert [u["ops"] for u in built.manifest["tuning"]["used"]] == [[op] for op in OPS]


def test_the_model_is_not_fitted_to_them(file: Path) -> None:
    tuning = read_tuning(file)
    every = [s for points in tuning.measured.values() for m in points.values() for s in m]
    mine = [s for s in every if s.form == "specialised"]
    assert mine and len(measurements(tuning)) == len(every) - len(mine)
    assert not [m for m in measurements(tuning) if m.schedule.form == "specialised"]
    assert json.loads(file.read_text())["fit"]["measurements"] == len(every) - len(mine)


def test_invariant_builds_never_take_them_and_say_what_that_costs(
    file: Path, tmp_path: Path, uncompiled_build: None
) -> None:
    built = build(tmp_path, file, batch_invariant=True)
    for name, found in annotations(built).items():
        assert found["kernel"] == f"triton.{name}" and "specialised" not in found["schedule"]
    tuning = read_tuning(file)
    with choose_by(Choosing(batch_invariant=True, tuning=tuning)):
        for problem in tuning.measured:
            ((_, one),) = pick(problem, H100, specialised=True)
            assert one.form != "specialised"
            costs, slow = dict(prices(problem, H100)), dict(without(tuning, problem))
            assert costs[0.25] == slow[0.25] and costs[512.0] > 1.5 * slow[512.0]


def without(tuning: Tuning, problem: Problem) -> list[tuple[float, float]]:
    """What one schedule costs beside those of the others that were measured."""
    others = {
        p: {rows: {s: t for s, t in m.items() if s.form != "specialised"} for rows, m in points.items()}
        for p, points in tuning.measured.items()
    }
    with choose_by(Choosing(batch_invariant=True, tuning=replace(tuning, measured=others))):
        return prices(problem, H100)


def test_a_family_that_the_build_prefers_goes_first(
    file: Path, tmp_path: Path, uncompiled_build: None
) -> None:
    built = build(tmp_path, file, kernels="triton")
    for name, found in annotations(built).items():
        assert found["kernel"] == f"triton.{name}" and "specialised" not in found["schedule"]
        assert found["tuned"]  # the others' measurements count


def test_moec_shows_it(file: Path, tmp_path: Path, cli: Cli, uncompiled_build: None) -> None:
    built = build(tmp_path, file)
    done = cli("show", str(built.path), "--cost", "--at", "T=2048")
    assert done.code == 0, done.err
    assert [line.split()[-1] for line in done.out.splitlines() if "grouped_linear" in line] == ["Gluon"] * 2


def test_the_explanation_says_it(
    file: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "mine.py"
    model.write_text(LAYER, encoding="utf-8")
    how = ("list", "kernels", "--explain", f"{model}:layer", "--tokens", "1,2048", "--json")
    monkeypatch.setenv("MOEC_TUNING", "none")
    plain = json.loads(cli(*how).out)
    assert not [row for row in plain if row["schedule"].startswith("specialised")]
    monkeypatch.setenv("MOEC_TUNING", str(file))
    for row in json.loads(cli(*how).out):
        mine = row["schedule"].startswith("specialised")
        assert mine == (row["tokens"] == 2048) == row["terms, µs"].startswith("measured on NVIDIA H100")
        assert (row["µs by the model"] == "-") == mine


LAYER = """
from moec import models

router = models.Router(experts=16, top_k=4, renorm=True)
block = models.MoE(router, models.Experts(count=16, intermediate=384))
layer = models.Layer(block, hidden=512, dtype="bf16", name="layer")
"""


def test_the_family_that_goes_first_is_one(tmp_path: Path, uncompiled_build: None) -> None:
    """It forces Gluon's where there are any, says that there are none, and refuses what isn't one."""
    given = moec.BuildOptions(cache=str(tmp_path / "cache"), force=True, kernels="gluon")
    built = moec.build(layer(), "sm_90a", tmp_path / "built", options=given)
    for name, found in annotations(built).items():
        assert found["kernel"] == f"gluon.{name}" and "tuned" not in found
        assert found["schedule"].endswith(" persistent") and "; specialised " in found["schedule"]
    assert built.manifest["emitted_by"]["gluon"] == list(OPS)
    with pytest.warns(UserWarning, match="no op here can have a kernel of gluon's on sm_80"):
        old = moec.build(layer(), "sm_80", tmp_path / "built", options=given)
    assert {a["kernel"] for a in annotations(old).values()} == {f"triton.{op}" for op in OPS}
    with pytest.raises(UnknownKernel, match="called 'gloun'; did you mean gluon"):
        moec.build(layer(), "sm_90a", tmp_path / "no", options=replace(given, kernels="gloun"))


def test_pytorch_s_may_go_first_too(tmp_path: Path, uncompiled_build: None) -> None:
    given = moec.BuildOptions(cache=str(tmp_path / "cache"), kernels="torch")
    built = moec.build(layer(), "sm_90a", tmp_path / "built", options=given)
    assert list(built.manifest["emitted_by"]) == ["torch"]
