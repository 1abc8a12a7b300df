"""``moec.ops.building``: options around calls, functions of their own for each set of them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import moec
import moec.ops
from moec.errors import BadOption, BadTuning, UnknownKernel
from moec.ops import building, compiled
from moec.ops.options import options

from .experts import layer

ROOT = Path(__file__).parents[2]


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[compiled.Key]:
    """Keys of what is built from here on; what was is forgotten."""
    keys: list[compiled.Key] = []
    build = compiled._build
    monkeypatch.setattr(compiled, "_functions", {})
    monkeypatch.setattr(compiled, "_build", lambda key: keys.append(key) or build(key))
    return keys


def call() -> torch.Tensor:
    return moec.ops.fused_experts(*layer().args)


def test_each_set_of_options_has_functions_of_its_own(built: list[compiled.Key]) -> None:
    plain = call()
    for _ in range(2):
        with building(opt_level=1):
            assert torch.equal(call(), plain)
        call()
    assert [key.options.opt_level for key in built] == [2, 1]


def test_they_nest_and_end(built: list[compiled.Key]) -> None:
    before = options()
    with building(tuning=Path("a.json")) as outer:
        with building(kernels="gluon", tuning="none") as inner:
            assert options() == inner and (inner.tuning, inner.kernels) == ("none", "gluon")
        assert options() == outer and (outer.tuning, outer.kernels) == ("a.json", None)
        with pytest.raises(ZeroDivisionError), building(kernels="torch"):
            _ = 1 / 0
        assert options() == outer
    assert options() == before


def test_other_threads_have_none() -> None:
    seen: list[Any] = []
    with building(kernels="torch"):
        thread = threading.Thread(target=lambda: seen.append(options().kernels))
        thread.start()
        thread.join()
        assert options().kernels == "torch"
    assert seen == [None]


def test_the_batch_may_be_invariant_for_all_calls(built: list[compiled.Key]) -> None:
    with building(batch_invariant=True), pytest.warns(UserWarning, match="batch_invariant holds for moec's"):
        call()
    assert [key.batch_invariant for key in built] == [True]


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"tunning": "x"}, BadOption, "building: tunning is none; did you mean tuning?"),
        (
            {"target": "cpu"},
            BadOption,
            "building: target isn't an operator's; there is batch_inv",
        ),
        ({"fp8": True}, BadOption, "building: fp8 isn't an operator's"),
        ({"tuning": 3}, BadOption, "tuning is 3; it must be text"),
        ({"opt_level": 9}, BadOption, "opt_level is 9"),
        ({"kernels": "tritn"}, UnknownKernel, "'tritn'; did you mean triton"),
    ],
)
def test_what_is_no_option_is_refused(given: dict[str, Any], error: type[Exception], words: str) -> None:
    before = options()
    with pytest.raises(error) as refused, building(**given):
        pytest.fail("it was entered")
    assert words in str(refused.value) and options() == before


def test_a_file_that_isn_t_there_is_an_error_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    from moec.ops import library

    monkeypatch.setattr(library, "target_of", lambda device: ("sm_90a", True))
    monkeypatch.setattr(compiled, "require_interpreter", lambda *given: None)
    with building(tuning="none.json"), pytest.raises(BadTuning, match=r"can't read none\.json"):
        call()


BOTH = """
import sys, torch, moec.ops
from tests.moec.experts import close, layer, loop
from moec.ops import building, compiled

one = layer(9, k=2, experts=4, hidden=128, width=128, dtype=torch.float16)
wanted = loop(one)
for given in ({}, {"kernels": "gluon"}, {"kernels": "torch"}, {}):
    with building(**given):
        close(moec.ops.fused_experts(*one.args), wanted, torch.float16)
folders = sorted(compiled._scratch().iterdir())
found = ["".join(f.read_text() for f in (p / "kernels").glob("*.py")) for p in folders]
assert len(found) == 3
assert ["_specialised(" in text for text in found] == [False, True, False]
assert ["triton.jit" in text for text in found] == [True, True, False]
"""


def test_families_side_by_side_in_the_interpreter() -> None:
    """As a GPU's kernels: the picked ones, Gluon's where they can, PyTorch's."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "MOEC_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", BOTH], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
