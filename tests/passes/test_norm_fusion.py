"""norm-fusion: the same bits, the sum's other users, and why it stays away."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moec.errors import ToleranceExceeded
from moec.ir import Interpreter, Module, Value, parse_module, print_module
from moec.ir.scaled import quantize
from moec.models import Model
from moec.passes import Oracle, parse_pipeline, pipeline
from moec.passes.manager import PassManager
from moec.passes.norm_fusion import RULES
from moec.passes.pattern import Match
from tests.passes.modules import golden_text, op_names, random_weights, reasons, replaced, run, tokens
from tests.passes.whole import batches, lowered, same_step, step, whole_models

BLOCK = """\
moec.ir 1 func @forward(%a: f32[N,8], %b: f32[N,8]) -> (f32[N,8], f32[N,8]) target=cpu
  param $scale: f32[8]
  %s = add(%a, %b) : f32[N,8] ; my_model.py:12
  %y = rms_norm(%s, $scale) {eps=0.001} : f32[N,8]
  %z = mul(%s, %y) : f32[N,8]
  return %z, %s
end
"""


def block(*edits: tuple[str, str]) -> Module:
    return parse_module(replaced(*edits)(BLOCK))


def outputs(m: Module, weights: dict[str, torch.Tensor], *args: Any) -> list[torch.Tensor]:
    return list(Interpreter(m, weights).run("forward", *args))


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_same_bits_and_the_sum_stays_in_use(dtype: str, count: int) -> None:
    m = block(("f32", dtype), (f"$scale: {dtype}", "$scale: f32"))
    weights = random_weights(m)
    args = tokens(count, 8, 1, dtype), tokens(count, 8, 2, dtype)
    before = outputs(m, weights, *args)
    (done,) = run("norm-fusion", m)
    assert done.fired == {"add-norm": 1}
    assert op_names(m) == ["add_rms_norm", "mul"]
    fused = m["forward"].ops[0]
    assert [r.text for r in fused.results] == ["%s", "%y"] and (fused.attrs["eps"], fused.attrs["quant"]) == (
        0.001,
        None,
    )
    assert fused.origin == "norm-fusion(%s,%y)"
    for a, b in zip(before, outputs(m, weights, *args), strict=True):
        assert torch.equal(a, b)
    assert print_module(parse_module(print_module(m))) == print_module(m)


@given(
    model=whole_models(),
    batch=batches,
    order=st.permutations(["canonicalise", "expert-grouping", "mla-absorb", "permute-fusion", "norm-fusion"]),
)
def test_whole_models_in_any_order(model: Model, batch: list[tuple[int, int]], order: list[str]) -> None:
    m, weights = lowered(model)
    before = step(m, weights, batch)
    run("norm-fusion", m)
    same_step(before, step(m, weights, batch))
    run(",".join(order), m)
    same_step(before, step(m, weights, batch))
    adds = [op for f in m for op in f.ops if op.name == "rms_norm" and getattr(op.operands[0], "op", None)]
    assert not any(op.operands[0].op.name == "add" for op in adds)  # type: ignore[union-attr]


def test_two_norms_of_one_sum() -> None:
    """The second is of the fused op's sum."""
    m = block(("  %z = mul(%s, %y)", "  %n = rms_norm(%s, $scale) {eps=0.5} : f32[N,8]\n  %z = mul(%n, %y)"))
    weights, args = random_weights(m), (tokens(3, 8, 1), tokens(3, 8, 2))
    before = outputs(m, weights, *args)
    assert run("norm-fusion", m)[0].fired == {"add-norm": 1}
    assert op_names(m) == ["add_rms_norm", "rms_norm", "mul"]
    for a, b in zip(before, outputs(m, weights, *args), strict=True):
        assert torch.equal(a, b)


def test_golden(golden: Callable[[str, str], None]) -> None:
    m = block()
    golden("norm_fusion.before.moec", golden_text(m))
    run("norm-fusion", m)
    golden("norm_fusion.after.moec", golden_text(m))


