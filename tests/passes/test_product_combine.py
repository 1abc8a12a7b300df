"""permute-fusion{combine=true}: the second product sums its rows by token, and when not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moec import models
from moec.errors import ToleranceExceeded
from moec.ir import Module, Value, parse_module, print_module
from moec.passes import Oracle, parse_pipeline, pipeline
from moec.passes.manager import PassManager
from moec.passes.pattern import Match
from moec.passes.permute_fusion import SUMMED
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
from tests.passes.test_permute_fusion import BLOCK as WHOLE
from tests.passes.test_permute_fusion import chosen, returning
from tests.passes.whole import batches, lowered, moe, same_step, step, whole_models

FUSE = "permute-fusion{combine=true}"
BLOCK = """\
moec.ir 1 func @forward(ARGS) -> bf16[N,8] target=cpu
  param $back: bf16[4,8,6]
  %d = grouped_linear(%h, $back, %off, %slot) : bf16[2*N,8]
  %y = combine(%d, _, %w, %x) : bf16[N,8]
  return %y
end
""".replace("ARGS", "%h: bf16[2*N~4,6], %off: i32[5], %slot: i32[2*N~4], %w: f32[N,2], %x: bf16[N,8]")
COMBINE = "%y = combine(%d, _, %w, %x) : bf16[N,8]"


def block(*edits: tuple[str, str]) -> Module:
    return parse_module(replaced(*edits)(BLOCK))


def inputs(count: int) -> tuple[torch.Tensor, ...]:
    ids = torch.randint(-1, 5, (2 * count,), generator=torch.Generator().manual_seed(1))
    last = torch.where((ids < 0) | (ids > 3), 4, ids)
    slot = last.sort(stable=True).indices.int()
    off = torch.tensor([int((last < e).sum()) for e in range(5)], dtype=torch.int32)
    w = torch.rand(count, 2, generator=torch.Generator().manual_seed(2))
    return tokens(2 * count, 6, dtype="bf16"), off, slot, w, tokens(count, 8, 3, dtype="bf16")


@pytest.mark.parametrize("count", [0, 1, 9])
@pytest.mark.parametrize("plus", [False, True])
def test_the_same_bits(count: int, plus: bool) -> None:
    m = block(*([] if plus else [("%w, %x)", "%w)")]))
    weights, args = random_weights(m), inputs(count)
    before = interpret(m, weights, *args)
    assert run(FUSE, m)[0].fired == {"product-combine": 1}
    (fused,) = m["forward"].ops
    assert [v and v.text for v in fused.operands] == [
        "%h",
        "$back",
        "%off",
        "%slot",
        "%w",
        "%x" if plus else None,
    ]
    assert fused.origin == "permute-fusion(%d,%y)" and fused.results[0].text == "%y"
    assert torch.equal(before, interpret(m, weights, *args))
    assert print_module(parse_module(print_module(m))) == print_module(m)
    assert not run(FUSE, m)[0].fired


@pytest.mark.parametrize(("rows", "to"), [("f32", "f32"), ("bf16", "f32"), ("f32", "bf16")])
def test_both_roundings_stay(rows: str, to: str) -> None:
    """That of the products, which only those of scaled operands may choose, and that of the sum."""
    m = block(
        ("%h: bf16[2*N~4,6]", "%h: f8e4m3[2*N~4,6]@s1x128"),
        ("$back: bf16[4,8,6]", "$back: f8e4m3[4,8,6]@s128x128"),
        ("%slot) : bf16[2*N,8]", f"%slot) {{to={rows}}} : {rows}[2*N,8]"),
        (COMBINE, f"%y = combine(%d, _, %w, %x) {{to={to}}} : {to}[N,8]"),
        ("-> bf16", f"-> {to}"),
    )
    run(FUSE, m)
    (fused,) = m["forward"].ops
    assert (str(fused.product_type().dtype), str(fused.results[0].type.dtype)) == (rows, to)  # type: ignore[attr-defined, union-attr]


ORDER = ["canonicalise", "expert-grouping{fold_shared=true}", FUSE, "norm-fusion"]


@given(model=whole_models(mlp=moe()), batch=batches, order=st.permutations(ORDER))
def test_whole_models_in_any_order(
    model: models.Model, batch: list[tuple[int, int]], order: list[str]
) -> None:
    m, weights = lowered(model)
    before = step(m, weights, batch)
    run(",".join(order), m)
    same_step(before, step(m, weights, batch))
    run(",".join(ORDER[:3]), m)
    same_step(before, step(m, weights, batch))
    assert "combine" not in {op.name for f in m for op in f.ops}


def test_the_whole_chain_at_once() -> None:
    m = parse_module(WHOLE)
    x, (w, id) = tokens(5, 8), chosen([[0, 3], [3, 0], [9, 1], [2, 2], [-1, 3]])
    weights = random_weights(m)
    before = interpret(m, weights, x, w, id)
    assert run(FUSE, m)[0].fired == {"gather-swiglu": 1, "combine": 1, "product-combine": 1}
    assert op_names(m) == ["sort_by_expert", "gather_grouped_linear", "grouped_linear_combine"]
    torch.testing.assert_close(before, interpret(m, weights, x, w, id))


def test_golden(golden: Callable[[str, str], None]) -> None:
    m = block()
    golden("product_combine.before.moec", golden_text(m))
    run(FUSE, m)
    golden("product_combine.after.moec", golden_text(m))


MISSES: list[tuple[list[tuple[str, str]], str]] = [
    ([("return %y", "return %y, %d")], "%d is used more than once, by combine and return"),
    (
        [("combine(%d,", "combine(%e,"), ("  %y =", "  %e = sigmoid(%d) : bf16[2*N,8]\n  %y =")],
        "%e comes from sigmoid, not grouped_linear",
    ),
    ([("bf16", "f64")], "the rows are f64: the fused products take bf16, f16, f32"),
]


@pytest.mark.parametrize(("edits", "reason"), MISSES, ids=[why for _, why in MISSES])
def test_near_miss(edits: list[tuple[str, str]], reason: str) -> None:
    runs = run(FUSE, parse_module(returning(replaced(*edits)(BLOCK))))
    assert "product-combine" not in runs[0].fired
    assert reason in reasons(runs, "product-combine")


def test_where_it_runs() -> None:
    """Only where it was asked for: on the GPU targets, which have a kernel for it."""
    (fusing,) = [p for p in pipeline(2, "sm_90a") if p.name == "permute-fusion"]
    assert fusing.options.combine
    assert not run("permute-fusion", block())[0].fired


def test_the_oracle_catches_what_is_not_added(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the rows are summed without what is to be added."""

    def without(m: Match) -> Value:
        operands = *m["product"].operands, m["weights"], None
        (y,) = m.create("grouped_linear_combine", *operands).op.results
        return y

    monkeypatch.setitem(SUMMED, "product-combine", (SUMMED["product-combine"][0], without))  # type: ignore[arg-type]
    m = block()
    oracle = Oracle({"forward": inputs(9)}, random_weights(m), tolerance=1e-5)
    with pytest.raises(ToleranceExceeded, match="permute-fusion changed forward"):
        PassManager(parse_pipeline(FUSE), [oracle]).run(m)


def test_cast_to_fp8_behind_it() -> None:
    """In either order the same IR: the products keep their dtype, and so does the sum."""
    found = []
    for order in (f"{FUSE},fp8-cast", f"fp8-cast,{FUSE}"):
        m = block(("target=cpu", "target=sm_90a"), ("6]", "128]"))
        run(order, m)
        (fused,) = [op for op in m["forward"].ops if op.name == "grouped_linear_combine"]
        found.append((fused.attrs, [v and str(v.type) for v in fused.operands]))
    assert found[0] == found[1] and found[0][1][0] == "f8e4m3[2*N~4,128]@s1x128"
