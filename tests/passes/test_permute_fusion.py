"""permute-fusion: same results, the shape it promises, and why it stays away."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moec.ir import Module, parse_module, print_module
from moec.passes import Oracle, parse_pipeline, pipeline
from moec.passes.manager import PassManager
from moec.passes.permute_fusion import ALONE, WITH_SWIGLU
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

GROUP = "canonicalise,expert-grouping,canonicalise"
# Of the largest result. Below f32 four roundings differ, of gate, up, their product and the sum: an ulp each.
TOLERANCE = {"f32": 1e-5, "bf16": 4 * 2**-7, "f16": 4 * 2**-10}

# What a user could write by hand, %y its result. The tests below change a line or two.
BLOCK = """\
moec.ir 1 func @forward(%x: f32[N,8], %w: f32[N,2], %id: i32[N,2]) -> f32[N,8] target=cpu
  param $both: f32[4,12,8]
  param $back: f32[4,8,6]
  %slot, %off = sort_by_expert(%id) {experts=4} : i32[2*N~4], i32[5]
  %xp = gather_rows(%x, %slot) {per_row=2} : f32[2*N~4,8]
  %gu = grouped_linear(%xp, $both, %off) : f32[2*N~4,12]
  %h = swiglu(%gu) {act=gelu} : f32[2*N~4,6]
  %d = grouped_linear(%h, $back, %off) : f32[2*N~4,8]
  %y = combine(%d, %slot, %w, %x) : f32[N,8]
  return %y
end
"""
SWIGLU = "  %h = swiglu(%gu) {act=gelu} : f32[2*N~4,6]\n"


def block(*edits: tuple[str, str]) -> Module:
    return parse_module(replaced(*edits)(BLOCK))


def chosen(ids: list[list[int]], k: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Routing weights and expert ids."""
    id = torch.tensor(ids, dtype=torch.int32).view(-1, k)
    return torch.rand(id.shape, generator=torch.Generator().manual_seed(seed)), id


def ops_of(m: Module, name: str) -> int:
    return [op.name for f in m for op in f.ops].count(name)


# The same results.
@given(block=moe_blocks(), count=st.integers(0, 7), seed=st.integers(0, 99))
def test_same_result(block: MoE, count: int, seed: int) -> None:
    m = block.build()
    weights, x = random_weights(m, seed), tokens(count, block.hidden, seed)
    before = interpret(m, weights, x)
    run(f"{GROUP},permute-fusion", m)
    assert [ops_of(m, name) for name in ("gather_rows", "gather_grouped_linear")] == [0, 1]
    assert ops_of(m, "swiglu") == block.shared
    close(before, interpret(m, weights, x))
    assert print_module(parse_module(print_module(m))) == print_module(m)


