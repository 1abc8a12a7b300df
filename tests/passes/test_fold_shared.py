"""expert-grouping{fold_shared=true}: the same sums, and which shared experts stay apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moec import models
from moec.errors import ToleranceExceeded
from moec.ir import Module, parse_module, print_module
from moec.passes import Oracle, fold_shared, parse_pipeline, pipeline
from moec.passes.fold_shared import RULES
from moec.passes.manager import PassManager
from tests.passes.modules import (
    MoE,
    close,
    golden_text,
    interpret,
    moe_blocks,
    op_names,
    random_weights,
    reasons,
    replaced,
    run,
    tokens,
)
from tests.passes.whole import batches, lowered, same_step, step, whole_models

FOLD = "expert-grouping{fold_shared=true}"


@given(block=moe_blocks(shared=True, gated=True), count=st.integers(0, 7), seed=st.integers(0, 99))
def test_same_result(block: MoE, count: int, seed: int) -> None:
    m = block.build()
    weights, x = random_weights(m, seed), tokens(count, block.hidden, seed)
    before = interpret(m, weights, x)
    (done,) = run(FOLD, m)
    assert sum(done.fired.get(rule, 0) for rule in RULES) == 1
    close(before, interpret(m, weights, x))
    names = [op.name for f in m if not f.name.startswith("weights") for op in f.ops]
    assert names.count("grouped_linear") == 2 and names.count("swiglu") == 1 and "add" not in names
    assert print_module(parse_module(print_module(m))) == print_module(m)


ORDER = [FOLD, "canonicalise", "permute-fusion", "merge-projections{align=1}", "norm-fusion", "mla-absorb"]


@given(model=whole_models(), batch=batches, order=st.permutations(ORDER))
def test_whole_models_in_any_order(
    model: models.Model, batch: list[tuple[int, int]], order: list[str]
) -> None:
    m, weights = lowered(model)
    before = step(m, weights, batch)
    run(",".join(order), m)
    same_step(before, step(m, weights, batch))
    m, weights = lowered(model)
    PassManager(pipeline(3, "sm_90a")).run(m)
    same_step(before, step(m, weights, batch))


def moe(
    intermediate: int, shared: int, gate: str = "", act: str = "silu", experts: int = 4, k: int = 2
) -> models.MoE:
    return models.MoE(
        models.Router(experts, k, renorm=True, scale=2.5),
        models.Experts(experts, intermediate),
        models.SwiGLU(shared, act=act, name="shared"),
        gate,
    )


def grouped(mlp: models.MoE) -> tuple[Module, dict[str, torch.Tensor]]:
    m = models.lower(models.Layer(mlp, hidden=8, dtype="f32", name="layer"))
    weights = random_weights(m)
    return m, weights


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("passes", [FOLD, f"canonicalise,{FOLD}", f"expert-grouping,canonicalise,{FOLD}"])
def test_a_wide_one_is_many(count: int, passes: str) -> None:
    m, weights = grouped(moe(5, 5 * count))
    x = tokens(6, 8)
    before = interpret(m, weights, x)
    run(passes, m)
    route, sort = (next(op for op in m["forward"].ops if op.name == n) for n in ("route", "sort_by_expert"))
    assert route.attrs["shared"] == count and sort.attrs["experts"] == 4 + count
    assert str(route.results[0].type) == f"f32[N,{2 + count}]"
    close(before, interpret(m, weights, x))


def test_models_whose_layers_differ() -> None:
    """Other experts, choices and widths; dense layers between; one with a gate, one that doesn't fit."""
    mlps = [moe(4, 8), models.SwiGLU(6), moe(3, 3, experts=6, k=3), moe(4, 4, gate="g"), moe(4, 6), moe(4, 8)]
    attn = models.GQA(2, 1, 4)
    layers = [models.Decoder(attn, mlp) for mlp in mlps]
    m, weights = lowered(models.Model(vocab=11, hidden=16, layers=layers, dtype="f32", page=4))
    batch = [(3, 2), (1, 0), (0, 4)]
    before = step(m, weights, batch)
    (done,) = run(FOLD, m)
    assert (
        done.fired["expert-loop"] == 4
        and done.fired["fold-shared-add"] + done.fired.get("fold-shared-cast", 0) == 2
    )
    same_step(before, step(m, weights, batch))
    shared = {f.name: op.attrs["shared"] for f in m for op in f.ops if op.name == "route"}
    assert sorted(shared.values()) == [0, 0, 1, 2]
    why = {miss["reason"] for miss in done.misses if miss["rule"] in RULES}
    assert "the shared MLP has 6 columns, no multiple of an expert's 4" in why
    assert any("comes from mul, not linear" in reason for reason in why)
    assert all(miss["line"] for miss in done.misses if miss["rule"] in RULES)


BLOCK = """\
moec.ir 1 func @forward(%x: f32[N,4], %logits: f32[N,3]) -> f32[N,4] target=cpu
  param $w13: f32[3,6,4]
  param $w2: f32[3,4,3]
  param $s13: f32[12,4]
  param $s2: f32[4,6]
  %w, %id = route(%logits) {k=2, score=softmax} : f32[N,2], i32[N,2]
  %slot, %off = sort_by_expert(%id) {experts=3} : i32[2*N~3], i32[4]
  %xe = gather_rows(%x, %slot) {per_row=2} : f32[2*N~3,4]
  %gu = grouped_linear(%xe, $w13, %off) : f32[2*N~3,6]
  %h = swiglu(%gu) : f32[2*N~3,3]
  %d = grouped_linear(%h, $w2, %off) : f32[2*N~3,4]
  %sgu = linear(%x, $s13) : f32[N,12]
  %sh = swiglu(%sgu) : f32[N,6]
  %s = linear(%sh, $s2) : f32[N,4] ; mine.py:9
  %y = combine(%d, %slot, %w, %s) : f32[N,4]
  return %y
end
"""
ADDED = BLOCK.replace(
    "  %y = combine(%d, %slot, %w, %s) : f32[N,4]",
    "  %c = combine(%d, %slot, %w) : f32[N,4]\n  %y = add(%s, %c) : f32[N,4]",
)
CAST = BLOCK.replace(
    "  %y = combine(%d, %slot, %w, %s) : f32[N,4]",
    "  %c = combine(%d, %slot, %w) {to=f16} : f16[N,4]\n"
    "  %c.1 = cast(%c) {to=f32} : f32[N,4]\n  %y = add(%c.1, %s) : f32[N,4]",
)
SOURCES = {"fold-shared": BLOCK, "fold-shared-add": ADDED, "fold-shared-cast": CAST}


