"""``moec tune`` with a worker that has a clock and no GPU; all else is real: processes, limits, files."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import moec
from moec import models
from moec.codegen.constants import ASSUMED, Constants
from moec.codegen.schedules import Schedule
from moec.codegen.select import explain, ladder, terms
from moec.codegen.specialised import specialised
from moec.codegen.tuned import read_tuning
from moec.errors import BadOption, BadTuning, DeviceUnavailable, NotAPackage
from moec.ir import read_module
from moec.ir.devices import GPUS
from moec.tune import session
from moec.tune.files import versions
from moec.tune.measuring import Limits, Measurer
from moec.tune.products import Product, products
from moec.tune.session import Session

from .conftest import Cli

DEVICE = "NVIDIA H100 80GB HBM3"
H100 = GPUS["sm_90a"]
# Not what the model assumes, so that its order isn't the clock's.
TRUE = Constants(latency=3e-6, prologue=6e-6, sm_bandwidth=50e9, triton=0.5, shows=0.4)
SLOWER = 3.0  # what warps with tasks of their own take of what the model says of their tile
QUICK = Limits(draw=60, measure=5)  # what hangs is waited for; no other reply should take that long
Plan = Callable[..., Path]


def layer(dtype: str = "bf16") -> models.Layer:
    block = models.MoE(
        models.Router(experts=16, top_k=4, renorm=True), models.Experts(count=16, intermediate=384)
    )
    return models.Layer(block, hidden=512, dtype=dtype, name="layer")


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without its kernels: a plan's clock needs none, and compiling takes time."""
    folder = tmp_path_factory.mktemp("tune")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moec.driver.compiler", lambda *given: None)
        return moec.build(layer(), "sm_90a", folder / "layer").path


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Candidates aren't compiled unless a test says so."""
    if "compiled" not in request.fixturenames:
        monkeypatch.setattr(
            "moec.tune.compiling.compile_many", lambda requests, cache: NOTHING(len(requests))
        )


class NOTHING:
    """What compiling gives where all of it went well."""

    class Cubin:
        @staticmethod
        def write(folder: Path) -> None: ...

    errors: tuple[()] = ()

    def __init__(self, count: int) -> None:
        self.cubins = [self.Cubin] * count


@pytest.fixture
def compiled() -> None: ...


def of(package: Path) -> list[Product]:
    return products(read_module(sorted((package / "ir").glob("*.moec"))[-1]), "sm_90a")[0]


