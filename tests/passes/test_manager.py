"""The pass manager and what watches it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from moec.errors import BadOption, InternalError, IRError, OutputUnwritable, ToleranceExceeded
from moec.ir import Module, print_module, read_module
from moec.ir.op import op_class
from moec.passes import (
    Dump,
    Events,
    Instrument,
    Oracle,
    Pass,
    PassManager,
    PassRun,
    parse_pipeline,
    pipeline,
)
from moec.passes.firings import Prices
from moec.passes.instruments import relative_error, sqnr
from tests.passes.modules import MoE, random_weights, tokens


class Break(Pass):
    """A pass that does what it's told: nothing, another result, an invalid module, a crash."""

    name = "break"

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def run(self, module: Module) -> bool:
        forward = module["forward"]
        if self.how == "result":
            forward.ret(*(double(module, v) for v in forward.outputs))
        elif self.how == "invalid":
            forward.ops[0].results[0].name = "no name"
        elif self.how == "crash":
            raise ZeroDivisionError("by nothing")
        return self.how != "nothing"


def double(module: Module, value: Any) -> Any:
    return module["forward"].create(op_class("add")([value, value])).results[0]


def test_dumps_read_back_and_resume(tmp_path: Path) -> None:
    m = MoE(fp8=True, layered=True, shared=True).build()
    dump = Dump(tmp_path / "ir")
    PassManager(pipeline(2), [dump]).run(m)
    names = [path.name for path in dump.files]
    assert names == [
        "000_naive.moec",
        "002_expert-grouping.moec",
        "005_canonicalise.moec",
        "007_select.moec",
        "008_plan.moec",
    ], "the others find nothing to change"
    for path in dump.files:
        assert print_module(read_module(path)) == path.read_text(encoding="utf-8")
    resumed = read_module(dump.files[1])
    assert (resumed.ran, resumed.to_run) == (
        "canonicalise,expert-grouping",
        "mla-absorb,paged-attention,canonicalise,decode-entry,select,plan",
    )
    again = Dump(tmp_path / "again")
    PassManager(parse_pipeline(resumed.to_run), [again]).run(resumed)
    assert print_module(resumed) == print_module(m)
    assert [(f.name, f.read_text()) for f in again.files] == [(f.name, f.read_text()) for f in dump.files[1:]]


def test_a_pass_that_says_it_changed_nothing_changed_nothing() -> None:
    """Dumps leave such passes out."""
    m = MoE(layered=True, shared=True).build()

    class Compare(Instrument):
        seen: ClassVar[set[bool]] = set()

        def start(self, module: Module) -> None:
            self.text = print_module(module)

        def after(self, run: PassRun, module: Module) -> None:
            text = print_module(module)
            assert (text != self.text) == run.changed, run.ran
            self.text = text
            self.seen.add(run.changed)

    compare = Compare()
    for target in ("sm_90a", "cpu"):
        PassManager(pipeline(3, target), [compare]).run(m)
    assert compare.seen == {True, False}


def test_history_through_a_changed_order(tmp_path: Path) -> None:
    """A pass that the dump doesn't name as its next one is put in; the others stay to run."""
    m = MoE().build()
    PassManager(parse_pipeline("expert-grouping,canonicalise,permute-fusion"), [Dump(tmp_path)]).run(m)
    m = read_module(tmp_path / "001_expert-grouping.moec")
    PassManager(parse_pipeline("mla-absorb")).run(m)
    assert (m.ran, m.to_run) == ("expert-grouping,mla-absorb", "canonicalise,permute-fusion")
    PassManager(parse_pipeline("canonicalise")).run(m)
    assert (m.ran, m.to_run) == ("expert-grouping,mla-absorb,canonicalise", "permute-fusion")
    assert m.clone().ran == m.ran


def test_events(tmp_path: Path) -> None:
    m = MoE(shared=True).build()
    events = Events(tmp_path / "build" / "events.jsonl")
    runs = PassManager(pipeline(2), [events]).run(m)
    written = [json.loads(line) for line in (tmp_path / "build" / "events.jsonl").read_text().splitlines()]
    assert written == events.rows
    passes = [row for row in written if row["event"] == "pass"]
    assert [(row["number"], row["pass"]) for row in passes] == [
        (1, "canonicalise"),
        (2, "expert-grouping"),
        (3, "mla-absorb"),
        (4, "paged-attention"),
        (5, "canonicalise"),
        (6, "decode-entry"),
        (7, "select"),
        (8, "plan"),
    ]
    grouping = passes[1]
    assert grouping["changed"] and grouping["seconds"] >= 0
    assert grouping["fired"] == {"expert-loop": 1, "gate-up": 1, "grouped-gate-up": 1}
    assert (grouping["ops_before"], grouping["ops_after"]) == (runs[1].ops_before, runs[1].ops_after)
    assert {"rule", "function", "op", "line", "reason", "asked"} == set(grouping["misses"][0])