@pytest.mark.parametrize("rule", RULES)
def test_golden(rule: str, golden: Callable[[str, str], None]) -> None:
    m = parse_module(SOURCES[rule])
    golden(f"{rule}.before.moec", golden_text(m))
    assert run(FOLD, m)[0].fired == {rule: 1}
    golden(f"{rule}.after.moec", golden_text(m))


MISSES: list[tuple[str, list[tuple[str, str]], str]] = [
    (
        "fold-shared",
        [("return %y", "return %y, %id"), ("-> f32[N,4]", "-> (f32[N,4], i32[N,2])")],
        "%id is used elsewhere too",
    ),
    (
        "fold-shared",
        [("%s = linear(%sh, $s2)", "%s.1 = linear(%sh, $s2) : f32[N,4]\n  %s = sigmoid(%s.1)")],
        "%s comes from sigmoid, not linear",
    ),
    (
        "fold-shared",
        [("swiglu(%sgu)", "swiglu(%sgu) {act=gelu}")],
        "the experts' act is silu, the shared one's gelu",
    ),
    (
        "fold-shared",
        [("swiglu(%sgu)", "swiglu(%sgu) {limit=7.0}")],
        "the experts' limit is not given, the shared one's 7.0",
    ),
    (
        "fold-shared",
        [
            ("f32[12,4]", "f32[10,4]"),
            ("f32[4,6]", "f32[4,5]"),
            ("f32[N,12]", "f32[N,10]"),
            ("%sh = swiglu(%sgu) : f32[N,6]", "%sh = swiglu(%sgu) : f32[N,5]"),
        ],
        "the shared MLP has 5 columns, no multiple of an expert's 3",
    ),
    (
        "fold-shared",
        [
            ("linear(%x, $s13)", "linear(%z, $s13)"),
            ("%logits: f32[N,3])", "%logits: f32[N,3], %z: f32[N,4])"),
        ],
        "%z and %x are not the same",
    ),
    (
        "fold-shared",
        [("%logits: f32[N,3]", "%logits: f32[N,4]")],
        "%slot sorts 3 experts, but the router knows 4",
    ),
    (
        "fold-shared",
        [
            (
                "%slot, %off = sort_by_expert(%id)",
                "%i = add(%id, %id) : i32[N,2]\n  %slot, %off = sort_by_expert(%i)",
            )
        ],
        "%slot and %off are not of %id, sorted",
    ),
    (
        "fold-shared-add",
        [("return %y", "return %y, %c"), ("-> f32[N,4]", "-> (f32[N,4], f32[N,4])")],
        "%c is used more than once, by add and return",
    ),
    (
        "fold-shared-cast",
        [("%c.1 = cast(%c) {to=f32}", "%c.2 = cast(%c) {to=f32} : f32[N,4]\n  %c.1 = sigmoid(%c.2)")],
        "%c.1 comes from sigmoid, not cast",
    ),
]


@pytest.mark.parametrize(("rule", "edits", "reason"), MISSES, ids=[f"{r}: {why}" for r, _, why in MISSES])
def test_near_miss(rule: str, edits: list[tuple[str, str]], reason: str) -> None:
    m = parse_module(replaced(*edits)(SOURCES[rule]))
    runs = run(FOLD, m)
    assert not set(runs[0].fired) & set(RULES)
    assert reason in reasons(runs, rule)


def test_every_rule_has_a_near_miss() -> None:
    assert {rule for rule, _, _ in MISSES} == {*RULES}


def test_without_the_option_it_stays_away() -> None:
    m = parse_module(BLOCK)
    assert not run("expert-grouping", m)[0].fired
    assert "route" in op_names(m) and pipeline(2)[1].options.fold_shared is False
    assert pipeline(3)[1].options.fold_shared is True


def test_fp8_weights() -> None:
    block = replace(MoE(shared=True, fp8=True), inner=8)
    m = block.build()
    weights, x = random_weights(m), tokens(5, 8)
    before = interpret(m, weights, x)
    run(FOLD, m)
    close(before, interpret(m, weights, x))


def test_the_oracle_catches_columns_in_the_wrong_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gate and up of all shared experts, not of each, one behind the other."""

    def careless(m: Any, count: int, width: int) -> Any:
        whole = fold_shared.loaded(m.module, m.function, m["s13"])
        return fold_shared._emit(m, "reshape", [whole], shape=(count, 2 * width, 4))[0]

    monkeypatch.setattr(fold_shared, "_gate_up", careless)
    m = parse_module(BLOCK)
    inputs = (tokens(4, 4), tokens(4, 3, seed=2))
    oracle = Oracle({"forward": inputs}, random_weights(m), tolerance=1e-5)
    with pytest.raises(ToleranceExceeded, match="expert-grouping changed forward"):
        PassManager(parse_pipeline(FOLD), [oracle]).run(m)
