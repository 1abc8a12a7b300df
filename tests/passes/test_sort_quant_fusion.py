"""sort-quant-fusion: the same bits, what else reads them, and why it stays away."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moec.errors import ToleranceExceeded
from moec.ir import Interpreter, Module, parse_module, print_module
from moec.ir.scaled import quantize
from moec.passes import Oracle, parse_pipeline, pipeline
from moec.passes.manager import PassManager
from moec.passes.pattern import Match
from tests.passes.fp8_layer import layer
from tests.passes.modules import golden_text, op_names, random_weights, reasons, replaced, run, tokens

FUSE = "sort-quant-fusion"
HEAD = "moec.ir 1 func @forward(%x: f32[N,256], %w13: f8e4m3[6,8,256]@s128x128, "
TAIL = """\
  %x.q = quant(%x) {block=1x128} : f8e4m3[N,256]@s1x128 ; mine.py:5
  %h = gather_grouped_linear(%x.q, %w13, %slot, %off) {per_row=2, to=f32} : f32[2*N~6,8]
"""
RETURN = "  return %h, %slot, %off, %again\nend\n"
AGAIN = "  %again = dequant(%x.q) {to=f32} : f32[N,256]\n"
RESULTS = "(f32[2*N~6,8], i32[2*N~6], i32[7], f32[N,256]) target=sm_90a\n"
BLOCKS = {
    "route_sort": HEAD
    + "%l: f32[N,6]) -> "
    + RESULTS
    + "  %w, %id, %slot, %off = route_sort(%l) {groups=3, k=2, score=sigmoid, topk_groups=2} "
    ": f32[N,2], i32[N,2], i32[2*N~6], i32[7] ; mine.py:4\n" + TAIL + AGAIN + RETURN,
    "local_sort": HEAD
    + "%w: f32[N,2], %id: i32[N,2]) -> "
    + RESULTS
    + "  %kept, %local, %slot, %off = local_sort(%w, %id) {experts=6, first=1} "
    ": f32[N,2], i32[N,2], i32[2*N~6], i32[7] ; mine.py:4\n" + TAIL + AGAIN + RETURN,
    "sort_by_expert": HEAD
    + "%id: i32[N,2]) -> "
    + RESULTS
    + "  %slot, %off = sort_by_expert(%id) {experts=6} : i32[2*N~6], i32[7] ; mine.py:4\n"
    + TAIL
    + AGAIN
    + RETURN,
}
RULES = {"route_sort": "route-sort", "local_sort": "local-sort", "sort_by_expert": "sort"}


def block(sort: str = "route_sort", *edits: tuple[str, str]) -> Module:
    return parse_module(replaced(*edits)(BLOCKS[sort]))


def operands(sort: str, count: int) -> list[Any]:
    generator = torch.Generator().manual_seed(count)
    w13 = quantize(torch.randn(6, 8, 256, generator=generator), (128, 128))
    x, id = tokens(count, 256), torch.randint(-1, 8, (count, 2), generator=generator, dtype=torch.int32)
    chosen = {
        "route_sort": [tokens(count, 6).round()],
        "local_sort": [torch.rand(count, 2, generator=generator), id],
        "sort_by_expert": [id],
    }
    return [x, w13, *chosen[sort]]


@pytest.mark.parametrize("scale", ["fp32", "ue8m0"])
@pytest.mark.parametrize("sort", BLOCKS)
@pytest.mark.parametrize("count", [0, 1, 9])
def test_the_same_bits(count: int, sort: str, scale: str) -> None:
    """Also of what others read: here the quantised rows again, behind the experts."""
    m = block(sort, ("{block=1x128}", f"{{block=1x128, scale={scale}}}"))
    given = operands(sort, count)
    before = Interpreter(m, {}).run("forward", *given)
    (done,) = run(FUSE, m)
    assert done.fired == {RULES[sort]: 1}
    assert op_names(m) == [f"{sort}_and_quant", "gather_grouped_linear", "dequant"]
    assert m["forward"].ops[0].results[-1].text == "%x.q"
    for a, b in zip(before, Interpreter(m, {}).run("forward", *given), strict=True):
        assert torch.equal(a, b)
    assert print_module(parse_module(print_module(m))) == print_module(m)
    assert not run(FUSE, m)[0].changed


@pytest.mark.parametrize("sort", BLOCKS)
def test_golden(sort: str, golden: Callable[[str, str], None]) -> None:
    m = block(sort)
    golden(f"sort_quant_fusion_{sort}.before.moec", golden_text(m))
    run(FUSE, m)
    golden(f"sort_quant_fusion_{sort}.after.moec", golden_text(m))


ROUTER = "  %l = linear(%x.q, %g) {acc=f32} : f32[N,6]\n"
MISSES: dict[str, tuple[list[tuple[str, str]], str]] = {
    "blocks of another size": (
        [("{block=1x128} : f8e4m3[N,256]@s1x128", "{block=1x64} : f8e4m3[N,256]@s1x64")],
        "blocks are 1x64: the kernels do 1x128",
    ),
    "a scale a row": (
        [("{block=1x128} : f8e4m3[N,256]@s1x128", "{block=1x*} : f8e4m3[N,256]@s1x*")],
        "blocks are 1x*: the kernels do 1x128",
    ),
    "rows of another dtype": ([("%x: f32[N,256]", "%x: f64[N,256]")], "the rows are f64"),
    "no fp8 there": ([("target=sm_90a", "target=sm_80")], "it multiplies no fp8"),
    "rows that come quantised": (
        [
            ("gather_grouped_linear(%x.q", "gather_grouped_linear(%z"),
            ("%w13: ", "%z: f8e4m3[N,256]@s1x128, %w13: "),
        ],
        "%z is not the result of quant",
    ),
    "slots that no product gathers by": (
        [
            ("(%x.q, %w13, %slot, %off)", "(%x.q, %w13, %s, %off)"),
            ("%w13: ", "%s: i32[2*N~6], %w13: "),
        ],
        "no product gathers its rows by %slot",
    ),
    "a router that reads quantised rows": (
        [
            ("%l: f32[N,6])", "%g: f8e4m3[6,256]@s128x128)"),
            ("  %w, %id", "  %x.r = quant(%x) {block=1x128} : f8e4m3[N,256]@s1x128\n" + ROUTER + "  %w, %id"),
            ("  %x.q = quant(%x) {block=1x128} : f8e4m3[N,256]@s1x128 ; mine.py:5\n", ""),
            ("%x.r =", "%x.q ="),
        ],
        "%slot depends on %x.q",
    ),
    "rows that come of the sort": (
        [
            ("quant(%x)", "quant(%m)"),
            ("  %x.q =", "  %c = cast(%id) {to=f32} : f32[N,2]\n  %o, %p = split(%c) {axis=1, sizes=[1,1]} "
             ": f32[N,1], f32[N,1]\n  %m = mul(%x, %o) : f32[N,256]\n  %x.q ="),
        ],
        "%x.q depends on %slot",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISSES)
def test_near_miss(name: str) -> None:
    edits, reason = MISSES[name]
    m = block("route_sort", *edits)
    before = print_module(m)
    runs = run(FUSE, m)
    assert not runs[0].fired and print_module(m) == before
    assert any(reason in found for found in reasons(runs, "route-sort")), reasons(runs, "route-sort")
    assert runs[0].misses[-1]["line"] == "mine.py:4"


def test_other_rows_than_tokens() -> None:
    """Two slots of two rows each: they aren't one a token."""
    edits = [("%x: f32[N,256]", "%x: f32[M,256]"), ("f8e4m3[N,256]@s1x128", "f8e4m3[M,256]@s1x128")]
    edits += [("f32[N,256]\n", "f32[M,256]\n"), ("i32[7], f32[N,256]", "i32[7], f32[M,256]")]
    runs = run(FUSE, block("route_sort", *edits))
    assert reasons(runs, "route-sort") == ["M rows are quantised, N tokens sorted"]


