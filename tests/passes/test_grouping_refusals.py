"""expert-grouping: why a loop or a pair of products stays as it is, and the nearest one that doesn't."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moec.ir import Builder, TensorType, parse_module, print_module
from moec.ir.text import print_function
from moec.ir.types import f32
from moec.ir.weights import weights_of
from tests.passes.modules import (
    MoE,
    close,
    edited,
    func,
    interpret,
    module,
    op_names,
    random_weights,
    reasons,
    replaced,
    run,
    tokens,
)

UP = "%u = linear(%rows, $up_proj.weight) : f32[R,6]"
SUM = "%out = scatter_add(%y, %d, %slot, %w) {per_row=2} : f32[N,8]"


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        pytest.param(
            replaced(("experts=0..3", "experts=1..3")),
            "the experts are 1..3: a sort by expert counts from 0",
            id="range",
        ),
        pytest.param(
            replaced(("scope=mlp.experts.*", "scope=mlp.experts")),
            "scope mlp.experts has no *: all experts share their parameters",
            id="scope",
        ),
        pytest.param(
            replaced(
                ("param $up_proj.weight: f32[6,8]", "param $up_proj.weight: f32[6,8]\n  param $b: f32[6]"),
                ("$up_proj.weight)", "$up_proj.weight, $b)"),
            ),
            "linear adds the bias $b: grouped_linear takes none",
            id="bias",
        ),
        pytest.param(
            replaced(("gather_rows(%x, %slot) {per_row=2}", "gather_rows(%x, %slot) {per_row=3}")),
            "per_row is 3, but a token chooses 2 experts",
            id="gather-per-row",
        ),
        pytest.param(
            replaced(
                ("%slot, %w) {per_row=2}", "%slot, %w3) {per_row=3}"),
                ("  %rows =", "  %w3 = concat(%w, %w1) : f32[N,3]\n  %rows ="),
                ("  %w3 =", "  %w1, %_w = split(%w) {sizes=[1,1]} : f32[N,1], f32[N,1]\n  %w3 ="),
            ),
            "scatter_add: w is %w3: f32[N,3], but a token chooses 2 experts",
            id="scatter-per-row",
        ),
        pytest.param(
            replaced(
                (UP, UP.replace("%u =", "%u0 =") + "\n  %u = rms_norm(%u0, $n) {eps=0.1} : f32[R,6]"),
                ("  param $up_proj", "  param $n: f32[6]\n  param $up_proj"),
            ),
            "rms_norm has no grouped twin: it isn't known to work row by row",
            id="no-twin",
        ),
        pytest.param(
            replaced(
                (UP, UP.replace("%u =", "%u0 =") + "\n  %u = add(%u0, $n) : f32[R,6]"),
                ("  param $up_proj", "  param $n: f32[6]\n  param $up_proj"),
            ),
            "add: b is $n, one expert's parameter, not the expert's rows or the same for every expert",
            id="expert-parameter",
        ),
        pytest.param(
            replaced(
                (
                    "linear(%rows, $up_proj.weight) : f32[R,6]",
                    "linear(%rows, $up_proj.weight) {acc=f64} : f64[R,6]",
                ),
                ("%h = swiglu(%g, %u)", "%uc = cast(%u) {to=f32} : f32[R,6]\n  %h = swiglu(%g, %uc)"),
            ),
            "linear keeps its result in f64: grouped_linear rounds it to x's dtype",
            id="acc",
        ),
        pytest.param(
            replaced(
                ("scatter_add(%y,", "scatter_add(%y2,"),
                ("  %rows =", "  %y2 = sigmoid(%y) : f32[N,8]\n  %rows ="),
            ),
            "sigmoid: x is %y, the running sum, not the expert's rows or the same for every expert",
            id="not-the-running-sum",
        ),
        pytest.param(
            replaced((SUM, SUM.replace("%out =", "%o =") + "\n  %out = sigmoid(%o) : f32[N,8]")),
            "sigmoid: x is %o, the new sum, not the expert's rows or the same for every expert",
            id="after-the-sum",
        ),
        pytest.param(
            replaced(
                ("scatter_add(%y, %d,", "scatter_add(%y, %d2,"),
                ("  %out =", "  %cc = concat(%d, %d) {axis=0} : f32[2*R,8]\n  %out ="),
                ("  %out =", "  %rr = reshape(%cc) {shape=[R,16]} : f32[R,16]\n  %out ="),
                ("  %out =", "  %d2, %d3 = split(%rr) {sizes=[8,8]} : f32[R,8], f32[R,8]\n  %out ="),
            ),
            "concat works along the rows",
            id="along-the-rows",
        ),
        pytest.param(
            replaced(
                ("scatter_add(%y,", "scatter_add(%z,"),
                ("  %rows =", "  %z = zeros_like(%y) {dtype=f32} : f32[N,8]\n  %rows ="),
            ),
            "zeros_like: x is %y, the running sum, not the expert's rows or the same for every expert",
            id="restarted-sum",
        ),
        pytest.param(
            replaced(("  %rows = gather_rows(%x,", "  %rows = gather_rows(%y,")),
            "gather_rows: x is %y, the running sum, not the same for every expert",
            id="reads-the-sum",
        ),
        pytest.param(
            replaced(
                ("linear(%rows, $up_proj.weight) : f32[R,6]", "linear(%x, $up_proj.weight) : f32[N,6]"),
                (
                    "%h = swiglu(%g, %u)",
                    "%ur = gather_rows(%u, %slot) {per_row=2} : f32[R,6]\n  %h = swiglu(%g, %ur)",
                ),
            ),
            "linear: x is %x, the same for every expert, not the expert's rows",
            id="every-token-by-every-expert",
        ),
        pytest.param(
            replaced(
                (
                    "%h = swiglu(%g, %u) : f32[R,6]",
                    "%dead = concat(%g, %u) {axis=0} : f32[2*R,6]\n  %h = mul(%g, %g) : f32[R,6]",
                )
            ),
            None,
            id="dead-op-is-ignored",
        ),
    ],
)
def test_why_not(edit: Callable[[str], str], reason: str | None) -> None:
    m = edited(edit)
    before = print_function(m["forward"], derived=False)
    runs = run("expert-grouping", m)
    if reason is None:
        assert op_names(m).count("combine") == 1
        return
    assert reasons(runs, "expert-loop") == [reason]
    assert print_function(m["forward"], derived=False) == before, "a rule that doesn't fire leaves no trace"


def test_rows_beyond_the_experts_must_be_zero() -> None:
    """With ids from outside, sigmoid(0) = 0.5 of a slot that no expert owns would be added."""
    edit = replaced(
        ("scatter_add(%y, %d,", "scatter_add(%y, %d2,"),
        ("  %out = scatter", "  %d2 = sigmoid(%d) : f32[R,8]\n  %out = scatter"),
    )
    runs = run("expert-grouping", edited(edit, router=False))
    assert reasons(runs, "expert-loop") == [
        "ids may name experts outside the loop, whose rows would be added"
    ]
    m = edited(edit)  # the router's ids are known
    weights, x = random_weights(m), tokens(5, 8)
    before = interpret(m, weights, x)
    assert run("expert-grouping", m)[0].changed
    close(before, interpret(m, weights, x))


def test_a_loop_over_fewer_experts_than_the_router_knows() -> None:
    fewer = ("experts=0..3", "experts=0..2")
    m = edited(replaced(fewer))
    weights, x = random_weights(m), tokens(5, 8)
    before = interpret(m, weights, x)
    run("expert-grouping", m)
    assert "combine" in op_names(m)
    close(before, interpret(m, weights, x))
    lifted = (
        ("scatter_add(%y, %d,", "scatter_add(%y, %d2,"),
        ("  %out =", "  %d2 = sigmoid(%d) : f32[R,8]\n  %out ="),
    )
    runs = run("expert-grouping", edited(replaced(fewer, *lifted)))
    assert reasons(runs, "expert-loop") == [
        "ids may name experts outside the loop, whose rows would be added"
    ]


TWO_LISTS = [
    ("%id: i32[N,2]) -> f32[N,8]", "%id: i32[N,2], %id2: i32[N,2]) -> f32[N,8]"),
    ("@forward.expert(%y, %x, %w, %id)", "@forward.expert(%y, %x, %w, %id, %id2)"),
    ("  %rows =", "  %slot2 = expert_slots(%id2, %expert) : i32[R]\n  %rows ="),
]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            [("scatter_add(%y, %d, %slot,", "scatter_add(%y, %d, %slot2,")],
            "scatter_add: slot is %slot2, the expert's slots, not those that the rows were gathered by",
        ),
        (
            [
                ("  %out =", "  %r2 = gather_rows(%x, %slot2) {per_row=2} : f32[R,8]\n  %out ="),
                ("  %out =", "  %d2 = add(%d, %r2) : f32[R,8]\n  %out ="),
                ("scatter_add(%y, %d,", "scatter_add(%y, %d2,"),
            ],
            "add mixes rows in the order of two lists of slots",
        ),
    ],
)
def test_two_lists_of_slots(change: list[tuple[str, str]], reason: str) -> None:
    m = edited(replaced(*TWO_LISTS, *change), router=False)
    assert reasons(run("expert-grouping", m), "expert-loop") == [reason]


def test_two_sums() -> None:
    """Two carried sums are two combines; a sum that moves on as another one is no sum."""
    out2 = "%out2 = scatter_add(%z, %rows, %slot, %w) {per_row=2} : f32[N,8]"
    sums = [
        ("%y.2 = for_each @forward.expert(%y.1, ", "%y.2, %y.3 = for_each @forward.expert(%y.1, %y.1, "),
        ("scope=mlp.experts.*} : f32[N,8]", "scope=mlp.experts.*} : f32[N,8], f32[N,8]"),
        ("return %y.2", "%both = add(%y.2, %y.3) : f32[N,8]\n  return %both"),
        ("(%expert: index, %y: f32[N,8],", "(%expert: index, %y: f32[N,8], %z: f32[N,8],"),
        ("-> f32[N,8]\n  param $gate", "-> (f32[N,8], f32[N,8])\n  param $gate"),
        ("return %out", f"{out2}\n  return %out, %out2"),
    ]
    m = edited(replaced(*sums))
    weights, x = random_weights(m), tokens(3, 8)
    before = interpret(m, weights, x)
    run("expert-grouping", m)
    assert op_names(m).count("combine") == 2
    close(before, interpret(m, weights, x))
    crossed = edited(replaced(*sums, ("return %out, %out2", "return %out2, %out")))
    runs = run("expert-grouping", crossed)
    assert reasons(runs, "expert-loop") == ["returns %out2, the sum that starts at %z, as %y"]


@pytest.mark.parametrize("layered", [False, True])
def test_a_member_that_is_bound_outside_refuses(layered: bool) -> None:
    """One expert's weight (of one layer) is bound by name, in a function around its own."""
    m = MoE(layered=layered).build()
    load = weights_of(m, "forward")
    stored = load.param("first", TensorType(f32, (6, 8)))
    name = "layers.2.mlp.experts.0.up_proj.weight" if layered else "mlp.experts.0.up_proj.weight"
    Builder(m, load, f32).bind(stored, param=name)
    weights, x = random_weights(m), tokens(3, 8)
    before = interpret(m, weights, x)
    runs = run("expert-grouping", m)
    holder, seen = ("layer", "mlp.experts.*.up_proj.weight") if layered else ("forward", "up_proj.weight")
    assert reasons(runs, "expert-loop", holder) == [f"${seen} is bound in @weights, for some of the runs"]
    assert reasons(runs, "gate-up", f"{holder}.expert")
    assert torch.equal(before, interpret(m, weights, x))


