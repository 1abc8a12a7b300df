"""FLOPs and bytes against calculations by hand, on DeepSeek-V3's shapes where there are published figures."""

from __future__ import annotations

import pytest
import sympy

from moec.ir import Cost, Module, Op, parse_module
from moec.ir.cost import describe, function_cost, op_cost, parameters, short
from moec.ir.types import symbol

T, N, S, B = symbol("T"), symbol("N"), symbol("S"), symbol("B")

# One MoE layer of DeepSeek-V3's shape (H 7168, I 2048, 256 experts, top-8), without its shared expert.
GROUPED = """\
moec.ir 1 func @moe(%x: bf16[T,7168]) -> bf16[T,7168] sym={T<=4096}
  param $gate.weight: bf16[256,7168]
  param $bias: f32[256]
  param $w13: bf16[256,4096,7168]
  param $w2: bf16[256,7168,2048]
  %logits = linear(%x, $gate.weight) {acc=f32} : f32[T,256]
  %w, %id = route(%logits, $bias) {k=8, score=sigmoid} : f32[T,8], i32[T,8]
  %slot, %off = sort_by_expert(%id) {experts=256} : i32[8*T~256], i32[257]
  %xp = gather_rows(%x, %slot) {per_row=8} : bf16[8*T~256,7168]
  %gu = grouped_linear(%xp, $w13, %off) : bf16[8*T~256,4096]
  %h = swiglu(%gu) : bf16[8*T~256,2048]
  %d = grouped_linear(%h, $w2, %off) : bf16[8*T~256,7168]
  %y = combine(%d, %slot, %w) : bf16[T,7168]
  return %y
end
"""


def op(module: Module, name: str) -> Op:
    found: Op = next(iter(module)).named(name).op  # type: ignore[attr-defined]
    return found


def at(cost: Cost, **values: int) -> tuple[float, float]:
    found = cost.at({symbol(name): value for name, value in values.items()})
    return float(found.flops), float(found.bytes)


@pytest.fixture(scope="module")
def grouped() -> Module:
    return parse_module(GROUPED)


def test_the_gate(grouped: Module) -> None:
    cost = op_cost(op(grouped, "logits"))
    flops, nbytes = at(cost, T=4096)
    assert flops == 2 * 4096 * 7168 * 256
    assert nbytes == 2 * 4096 * 7168 + 2 * 256 * 7168 + 4 * 4096 * 256
    assert describe(cost, grouped.bound_values()) == ["15.0GF", "66.6MB"]


def test_a_token_s_experts_and_the_shared_one_take_0_793_gflop(grouped: Module) -> None:
    routed = sum(at(op_cost(op(grouped, name)), T=1)[0] for name in ("gu", "d"))
    one_expert = 3 * 7168 * 2048
    assert one_expert == 44_040_192
    assert routed == 2 * 8 * one_expert
    assert (routed + 2 * one_expert) / 1e9 == pytest.approx(0.793, abs=5e-4)


@pytest.mark.parametrize(
    ("tokens", "active"), [(1, 8.0), (8, 57.4), (64, 222.4), (512, 256), (4096, 256), (16384, 256)]
)
def test_only_experts_that_have_rows_are_read(grouped: Module, tokens: int, active: float) -> None:
    """256·(1 - (31/32)^M) of the experts have rows: what sorted them says that each token chose 8."""
    assert active == pytest.approx(256 * (1 - (31 / 32) ** tokens), abs=0.05)
    _, nbytes = at(op_cost(op(grouped, "gu")), T=tokens)
    rows = 8 * tokens
    weights = nbytes - 2 * rows * (7168 + 4096) - 4 * 257
    assert weights / (2 * 4096 * 7168) == pytest.approx(256 * (1 - (31 / 32) ** tokens))


def test_experts_that_every_token_takes_are_always_read() -> None:
    """The router chooses 2 of 6, a seventh is everyone's: 6·(1 - (2/3)^M) + 1 of the 7 are read."""
    module = parse_module("""\
moec.ir 1 func @moe(%x: bf16[T,4], %logits: f32[T,6], %w13: bf16[7,4,4]) -> bf16[3*T~7,4]
  %w, %id = route(%logits) {k=2, score=softmax, shared=1} : f32[T,3], i32[T,3]
  %slot, %off = sort_by_expert(%id) {experts=7} : i32[3*T~7], i32[8]
  %y = gather_grouped_linear(%x, %w13, %slot, %off) {per_row=3} : bf16[3*T~7,4]
  return %y
end
""")
    for tokens in (1, 5):
        _, moved = at(op_cost(op(module, "y")), T=tokens)
        read = 6 * (1 - (2 / 3) ** tokens) + 1
        assert moved == pytest.approx(8 * tokens + 32 * read + 12 * tokens + 32 + 24 * tokens)


