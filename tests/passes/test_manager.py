"""The pass manager and what watches it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moec.errors import BadOption, InternalError, IRError, OutputUnwritable
from moec.ir import Module, print_module, read_module
from moec.ir.op import op_class
from moec.passes import Dump, Events, Oracle, Pass, PassManager, parse_pipeline, pipeline
from moec.passes.instruments import relative_error
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
        "001_canonicalise.moec",
        "002_expert-grouping.moec",
        "003_mla-absorb.moec",
        "004_canonicalise.moec",
        "005_select.moec",
    ]
    for path in dump.files:
        assert print_module(read_module(path)) == path.read_text(encoding="utf-8")
    resumed = read_module(dump.files[1])
    PassManager(parse_pipeline("expert-grouping,canonicalise,select")).run(resumed)
    assert print_module(resumed) == print_module(m)


def test_events(tmp_path: Path) -> None:
    m = MoE(shared=True).build()
    events = Events(tmp_path / "build" / "events.jsonl")
    runs = PassManager(pipeline(2), [events]).run(m)
    written = [json.loads(line) for line in (tmp_path / "build" / "events.jsonl").read_text().splitlines()]
    assert written == events.rows
    assert [row["pass"] for row in written] == [
        "canonicalise",
        "expert-grouping",
        "mla-absorb",
        "canonicalise",
        "select",
    ]
    grouping = written[1]
    assert grouping["changed"] and grouping["seconds"] >= 0
    assert grouping["fired"] == {"expert-loop": 1, "gate-up": 1, "grouped-gate-up": 1}
    assert (grouping["ops_before"], grouping["ops_after"]) == (runs[1].ops_before, runs[1].ops_after)
    assert {"rule", "function", "op", "line", "reason"} == set(grouping["misses"][0])


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
    with pytest.raises(InternalError, match=r"break changed forward.0 by 1.00e\+00, more than 1.00e-05"):
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
    replay = f"after pass break; replay: moec opt {tmp_path}/001_canonicalise.moec -p break"
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
