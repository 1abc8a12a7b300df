"""moec.ops.fused_experts with experts in fp8, against what their values and scales stand for."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moec.errors import BadInput
from moec.ops import compiled, fused_experts
from tests.moec.experts import ACTS, Layer, layer, loop
from tests.moec.fp8_experts import BLOCKS, E4M3, LEAST, FP8Layer, fp8_layer, ratio


@given(st.data())
def test_fused_experts(data: st.DataObject) -> None:
    draw = data.draw
    experts = draw(st.sampled_from([3, 8]))
    scaled_x = draw(st.booleans())
    dtype = torch.bfloat16 if scaled_x else draw(st.sampled_from([torch.float32, torch.bfloat16]))
    one = fp8_layer(
        draw(st.sampled_from(BLOCKS)),
        scaled_x,
        dtype,
        tokens=draw(st.integers(4, 9)),
        k=draw(st.integers(1, experts)),
        experts=experts,
        hidden=draw(st.sampled_from([128, 200, 264])),
        width=draw(st.sampled_from([64, 100, 256])),
    )
    how: dict[str, Any] = {
        "activation": draw(st.sampled_from(list(ACTS))),
        "limit": draw(st.sampled_from([None, 0.5])),
        "shared": torch.randn(one.x.shape).to(dtype) if draw(st.booleans()) else None,
    }
    first = draw(st.sampled_from([0, 5]))
    one.ids += first
    found = fused_experts(*one.args, **one.scales, **how, expert_range=(first, first + experts))
    assert found.dtype == dtype
    assert ratio(found, loop(one.meant(), first, **how)) > LEAST


def test_no_tokens() -> None:
    one = fp8_layer(tokens=0)
    assert fused_experts(*one.args, **one.scales).shape == (0, 256)


def test_nan_and_skipped_choices_stay_where_they_are() -> None:
    one = fp8_layer()
    clean = fused_experts(*one.args, **one.scales)
    one.x[3], one.ids[5] = math.nan, -1
    got = fused_experts(*one.args, **one.scales)
    assert got[3].isnan().all() and got[5].eq(0).all()
    rest = [0, 1, 2, 4, 6, 7, 8]
    assert torch.equal(got[rest], clean[rest])


def test_a_scale_that_is_nan_is_not_hidden() -> None:
    one = fp8_layer()
    one.w2_scale[1, 0, 0] = math.nan
    got = fused_experts(*one.args, **one.scales)
    chose = (one.ids == 1).any(1)
    assert got[chose][:, :128].isnan().all() and not got[chose][:, 128:].isnan().any()
    assert not got[~chose].isnan().any()


def test_out_and_compiled_graphs() -> None:
    one = fp8_layer(scaled_x=True)
    wanted = fused_experts(*one.args, **one.scales)
    out = torch.empty(one.x.shape, dtype=torch.bfloat16)
    assert fused_experts(*one.args, **one.scales, out=out) is out and torch.equal(out, wanted)
    traced = torch.compile(lambda *a: fused_experts(*a, **one.scales), fullgraph=True, backend="aot_eager")
    assert torch.equal(traced(*one.args), wanted)


def test_functions_are_kept_by_the_blocks_of_their_scales() -> None:
    for block in BLOCKS:
        one = fp8_layer(block)
        fused_experts(*one.args, **one.scales)
    kept = {key.blocks for key in compiled._functions if key.form == "fused_fp8" and key.width == 256}
    assert kept >= {(block, block) for block in BLOCKS}


def drop(name: str) -> Callable[[FP8Layer], dict[str, Any]]:
    return lambda one: {n: s for n, s in one.scales.items() if n != name}


def change(name: str, how: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[FP8Layer], dict[str, Any]]:
    return lambda one: one.scales | {name: how(one.scales[name])}


@pytest.mark.parametrize(
    "given, message",
    [
        (drop("w13_scale"), "w13_scale is missing: w13 is float8_e4m3fn"),
        (drop("w2_scale"), "w2_scale is missing"),
        (drop("x_scale"), r"x must be bfloat16 or float16 or float32 \[T, H\]"),
        (
            change("w13_scale", lambda s: s[:, :1]),
            r"w13_scale must be float32, one of \[4, 2, 2\] \(128 x 128",
        ),
        (change("w2_scale", torch.Tensor.half), r"w2_scale must be .*, not float16"),
        (change("w2_scale", lambda s: s.repeat(1, 2, 2)), "w2_scale must be"),
        (change("x_scale", lambda s: s[:, :1]), r"x_scale must be float32 \[T, ceil\(H / 128\)\] = \[9, 2\]"),
        (change("x_scale", lambda s: s.double()), "x_scale must be float32"),
    ],
)
def test_scales_that_do_not_fit(given: Callable[[FP8Layer], dict[str, Any]], message: str) -> None:
    one = fp8_layer(scaled_x=True)
    with pytest.raises(BadInput, match=message):
        fused_experts(*one.args, **given(one))


def test_dtypes_that_do_not_fit() -> None:
    one, plain = fp8_layer(), layer(9, hidden=256, width=128)
    with pytest.raises(BadInput, match="w13 must be float8_e4m3fn"):
        fused_experts(*plain.args, **one.scales)
    with pytest.raises(BadInput, match="w13 must be float32"):
        fused_experts(*Layer(plain.x, one.w13, one.w2, plain.weights, plain.ids).args)
    with pytest.raises(BadInput, match="w2 must be float8_e4m3fn"):
        fused_experts(one.x, one.w13, one.w2.to(torch.float8_e5m2), one.weights, one.ids, **one.scales)
    with pytest.raises(BadInput, match="shared must be bfloat16 like x"):
        scaled = fp8_layer(scaled_x=True)
        fused_experts(*scaled.args, **scaled.scales, shared=torch.zeros(9, 256))
    assert one.w13.dtype == E4M3
