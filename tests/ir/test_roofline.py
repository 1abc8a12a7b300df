"""Prices by hand, and against the published roofline of DeepSeek-V3's MoE layer."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moec.errors import BadOption
from moec.ir import parse_module
from moec.ir.cost import function_cost
from moec.ir.devices import DEVICES
from moec.ir.roofline import Costs, Price, functions_run
from moec.ir.routing import Uniform, Zipf
from moec.ir.sizes import complete, parse_sizes, symbols
from moec.ir.types import symbol

from .test_cost import GROUPED, LOOPS

H100 = DEVICES["sm_90a"]


def costs(text: str, routing: object = None, **sizes: float) -> Costs:
    return Costs(parse_module(text), H100, sizes, routing or Uniform())  # type: ignore[arg-type]


def test_an_op_takes_the_longer_of_its_bytes_and_its_flops() -> None:
    few, many = costs(GROUPED, T=1), costs(GROUPED, T=65536)
    logits, h = (next(o for o in few.module["moe"].ops if o.results[0].name == n) for n in ("logits", "h"))
    moved = 2 * 7168 + 2 * 256 * 7168 + 4 * 256
    assert few.op(logits) == Price(2 * 7168 * 256, moved, 1, moved / 3.0e12)
    gu = many.module["moe"].named("gu").op  # type: ignore[attr-defined]
    assert many.op(gu).seconds == 2 * 8 * 65536 * 7168 * 4096 / 798e12
    # Arithmetic that is no product runs at fp32's rate.
    bound = replace(H100, bandwidth=1e18)
    assert Costs(few.module, bound, {"T": 10}).op(h).seconds == 5 * 80 * 2048 / 67e12


SHARED = """\
moec.ir 1 func @moe(%x: DT[T,7168], %id: i32[T,8], %w: f32[T,8]) -> DT[T,7168]
  param $w13: DT[256,4096,7168]
  param $w2: DT[256,7168,2048]
  param $s13: DT[4096,7168]
  param $s2: DT[7168,2048]
  %slot, %off = sort_by_expert(%id) {experts=256} : i32[8*T~256], i32[257]
  %h = gather_grouped_linear(%x, $w13, %slot, %off) {epilogue=swiglu, per_row=8} : DT[8*T~256,2048]
  %d = grouped_linear(%h, $w2, %off, %slot) : DT[8*T,7168]
  %gu = linear(%x, $s13) : DT[T,4096]
  %sh = swiglu(%gu) : DT[T,2048]
  %sd = linear(%sh, $s2) : DT[T,7168]
  return %sd
end
"""


@pytest.mark.parametrize(
    ("tokens", "gigabytes", "micros"),
    [(1, 0.793, 264), (8, 5.15, 1716), (64, 19.7, 6562), (512, 22.7, 7563)],
)
def test_the_published_floor_of_a_layer_in_bf16(tokens: int, gigabytes: float, micros: float) -> None:
    """The table counts expert weights, x, y and the intermediate once each way: little is left out."""
    found = costs(SHARED.replace("DT", "bf16"), T=tokens).function("moe")
    # d by slot, the gathered rows of the shared expert's gate and up: activations the table leaves out.
    assert found.bytes / 1e9 == pytest.approx(gigabytes, rel=0.01)
    assert found.seconds * 1e6 == pytest.approx(micros, rel=0.01)
    assert found.flops / tokens / 1e9 == pytest.approx(0.793, abs=2e-3)


FP8 = """\
moec.ir 1 func @moe(%x: f8e4m3[T,7168]@s1x128, %id: i32[T,8]) -> bf16[T,7168]
  param $w13: f8e4m3[256,4096,7168]@s128x128
  param $w2: f8e4m3[256,7168,2048]@s128x128
  param $s13: f8e4m3[4096,7168]@s128x128
  param $s2: f8e4m3[7168,2048]@s128x128
  %slot, %off = sort_by_expert(%id) {experts=256} : i32[8*T~256], i32[257]
  %h = gather_grouped_linear(%x, $w13, %slot, %off) {epilogue=swiglu, per_row=8, quant=1x128} : f8e4m3[8*T~256,2048]@s1x128
  %d = grouped_linear(%h, $w2, %off, %slot) : bf16[8*T,7168]
  %gu = linear(%x, $s13) : bf16[T,4096]
  %sh = swiglu(%gu) : bf16[T,2048]
  %sq = quant(%sh) {block=1x128} : f8e4m3[T,2048]@s1x128
  %sd = linear(%sq, $s2) : bf16[T,7168]
  return %sd
