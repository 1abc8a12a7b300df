"""permute-fusion{route_sort=true}: the router's choice and the sort as one op, and when not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moec import models
from moec.errors import ToleranceExceeded
from moec.ir import Interpreter, Module, Value, parse_module, print_module
from moec.passes import Oracle, parse_pipeline, pipeline
from moec.passes.manager import PassManager
from moec.passes.pattern import Match
from moec.passes.permute_fusion import ROUTING
from tests.passes.modules import golden_text, op_names, random_weights, reasons, replaced, run, tokens
from tests.passes.whole import batches, lowered, moe, same_step, step, whole_models

FUSE = "permute-fusion{route_sort=true}"
BLOCK = """\
moec.ir 1 func @forward(%l: f32[N,6]) -> (f32[N,3], i32[3*N~7], i32[8], i32[N,3]) target=cpu
  param $b: f32[6]
  %w, %id = route(%l, $b) {groups=3, k=2, score=sigmoid, shared=1, topk_groups=2} : f32[N,3], i32[N,3]
  %slot, %off = sort_by_expert(%id) {experts=7} : i32[3*N~7], i32[8] ; mine.py:4
  %i = add(%id, %id) : i32[N,3]
  return %w, %slot, %off, %i
end
"""


def block(*edits: tuple[str, str]) -> Module:
    return parse_module(replaced(*edits)(BLOCK))


def outputs(m: Module, weights: dict[str, torch.Tensor], x: torch.Tensor) -> list[torch.Tensor]:
    return list(Interpreter(m, weights).run("forward", x))


@pytest.mark.parametrize("count", [0, 1, 9])
def test_the_same_bits_and_the_routing_stays_in_use(count: int) -> None:
    m = block()
    weights, x = random_weights(m), tokens(count, 6).round()  # many ties
    before = outputs(m, weights, x)
    assert run(FUSE, m)[0].fired == {"route-sort": 1}
    assert op_names(m) == ["route_sort", "add"]
    fused = m["forward"].ops[0]
    assert [r.text for r in fused.results] == ["%w", "%id", "%slot", "%off"]
    assert fused.origin == "permute-fusion(%w,%id,%slot,%off)"
    for a, b in zip(before, outputs(m, weights, x), strict=True):
        assert torch.equal(a, b)
    assert print_module(parse_module(print_module(m))) == print_module(m)


ORDER = [
    "canonicalise",
    "expert-grouping{fold_shared=true}",
    FUSE,
    "merge-projections{align=1}",
    "norm-fusion",
]


@given(model=whole_models(mlp=moe()), batch=batches, order=st.permutations(ORDER))
def test_whole_models_in_any_order(
    model: models.Model, batch: list[tuple[int, int]], order: list[str]
) -> None:
    m, weights = lowered(model)
    before = step(m, weights, batch)
    run(",".join(order), m)
    same_step(before, step(m, weights, batch))
    run(",".join([*ORDER[:2], FUSE]), m)
    same_step(before, step(m, weights, batch))
    assert not {"route", "sort_by_expert"} & {op.name for f in m for op in f.ops}


def test_golden(golden: Callable[[str, str], None]) -> None:
    m = block()
    golden("route_sort.before.moec", golden_text(m))
    run(FUSE, m)
    golden("route_sort.after.moec", golden_text(m))


MISSES: list[tuple[list[tuple[str, str]], str]] = [
    (
        [
            ("{experts=7} : i32[3*N~7], i32[8]", "{experts=6} : i32[3*N~6], i32[7]"),
            ("i32[3*N~7], i32[8],", "i32[3*N~6], i32[7],"),
        ],
        "the router knows 7 experts, not 6",
    ),
    (
        [("sort_by_expert(%id)", "sort_by_expert(%z)"), ("%l: f32[N,6])", "%l: f32[N,6], %z: i32[N,3])")],
        "an operand is %z, an argument, not the result of route",
    ),
]


def test_more_experts_than_its_kernel_takes() -> None:
    big = [("f32[N,6]", "f32[N,1200]"), ("$b: f32[6]", "$b: f32[1200]"), ("experts=7", "experts=1201")]
    runs = run(FUSE, block(*big, ("i32[3*N~7], i32[8]", "i32[3*N~1201], i32[1202]")))
    assert reasons(runs, "route-sort") == ["1201 experts are more than 1024"]


@pytest.mark.parametrize(("edits", "reason"), MISSES, ids=[why for _, why in MISSES])
def test_near_miss(edits: list[tuple[str, str]], reason: str) -> None:
    runs = run(FUSE, block(*edits))
    assert not runs[0].fired
    assert reason in reasons(runs, "route-sort")
    assert runs[0].misses[-1]["line"] == "mine.py:4"


def test_where_it_runs() -> None:
    """Only where it was asked for: on the GPU targets, which have a kernel for it."""
    (fusing,) = [p for p in pipeline(2, "sm_90a") if p.name == "permute-fusion"]
    assert fusing.options.route_sort
    assert not run("permute-fusion", block())[0].fired


def test_the_oracle_catches_slots_of_other_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    def unbiased(m: Match) -> list[Value]:
        route = m["route"]
        w, id, slot, off = m.create("route_sort", route.operands[0], **route.attrs)
        m.also(route, w, id)
        return [slot, off]

    monkeypatch.setitem(ROUTING, "route-sort", (ROUTING["route-sort"][0], unbiased))  # type: ignore[arg-type]
    m = block()
    oracle = Oracle({"forward": (tokens(9, 6),)}, random_weights(m), tolerance=1e-5)
    with pytest.raises(ToleranceExceeded, match="permute-fusion changed forward"):
        PassManager(parse_pipeline(FUSE), [oracle]).run(m)
