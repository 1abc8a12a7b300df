"""merge-projections: the same dot products, which products join, and why others stay apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moec import models
from moec.errors import BadOption, ToleranceExceeded
from moec.ir import Interpreter, Module, Value, parse_module, print_module
from moec.passes import Oracle, parse_pipeline, pipeline
from moec.passes.manager import PassManager
from moec.passes.merge_projections import MergeProjections, joint_name
from moec.passes.pattern import Match
from tests.passes.modules import (
    MoE,
    golden_text,
    interpret,
    op_names,
    random_weights,
    reasons,
    replaced,
    run,
    tokens,
)
from tests.passes.whole import batches, lowered, same_step, step, whole_models

BLOCK = """\
moec.ir 1 func @forward(%x: f32[N,4]) -> (f32[N,8], f32[N,16], f32[N,8]) target=cpu
  param $a.q.weight: f32[8,4]
  param $a.kv.weight: f32[16,4]
  param $b: f32[8,4]
  %q = linear(%x, $a.q.weight) : f32[N,8] ; my_model.py:7
  %kv = linear(%x, $a.kv.weight) : f32[N,16] ; my_model.py:8
  %s = sigmoid(%kv) : f32[N,16]
  %y = linear(%q, $b_) : f32[N,8]
  return %y, %s, %q
end
""".replace("$b_", "$c").replace("  param $b: f32[8,4]", "  param $c: f32[8,8]")
Q = "%q = linear(%x, $a.q.weight) : f32[N,8]"
KV = "%kv = linear(%x, $a.kv.weight) : f32[N,16]"


def block(*edits: tuple[str, str]) -> Module:
    return parse_module(replaced(*edits)(BLOCK))


def outputs(m: Module, weights: dict[str, torch.Tensor], *args: Any) -> list[torch.Tensor]:
    return list(Interpreter(m, weights).run("forward", *args))


WITH_BIAS = (
    ("  param $c", "  param $a.q.bias: f32[8]\n  param $a.kv.bias: f32[16]\n  param $c"),
    ("$a.q.weight)", "$a.q.weight, $a.q.bias)"),
    ("$a.kv.weight)", "$a.kv.weight, $a.kv.bias)"),
)


@pytest.mark.parametrize("edits", [(), WITH_BIAS, (("f32", "bf16"),)], ids=["plain", "bias", "bf16"])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_same_results(edits: tuple[tuple[str, str], ...], count: int) -> None:
    m = block(*edits)
    weights, x = random_weights(m), tokens(count, 4, dtype="bf16" if edits == (("f32", "bf16"),) else "f32")
    before = outputs(m, weights, x)
    (done,) = run("merge-projections", m)
    assert done.fired == {"projections": 1}
    assert op_names(m) == ["linear", "split", "sigmoid", "linear"]
    product, split = m["forward"].ops[:2]
    assert [v and v.text for v in product.operands[1:]] == [
        "$a.q_kv.weight",
        "$a.q_kv.bias" if edits is WITH_BIAS else None,
    ]
    assert [r.text for r in split.results] == ["%q", "%kv"] and split.attrs["sizes"] == (8, 16)
    assert product.origin == "merge-projections(%q,%kv)"
    for a, b in zip(before, outputs(m, weights, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert print_module(parse_module(print_module(m))) == print_module(m)


PASSES = ["canonicalise", "expert-grouping", "mla-absorb", "merge-projections{align=1}", "permute-fusion"]


@given(model=whole_models(), batch=batches, order=st.permutations([*PASSES, "norm-fusion"]))
def test_whole_models_in_any_order(
    model: models.Model, batch: list[tuple[int, int]], order: list[str]
) -> None:
    m, weights = lowered(model)
    before = step(m, weights, batch)
    run("merge-projections{align=1}", m)
    same_step(before, step(m, weights, batch))
    run(",".join(order), m)
    same_step(before, step(m, weights, batch))
    run(",".join([*PASSES, "norm-fusion"]), m)
    same_step(before, step(m, weights, batch))


@pytest.mark.parametrize("bias", [False, True])
def test_q_k_and_v(bias: bool) -> None:
    attn = models.GQA(heads=4, kv_heads=2, head_dim=8, qkv_bias=bias)
    decoder = models.Decoder(attn, models.SwiGLU(8))
    m = models.lower(models.Model(vocab=9, hidden=16, layers=[decoder, decoder], dtype="f32"))
    run("expert-grouping,merge-projections", m)
    assert op_names(m, "layer.dense").count("linear") == 4  # q, k and v; o; gate and up; down
    (split,) = [op for op in m["layer.dense"].ops if op.attrs.get("sizes") == (32, 16, 16)]
    name = split.operands[0].op.operands[1].text  # type: ignore[union-attr]
    assert name == "$self_attn.q_proj_k_proj_v_proj.weight"


def test_q_a_and_kv_a_of_every_layer() -> None:
    m = models.lower(models.preset("deepseek-v3"))
    (done,) = PassManager(parse_pipeline("expert-grouping,mla-absorb,merge-projections")).run(m)[-1:]
    assert done.fired["projections"] == 2
    assert all("logits" in [r.name for r in op.results] for op in m["layer.moe"].ops if op.attrs.get("acc"))


def test_fp8_weights_are_joined_as_they_are_loaded() -> None:
    """What is loaded of each, its dequantisation included, is what is joined."""
    m = MoE(shared=True, fp8=True, gated=True, inner=8).build()
    weights, x = random_weights(m), tokens(4, 8)
    before = interpret(m, weights, x)
    assert run("merge-projections", m)[0].fired == {"projections": 2, "swiglu-halves": 2}
    torch.testing.assert_close(before, interpret(m, weights, x), rtol=1e-5, atol=1e-5)
    run("expert-grouping", m)
    assert op_names(m).count("grouped_linear") == 2
    torch.testing.assert_close(before, interpret(m, weights, x), rtol=1e-5, atol=1e-5)


def test_names_of_joint_weights() -> None:
    assert joint_name(["a.q.weight", "a.k.weight", "a.v.weight"]) == "a.q_k_v.weight"
    assert joint_name(["q", "k"]) == "q_k"
    assert joint_name(["a.x.w", "b.w"]) == "a_x_b.w"
    assert joint_name(["a.w", "a.w.w"]) == "a.w.w"  # then told apart by a number
    assert joint_name(["left.w", "right.v"]) == "left_w_right_v"


def test_golden(golden: Callable[[str, str], None]) -> None:
    m = block(*WITH_BIAS)
    golden("merge_projections.before.moec", golden_text(m))
    run("merge-projections", m)
    golden("merge_projections.after.moec", golden_text(m))


def test_halves_golden(golden: Callable[[str, str], None]) -> None:
    m = halves()
    golden("merge_projections_swiglu.before.moec", golden_text(m))
    (done,) = run("merge-projections", m)
    assert done.fired == {"swiglu-halves": 1}
    golden("merge_projections_swiglu.after.moec", golden_text(m))


HALVES = """\
moec.ir 1 func @forward(%x: f32[N,8]) -> f32[N,4] target=cpu
  %g, %u = split(%x) {sizes=[4,4]} : f32[N,4], f32[N,4]
  %h = swiglu(%g, %u) {act=gelu} : f32[N,4]
  return %h
