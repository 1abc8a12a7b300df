"""Tuning files: what a build makes of one, and why it passes one over."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

import moec
from moec.codegen.choosing import STANDS_FOR, Choosing, choose_by, pick, prices
from moec.codegen.constants import Constants
from moec.codegen.schedules import Problem, Schedule, space
from moec.codegen.select import ROWS, SWITCH, eligible, explain, ladder
from moec.codegen.tuned import SHIPPED, Tuning, read_tuning
from moec.errors import BadTuning
from moec.ir import parse_module, read_module
from moec.ir.devices import GPUS
from moec.tune import files
from moec.tune.files import find_tuning, versions
from tests.codegen.packages import moe_layer

H100 = GPUS["sm_90a"]
FIXTURE = json.loads(Path(__file__).with_name("tuning").joinpath("made-up.json").read_text(encoding="utf-8"))
PRODUCT = FIXTURE["problems"][0]
TWICE = PRODUCT | {"points": [*PRODUCT["points"], PRODUCT["points"][0]]}
FEW, MANY = Schedule("swapped", 32, 64, 64, 4, 3), Schedule("rows", 64, 64, 64, 4, 4)
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """The fixture with some fields changed, as a file."""

    def make(path: Path | None = None, text: str | None = None, **changes: Any) -> Path:
        path = path or tmp_path / "made-up.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        given = FIXTURE | {"versions": versions("sm_90a")} | changes
        path.write_text(json.dumps(given, indent=1) if text is None else text, encoding="utf-8")
        return path

    return make


def build(tmp_path: Path, **options: Any) -> tuple[moec.Built, list[str]]:
    """A package for sm_90a, and what it warned of."""
    given = moec.BuildOptions(cache=str(tmp_path / "cache"), force=True, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        built = moec.build(moe_layer(), "sm_90a", tmp_path / "built", "f16", given)
    return built, [str(w.message) for w in caught]


def schedules(built: moec.Built) -> dict[str, dict[str, Any]]:
    module = read_module(built.ir_files[-1])
    return {op.name: op.annotations for f in module for op in f.ops if "schedule" in op.annotations}


# Read.
def test_reading(write: Write) -> None:
    tuning = read_tuning(write(), pytest.fail)
    ((problem, points),) = tuning.measured.items()
    assert problem.text == "4 x [2 x 6, 8] f16, gathered" and list(points) == [0.5, 8.0]
    assert min(points[8.0], key=lambda s: points[8.0][s]) == MANY
    assert tuning.origin(problem) == "Made-Up GPU, 2000-01-02"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"text": '{\n "format": 1,\n "device": oops\n}'}, ["M0707", "made-up.json:3:12", '"device": oops']),
        ({"text": "[1]"}, ["JSON object"]),
        ({"text": ""}, ["made-up.json:1", "no JSON"]),
        ({"format": 2}, ["format 2", "tune again"]),
        ({"device": 7}, ["device is 7, not text"]),
        ({"target": "cpu"}, ["target is 'cpu'"]),
        ({"versions": []}, ["versions is []"]),
        ({"problems": {}}, ["problems is {}, not a list"]),
        ({"problems": [{"problem": {"experts": 4}, "points": []}]}, ["problems[0].problem"]),
        ({"problems": [{"problem": {"experts": "4"}, "points": []}]}, ["problems[0].problem"]),
        ({"constants": {"latency": -1}}, ["not positive numbers"]),
        ({"constants": {"latency": 10**400}}, ["constants is"]),
        ({"constants": {"latency": 1e300}}, ["latency is 1e+300, not between 1e-09 and 0.001"]),
        ({"constants": {"triton": 1e-300}}, ["triton is 1e-300, not between 0.00075 and 1"]),
        ({"constants": {"shows": 1.5}}, ["shows is 1.5, not between 0.0001 and 1"]),
        ({"problems": [TWICE]}, ["made-up.json:", "points[2].rows is 0.5, which another point has too"]),
        *(
            ({"problems": [PRODUCT | {"problem": PRODUCT["problem"] | wrong}]}, ["problems[0].problem"])
            for wrong in ({"experts": -8}, {"depth": 0}, {"dtype": ""}, {"itemsize": 256}, {"itemsize": 3})
        ),
        ({"format": True}, ["format True", "tune again"]),
        ({"text": '{"format": ' + "1" * 5000 + "}"}, ["no tuning file"]),
    ],
)
def test_a_damaged_file_is_refused_by_name(change: dict[str, Any], words: list[str], write: Write) -> None:
    path = write(**change)
    with pytest.raises(BadTuning) as caught:
        read_tuning(path)
    assert all(word in str(caught.value) for word in ["made-up.json", *words]), caught.value


@pytest.mark.parametrize(
    ("point", "words"),
    [
        ({"rows": 0}, "points[1].rows is 0"),
        ({"rows": 10**400}, "points[1].rows is 1000"),
        ({"rows": 1e308}, "points[1].rows is 1e+308, more than 2147483648"),
        ({"measured": {"rows 64x64x64 w4 s3": 0}}, "points[1].measured.rows 64x64x64 w4 s3 is 0"),
        ({"measured": {"rows 64x64x64 w4 s3": True}}, "is True, not a positive number"),
        ({"measured": []}, "points[1].measured is []"),
        ({"date": None}, "points[1].date is None"),
    ],
)
def test_a_damaged_point_is_refused_by_its_place_and_line(
    point: dict[str, Any], words: str, write: Write
) -> None:
    ((where, value),) = point.items()
    where = next(iter(value)) if value and isinstance(value, dict) else where
    problem = json.loads(json.dumps(FIXTURE["problems"][0]))
    problem["points"][1] |= point
    with pytest.raises(BadTuning) as caught:
        read_tuning(path := write(problems=[problem]))
    assert caught.value.loc is not None
    line = path.read_text(encoding="utf-8").splitlines()[caught.value.loc.line - 1]
    assert f'"{where}": ' in line and f"{path}:{caught.value.loc.line}" in str(caught.value)
    assert "problems[0]." + words.partition("points")[1] in str(caught.value)
    assert words in str(caught.value)


def test_schedules_that_the_space_hasn_t_are_left_out(write: Write) -> None:
    problem = json.loads(json.dumps(FIXTURE["problems"][0]))
    ladder = f"<4 rows: {FEW.text}; {MANY.text}"
    problem["points"][0]["measured"] = {"rows 16x64x64 w4 s3": 1e-6, FEW.text: 1e-5, "rows 0x0x0 w0 s0": 1e-7}
    problem["points"][0]["measured"][ladder] = 1e-8
    odd = problem | {"problem": problem["problem"] | {"colour": 3}}
    said: list[str] = []
    tuning = read_tuning(write(problems=[problem, odd]), said.append)
    assert list(next(iter(tuning.measured.values()))[0.5]) == [FEW]
    assert len(said) == 2 and "colour" in said[0] and "the slow path, and 2 more" in said[1]


# Picked.
def test_measured_schedules_hold_around_their_rows_and_the_model_s_elsewhere(write: Write) -> None:
    tuning = read_tuning(write())
    (problem,) = tuning.measured
    with choose_by(Choosing(tuning=tuning)):
        rungs = pick(problem, H100)
        other = replace(problem, experts=5)
        assert pick(other, H100) == ladder(other, H100)
        assert pick(problem, GPUS["sm_100a"]) == ladder(problem, GPUS["sm_100a"])

    def at(rows: float) -> Schedule:
        return next(s for below, s in rungs if rows < below)

    assert at(0.5) == at(0.5 * STANDS_FOR) == FEW and at(8.0) == at(8.0 / STANDS_FOR) == MANY
    plain = ladder(problem, H100)
    assert FEW not in {s for _, s in plain}
    for rows in (1 / 64, 1000.0):  # where one more schedule would gain little, a neighbour's stays
        seconds = {c.schedule: c.seconds for c in explain(problem, H100, rows)}
        assert seconds[at(rows)] <= math.exp(SWITCH) * min(seconds.values())
    assert pick(problem, H100) == plain  # the context has ended


def test_k_is_split_no_further_than_without_measurements(write: Write) -> None:
    """Measured at 48 rows, which stand for up to 96: there tiles are enough for all SMs."""
    base = read_tuning(write())
    problem = Problem(1, 7168, 2048, "f8e4m3", 1)
    whole = Schedule("swapped", 32, 128, 128, 4, 4)
    split = replace(whole, split=4)
    assert {whole, split} <= set(space(problem, H100)) and eligible(split, problem, H100, 48.0)
    assert not eligible(split, problem, H100, 96.0)
    measured = {48.0: {split: 1e-6, whole: 1e-5}}
    tuning = replace(base, measured={problem: measured}, dates={problem: "2000-01-01"})
    with choose_by(Choosing(tuning=tuning)):
        rungs = pick(problem, H100)
    taken = {rows: next(s for below, s in rungs if rows < below) for rows in ROWS if 24 <= rows <= 96}
    assert taken[24.0] == taken[48.0] == split and taken[96.0] == whole
    assert all(eligible(s, problem, H100, rows) for rows, s in taken.items())


def test_the_model_goes_by_a_file_s_constants(write: Write) -> None:
    slow = Constants(prologue=1e-4)
    tuning = read_tuning(write(constants=asdict(slow) | {"unheard": 1}), lambda line: None)
    (problem,) = tuning.measured
    other = replace(problem, experts=256, columns=2048, depth=7168)
    assert ladder(other, H100, slow) != ladder(other, H100)
    with choose_by(Choosing(tuning=tuning)):
        assert pick(other, H100) == ladder(other, H100, slow)


def test_one_for_all_goes_by_measurements_too(write: Write) -> None:
    """A schedule that was found twice as fast as the model's choice wherever it was measured."""
    base = read_tuning(write())
    (problem,) = base.measured
    with choose_by(Choosing(batch_invariant=True)):
        ((_, modelled),) = pick(problem, H100)
    best = next(s for s in (FEW, MANY) if s != modelled)
    points = {2.0**i: {best: 1e-6, modelled: 1e-5} for i in range(-6, 13)}
    tuning = Tuning(base.path, base.device, base.target, base.versions, None, {problem: points}, base.dates)
    with choose_by(Choosing(True, tuning)):
        ((_, one),) = pick(problem, H100)
        assert one == best
        assert all(ratio == pytest.approx(1.0) for rows, ratio in prices(problem, H100) if rows < 8192)