def test_the_design_s_grouped_gemms(grouped: Module) -> None:
    values = grouped.bound_values()
    assert describe(op_cost(op(grouped, "gu")), values) == ["1.92TF", "15.8GB"]
    assert describe(op_cost(op(grouped, "d")), values) == ["962GF", "8.12GB"]
    assert describe(op_cost(op(grouped, "xp")), values)[-1] == "529MB"
    # The intermediate once each way.
    assert at(op_cost(op(grouped, "h")), T=4096)[1] == 2 * 32768 * (4096 + 2048)


def test_the_whole_function_is_its_ops(grouped: Module) -> None:
    function = grouped["moe"]
    total = function_cost(function)
    assert at(total, T=64)[0] == sum(at(op_cost(o), T=64)[0] for o in function.ops)
    assert at(total, T=64)[1] == pytest.approx(sum(at(op_cost(o), T=64)[1] for o in function.ops))


def line(text: str, args: str) -> Op:
    """The one op of a function."""
    result = text.rpartition(" : ")[2]
    name = text.partition(" = ")[0].partition(",")[0].strip()[1:]
    out, ret = ("()", "return") if "," in text.partition(" = ")[0] else (result, f"return %{name}")
    return next(iter(parse_module(f"moec.ir 1 func @f({args}) -> {out}\n  {text}\n  {ret}\nend\n"))).ops[0]


def test_the_fused_products_move_neither_gathered_rows_nor_gate_and_up(grouped: Module) -> None:
    x = "%x: bf16[T,7168], %w: bf16[256,4096,7168], %s: i32[8*T~256], %o: i32[257]"
    fused = "%h = gather_grouped_linear(%x, %w, %s, %o) {epilogue=swiglu, per_row=8} : bf16[8*T~256,2048]"
    h = "%h: bf16[8*T~256,2048], %w: bf16[256,7168,2048], %o: i32[257], %s: i32[8*T~256]"
    placed = "%d = grouped_linear(%h, %w, %o, %s) : bf16[8*T,7168]"
    T, rows = (
        512,
        8 * 512,
    )  # all experts have rows: (255/256)^4096 of the weights, a ten-millionth, needn't move
    flops, nbytes = at(op_cost(line(fused, x)), T=T)
    assert flops == 2 * rows * 7168 * 4096 + 5 * rows * 2048
    moved = 2 * T * 7168 + 2 * 256 * 4096 * 7168 + 4 * rows + 4 * 257 + 2 * rows * 2048
    assert nbytes == pytest.approx(moved, rel=1e-6)
    assert flops == sum(at(op_cost(op(grouped, name)), T=T)[0] for name in ("gu", "h"))
    flops, nbytes = at(op_cost(line(placed, h)), T=T)
    assert (flops, nbytes) == (
        at(op_cost(op(grouped, "d")), T=T)[0],
        pytest.approx(at(op_cost(op(grouped, "d")), T=T)[1] + 4 * rows),
    )


def test_products_that_are_summed_in_one_go_still_move_there_and_back() -> None:
    """What the two ops move, but for nothing: one launch less is all that it saves."""
    h = "%h: bf16[8*T~256,2048], %w: bf16[256,7168,2048], %o: i32[257], %s: i32[8*T~256], %g: f32[T,8]"
    h += ", %p: bf16[T,7168]"
    both = op_cost(line("%y = grouped_linear_combine(%h, %w, %o, %s, %g, %p) : bf16[T,7168]", h))
    product = op_cost(line("%d = grouped_linear(%h, %w, %o, %s) : bf16[8*T,7168]", h))
    d = "%d: bf16[8*T,7168], %g: f32[T,8], %p: bf16[T,7168]"
    summed = op_cost(line("%y = combine(%d, _, %g, %p) : bf16[T,7168]", d))
    assert at(both, T=64) == pytest.approx(
        [a + b for a, b in zip(at(product, T=64), at(summed, T=64), strict=True)]
    )
    assert (both.launches, product.launches + summed.launches) == (1, 2)