QUANT = """\
moec.ir 1 func @forward(%a: f32[N,8], %b: f32[N,8]) -> (f32[N,3], f32[N,8]) target=cpu
  param $first.weight: f32[8]
  param $second.weight: f32[8]
  param $up.weight: f8e4m3[8,8]@s4x4
  param $down.weight: f8e4m3[3,8]@s4x4
  %n = rms_norm(%a, $first.weight) {eps=0.001} : f32[N,8]
  %n.q = quant(%n) {block=1x4, scale=ue8m0} : f8e4m3[N,8]@s1x4 ; my_model.py:14
  %up = linear(%n.q, $up.weight) {acc=f32} : f32[N,8]
  %s = add(%up, %b) : f32[N,8]
  %m = rms_norm(%s, $second.weight) {eps=0.001} : f32[N,8]
  %m.q = quant(%m) {block=1x4} : f8e4m3[N,8]@s1x4
  %y = linear(%m.q, $down.weight) {acc=f32} : f32[N,3]
  return %y, %s
end
"""


def scaled_weights(m: Module) -> dict[str, Any]:
    weights: dict[str, Any] = random_weights(m)
    for name, rows in (("up.weight", 8), ("down.weight", 3)):
        weights[name] = quantize(tokens(rows, 8, rows), (4, 4))
    return weights


def test_golden_quant(golden: Callable[[str, str], None]) -> None:
    m = parse_module(QUANT)
    golden("norm_fusion_quant.before.moec", golden_text(m))
    (done,) = run("norm-fusion", m)
    golden("norm_fusion_quant.after.moec", golden_text(m))
    assert done.fired == {"add-norm": 1, "norm-quant": 1, "add-norm-quant": 1}


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("count", [0, 1, 5])
@pytest.mark.parametrize("twice", [False, True], ids=["sum read once", "sum read twice"])
def test_same_bits_of_quantised_norms(dtype: str, count: int, twice: bool) -> None:
    more = "%z = mul(%s, %s) : f32[N,8]\n  return %y, %z"
    text = replaced(("return %y, %s", more))(QUANT) if twice else QUANT
    m = parse_module(text.replace("f32[N", f"{dtype}[N").replace("acc=f32", f"acc={dtype}"))
    weights = scaled_weights(m)
    args = tokens(count, 8, 1, dtype), tokens(count, 8, 2, dtype)
    before = outputs(m, weights, *args)
    run("norm-fusion", m)
    assert "quant" not in op_names(m)
    for a, b in zip(before, outputs(m, weights, *args), strict=True):
        assert torch.equal(a, b)
    assert print_module(parse_module(print_module(m))) == print_module(m)
    assert not run("norm-fusion", m)[0].changed


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_plain_rows_that_others_read_come_with_the_quantised(
    dtype: str, count: int, golden: Callable[[str, str], None]
) -> None:
    m = parse_module(
        replaced(("return %y, %s", "return %y, %m"))(QUANT)
        .replace("f32[N", f"{dtype}[N")
        .replace("acc=f32", f"acc={dtype}")
    )
    weights, args = scaled_weights(m), (tokens(count, 8, 1, dtype), tokens(count, 8, 2, dtype))
    before = outputs(m, weights, *args)
    if dtype == "f32" and count == 5:
        golden("norm_fusion_and_quant.before.moec", golden_text(m))
    (done,) = run("norm-fusion", m)
    if dtype == "f32" and count == 5:
        golden("norm_fusion_and_quant.after.moec", golden_text(m))
    assert done.fired["add-norm-and-quant"] == 1 and "quant" not in op_names(m)
    for a, b in zip(before, outputs(m, weights, *args), strict=True):
        assert torch.equal(a, b)
    assert print_module(parse_module(print_module(m))) == print_module(m)
    assert not run("norm-fusion", m)[0].changed


TWO = "  %up = linear(%n.q, $up.weight) {acc=f32} : f32[N,8]"
QUANT_MISSES: list[tuple[str, list[tuple[str, str]], str]] = [
    (
        "norm-quant",
        [(TWO, f"{TWO.replace('%up', '%u')}\n  %up = add(%u, %n) : f32[N,8]")],
        "%n is used more than once",
    ),
    (
        "norm-quant",
        [("block=1x4, scale=ue8m0} : f8e4m3[N,8]@s1x4", "block=*x*} : f8e4m3[N,8]@s*x*")],
        "a scale of several rows is known after the last of them",
    ),
    (
        "add-norm-and-quant",
        [
            ("return %y, %s", "return %y, %m"),
            ("block=1x4} : f8e4m3[N,8]@s1x4", "block=*x*} : f8e4m3[N,8]@s*x*"),
        ],
        "a scale of several rows is known after the last of them",
    ),
    (
        "add-norm-quant",
        [("block=1x4} : f8e4m3[N,8]@s1x4", "block=*x*} : f8e4m3[N,8]@s*x*")],
        "a scale of several rows is known after the last of them",
    ),
]