# Built.
def test_a_build_says_what_it_goes_by(write: Write, tmp_path: Path) -> None:
    path = write()
    built, said = build(tmp_path, tuning=str(path))
    assert not said
    found = schedules(built)
    assert found["gather_grouped_linear"]["tuned"] == "Made-Up GPU, 2000-01-02"
    assert FEW.text in found["gather_grouped_linear"]["schedule"]
    assert "tuned" not in found["grouped_linear_combine"]
    assert built.manifest["tuning"] == {
        "file": "made-up.json",
        "device": "Made-Up GPU",
        "versions": versions("sm_90a"),
        "constants": False,
        "used": [{"problem": "4 x [2 x 6, 8] f16, gathered", "ops": ["gather_grouped_linear"]}],
    }
    variants = {k["variant"] for k in built.manifest["kernels"] if "gather" in k["kernel"]}
    assert {FEW.tile, MANY.tile} <= variants
    text = built.ir_files[-1].read_text(encoding="utf-8")
    assert 'tuned="Made-Up GPU, 2000-01-02"' in text
    parse_module(text, "again.moec")


def test_none_means_none(write: Write, tmp_path: Path) -> None:
    write(files.folder_of(moec.BuildOptions(cache=str(tmp_path / "cache"))) / "a.json")
    assert build(tmp_path, tuning="none")[0].manifest["tuning"] is None
    assert build(tmp_path)[0].manifest["tuning"]["file"] == "a.json"