@pytest.mark.parametrize(
    ("text", "args", "flops", "nbytes"),
    [
        ("%y = add(%a, %b) : bf16[N,4]", "%a: bf16[N,4], %b: bf16[4]", 4 * N, 16 * N + 8),
        ("%y = cast(%a) {to=f32} : f32[N,4]", "%a: bf16[N,4]", 4 * N, 24 * N),
        ("%y = zeros_like(%a) {dtype=f32} : f32[N,4]", "%a: bf16[N,4]", 0, 16 * N),
        ("%y = swiglu(%a) : bf16[N,4]", "%a: bf16[N,8]", 20 * N, 24 * N),
        ("%y = swiglu(%a) {limit=7.0} : bf16[N,4]", "%a: bf16[N,8]", 28 * N, 24 * N),
        ("%y = rms_norm(%a, %w) {eps=0.1} : bf16[N,4]", "%a: bf16[N,4], %w: f32[4]", 16 * N, 16 * N + 16),
        # Only the rows that are looked up.
        ("%y = embedding(%i, %t) : bf16[N,4]", "%i: i64[N], %t: bf16[99999,4]", 0, 8 * N + 16 * N),
        ("%y = reshape(%a) {shape=[4*N]} : bf16[4*N]", "%a: bf16[N,4]", 0, 0),
        ("%y = broadcast(%a) {axis=0, size=9} : bf16[9,N]", "%a: bf16[N]", 0, 0),
        ("%y = concat(%a, %a) : bf16[N,8]", "%a: bf16[N,4]", 0, 32 * N),
        ("%y = prefix_sum(%n) : i32[B+1]", "%n: i32[B]", 0, 8 * B + 4),
        (
            "%c, %s = rope_table(%p) {dim=8, theta=10.0} : f32[N,4], f32[N,4]",
            "%p: i64[N]",
            12 * N,
            8 * N + 32 * N,
        ),
        (
            "%y = rope(%x, %c, %s) {layout=half} : bf16[N,2,8]",
            "%x: bf16[N,2,8], %c: f32[N,4], %s: f32[N,4]",
            48 * N,
            64 * N + 32 * N,
        ),
        (
            "%y = cache_read(%c, %l, %t, %n) : bf16[S,576]",
            "%c: cache<bf16[576], page=64>, %l: index, %t: i32[B,P], %n: i32[B]",
            0,
            2 * 1152 * S + 4 * B * symbol("P"),
        ),
        (
            "%y = cache_write(%c, %l, %e, %s) : cache<bf16[576], page=64>",
            "%c: cache<bf16[576], page=64>, %l: index, %e: bf16[N,576], %s: i32[N]",
            0,
            2 * 1152 * N + 4 * N,
        ),
        # Of the sums, R rows are read and written in fp32; each row has one weight.
        (
            "%y = scatter_add(%a, %r, %s, %w) {per_row=2} : f32[T,4]",
            "%a: f32[T,4], %r: bf16[R,4], %s: i32[R], %w: f32[T,2]",
            8 * symbol("R"),
            (8 + 2 * 16 + 4 + 4) * symbol("R"),
        ),
        (
            "%o = combine(%r, %s, %w) : bf16[N,4]",
            "%r: bf16[2*N,4], %s: i32[2*N], %w: f32[N,2]",
            16 * N,
            40 * N,
        ),
        (
            "%o = combine(%r, _, %w) : bf16[N,4]",
            "%r: bf16[2*N,4], %w: f32[N,2]",
            16 * N,
            32 * N,
        ),
    ],
)
def test_by_hand(text: str, args: str, flops: object, nbytes: object) -> None:
    cost = op_cost(line(text, args))
    assert sympy.expand(cost.flops - flops) == 0
    assert sympy.expand(cost.bytes - nbytes) == 0


def attention(tokens: str, keys: str, offsets: str) -> Op:
    args = f"%q: bf16[{tokens},128,192], %k: bf16[{keys},128,192], %v: bf16[{keys},128,128]"
    args += f", %a: i32[{offsets}], %b: i32[{offsets}]"
    return line(f"%o = attention(%q, %k, %v, %a, %b) {{scale=0.1}} : bf16[{tokens},128,128]", args)


def test_attention_takes_640_flops_a_head_query_and_key() -> None:
    # Expanded MLA: 640·Sq·Sk a head; over B sequences of equal length a query meets S/B keys.
    cost = op_cost(attention("N", "S", "B+1"))
    assert at(cost, N=32, S=4096, B=1)[0] == 640 * 128 * 32 * 4096
    assert at(cost, N=32, S=4096, B=8)[0] == 640 * 128 * 32 * 4096 / 8
    assert op_cost(attention("32", "4096", "4")).flops == sympy.Rational(640 * 128 * 32 * 4096, 3)
    assert op_cost(attention("0", "0", "1")).flops == 0  # no sequences


