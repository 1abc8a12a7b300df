"""permute-fusion: the choices that are here and their sort as one op, and when not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moec.errors import ToleranceExceeded
from moec.ir import Interpreter, Module, Value, parse_module
from moec.passes import Oracle, parse_pipeline
from moec.passes.manager import PassManager
from moec.passes.pattern import Match
from moec.passes.permute_fusion import LOCAL
from tests.passes.modules import golden_text, op_names, reasons, replaced, run

BLOCK = """\
moec.ir 1 func @forward(%w: f32[N,3], %id: i32[N,3]) -> (f32[N,3], i32[3*N~4], i32[5], i32[N,3]) target=cpu
  %kept, %local = local_experts(%w, %id) {experts=4, first=2} : f32[N,3], i32[N,3]
  %slot, %off = sort_by_expert(%local) {experts=4} : i32[3*N~4], i32[5] ; mine.py:4
  return %kept, %slot, %off, %local
end
"""


def block(*edits: tuple[str, str]) -> Module:
    return parse_module(replaced(*edits)(BLOCK))


@pytest.mark.parametrize("count", [0, 1, 9])
def test_the_same_bits(count: int) -> None:
    m = block()
    generator = torch.Generator().manual_seed(count)
    w = torch.rand(count, 3, generator=generator)
    id = torch.randint(-1, 8, (count, 3), generator=generator, dtype=torch.int32)
    before = Interpreter(m, {}).run("forward", w, id)
    assert run("permute-fusion", m)[0].fired == {"local-sort": 1}
    assert op_names(m) == ["local_sort"]
    assert [r.text for r in m["forward"].ops[0].results] == ["%kept", "%local", "%slot", "%off"]
    after = Interpreter(m, {}).run("forward", w, id)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_golden(golden: Callable[[str, str], None]) -> None:
    m = block()
    golden("local_sort.before.moec", golden_text(m))
    run("permute-fusion", m)
    golden("local_sort.after.moec", golden_text(m))


MISSES = [
    (
        [
            (
                "sort_by_expert(%local) {experts=4} : i32[3*N~4], i32[5]",
                "sort_by_expert(%local) {experts=3} : i32[3*N~3], i32[4]",
            ),
            ("i32[3*N~4], i32[5], i32[N,3])", "i32[3*N~3], i32[4], i32[N,3])"),
        ],
        "4 experts are here, 3 are sorted",
    ),
    (
        [("sort_by_expert(%local)", "sort_by_expert(%id)")],
        "an operand is %id, an argument, not the result of",
    ),
]


@pytest.mark.parametrize(("edits", "reason"), MISSES, ids=[why for _, why in MISSES])
def test_near_miss(edits: list[tuple[str, str]], reason: str) -> None:
    runs = run("permute-fusion", block(*edits))
    assert not runs[0].fired
    assert any(reason in found for found in reasons(runs, "local-sort"))


def test_the_oracle_catches_experts_of_another_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    def elsewhere(m: Match) -> list[Value]:
        local = m["local"]
        kept, id, slot, off = m.create("local_sort", *local.operands, **local.attrs | {"first": 0})
        m.also(local, kept, id)
        return [slot, off]

    monkeypatch.setitem(LOCAL, "local-sort", (LOCAL["local-sort"][0], elsewhere))  # type: ignore[arg-type]
    inputs = torch.rand(9, 3), torch.arange(27, dtype=torch.int32).view(9, 3) % 8
    oracle = Oracle({"forward": inputs}, {}, tolerance=1e-5)
    with pytest.raises(ToleranceExceeded, match="permute-fusion changed forward"):
        PassManager(parse_pipeline("permute-fusion"), [oracle]).run(block())