end
"""  # noqa: E501


@pytest.mark.parametrize(
    ("tokens", "gigabytes", "micros"), [(1, 0.397, 132), (8, 2.57, 858), (64, 9.85, 3282)]
)
def test_the_published_floor_of_a_layer_in_fp8(tokens: int, gigabytes: float, micros: float) -> None:
    found = costs(FP8, T=tokens).function("moe")
    assert found.bytes / 1e9 == pytest.approx(gigabytes, rel=0.01)
    assert found.seconds * 1e6 == pytest.approx(micros, rel=0.01)


def test_fp8_products_run_at_fp8_s_rate() -> None:
    prices = costs(FP8, T=65536)
    h = prices.module["moe"].named("h").op  # type: ignore[attr-defined]
    assert prices.op(h).seconds == prices.op(h).flops / 1979e12
    # A device without them computes in bf16 what it has dequantised.
    a100 = Costs(prices.module, DEVICES["sm_80"], {"T": 65536})
    assert a100.op(h).seconds == a100.op(h).flops / 312e12


def test_a_loop_over_experts_needs_only_those_with_rows() -> None:
    module = parse_module(LOOPS)
    price = Costs(module, H100, {"T": 3}).function("layer")
    running = 8 * (1 - (1 - 2 / 8) ** 3)
    assert price.flops == pytest.approx(4 * 12 + 6 * (2 * 4 * 4 + 2 * 4))  # the norm, six slots
    # Each expert that has rows reads the ids, x and its weights; each slot moves its number and its row.
    slots = 6 * (4 + (4 + 16) + (16 + 16) + (16 + 2 * 16 + 4 + 4))
    norm, zeros = 2 * 48 + 16, 48
    assert price.bytes == pytest.approx(norm + zeros + running * (4 * 6 + 16 * 3 + 64) + slots)
    skewed = Costs(module, H100, {"T": 3}, Zipf(2.0)).function("layer")
    assert skewed.bytes < price.bytes and skewed.flops == pytest.approx(price.flops)


@given(st.integers(0, 2000), st.sampled_from(["layer", "step"]))
def test_numbers_are_the_symbolic_cost_s(tokens: int, name: str) -> None:
    module = parse_module(LOOPS)
    said = function_cost(module[name], module)
    found = Costs(module, H100, {"T": tokens}).function(name)
    assert found.launches == said.launches
    if tokens:  # nothing is shared out among no experts
        exact = said.at({symbol("T"): tokens})
        assert found.flops == pytest.approx(float(exact.flops))
        assert found.bytes == pytest.approx(float(exact.bytes))


def test_functions_of_an_entry_add_up_to_it() -> None:
    prices = costs(LOOPS, T=5)
    runs = functions_run(prices, "step")
    assert [(r.name, r.launched) for r in runs.values()] == [("step", 1), ("layer", 5), ("expert", 40)]
    assert runs["expert"].working == pytest.approx(5 * 8 * (1 - 0.75**5))
    total = prices.function("step")
    for what in ("flops", "bytes", "launches", "seconds"):
        assert sum(getattr(r.own, what) for r in runs.values()) == pytest.approx(getattr(total, what))


STEP = """\
moec.ir 1 func @step(%x: bf16[N,576], %table: i32[B,P], %lens: i32[B], %c: cache<bf16[576], page=64>, %l: index) -> bf16[S,576]
  %all = cache_read(%c, %l, %table, %lens) : bf16[S,576]
  return %all
end
"""  # noqa: E501


def test_sizes_by_name_and_what_stands_where_nothing_is_said() -> None:
    module = parse_module(STEP)
    assert set(symbols(module)) == {"N", "B", "P", "S"}

    def at(text: str) -> dict[str, int]:
        return complete(parse_sizes(text, module), module)

    assert at("") == {"N": 1, "B": 1, "P": 1, "S": 1}
    assert at("T=4096") == {"N": 4096, "B": 1, "P": 64, "S": 4096}
    assert at("B=4, context=65") == {"N": 4, "B": 4, "P": 2, "S": 260}
    assert at("S=8192,B=2,P=100") == {"N": 2, "B": 2, "P": 100, "S": 8192}
    assert at("B=0")["N"] == 0
    assert symbols(parse_module(LOOPS)) == ["T"]  # R, an expert's rows, is the loop's own
    assert parse_sizes("T=4", parse_module(LOOPS)) == {"T": 4}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("Q=3", "no size is called that; there is N, B, S, P, T, context"),
        ("contex=3", "did you mean context"),
        ("T", "takes names with numbers, as N=4096"),
        ("T=-1", "takes names with numbers"),
        ("T=1e3", "takes names with numbers"),
        ("T=" + "9" * 5000, "takes names with numbers"),
        ("T=1,N=2", "gives N twice"),
        ("S=1,context=2", "gives both S and context"),
        ("T=9,S=8", "they include the 9 new tokens'"),
    ],
)
def test_sizes_that_mean_nothing(text: str, why: str) -> None:
    module = parse_module(STEP)
    with pytest.raises(BadOption) as error:
        complete(parse_sizes(text, module), module)
    assert why in str(error.value)


def test_what_has_no_rows_moves_no_weights() -> None:
    prices = costs(SHARED.replace("DT", "bf16"), T=0)
    linear = prices.module["moe"].named("gu").op  # type: ignore[attr-defined]
    assert prices.op(linear) == Price(launches=1)
    assert prices.function("moe").launches == 6


def test_a_symbol_without_a_number_is_asked_for() -> None:
    with pytest.raises(BadOption, match=r"no number is given for T: --at T="):
        costs(LOOPS).function("step")