def test_moec_ops_go_by_it(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moec.codegen.choosing import choosing
    from moec.ops import compiled

    seen = []
    monkeypatch.setenv("MOEC_TUNING", str(write()))
    import torch

    monkeypatch.setattr("moec.driver.optimise", lambda *given: seen.append(choosing()) or 1 / 0)
    options = moec.BuildOptions.from_environment()
    key = compiled.Key("fused", "sm_90a", True, torch.float16, 4, 8, 12, 2, torch.float32, options=options)
    for invariant in (False, True):
        with pytest.raises(ZeroDivisionError):
            compiled._build(replace(key, batch_invariant=invariant))
    assert [how.batch_invariant for how in seen] == [False, True]
    assert all(how.tuning and how.tuning.device == "Made-Up GPU" for how in seen)


# Passed over.
@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"target": "sm_80", "problems": []}, "it is of Made-Up GPU, sm_80, and the build is for sm_90a"),
        ({"versions": {"moec": moec.__version__, "triton": "2.0"}}, "it was measured with triton 2.0"),
        ({"versions": {"moec": "0.0.1", "triton": "x"}}, "it was measured with moec 0.0.1"),
    ],
)
def test_a_file_of_something_else_is_ignored_and_said_to_be(
    change: dict[str, Any], why: str, write: Write, tmp_path: Path
) -> None:
    path = write(**change)
    built, said = build(tmp_path, tuning=str(path))
    assert built.manifest["tuning"] is None
    assert len(said) == 1 and said[0].startswith(f"{path} is ignored: {why}")