LATENT = (
    "%q: bf16[N,128,576], %kv: cache<bf16[576], page=64>, %l: index, %t: i32[B,P], %a: i32[B+1], %s: i32[B]"
)


def test_absorbed_attention_takes_2176_flops_a_head_query_and_key() -> None:
    """DeepSeek-V3: scores over 576 columns, sums over 512; each latent is read once, for all heads."""
    text = "%o = latent_attention(%q, %kv, %l, %t, %a, %s) {rank=512, scale=0.1} : bf16[N,128,512]"
    flops, nbytes = at(op_cost(line(text, LATENT)), N=32, S=4096, B=8, P=8)
    assert flops == 2176 * 128 * 32 * 4096 / 8
    rows = 2 * 32 * 128 * (576 + 512)
    assert nbytes == 1152 * 4096 + rows + 4 * (8 * 8 + 9 + 8)
    assert at(op_cost(line(text, LATENT)), N=0, S=0, B=0, P=0)[0] == 0


def test_paged_attention_costs_what_attention_does_without_the_copy() -> None:
    args = (
        "%q: bf16[N,8,64], %kv: cache<bf16[4,64], page=16>, %l: index, %t: i32[B,P], %a: i32[B+1], %s: i32[B]"
    )
    text = "%o = paged_attention(%q, %kv, %l, %t, %a, %s) {scale=0.1} : bf16[N,8,64]"
    flops, nbytes = at(op_cost(line(text, args)), N=2, S=100, B=1, P=7)
    assert flops == 2 * 2 * 100 * 8 * (64 + 64)
    assert nbytes == 2 * 100 * 4 * 64 + 2 * 2 * 2 * 8 * 64 + 4 * (7 + 2 + 1)


def test_head_linear_is_a_product_a_head() -> None:
    """W_UK of DeepSeek-V3: 2·128·128·512 FLOPs a token, 16.8 MB of weights."""
    text = "%y = head_linear(%x, %w) {transposed=true} : bf16[N,128,512]"
    flops, nbytes = at(op_cost(line(text, "%x: bf16[N,128,128], %w: bf16[128,128,512]")), N=3)
    assert flops == 3 * 2 * 128 * 128 * 512
    assert nbytes == 2 * 128 * 128 * 512 + 2 * 3 * 128 * (128 + 512)


def test_a_split_batch_is_in_one_part_where_all_sequences_are_alike() -> None:
    parts = ("N0", "B0+1", "B0", "B0,P", "N-N0", "B-B0+1", "B-B0", "B-B0,P")
    args = "%x: f32[N,4], %cu: i32[B+1], %lens: i32[B], %table: i32[B,P]"
    text = [
        f"moec.ir 1 func @f({args}) -> (f32[N0,4], f32[N-N0,4]) sym={{B<=4,N<=40,S<=99}}",
        "%r0, %c0, %l0, %t0, %r1, %c1, %l1, %t1 = split_batch(%x, %cu, %lens, %table) {below=10} : "
        + ", ".join(f"i32[{p}]" for p in parts),
        "%a = take_rows(%x, %r0) : f32[N0,4]",
        "%b = take_rows(%x, %r1) : f32[N-N0,4]",
        "return %a, %b",
        "end",
    ]
    module = parse_module("\n".join(text) + "\n")
    names = ("N0", "B0", "S0", "S1")
    assert [module.bound_values()[symbol(n)] for n in names] == [0, 0, 0, 99]
    short = op(module, "r0").shares({N: 39, B: 4, S: 99})  # type: ignore[attr-defined]
    assert [short[symbol(n)] for n in names] == [39, 4, 99, 0]
    assert op(module, "r0").shares({N: 39}) == {}  # type: ignore[attr-defined]
    # Rows and their numbers, once each way, of the part that has them.
    costs = [at(op_cost(op(module, n)).at(module.bound_values()))[1] for n in ("a", "b")]
    assert costs == [0, 40 * (2 * 16 + 4)]