@pytest.mark.parametrize(("rule", "edits", "reason"), QUANT_MISSES, ids=range(len(QUANT_MISSES)))
def test_near_miss_of_quant(rule: str, edits: list[tuple[str, str]], reason: str) -> None:
    """Plain rows that others read, and scales of rows together, keep the quant."""
    runs = run("norm-fusion", parse_module(replaced(*edits)(QUANT)))
    assert rule not in runs[0].fired and "add-norm" in runs[0].fired
    assert any(reason in r for r in reasons(runs, rule)), reasons(runs, rule)


def test_rows_that_only_the_quant_reads_are_not_given_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    others = {name: rule for name, rule in RULES.items() if name != "add-norm-quant"}
    monkeypatch.setattr("moec.passes.norm_fusion.RULES", others)
    runs = run("norm-fusion", parse_module(QUANT))
    assert "only the quant reads %m" in reasons(runs, "add-norm-and-quant")
    assert "add-norm-and-quant" not in runs[0].fired


MISSES: list[tuple[str, list[tuple[str, str]], str]] = [
    ("add-norm", [("%b: f32[N,8]", "%b: f32[8]")], "it adds %b, f32[8], to %a, f32[N,8]"),
    ("add-norm", [("%s = add", "%s = mul")], "%s comes from mul, not add"),
    ("add-norm", [("rms_norm(%s", "rms_norm(%a")], "an operand is %a, an argument, not the result of add"),
    (
        "add-norm",
        [("%b: f32[N,8])", "%b: f32[N,8], %v: f32[8])"), ("%s, $scale", "%s, %v")],
        "%v is no parameter",
    ),
]


@pytest.mark.parametrize(("rule", "edits", "reason"), MISSES, ids=[why for *_, why in MISSES])
def test_near_miss(rule: str, edits: list[tuple[str, str]], reason: str) -> None:
    m = block(*edits)
    runs = run("norm-fusion", m)
    assert not runs[0].fired
    assert reason in reasons(runs, rule)


def test_a_reason_names_the_user_s_line() -> None:
    (done,) = run("norm-fusion", block(("%b: f32[N,8]", "%b: f32[8]")))
    assert done.misses[0]["line"] == "my_model.py:12"


def test_every_rule_has_a_near_miss() -> None:
    assert {rule for rule, _, _ in [*MISSES, *QUANT_MISSES]} == {*RULES}


def test_the_oracle_catches_a_sum_that_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(m: Match) -> Value:
        _, normed = m.create("add_rms_norm", m["x"], m["residual"], m["w"], eps=m.root.attrs["eps"])
        m.also(m["add"], m["x"])
        return normed  # type: ignore[no-any-return]

    monkeypatch.setitem(RULES, "add-norm", (RULES["add-norm"][0], forgetful))  # type: ignore[arg-type]
    m = block()
    oracle = Oracle({"forward": (tokens(3, 8, 1), tokens(3, 8, 2))}, random_weights(m), tolerance=1e-5)
    with pytest.raises(ToleranceExceeded, match="norm-fusion changed forward"):
        PassManager(parse_pipeline("norm-fusion"), [oracle]).run(m)


def test_the_oracle_catches_a_quant_by_another_block(monkeypatch: pytest.MonkeyPatch) -> None:
    def coarse(m: Match) -> Value:
        made = dict(m["norm"].attrs) | {"quant": m.root.attrs["block"], "scale": "ue8m0", "eps": 1.0}
        return m.create("rms_norm", *m["norm"].operands, **made)  # type: ignore[no-any-return]

    monkeypatch.setitem(RULES, "norm-quant", (RULES["norm-quant"][0], coarse))  # type: ignore[arg-type]
    m = parse_module(QUANT)
    oracle = Oracle({"forward": (tokens(3, 8, 1), tokens(3, 8, 2))}, scaled_weights(m), tolerance=1e-5)
    with pytest.raises(ToleranceExceeded, match="norm-fusion changed forward"):
        PassManager(parse_pipeline("norm-fusion"), [oracle]).run(m)


def test_where_it_runs() -> None:
    names = {target: [p.name for p in pipeline(2, target)] for target in ("cpu", "sm_90a")}
    assert "norm-fusion" in names["sm_90a"]
    for target, fused in (("cpu", False), ("sm_90a", True)):
        passes = [p.name for p in pipeline(2, target, fp8=True)]
        assert ("norm-fusion" in passes) == fused
        assert not fused or passes.index("norm-fusion") > passes.index("fp8-cast")