def test_a_row_for_each_firing() -> None:
    """Prices by hand: 2 layers of 4 experts, 2 choices, 8 wide inside 6, at N = 10 on the cpu target."""
    m = MoE(layered=True).build()
    events = Events(sizes={"N": 10})
    PassManager(pipeline(2), [events]).run(m)
    fired = [row for row in events.rows if row["event"] == "fired"]
    names = [(row["number"], row["rule"]) for row in fired]
    assert names == [(2, "expert-loop"), (2, "grouped-gate-up"), (5, "combine-dtype")]
    loop, gate_up, _ = fired
    assert (loop["pass"], loop["function"], loop["runs"]) == ("expert-grouping", "layer", 2)
    assert loop["line"].startswith("modules.py:") and loop["rule_line"].startswith("expert_grouping.py:")
    # What was an op a choice and expert is one for all: 7 ops a run of a body that ran 4 times, and a zero.
    assert loop["delta"]["launches"] == 7 - (4 * 7 + 1)
    assert loop["gone"][0].startswith("for_each(") and loop["made"][-1].startswith("combine(")
    assert gate_up["matched"] == ["%h", "%g", "%u"] and gate_up["out"] == ["%h"]
    assert set(gate_up["reads"]) == {
        "%rows", "%off", "$mlp.experts.gate_proj.weight", "$mlp.experts.up_proj.weight"
    }  # fmt: skip
    # One product less reads its rows (8 wide) and offsets; a choice's row has 4-byte elements.
    saved = {"ops": -1, "launches": -1, "bytes": -(20 * 8 * 4 + 5 * 4), "flops": 0}
    us = -(20 * 8 * 4 + 5 * 4) / 50e9 * 1e6
    assert gate_up["delta"] == saved | {"us": pytest.approx(us, abs=1e-3)}
    row = next(row for row in events.rows if row["event"] == "pass" and row["number"] == 2)
    assert row["delta"]["launches"] == 2 * (loop["delta"]["launches"] + gate_up["delta"]["launches"])
    assert row["sizes"] == {"N": 10}


def test_the_deltas_add_up() -> None:
    """What each firing saves is, over all passes, what the module costs less."""
    m = MoE(layered=True, shared=True).build()
    before = Prices(m).costs.function("forward")
    events = Events()
    PassManager(pipeline(2, "sm_90a"), [events]).run(m)
    after = Prices(m).costs.function("forward")
    deltas = [row["delta"] for row in events.rows if row["event"] == "pass"]
    for key in ("launches", "bytes", "flops"):
        change = getattr(after, key) - getattr(before, key)
        assert sum(d[key] for d in deltas) == pytest.approx(change, abs=1), key
    us = (after.seconds - before.seconds) * 1e6
    assert sum(d["us"] for d in deltas) == pytest.approx(us, abs=1e-2) and us < 0


def test_misses_name_the_users_line() -> None:
    m = MoE(shared=True).build()
    runs = PassManager(pipeline(2)).run(m)
    lines = {miss["line"] for miss in runs[1].misses}
    assert lines and all(line.startswith("modules.py:") for line in lines)


def test_the_oracle_sees_what_changed_and_what_did_not() -> None:
    block = MoE(layered=True)
    m = block.build()
    oracle = Oracle({"forward": [tokens(5, 8)]}, random_weights(m))
    PassManager([Break("nothing"), *parse_pipeline("expert-grouping"), Break("result")], [oracle]).run(m)
    nothing, grouping, broken = oracle.rows
    assert nothing["outputs"] == {"forward.0": 0.0}
    assert set(nothing["values"].values()) == {0.0} and "layer@layers.1.:%d" not in nothing["values"]
    assert 0 < grouping["outputs"]["forward.0"] < 1e-6
    assert grouping["values"]["layer@layers.2.:%y"] < 1e-6
    assert broken["outputs"]["forward.0"] == pytest.approx(1.0)


def test_the_oracle_can_stop_the_pipeline() -> None:
    m = MoE().build()
    oracle = Oracle({"forward": [tokens(5, 8)]}, random_weights(m), tolerance=1e-5)
    with pytest.raises(ToleranceExceeded, match=r"break changed forward.0 by 1.00e\+00, more than 1.00e-05"):
        PassManager([Break("result")], [oracle]).run(m)


@pytest.mark.parametrize(
    ("before", "after", "error"),
    [
        ([1.0, -4.0], [1.0, -4.0], 0.0),
        ([1.0, -4.0], [2.0, -4.0], 0.25),
        ([1.0, float("nan")], [1.0, float("nan")], 0.0),
        ([1.0, float("nan")], [1.0, 0.0], float("inf")),
        ([1.0, 2.0], [1.0, float("nan")], float("inf")),
        ([float("inf"), 2.0], [float("inf"), 1.0], 0.5),
        ([1.0], [1.0, 1.0], float("inf")),
        ([], [], 0.0),
    ],
)
def test_relative_error(before: list[float], after: list[float], error: float) -> None:
    assert relative_error(torch.tensor(before), torch.tensor(after)) == error