end
"""


def halves(*edits: tuple[str, str]) -> Module:
    return parse_module(replaced(*edits)(HALVES))


MISSES: list[tuple[str, list[tuple[str, str]], str]] = [
    (
        "projections",
        [(KV, KV.replace("%x", "%z")), ("(%x: f32[N,4])", "(%x: f32[N,4], %z: f32[N,4])")],
        "no other projection reads %x",
    ),
    ("projections", [(KV, KV.replace(")", ") {acc=f32}"))], "acc is not given and f32"),
    ("projections", [*WITH_BIAS[:1], *WITH_BIAS[2:]], "only one has a bias"),
    (
        "projections",
        [("f32[N,16]", "f32[N,15]"), ("f32[16,4]", "f32[15,4]")],
        "%kv has 15 columns, no multiple of 8",
    ),
    (
        "projections",
        [
            (
                "  %s =",
                "  %more = linear(%q, $c) : f32[N,8]\n  %t = linear(%x, $a.kv.weight) : f32[N,16]\n  %s =",
            ),
            ("sigmoid(%kv)", "add(%kv, %t)"),
        ],
        "$a.kv.weight is used elsewhere too",
    ),
    (
        "projections",
        [
            (
                "  %s = sigmoid(%kv) : f32[N,16]",
                "  %s, %id = route(%kv) {k=2, score=sigmoid} : f32[N,2], i32[N,2]",
            ),
            ("f32[N,16], f32[N,8])", "f32[N,2], f32[N,8])"),
        ],
        "%kv are a router's scores",
    ),
    (
        "projections",
        [
            ("(%x: f32[N,4])", "(%x: f32[N,4], %v: f32[16,4])"),
            ("  param $a.kv.weight: f32[16,4]\n", ""),
            ("$a.kv.weight)", "%v)"),
        ],
        "has weights that are no parameters",
    ),
    ("swiglu-halves", [("swiglu(%g, %u)", "swiglu(%u, %g)")], "%g is result 1 of split"),
]


@pytest.mark.parametrize(("rule", "edits", "reason"), MISSES[:-1], ids=[why for *_, why in MISSES[:-1]])
def test_near_miss(rule: str, edits: list[tuple[str, str]], reason: str) -> None:
    m = block(*edits)
    runs = run("merge-projections", m)
    assert not runs[0].fired
    assert any(reason in found for found in reasons(runs, rule)), reasons(runs, rule)


@pytest.mark.parametrize(
    ("edits", "reason"),
    [
        ([("swiglu(%g, %u)", "swiglu(%u, %g)")], "%u is result 1 of split"),
        ([("swiglu(%g, %u)", "swiglu(%g, %g)")], "gate and up are not the two parts of %x in order"),
        (
            [("{sizes=[4,4]}", "{axis=0, sizes=[4,4]}"), ("f32[N,8]", "f32[8,4]"), ("f32[N,4]", "f32[4,4]")],
            "%x is not cut along its columns",
        ),
    ],
)
def test_near_miss_of_halves(edits: list[tuple[str, str]], reason: str) -> None:
    runs = run("merge-projections", halves(*edits))
    assert not runs[0].fired
    assert reason in reasons(runs, "swiglu-halves")


def test_a_weight_that_another_entry_reads_stays_apart() -> None:
    text = """\
