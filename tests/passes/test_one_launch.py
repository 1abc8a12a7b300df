"""one-launch: a routed layer, or its experts alone, as one op, and when not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moec import models
from moec.codegen import TARGETS
from moec.errors import ToleranceExceeded
from moec.ir import Module, Value, parse_module, print_module
from moec.passes import Oracle, parse_pipeline, pipeline
from moec.passes.manager import PassManager
from moec.passes.one_launch import PRODUCTS, ROUTED
from moec.passes.pattern import Match
from tests.passes.modules import (
    golden_text,
    interpret,
    op_names,
    random_weights,
    reasons,
    replaced,
    run,
    tokens,
)
from tests.passes.whole import batches, lowered, moe, same_step, step, whole_models

BLOCK = """\
moec.ir 1 func @forward(%x: bf16[N,8], %l: f32[N,6], %s: bf16[N,8]) -> bf16[N,8] target=cpu
  param $b: f32[6]
  param $w13: bf16[7,10,8]
  param $w2: bf16[7,8,5]
  %w, %id, %slot, %off = route_sort(%l, $b) {k=2, score=sigmoid, shared=1} : ORDER
  %h = gather_grouped_linear(%x, $w13, %slot, %off) {EPILOGUE, per_row=3} : bf16[3*N~7,5]
  %y = grouped_linear_combine(%h, $w2, %off, %slot, %w, %s) : bf16[N,8] ; mine.py:4
  return %y