@pytest.fixture
def plan(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """Makes the worker of a session one that goes by this plan."""

    def write(**changes: Any) -> Path:
        problems = {
            json.dumps(next(a["shape"] for a in p.arguments(1) if a["role"] == "weights")): asdict(p.problem)
            for p in of(package)
        }
        about = {
            "problems": problems,
            "constants": asdict(TRUE),
            "noise": 0.0,
            "specialised": SLOWER,
            "behave": {},
            "device": DEVICE,
        }
        file = tmp_path / "plan.json"
        file.write_text(json.dumps(about | {"log": str(tmp_path / "log")} | changes))
        fake = Path(__file__).with_name("fake_tuner.py")
        monkeypatch.setattr(session, "real_worker", lambda device: [sys.executable, str(fake), str(file)])
        return tmp_path / "log"

    return write


def tune(package: Path, tmp_path: Path, tokens: tuple[int, ...] = (1, 64, 2048), **how: Any) -> Any:
    given = {"seconds": 600.0, "limits": QUICK, "cache": str(tmp_path / "cache")} | how
    return Session(package, tokens=tokens, **given).run()


def choice(product: Product, rows: float) -> Schedule:
    return next(s for below, s in ladder(product.problem, H100) if rows < below)


def true(product: Product, rows: float, specialised_takes: float = SLOWER) -> dict[Schedule, float]:
    """What the fake worker's clock shows."""
    seconds = {c.schedule: c.seconds for c in explain(product.problem, H100, rows, TRUE)}
    for s in specialised(product.problem, H100):
        seconds[s] = specialised_takes * sum(terms(s, product.problem, H100, rows, TRUE).values())
    return seconds


def test_the_fastest_are_found_and_written(package: Path, tmp_path: Path, plan: Plan) -> None:
    plan()
    outcome = tune(package, tmp_path)
    assert outcome.file == tmp_path / "cache" / "tuning" / f"nvidia-h100-80gb-hbm3.triton-{triton()}.json"
    assert [len(one.points) for one in outcome.found] == [3, 3] and not outcome.notes
    gains = []
    for one in outcome.found:
        for point in one.points:
            assert point.analytic == choice(one.product, point.rows)
            assert point.rows == point.tokens * 4 / 16 and not point.excluded
            seconds = true(one.product, point.rows)
            assert point.measured == pytest.approx({s: seconds[s] for s in point.measured})
            assert point.analytic in point.measured and len(point.measured) > 6
            gains.append(point.speedup)
    assert min(gains) >= 1 and max(gains) > 1.01, gains
    written = read_tuning(outcome.file, pytest.fail)
    assert (written.device, written.target, dict(written.versions)) == (DEVICE, "sm_90a", versions("sm_90a"))
    assert {p: dict(m) for p, m in written.measured.items()} == {
        one.product.problem: {point.rows: point.measured for point in one.points} for one in outcome.found
    }
    entry = json.loads(outcome.file.read_text())["problems"][0]["points"][0]
    best = outcome.found[0].points[0]
    assert entry["schedule"] == best.best.text and entry["analytic"] == best.analytic.text
    assert entry["speedup"] == pytest.approx(best.speedup, abs=1e-4)
    assert entry["seconds"] == min(entry["measured"].values())


def triton() -> str:
    return versions("sm_90a")["triton"]


def test_one_that_crashes_hangs_or_is_wrong_harms_no_other(
    package: Path, tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each at one number of tokens; what follows is measured, compared and not excluded."""
    (first, *_) = of(package)
    monkeypatch.setattr(session, "products", lambda *given: ([first], []))
    order = [c.schedule for c in explain(first.problem, H100, 16.0)]
    order = [s for s in order if s != choice(first, 16.0)]
    how = dict(zip(("crash", "hang", "wrong", "fatal", "garbage"), order[1:6], strict=True))
    log = plan(behave={s.text: kind for kind, s in how.items()})
    outcome = tune(package, tmp_path, tokens=(64,))
    (point,) = outcome.found[0].points
    assert point.excluded.keys() >= {how[k] for k in ("crash", "hang", "wrong", "fatal")}
    said = {kind: point.excluded.get(s, "") for kind, s in how.items()}
    assert "signal 6" in said["crash"] and "illegal memory access" in said["crash"]
    assert "no result within" in said["hang"] and "off by" in said["wrong"] and "illegal" in said["fatal"]
    seconds = true(first, 16.0)
    assert point.measured == pytest.approx({s: seconds[s] for s in point.measured})
    assert len(point.measured) > 6 and point.speedup >= 1
    requests = [json.loads(line) for line in log.read_text().splitlines()]
    # After each death: operands anew, and the reference's results, before anything is compared.
    assert sum(r["do"] == "operands" for r in requests) >= 5
    written = json.loads(outcome.file.read_text())["problems"][0]["points"][0]["excluded"]
    assert written == {s.text: why for s, why in point.excluded.items()}


def test_the_model_s_own_choice_may_be_the_one_that_crashes(
    package: Path, tmp_path: Path, plan: Plan
) -> None:
    (first, *_) = of(package)
    plan(behave={choice(first, 16.0).text: "crash"})
    (point,) = tune(package, tmp_path, tokens=(64,)).found[0].points
    assert "signal 6" in point.excluded[point.analytic]
    assert point.measured and point.speedup is None


def test_a_reference_that_no_other_agrees_with_is_doubted(package: Path, tmp_path: Path, plan: Plan) -> None:
    (first, *_) = of(package)
    plan(behave={choice(first, 16.0).text: "alone"})
    (point,) = tune(package, tmp_path, tokens=(64,)).found[0].points
    assert not point.measured and "may be wrong itself" in point.skipped


def test_no_memory_for_the_operands(package: Path, tmp_path: Path, plan: Plan) -> None:
    plan(memory=False)
    outcome = tune(package, tmp_path)
    assert outcome.file is None and not list(tmp_path.glob("cache/tuning/*"))
    assert {point.skipped for one in outcome.found for point in one.points} == {"out of memory"}


def test_the_budget_is_kept_and_what_was_found_too(package: Path, tmp_path: Path, plan: Plan) -> None:
    """By a clock on which each look takes ten seconds: too little for 39 numbers of tokens, twice."""
    plan()
    looks = itertools.count()
    clock = lambda: 10.0 * next(looks)  # noqa: E731
    outcome = tune(package, tmp_path, tokens=tuple(range(1, 40)), seconds=3000.0, clock=clock)
    assert next(looks) < 360  # what was begun is ended
    counts = [sum(bool(point.measured) for point in one.points) for one in outcome.found]
    assert len(counts) == 2 and all(0 < count < 39 for count in counts)  # shared out
    tuning = read_tuning(outcome.file)
    assert [len(points) for points in tuning.measured.values()] == counts


def test_ctrl_c_loses_nothing(package: Path, tmp_path: Path, plan: Plan) -> None:
    plan()
    seen: list[str] = []

    def interrupt(line: str) -> None:
        seen.append(line)
        if len(seen) == 12:
            raise KeyboardInterrupt

    given = Session(package, 600, (1, 64), tmp_path / "x.json", str(tmp_path / "cache"), limits=QUICK)
    with pytest.raises(KeyboardInterrupt):
        given.run(interrupt)
    (points,) = read_tuning(tmp_path / "x.json").measured.values()
    assert sum(map(len, points.values())) >= 10 and "tokens" in seen[0]


def test_what_was_found_is_kept_after_each_number_of_tokens(
    package: Path, tmp_path: Path, plan: Plan
) -> None:
    """So that not even a machine that fails takes more with it than the last number's."""
    plan()
    kept: list[int] = []

    def count(path: Path) -> None:
        kept.append(sum(len(points) for points in read_tuning(path).measured.values()))

    given = Session(package, 600, (1, 64), tmp_path / "x.json", str(tmp_path / "cache"), limits=QUICK)
    given.run(keep=count)
    assert kept == [1, 2, 3, 4, 4]


def test_a_second_run_adds_to_the_file(package: Path, tmp_path: Path, plan: Plan) -> None:
    plan()
    out = tmp_path / "x.json"
    first = tune(package, tmp_path, (1, 64), out=out)
    old = read_tuning(out)
    plan(constants=asdict(ASSUMED))
    tune(package, tmp_path, (64, 512), out=out)
    new = read_tuning(out)
    for problem in (one.product.problem for one in first.found):
        assert list(new.measured[problem]) == [0.25, 16.0, 128.0]
        assert new.measured[problem][0.25] == old.measured[problem][0.25]
        assert new.measured[problem][16.0] != old.measured[problem][16.0]
    assert not [f for f in tmp_path.iterdir() if f.name.startswith(".x.json")]


def test_the_model_is_fitted_to_what_was_measured(package: Path, tmp_path: Path, plan: Plan) -> None:
    plan(noise=0.02)
    outcome = tune(package, tmp_path, (1, 8, 64, 512, 4096), out=tmp_path / "x.json")
    assert outcome.fit.before > 0.2 and outcome.fit.after < 0.06
    assert read_tuning(tmp_path / "x.json").constants == outcome.fit.constants


def test_what_it_needs_is_said(package: Path, tmp_path: Path, plan: Plan) -> None:
    plan(about={"error": "PyTorch finds no NVIDIA GPU here"})
    with pytest.raises(DeviceUnavailable, match="no NVIDIA GPU here") as caught:
        tune(package, tmp_path)
    assert "a GPU that runs sm_90a" in str(caught.value)
    plan(about={"device": "NVIDIA A100", "capability": [8, 0]})
    with pytest.raises(DeviceUnavailable, match=r"NVIDIA A100, compute capability 8\.0"):
        tune(package, tmp_path)
    with pytest.raises(NotAPackage):
        tune(tmp_path / "none", tmp_path)
    cpu = moec.build(layer("f32"), "cpu", tmp_path / "cpu").path
    with pytest.raises(BadOption, match="is for cpu: only packages for GPUs"):
        tune(cpu, tmp_path)


def test_a_file_that_can_t_be_added_to_is_refused_before_anything_is_measured(
    package: Path, tmp_path: Path, plan: Plan
) -> None:
    log = plan()
    out = tmp_path / "x.json"
    out.write_text('{\n "format": 1,\n oops\n}')
    with pytest.raises(BadTuning) as caught:
        tune(package, tmp_path, out=out)
    assert f"{out}:3" in str(caught.value)
    out.unlink()
    tune(package, tmp_path, (1,), out=out)
    text = out.read_text()
    plan(device="NVIDIA H200")
    log.unlink()
    with pytest.raises(BadOption, match=r"is of device 'NVIDIA H100 80GB HBM3', this is 'NVIDIA H200'"):
        tune(package, tmp_path, out=out)
    assert out.read_text() == text and "measure" not in log.read_text()


def test_the_command(package: Path, tmp_path: Path, plan: Plan, cli: Cli) -> None:
    plan()
    out = tmp_path / "x.json"
    done = cli("tune", str(package), "--tokens", "1,64", "--out", str(out), "--budget", "30")
    assert done.code == 0, done.err
    assert (
        f"on {DEVICE}" in done.out and f"written to {out}" in done.out and "the model was off by" in done.out
    )
    assert sum("gather_grouped_linear 16 x" in line for line in done.out.splitlines()) == 2
    done = cli("tune", str(package), "--tokens", "64", "--out", str(out), "--json")
    found = json.loads(done.out)
    assert found["device"] == DEVICE and len(found["products"]) == 2
    assert all(row["speedup"] >= 1 for row in found["products"])
    refitted = cli("tune", "--refit", str(out))
    assert refitted.code == 0 and "with the fitted constants" in refitted.out
    for given, code in [
        ([], 2),
        ([str(package), "--refit", str(out)], 2),
        ([str(package), "--budget", "0"], 1),
        ([str(package), "--tokens", "1,x"], 1),
        (["--refit", str(tmp_path / "none.json")], 1),
    ]:
        assert cli("tune", *given).code == code


def test_candidates_are_compiled(compiled: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Really, all of a small space; then each package is one that a worker can load."""
    from moec.codegen.schedules import space
    from moec.tune.compiling import Compiling
    from moec.tune.measuring import Failed

    with monkeypatch.context() as patch:
        patch.setattr("moec.driver.compiler", lambda *given: None)
        built = moec.build(layer("f32"), "sm_80", tmp_path / "f32").path
    (product, *_), _ = products(read_module(sorted((built / "ir").glob("*.moec"))[-1]), "sm_80")
    compiling = Compiling(tmp_path / "candidates", "sm_80", tmp_path / "cache")
    try:
        schedules = space(product.problem, GPUS["sm_80"])[:2]
        compiling.want([(product, s) for s in schedules])
        for schedule in schedules:
            folder = compiling.package(product, schedule, 120)
            assert [f.name for f in (folder / "cubin").glob("*.cubin")]
            manifest = json.loads((folder / "manifest.json").read_text())
            assert manifest["name"] == f"{product.op.name} {schedule.text}"
        impossible = Schedule("rows", 256, 256, 32, 4, 3)
        with pytest.raises(Failed, match="spill"):
            compiling.package(product, impossible, 60)
    finally:
        compiling.close()


def test_a_worker_that_isn_t_there(tmp_path: Path) -> None:
    from moec.tune.measuring import Failed

    measurer = Measurer([sys.executable, "-c", "raise SystemExit('gone')"], QUICK)
    with pytest.raises(Failed, match="ended with status 1: gone"):
        measurer.about()
    measurer.close()