moec.ir 1 module @test target=cpu

func @step(%x: f32[N,4]) -> (f32[N,8], f32[N,8])
  param $a: f32[8,4]
  param $b: f32[8,4]
  %p = linear(%x, $a) : f32[N,8]
  %q = linear(%x, $b) : f32[N,8]
  return %p, %q
end

func @head(%x: f32[N,4]) -> f32[N,8]
  param $b: f32[8,4]
  %q = linear(%x, $b) : f32[N,8]
  return %q
end
"""
    runs = run("merge-projections", parse_module(text))
    assert not runs[0].fired
    assert "$b is used in @head too" in reasons(runs, "projections", "step")


def test_a_reason_names_the_user_s_line() -> None:
    (done,) = run("merge-projections", block((KV, KV.replace(")", ") {acc=f32}"))))
    assert {"my_model.py:7", "my_model.py:8"} <= {miss["line"] for miss in done.misses}


def test_an_alignment_of_nothing() -> None:
    with pytest.raises(BadOption, match="align must be 1 or more"):
        parse_pipeline("merge-projections{align=0}")


def test_the_oracle_catches_parts_in_the_wrong_order(monkeypatch: pytest.MonkeyPatch) -> None:
    right = MergeProjections._join

    def swapped(self: MergeProjections, m: Match) -> Value:
        m.captures["all"].reverse()
        part = right(self, m)
        m.captures["all"].reverse()
        split = part.op  # type: ignore[attr-defined]
        m.replaced[:] = [(old, split.results[1 - new.index]) for old, new in m.replaced]  # type: ignore[attr-defined]
        return split.results[1 - part.index]  # type: ignore[attr-defined,no-any-return]

    monkeypatch.setattr(MergeProjections, "_join", swapped)
    m = block(("f32[16,4]", "f32[8,4]"), ("f32[N,16]", "f32[N,8]"))
    oracle = Oracle({"forward": (tokens(3, 4),)}, random_weights(m), tolerance=1e-5)
    with pytest.raises(ToleranceExceeded, match="merge-projections changed forward"):
        PassManager(parse_pipeline("merge-projections"), [oracle]).run(m)


def test_where_it_runs() -> None:
    names = [p.name for p in pipeline(2, "sm_90a")]
    assert names.index("expert-grouping") < names.index("merge-projections") < names.index("norm-fusion")