ORDER = ["norm-fusion", "permute-fusion{route_sort=true,combine=true}", FUSE, "merge-projections{align=1}"]


@given(order=st.permutations(ORDER), count=st.sampled_from([0, 1, 5]))
def test_a_layer_in_any_order(order: list[str], count: int) -> None:
    """The fused activation rounds less often; the choice and the rest of it are the same."""
    m = layer()
    weights, x = random_weights(m), tokens(count, 40)
    run("fp8-cast", m)
    (before,) = Interpreter(m, weights).run("forward", x)
    run(",".join([*order, *ORDER]), m)
    (after,) = Interpreter(m, weights).run("forward", x)
    torch.testing.assert_close(after, before, rtol=0.1, atol=0.05)
    names = op_names(m)
    assert not {"route", "route_sort"} & set(names)
    assert {"route_sort_and_quant", "sort_by_expert_and_quant"} & set(names)


def test_the_oracle_catches_other_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    create = Match.create

    def powers(m: Match, name: str, *given: Any, **how: Any) -> Any:
        return create(m, name, *given, **how | ({"quant_scale": "ue8m0"} if "quant_scale" in how else {}))

    monkeypatch.setattr(Match, "create", powers)
    oracle = Oracle({"forward": tuple(operands("route_sort", 9))}, {}, tolerance=1e-5)
    with pytest.raises(ToleranceExceeded, match="sort-quant-fusion changed forward"):
        PassManager(parse_pipeline(FUSE), [oracle]).run(block())


def test_where_it_runs() -> None:
    """On GPUs, behind the fusion that takes a quant into its norm."""
    names = {target: [p.name for p in pipeline(2, target, fp8=True)] for target in ("cpu", "sm_90a")}
    assert FUSE not in names["cpu"]
    assert names["sm_90a"].index("norm-fusion") < names["sm_90a"].index(FUSE)