def test_an_unknown_way_of_loading_refuses() -> None:
    text = print_module(MoE(fp8=True).build(), derived=False)
    edit = replaced(
        (
            "  bind(%y.2) {param=down",
            "  %odd = rms_norm(%y.2, $n) {eps=0.1} : f32[8,6]\n  bind(%odd) {param=down",
        ),
        ("  param $down_proj.weight: f8", "  param $n: f32[6]\n  param $down_proj.weight: f8"),
    )
    runs = run("expert-grouping", parse_module(edit(text)))
    wanted = "$down_proj.weight is loaded by rms_norm, not known to work on stacked tensors"
    assert reasons(runs, "expert-loop") == [wanted]


DENSE = func(
    "@forward(%x: f32[N,4]) -> f32[N,2]",
    "param $mlp.gate_proj.weight: f32[2,4]",
    "param $mlp.up_proj.weight: f32[2,4]",
    "%g = linear(%x, $mlp.gate_proj.weight) : f32[N,2]",
    "%u = linear(%x, $mlp.up_proj.weight) : f32[N,2]",
    "%h = swiglu(%g, %u) : f32[N,2]",
    "return %h",
)


def test_dense_gate_up() -> None:
    m = module(DENSE)
    weights, x = random_weights(m), tokens(3, 4)
    before = interpret(m, weights, x)
    run("expert-grouping", m)
    assert op_names(m) == ["linear", "swiglu"] and set(m["forward"].params) == {"mlp.w13"}
    close(before, interpret(m, weights, x))


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (replaced(("swiglu(%g, %u)", "swiglu(%g, %g)")), "%g is used more than once, by swiglu"),
        (replaced(("return %h", "return %u")), "%u is used more than once, by swiglu and return"),
        (
            replaced(
                ("linear(%x, $mlp.up", "linear(%x2, $mlp.up"),
                ("%g =", "%x2 = sigmoid(%x) : f32[N,4]\n%g ="),
            ),
            "%x2 and %x are not the same",
        ),
        (
            replaced(("$mlp.up_proj.weight) :", "$mlp.gate_proj.weight) :")),
            "$mlp.gate_proj.weight is used elsewhere too",
        ),
        (
            replaced(
                ("$mlp.up_proj.weight) :", "$mlp.up_proj.weight, $b) :"),
                ("param $mlp.up", "param $b: f32[2]\nparam $mlp.up"),
            ),
            "has bias $b",
        ),
        (
            replaced(("%x: f32[N,4])", "%x: f32[N,4], %v: f32[2,4])"), ("$mlp.up_proj.weight) :", "%v) :")),
            "%v is no parameter",
        ),
    ],
)
def test_why_not_gate_up(edit: Callable[[str], str], reason: str) -> None:
    m = module(edit(DENSE))
    before = print_module(m)
    assert reasons(run("expert-grouping", m), "gate-up") == [reason]
    assert print_module(m) == before


def test_why_not_grouped_gate_up() -> None:
    text = func(
        "@forward(%x: f32[6~2,4], %off: i32[3], %off2: i32[3]) -> f32[6~2,2]",
        "param $e.a: f32[2,2,4]",
        "param $e.b: f32[2,2,4]",
        "%g = grouped_linear(%x, $e.a, %off) : f32[6~2,2]",
        "%u = grouped_linear(%x, $e.b, %off2) : f32[6~2,2]",
        "%h = swiglu(%g, %u) : f32[6~2,2]",
        "return %h",
    )
    assert reasons(run("expert-grouping", module(text)), "grouped-gate-up") == [
        "%off2 and %off are not the same"
    ]
    assert run("expert-grouping", module(text.replace("%off2)", "%off)")))[0].changed