end
""".replace("EPILOGUE", "act=gelu, epilogue=swiglu, limit=7.0").replace(
    "ORDER", "f32[N,3], i32[N,3], i32[3*N~7], i32[8]"
)


def block(*edits: tuple[str, str]) -> Module:
    return parse_module(replaced(*edits)(BLOCK))


def inputs(count: int) -> tuple[torch.Tensor, ...]:
    return tokens(count, 8, dtype="bf16"), tokens(count, 6, 2), tokens(count, 8, 3, dtype="bf16")


@pytest.mark.parametrize("count", [0, 1, 9])
@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("route", [False, True])
def test_the_same_bits(count: int, plus: bool, bias: bool, route: bool) -> None:
    m = block(*([] if plus else [("%w, %s)", "%w)")]), *([] if bias else [("(%l, $b)", "(%l)")]))
    weights, args = random_weights(m), inputs(count)
    before = interpret(m, weights, *args)
    passes = "one-launch" if route else "one-launch{route=false}"
    assert run(passes, m)[0].fired == {"experts": 1, **({"routed-experts": 1} if route else {})}
    fused = m["forward"].ops[-1]
    assert op_names(m) == (["routed_experts"] if route else ["route_sort", "experts"])
    chosen = ["%l", "$b" if bias else None] if route else ["%off", "%slot", "%w"]
    operands = ["%x", "$w13", "$w2", *chosen, "%s" if plus else None]
    assert [v and v.text for v in fused.operands] == operands
    assert fused.results[0].text == "%y" and fused.attrs["limit"] == 7.0 and fused.attrs["act"] == "gelu"
    assert torch.equal(before, interpret(m, weights, *args))
    assert print_module(parse_module(print_module(m))) == print_module(m)


def test_in_fp8_what_is_quantised_stays_so() -> None:
    m = block(
        ("%x: bf16[N,8]", "%x: f8e4m3[N,8]@s1x128"),
        ("$w13: bf16[7,10,8]", "$w13: f8e4m3[7,10,8]@s128x128"),
        ("$w2: bf16[7,8,5]", "$w2: f8e4m3[7,8,5]@s128x128"),
        ("per_row=3} : bf16[3*N~7,5]", "per_row=3, quant=1x128, scale=ue8m0} : f8e4m3[3*N~7,5]@s1x128"),
        ("%w, %s) : bf16[N,8]", "%w, %s) {rows=f32, to=bf16} : bf16[N,8]"),
    )
    run("one-launch", m)
    (fused,) = m["forward"].ops
    named = {key: str(fused.attrs[key]) for key in ("quant", "quant_scale", "rows", "to", "h")}
    assert named == {"quant": "(1, 128)", "quant_scale": "ue8m0", "rows": "f32", "to": "bf16", "h": "None"}


def test_golden(golden: Callable[[str, str], None]) -> None:
    m = block()
    golden("one_launch.before.moec", golden_text(m))
    run("one-launch{route=false}", m)
    golden("one_launch_products.after.moec", golden_text(m))
    run("one-launch", m)
    golden("one_launch.after.moec", golden_text(m))


MISSES: list[tuple[str, list[tuple[str, str]], str]] = [
    ("experts", [("return %y", "return %y, %h")], "%h is used more than once"),
    (
        "experts",
        [
            ("{act=gelu, epilogue=swiglu, limit=7.0, per_row=3}", "{per_row=3}"),
            ("8,5]", "8,10]"),
            ("7,5]", "7,10]"),
        ],
        "epilogue is none, not swiglu",
    ),
    (
        "experts",
        [("per_row=3}", "per_row=1}")],
        "a token has 1 rows in the first product, but 3 in the second",
    ),
    (
        "experts",
        [
            ("(%h, $w2, %off, %slot", "(%h, $w2, %off, %t"),
            ("%s: bf16[N,8])", "%s: bf16[N,8], %t: i32[3*N~7])"),
        ],
        "%t and %slot are not the same",
    ),
    ("routed-experts", [("return %y", "return %y, %w")], "%w is read elsewhere too"),
    ("routed-experts", [("return %y", "return %y, %id")], "%id is read elsewhere too"),
    ("routed-experts", [("return %y", "return %y, %off, %slot")], "%slot and %off is read elsewhere too"),
    (
        "routed-experts",
        [("%slot, %w, %s)", "%slot, %v, %s)"), ("%s: bf16[N,8])", "%s: bf16[N,8], %v: f32[N,3])")],
        "%v is not what the router gives, %w",
    ),
    (
        "routed-experts",
        [
            ("%slot, %off)", "%t, %off)"),
            ("%off, %slot, %w, %s)", "%off, %t, %w, %s)"),
            ("%s: bf16[N,8])", "%s: bf16[N,8], %t: i32[3*N~7])"),
        ],
        "%t is not what the router gives, %slot",
    ),
]


@pytest.mark.parametrize(("rule", "edits", "reason"), MISSES, ids=[why for _, _, why in MISSES])
def test_near_miss(rule: str, edits: list[tuple[str, str]], reason: str) -> None:
    text = replaced(*edits)(BLOCK)
    returned = text.split("  return ")[1].split("\n")[0].split(", ")
    types = {"%y": "bf16[N,8]", "%h": "bf16[3*N~7,5]", "%w": "f32[N,3]", "%id": "i32[N,3]"}
    types |= {"%slot": "i32[3*N~7]", "%off": "i32[8]"}
    many = ", ".join(types[name] for name in returned)
    text = text.replace("-> bf16[N,8] target", f"-> {f'({many})' if len(returned) > 1 else many} target")
    runs = run("one-launch", parse_module(text))
    assert rule not in runs[0].fired
    assert any(reason in found for found in reasons(runs, rule)), reasons(runs, rule)


ORDER = [
    "canonicalise",
    "expert-grouping{fold_shared=true}",
    "permute-fusion{route_sort=true,combine=true}",
    "one-launch",
]


@given(model=whole_models(mlp=moe()), batch=batches, order=st.permutations(ORDER))
def test_whole_models_in_any_order(
    model: models.Model, batch: list[tuple[int, int]], order: list[str]
) -> None:
    m, weights = lowered(model)
    before = step(m, weights, batch)
    run(",".join(order), m)
    same_step(before, step(m, weights, batch))
    run(",".join(ORDER), m)
    same_step(before, step(m, weights, batch))
    assert "grouped_linear_combine" not in {op.name for f in m for op in f.ops}


@pytest.mark.parametrize("target", TARGETS)
def test_no_level_runs_it(target: str) -> None:
    """Nothing has been measured: who wants it names it."""
    assert "one-launch" not in {p.name for level in range(4) for p in pipeline(level, target)}


def test_the_oracle_catches_a_choice_without_the_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    def unbiased(m: Match) -> Value:
        operands = [*(m[name] for name in ("x", "w13", "w2")), m["route"].operands[0], None, m["plus"]]
        (y,) = m.create("routed_experts", *operands, **m["route"].attrs, **m.root.attrs).op.results
        return y

    monkeypatch.setitem(ROUTED, "routed-experts", (ROUTED["routed-experts"][0], unbiased))  # type: ignore[arg-type]
    caught_by_the_oracle()


def test_the_oracle_catches_another_activation(monkeypatch: pytest.MonkeyPatch) -> None:
    def silu(m: Match) -> Value:
        operands = [m[name] for name in ("x", "w13", "w2", "off", "slot", "weights", "plus")]
        (y,) = m.create("experts", *operands).op.results
        return y

    monkeypatch.setitem(PRODUCTS, "experts", (PRODUCTS["experts"][0], silu))  # type: ignore[arg-type]
    caught_by_the_oracle()


def caught_by_the_oracle() -> None:
    m = block()
    oracle = Oracle({"forward": inputs(9)}, random_weights(m), tolerance=1e-5)
    with pytest.raises(ToleranceExceeded, match="one-launch changed forward"):
        PassManager(parse_pipeline("one-launch"), [oracle]).run(m)