@pytest.mark.parametrize(("how", "kind"), [("invalid", IRError), ("crash", InternalError)])
def test_an_error_names_the_pass_and_the_replay(how: str, kind: type[Exception], tmp_path: Path) -> None:
    m = MoE().build()
    manager = PassManager([*parse_pipeline("canonicalise"), Break(how)], [Dump(tmp_path)])
    with pytest.raises(kind) as caught:
        manager.run(m)
    # canonicalise changes nothing here: what it was given is what it leaves
    replay = f"after pass break; replay: moec opt {tmp_path}/000_naive.moec -p break"
    assert replay in str(caught.value)
    if how == "crash":
        assert "break failed: ZeroDivisionError: by nothing" in str(caught.value)
        assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_without_dumps_there_is_no_replay() -> None:
    with pytest.raises(InternalError) as caught:
        PassManager([Break("crash")]).run(MoE().build())
    assert str(caught.value).endswith("after pass break")


def test_an_invalid_module_is_refused_before_the_first_pass() -> None:
    m = MoE().build()
    m["forward"].ops[0].results[0].name = "no name"
    with pytest.raises(IRError):
        PassManager([]).run(m)


def test_an_unwritable_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputUnwritable):
        PassManager([], [Dump(tmp_path / "file" / "ir")]).run(MoE().build())
    with pytest.raises(OutputUnwritable):
        PassManager([], [Events(tmp_path / "file" / "events.jsonl")]).run(MoE().build())


def ordered(*phases: int) -> list[Pass]:
    return [type(f"P{i}", (Break,), {"name": f"p{i}", "phase": n})("nothing") for i, n in enumerate(phases)]


@pytest.mark.parametrize("phases", [(), (3,), (0, 0, 1, 2, 3), (2, 2), (0, 3)])
def test_legal_orders_are_those_of_phases_that_do_not_fall(phases: tuple[int, ...]) -> None:
    PassManager(ordered(*phases))


@pytest.mark.parametrize("phases", [(1, 0), (0, 2, 1), (3, 3, 0, 3)])
def test_another_order_is_refused_naming_both(phases: tuple[int, ...]) -> None:
    fall = next(i for i in range(1, len(phases)) if phases[i] < phases[i - 1])
    with pytest.raises(BadOption) as caught:
        PassManager(ordered(*phases))
    assert caught.value.message == (
        f"p{fall} (phase {phases[fall]}) can't run after p{fall - 1} (phase {phases[fall - 1]})"
    )


@given(st.lists(st.floats(-4, 4), min_size=1, max_size=50), st.floats(-3, 0))
def test_sqnr_of_scaled_noise(values: list[float], power: float) -> None:
    """Noise that is 10^p of the signal, element by element, is at -20·p dB: by the definition."""
    a = torch.tensor(values, dtype=torch.float64)
    assume(float((a**2).sum()) > 1e-6)
    assert sqnr(a, a * (1 + 10**power)) == pytest.approx(-20 * power, abs=1e-3)
    assert sqnr(a, a) == math.inf and sqnr(a, torch.zeros_like(a)) == pytest.approx(0.0, abs=1e-9)


def test_sqnr_of_what_is_no_number() -> None:
    nan = torch.tensor([1.0, torch.nan])
    assert sqnr(nan, nan.clone()) == math.inf
    assert sqnr(nan, torch.tensor([1.0, 0.0])) == sqnr(torch.ones(2), torch.ones(3)) == -math.inf
    assert sqnr(torch.zeros(2), torch.ones(2)) == -math.inf


def test_sqnr_of_eight_bits() -> None:
    """6.02 dB a bit for values that use the whole range evenly."""
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(100_000, generator=generator, dtype=torch.float64) * 2 - 1
    rounded = (uniform * 128).round() / 128
    assert sqnr(uniform, rounded) == pytest.approx(20 * math.log10(2 * 128), abs=0.1)


@pytest.mark.parametrize("text", ["canonicalise", "decode-entry", "select"])
def test_what_a_dump_has_behind_it_counts(text: str) -> None:
    """Kernels, buffers and entries would be stale: the header says what has run."""
    m = MoE().build()
    m.ran = "mla-absorb{absorb_below=9},canonicalise,decode-entry{max_new=4},select,plan"
    before = print_module(m)
    with pytest.raises(BadOption, match="can't run after plan") as error:
        PassManager(parse_pipeline(text)).run(m)
    assert error.value.notes == ("plan has run on this module: take a dump from before it",)
    assert print_module(m) == before
    PassManager(parse_pipeline("plan")).run(m)
    m.ran = "canonicalise,a-pass-of-another-moec"
    PassManager(parse_pipeline(text)).run(m)


@pytest.mark.parametrize("tolerance", [float("nan"), -1.0])
def test_a_tolerance_that_judges_nothing_is_refused(tolerance: float) -> None:
    m = MoE().build()
    oracle = Oracle({"forward": [tokens(5, 8)]}, random_weights(m), tolerance)
    with pytest.raises(BadOption, match="it must be 0 or more"):
        PassManager([], [oracle]).run(m)