@given(
    block=moe_blocks(router=False, layered=False),
    data=st.data(),
    count=st.integers(0, 7),
    dtype=st.sampled_from(sorted(TOLERANCE)),
)
def test_same_result_whatever_the_ids(block: MoE, data: st.DataObject, count: int, dtype: str) -> None:
    """Ids of no expert, and one expert chosen twice, included; each step by the oracle as well."""
    block = replace(block, dtype=dtype)
    a_row = st.lists(st.integers(-1, block.experts), min_size=block.k, max_size=block.k)
    w, id = chosen(data.draw(st.lists(a_row, min_size=count, max_size=count)), block.k)
    m, x = block.build(), tokens(count, block.hidden, dtype=dtype)
    weights = random_weights(m)
    run(GROUP, m)
    before = interpret(m, weights, x, w, id)
    oracle = Oracle({"forward": (x, w, id)}, weights, tolerance=TOLERANCE[dtype])
    PassManager(parse_pipeline("permute-fusion"), [oracle]).run(m)
    close(before.float(), interpret(m, weights, x, w, id).float(), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", sorted(TOLERANCE))
def test_without_an_activation_it_is_right_bit_for_bit(dtype: str) -> None:
    """The gather and the store by slot move rows; the sum keeps its order."""
    m = block((SWIGLU, ""), ("%h", "%gu"), ("4,12,8]", "4,6,8]"), ("~4,12]", "~4,6]"), ("f32", dtype))
    weights, x = random_weights(m), tokens(5, 8, dtype=dtype)
    w, id = chosen([[0, 3], [3, 0], [9, 1], [2, 2], [-1, 3]])
    before = interpret(m, weights, x, w.to(x.dtype), id)
    run("permute-fusion", m)
    assert op_names(m) == ["sort_by_expert", "gather_grouped_linear", "grouped_linear", "combine"]
    assert torch.equal(before, interpret(m, weights, x, w.to(x.dtype), id))


@pytest.mark.parametrize(
    "ids",
    [
        [[2, 2], [2, 2], [2, 2]],  # all to one expert; the others are empty
        [[0, 3], [3, 0], [1, 2]],
        [[-1, 4], [1000, -7]],  # to none
        [[0, 1]],
        [],
    ],
)
def test_routing_edges(ids: list[list[int]]) -> None:
    m, x, (w, id) = block(), tokens(len(ids), 8), chosen(ids)
    weights = random_weights(m)
    before = interpret(m, weights, x, w, id)
    run("permute-fusion", m)
    close(before, interpret(m, weights, x, w, id))


def test_what_no_expert_computes_adds_nothing() -> None:
    m, x, (w, id) = block(), tokens(2, 8), chosen([[4, -1], [0, 4]])
    run("permute-fusion", m)
    y = interpret(m, random_weights(m), x, w, id)
    assert torch.equal(y[0], x[0]) and not torch.equal(y[1], x[1])


def test_a_nan_stays_in_its_row() -> None:
    m, x, (w, id) = block(), tokens(4, 8), chosen([[0, 1], [0, 1], [1, 2], [0, 3]])
    weights = random_weights(m)
    run("permute-fusion", m)
    clean = interpret(m, weights, x, w, id)
    x[1, 3] = torch.nan
    dirty = interpret(m, weights, x, w, id)
    assert dirty[1].isnan().all()
    assert torch.equal(clean[[0, 2, 3]], dirty[[0, 2, 3]])


def test_the_same_batch_has_the_same_bits() -> None:
    m, x, (w, id) = block(), tokens(6, 8), chosen([[0, 1], [0, 1], [3, 2], [0, 3], [2, 1], [3, 3]])
    weights, order = random_weights(m), torch.tensor([3, 5, 0, 2, 4, 1])
    run("permute-fusion", m)
    y = interpret(m, weights, x, w, id)
    assert torch.equal(y, interpret(m, weights, x, w, id))
    close(y[order], interpret(m, weights, x[order], w[order], id[order]))


def test_below_f32_it_comes_nearer_to_the_exact_result() -> None:
    """The sum of squared errors against fp32, over many rows: the activation's operands are not rounded."""
    exact, m = block(), block(("f32", "bf16"))
    weights = {name: w.bfloat16() for name, w in random_weights(exact).items()}
    w, id = chosen([[i % 4, (i + 1) % 4] for i in range(200)])
    args = (tokens(200, 8).bfloat16(), w.bfloat16(), id)
    want = interpret(
        exact, {name: w.float() for name, w in weights.items()}, *(a.float() for a in args[:2]), id
    )
    before = interpret(m, weights, *args)
    run("permute-fusion", m)
    after = interpret(m, weights, *args)
    assert (after - want).square().sum() < (before - want).square().sum()


# The shape.
def test_a_block_written_by_hand() -> None:
    m = block()
    runs = run("permute-fusion", m)
    assert runs[0].fired == {"gather-swiglu": 1, "combine": 1}
    _, first, second, last = m["forward"].ops
    assert first.attrs == first.attrs | {"per_row": 2, "epilogue": "swiglu", "act": "gelu"}
    assert [v.text for v in first.operands] == ["%x", "$both", "%slot", "%off"]
    assert [v.text for v in second.operands] == ["%h", "$back", "%off", "%slot"]
    assert str(second.results[0].type) == "f32[2*N,8]"
    assert [v and v.text for v in last.operands] == ["%d.by_slot", None, "%w", "%x"]
    assert [op.origin for op in (first, second)] == ["permute-fusion(%xp,%gu,%h)", "permute-fusion(%d,%y)"]


def test_each_part_is_fused_without_the_others() -> None:
    whole, parts = block(), block((SWIGLU, ""), ("%h", "%gu"), ("4,12,8]", "4,6,8]"), ("~4,12]", "~4,6]"))
    run("permute-fusion", whole)
    assert run("permute-fusion", parts)[0].fired == {"gather": 1, "combine": 1}
    fused = "gather_grouped_linear(%x, $both, %slot, %off) {per_row=2} : f32[2*N~4,12]"
    m = block(
        ("  %xp = gather_rows(%x, %slot) {per_row=2} : f32[2*N~4,8]\n", ""),
        ("grouped_linear(%xp, $both, %off) : f32[2*N~4,12]", fused),
    )
    assert run("permute-fusion", m)[0].fired == {"swiglu": 1, "combine": 1}
    assert [op.attrs for op in m["forward"].ops] == [op.attrs for op in whole["forward"].ops]


def test_the_combine_keeps_its_dtype_and_what_it_adds() -> None:
    m = block(("%slot, %w, %x) : f32[N,8]", "%slot, %w) {to=bf16} : bf16[N,8]"), ("-> f32", "-> bf16"))
    run("permute-fusion", m)
    assert str(m["forward"].outputs[0].type) == "bf16[N,8]"
    assert m["forward"].ops[-1].operands[3] is None


@pytest.mark.parametrize("order", [*permutations(["canonicalise", "expert-grouping", "permute-fusion"])])
@pytest.mark.parametrize(
    "source",
    [MoE(shared=True, router=False), MoE(layered=True, fp8=True), BLOCK],
    ids=["naive", "layers", "by-hand"],
)
def test_any_order_of_passes(order: tuple[str, ...], source: MoE | str) -> None:
    m = source.build() if isinstance(source, MoE) else parse_module(source)
    args = (tokens(3, 8), *chosen([[0, 3], [4, 1], [2, 2]]))[: len(m["forward"].args)]
    weights = random_weights(m)
    before = interpret(m, weights, *args)
    PassManager(parse_pipeline(",".join(order))).run(m)
    close(before, interpret(m, weights, *args))
    PassManager(pipeline(2, "sm_90a")).run(m)  # whatever came first, what is left is the same
    close(before, interpret(m, weights, *args))
    counted = [ops_of(m, name) for name in ("gather_rows", "gather_grouped_linear", "grouped_linear_combine")]
    assert counted == [0, 1, 1]
    assert not any(pass_.run(m) for pass_ in pipeline(3, "sm_90a"))


def test_names_do_not_matter() -> None:
    shapes = []
    for source in (MoE(), MoE(names=("left", "right", "back"), prefix="zoo.animals")):
        m = source.build()
        run(f"{GROUP},permute-fusion", m)
        shapes.append(op_names(m))
    assert shapes[0] == shapes[1]
    assert shapes[0][-3:] == ["gather_grouped_linear", "grouped_linear", "combine"]


@pytest.mark.parametrize("name", ["permute_fusion", "permute_fusion_layers"])
def test_golden(name: str, golden: Callable[[str, str], None]) -> None:
    source = {
        "permute_fusion": MoE(shared=True),
        "permute_fusion_layers": MoE(layered=True, gated=False, dtype="bf16"),
    }[name]
    m = source.build()
    run(GROUP, m)
    golden(f"{name}.before.moec", golden_text(m))
    run("permute-fusion", m)
    golden(f"{name}.after.moec", golden_text(m))


# Why it stays away: rule, edits of the block, reason.
FIRST = "%gu = grouped_linear(%xp, $both, %off) : f32[2*N~4,12]"
MISSES: list[tuple[str, list[tuple[str, str]], str]] = [
    (
        "gather-swiglu",
        [(SWIGLU, SWIGLU + "  %more = sigmoid(%xp) : f32[2*N~4,8]\n"), ("return %y", "return %y, %more")],
        "%xp is used more than once, by grouped_linear and sigmoid",
    ),
    (
        "gather",
        [(SWIGLU, SWIGLU + "  %more = sigmoid(%xp) : f32[2*N~4,8]\n"), ("return %y", "return %y, %more")],
        "%xp is used more than once, by grouped_linear and sigmoid",
    ),
    (
        "gather-swiglu",
        [("return %y", "return %y, %gu")],
        "%gu is used more than once, by swiglu and return",
    ),
    (
        "gather-swiglu",
        [
            (FIRST, "%g = sigmoid(%xp) : f32[2*N~4,8]\n  " + FIRST.replace("%xp", "%g")),
        ],
        "%g comes from sigmoid, not gather_rows",
    ),
    (
        "gather-swiglu",
        [
            ("{act=gelu} : f32[2*N~4,6]", "{act=gelu} : f32[2*N~4,12]"),
            ("  %h = swiglu(%gu)", "  %u = sigmoid(%both) : f32[2*N~4,12]\n  %h = swiglu(%gu, %u)"),
            ("%id: i32[N,2])", "%id: i32[N,2], %both: f32[2*N~4,12])"),
            ("$back: f32[4,8,6]", "$back: f32[4,8,12]"),
        ],
        "has up %u",
    ),
    (
        "gather",
        [
            (FIRST, FIRST.replace("%off)", "%off, %slot)").replace("2*N~4", "2*N")),
            ("{act=gelu} : f32[2*N~4,6]", "{act=gelu} : f32[2*N,6]"),
        ],
        "has slot %slot",
    ),
    ("combine", [("return %y", "return %y, %d")], "%d is used more than once, by combine and return"),
    (
        "combine",
        [("combine(%d,", "combine(%e,"), ("  %y =", "  %e = sigmoid(%d) : f32[2*N~4,8]\n  %y =")],
        "%e comes from sigmoid, not grouped_linear",
    ),
    (
        "combine",
        [("$back, %off) : f32[2*N~4,8]", "$back, %off, %slot) : f32[2*N,8]"), ("(%d, %slot,", "(%d, _,")],
        "has slot %slot",
    ),
    ("gather-swiglu", [("f32", "f64")], "the rows are f64: the fused products take bf16, f16, f32"),
    ("gather", [("f32", "f64")], "the rows are f64: the fused products take bf16, f16, f32"),
    ("combine", [("f32", "f64")], "the rows are f64: the fused products take bf16, f16, f32"),
    ("swiglu", [("f32", "f64")], "%gu comes from grouped_linear, not gather_grouped_linear"),
]


def returning(text: str) -> str:
    """The text with its signature's results as its return has them."""
    returned = text.partition("return ")[2].partition("\n")[0].split(", ")
    types = [
        line.rpartition(" : ")[2] for name in returned for line in text.split("\n") if f"{name} =" in line
    ]
    before, _, rest = text.partition("-> ")
    return f"{before}-> ({', '.join(types)}) target{rest.partition(' target')[2]}"


@pytest.mark.parametrize(("rule", "edits", "reason"), MISSES, ids=[f"{r}: {why}" for r, _, why in MISSES])
def test_near_miss(rule: str, edits: list[tuple[str, str]], reason: str) -> None:
    m = parse_module(returning(replaced(*edits)(BLOCK)))
    runs = run("permute-fusion", m)
    assert rule not in runs[0].fired
    assert reason in reasons(runs, rule)


def test_every_rule_has_a_near_miss() -> None:
    assert {rule for rule, _, _ in MISSES} == {*WITH_SWIGLU, *ALONE}


def test_gate_and_up_apart_are_left_to_expert_grouping() -> None:
    """Both products read the gathered rows: they are fused once they are one."""
    text = BLOCK.replace("4,12,8]", "4,6,8]\n  param $up: f32[4,6,8]").replace("~4,12]", "~4,6]")
    text = text.replace(SWIGLU, "  %u = grouped_linear(%xp, $up, %off) : f32[2*N~4,6]\n" + SWIGLU)
    m = parse_module(text.replace("swiglu(%gu)", "swiglu(%gu, %u)"))
    assert run("permute-fusion", m)[0].fired == {"combine": 1}
    run("expert-grouping,permute-fusion", m)
    assert op_names(m) == ["sort_by_expert", "gather_grouped_linear", "grouped_linear", "combine"]