def test_a_file_of_another_device_than_the_one_here(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "device_here", lambda target: "NVIDIA H200")
    path = write()
    built, said = build(tmp_path, tuning=str(path))
    assert built.manifest["tuning"] is None and said == [
        f"{path} is ignored: it is of Made-Up GPU, and this is NVIDIA H200"
    ]
    monkeypatch.setattr(files, "device_here", lambda target: "Made-Up GPU")
    assert build(tmp_path, tuning=str(path))[0].manifest["tuning"]


def test_a_damaged_file_stops_a_build_that_names_it_and_no_other(write: Write, tmp_path: Path) -> None:
    path = write(text="{")
    with pytest.raises(BadTuning, match="no JSON"):
        build(tmp_path, tuning=str(path))
    with pytest.raises(BadTuning, match="No such file"):
        build(tmp_path, tuning=str(tmp_path / "none.json"))
    assert not (tmp_path / "built").exists()
    lying = write(files.folder_of(moec.BuildOptions(cache=str(tmp_path / "cache"))) / "a.json", text="{")
    built, said = build(tmp_path)
    assert built.manifest["tuning"] is None
    assert len(said) == 1 and said[0].startswith(f"{lying} is ignored: {lying}:1")


def test_of_several_devices_files_that_of_the_one_here_is_taken(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = moec.BuildOptions(cache=str(tmp_path / "cache"))
    folder = files.folder_of(options)
    write(folder / "a.json")
    write(folder / "b.json", device="Another GPU")
    with pytest.warns(UserWarning, match=r"a\.json, .*b\.json are of several devices"):
        assert find_tuning(options, "sm_90a") is None
    monkeypatch.setattr(files, "device_here", lambda target: "Another GPU")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = find_tuning(options, "sm_90a")
        assert found is not None and found.path == folder / "b.json"
        assert find_tuning(options, "cpu") is None


def test_shipped_files_are_whole(monkeypatch: pytest.MonkeyPatch, write: Write, tmp_path: Path) -> None:
    """Each can be read and has nothing that the space hasn't; and is found behind the user's own."""
    assert (SHIPPED / "README.md").is_file()
    for path in SHIPPED.glob("*.json"):
        assert read_tuning(path, pytest.fail).measured
    monkeypatch.setattr(files, "SHIPPED", tmp_path / "shipped")
    write(tmp_path / "shipped" / "x.json")
    options = moec.BuildOptions(cache=str(tmp_path / "cache"))
    found = find_tuning(options, "sm_90a")
    assert found is not None and found.path.name == "x.json"
    write(files.folder_of(options) / "own.json")
    found = find_tuning(options, "sm_90a")
    assert found is not None and found.path.name == "own.json"
