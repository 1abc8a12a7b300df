"""Buffers as annotations: a golden pair, and what must not share one."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moec.errors import BadOption
from moec.ir import Interpreter, Module, parse_module, print_module
from moec.ir.lifetimes import lifetimes, view_of
from moec.passes import PassManager, parse_pipeline
from tests.passes.modules import (
    MoE,
    close,
    func,
    golden_text,
    interpret,
    module,
    moe_blocks,
    random_weights,
    run,
    tokens,
)


def grouped() -> Module:
    m = MoE(experts=8, k=2, hidden=256, inner=128, dtype="bf16", layered=True, shared=True).build()
    m.target = "sm_90a"
    PassManager(parse_pipeline("canonicalise,expert-grouping,canonicalise,permute-fusion,select")).run(m)
    return m


def test_golden(golden: Callable[[str, str], None]) -> None:
    m = grouped()
    golden("plan.before.moec", golden_text(m))
    run("plan", m)
    golden("plan.after.moec", golden_text(m))


def buffers(m: Module, function: str = "forward") -> dict[str, int | None]:
    return {
        r.name: b
        for op in m[function].ops
        for r, b in zip(op.results, op.annotations.get("buffer", (None,) * len(op.results)), strict=True)
    }


@given(block=moe_blocks(), pipeline=st.sampled_from(["plan", "expert-grouping,plan", "select,plan"]))
def test_what_is_needed_at_once_lies_apart(block: MoE, pipeline: str) -> None:
    m = block.build()
    weights, x = random_weights(m), tokens(5, block.hidden)
    before = interpret(m, weights, x)
    run(pipeline, m)
    close(before, interpret(m, weights, x), tolerance=1e-5)
    for function in (f for f in m if not f.name.startswith("weights")):
        number = buffers(m, function.name)
        for a, b in combinations(lifetimes(function), 2):
            if a.first <= b.last and b.first <= a.last:
                assert number[a.value.name] != number[b.value.name]


def test_views_and_state_have_none() -> None:
    m = module(
        func(
            "@step(%x: f32[N,4], %kv: cache<f32[4], page=8>, %layer: index, %slot: i64[N]) -> "
            "(f32[2*N,2], cache<f32[4], page=8>)",
            "%y = sigmoid(%x) : f32[N,4]",
            "%next = cache_write(%kv, %layer, %y, %slot) : cache<f32[4], page=8>",
            "%z = reshape(%y) {shape=[2*N,2]} : f32[2*N,2]",
            "return %z, %next",
        )
    )
    run("plan", m)
    assert buffers(m, "step") == {"y": 0, "next": None, "z": None}
    assert all(view_of(op) is None for op in m["step"].ops if "buffer" in op.annotations)


def test_an_edited_buffer_is_planned_again() -> None:
    m = grouped()
    run("plan", m)
    text = print_module(m)
    edited = parse_module(text.replace("buffer=0,", "buffer=7,"))
    assert print_module(edited) != text
    run("plan", edited)
    assert print_module(edited) == text


@pytest.mark.parametrize("order", ["plan,select", "plan,canonicalise", "select,expert-grouping"])
def test_what_would_undo_it_is_refused(order: str) -> None:
    with pytest.raises(BadOption, match="can't run after"):
        PassManager(parse_pipeline(order))


def test_a_planted_bug_in_the_drops_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A value that goes before its last use: the generated code has no such name."""
    from pathlib import Path
    from tempfile import TemporaryDirectory

    from moec.ir import memory
    from moec.ir.memory import FunctionPlan
    from tests.codegen.emission import Emitted

    m = MoE(shared=True).build()
    weights, x = random_weights(m), tokens(5, 8)
    PassManager(parse_pipeline("expert-grouping,canonicalise,select,plan")).run(m)
    (want,) = Interpreter(m, weights).run("forward", x)

    def got() -> object:
        with TemporaryDirectory() as folder:
            return Emitted(Path(folder), m, weights).run(x)[0]

    close(want, got())  # type: ignore[arg-type]

    def early(plan: FunctionPlan, *_: object) -> None:
        held = next(h for h in plan.held if h.last > h.first + 1)
        plan.drops = {held.first + 1: [held]}

    monkeypatch.setattr(memory, "_drops_of", early)
    with pytest.raises(UnboundLocalError):
        got()