LOOPS = """\
moec.ir 1 module @m sym={T<=32}

func @expert(%expert: index, %acc: f32[T,4], %x: f32[T,4], %id: i32[T,2], %w: f32[T,2]) -> f32[T,4]
  param $up: f32[4,4]
  %slot = expert_slots(%id, %expert) : i32[R]
  %rows = gather_rows(%x, %slot) {per_row=2} : f32[R,4]
  %y = linear(%rows, $up) : f32[R,4]
  %out = scatter_add(%acc, %y, %slot, %w) {per_row=2} : f32[T,4]
  return %out
end

func @layer(%layer: index, %x: f32[T,4], %id: i32[T,2], %w: f32[T,2]) -> f32[T,4]
  param $norm: f32[4]
  %n = rms_norm(%x, $norm) {eps=1e-06} : f32[T,4]
  %acc = zeros_like(%n) {dtype=f32} : f32[T,4]
  %y = for_each @expert(%acc, %n, %id, %w) {experts=0..7, scope=experts.*} : f32[T,4]
  return %y
end

func @step(%x: f32[T,4], %id: i32[T,2], %w: f32[T,2]) -> f32[T,4]
  param $last: f32[4]
  %y = call @layer(%x, %id, %w) {layers=1..3, scope=layers.*} : f32[T,4]
  %z = call @layer(%y, %id, %w) {layers=3..4, scope=layers.*} : f32[T,4]
  %o = rms_norm(%z, $last) {eps=1e-06} : f32[T,4]
  return %o
end
"""


def test_a_loop_costs_its_body_with_the_rows_shared_equally() -> None:
    module = parse_module(LOOPS)
    experts = op_cost(module["layer"].named("y").op, module)  # type: ignore[attr-defined]
    # 2·T slots over 8 experts: T/4 rows each; a linear takes 2·4·4 a row, a scatter_add 2·4.
    assert experts.flops == 8 * (T / 4) * (32 + 8)
    layer = 16 * T + 80 * T  # its norm and its experts
    calls = [op_cost(module["step"].named(name).op, module) for name in ("y", "z")]  # type: ignore[attr-defined]
    assert [c.flops for c in calls] == [3 * layer, 2 * layer]
    assert function_cost(module["step"], module).flops == 5 * layer + 16 * T
    assert at(function_cost(module["step"], module), T=32)[1] > 0


def test_views_launch_nothing_and_loops_multiply() -> None:
    module = parse_module(LOOPS)
    # slots, gathered rows, product, sum; eight experts; with the norm and the zeros.
    assert op_cost(module["layer"].named("y").op, module).launches == 8 * 4  # type: ignore[attr-defined]
    assert function_cost(module["layer"], module).launches == 2 + 32
    assert function_cost(module["step"], module).launches == 5 * 34 + 1
    for view in (
        "%y = reshape(%a) {shape=[4*N]} : bf16[4*N]",
        "%y = broadcast(%a) {axis=0, size=9} : bf16[9,N,4]",
        "%y, %z = split(%a) {sizes=[1,3]} : bf16[N,1], bf16[N,3]",
    ):
        assert op_cost(line(view, "%a: bf16[N,4]")).launches == 0
    assert op_cost(line("%y = concat(%a, %a) : bf16[N,8]", "%a: bf16[N,4]")).launches == 1
    assert op_cost(line("%y = concat(%a, %a) : bf16[N,8]", "%a: bf16[N,4]")).at({N: 3}).launches == 1


def test_parameters_that_loops_share_count_once() -> None:
    module = parse_module(LOOPS)
    assert parameters(module, "expert") == 16
    assert parameters(module, "layer") == 4 + 8 * 16
    # Layers 1 to 4, though layer 3 runs twice.
    assert parameters(module, "step") == 4 + 4 * (4 + 8 * 16)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.4, "0B"),
        (7, "7B"),
        (999, "999B"),
        (1000, "1.00KB"),
        (9996, "10.0KB"),
        (99_960, "100KB"),
        (999_600, "1.00MB"),
        (66.58e6, "66.6MB"),
        (15.03e9, "15.0GB"),
        (1.924e12, "1.92TB"),
        (3.25e15, "3250TB"),
    ],
)
def test_three_significant_digits(value: float, text: str) -> None:
    assert short(value, "B") == text


def test_what_stays_symbolic_is_left_out() -> None:
    assert describe(Cost(2 * T, 1000), {}) == ["1.00KB"]
    assert describe(Cost(2 * T, 0), {T: 500}) == ["1.00KF"]
    assert describe(Cost(), {}) == []
    assert Cost(1, 2) + Cost(T, 3) * 2 == Cost(1 + 2 * T, 8)
