"""moec.ops.fused_experts with experts in fp8, against what their values and scales stand for."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moec.errors import BadInput, DeviceUnavailable
from moec.ops import compiled, fused_experts, grouped_experts, route, routed_experts, scales
from tests.moec.experts import ACTS, Layer, expert, layer, loop
from tests.moec.fp8_experts import (
    BLOCKS,
    E4M3,
    LEAST,
    X_BLOCKS,
    FP8Layer,
    fp8_layer,
    quantise,
    ratio,
    rounded,
    spread,
)


@given(st.data())
def test_fused_experts(data: st.DataObject) -> None:
    draw = data.draw
    experts = draw(st.sampled_from([3, 8]))
    scaled_x = draw(st.sampled_from([False, *X_BLOCKS]))
    dtype = torch.bfloat16 if scaled_x else draw(st.sampled_from([torch.float32, torch.bfloat16]))
    one = fp8_layer(
        draw(st.sampled_from(BLOCKS)),
        scaled_x,
        dtype,
        tokens=draw(st.integers(4, 9)),
        k=draw(st.integers(1, experts)),
        experts=experts,
        hidden=draw(st.sampled_from([256, 200, 264])),
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


@pytest.mark.parametrize("x_scale", [None, torch.ones(0, 2), torch.ones(0, 1), torch.ones(1)])
def test_no_tokens(x_scale: torch.Tensor | None) -> None:
    one = fp8_layer(tokens=0)
    given = one.scales | ({} if x_scale is None else {"x_scale": x_scale})
    x = one.x if x_scale is None else one.x.to(E4M3)
    assert fused_experts(x, *one.args[1:], **given).shape == (0, 256)
    off = torch.zeros(5, dtype=torch.int32)
    assert grouped_experts(x, off, one.w13, one.w2, **given).shape == (0, 256)


def test_nan_and_skipped_choices_stay_where_they_are() -> None:
    one = fp8_layer()
    clean = fused_experts(*one.args, **one.scales)
    one.x[3], one.ids[5] = math.nan, -1
    got = fused_experts(*one.args, **one.scales)
    assert got[3].isnan().all() and got[5].eq(0).all()
    rest = [0, 1, 2, 4, 6, 7, 8]
    assert torch.equal(got[rest], clean[rest])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name, shown", [("w13_scale", "1, 1, 0"), ("w2_scale", "1, 1, 0")])
def test_a_scale_that_is_not_finite_is_named(name: str, shown: str, bad: float) -> None:
    one = fp8_layer()
    one.scales[name][1, 1, 0] = bad
    named = rf"{name}\[{shown}\] is {bad}: the scales of experts that are chosen"
    with pytest.raises(BadInput, match=named):
        fused_experts(*one.args, **one.scales)
    off = torch.tensor([0, 2, 3, 9, 9], dtype=torch.int32)
    with pytest.raises(BadInput, match=rf"{name}\[{shown}\]"):
        grouped_experts(one.x, off, one.w13, one.w2, **one.scales)


def test_scales_of_experts_that_nobody_chose_may_be_anything() -> None:
    one = fp8_layer()
    one.ids[one.ids == 1] = 3
    clean = fused_experts(*one.args, **one.scales)
    one.w13_scale[1], one.w2_scale[1] = math.nan, math.inf
    assert torch.equal(fused_experts(*one.args, **one.scales), clean)
    grouped_experts(one.x, torch.tensor([0, 2, 2, 9, 9]), one.w13, one.w2, **one.scales)


def test_a_row_whose_scale_is_nan_stays_in_its_token() -> None:
    one = fp8_layer(scaled_x=True)
    clean = fused_experts(*one.args, **one.scales)
    one.x_scale[3] = math.nan  # type: ignore[index]
    got = fused_experts(*one.args, **one.scales)
    assert got[3].isnan().all() and torch.equal(got[[0, 1, 2, 4]], clean[[0, 1, 2, 4]])


@given(st.data())
def test_grouped_experts(data: st.DataObject) -> None:
    """Rows by expert, some experts without any; rows behind the last are zeros, whatever they hold."""
    draw = data.draw
    block, x_block = draw(st.sampled_from(BLOCKS)), draw(st.sampled_from([False, *X_BLOCKS]))
    counts = draw(st.lists(st.integers(0, 4), min_size=3, max_size=3))
    rows, spare = sum(counts), draw(st.integers(0 if any(counts) else 1, 3))
    dtype = torch.bfloat16 if x_block else draw(st.sampled_from([torch.float32, torch.bfloat16]))
    sizes = {"hidden": draw(st.sampled_from([256, 200])), "width": draw(st.sampled_from([64, 100]))}
    one = fp8_layer(block, x_block, dtype, tokens=rows + spare, experts=3, **sizes)
    meant = one.meant()
    if spare and not x_block:
        one.x[rows:] = math.nan
    off = torch.tensor([0, *counts]).cumsum(0).to(draw(st.sampled_from([torch.int32, torch.int64])))
    how: dict[str, Any] = {
        "activation": draw(st.sampled_from(list(ACTS))),
        "limit": draw(st.sampled_from([None, 0.5])),
    }
    wanted = torch.zeros(rows, sizes["hidden"], dtype=torch.float64)
    for row, e in enumerate(e for e, count in enumerate(counts) for _ in range(count)):
        wanted[row] = expert(meant.x[row], meant.w13[e], meant.w2[e], **how)
    found = grouped_experts(one.x, off, one.w13, one.w2, **one.scales, **how)
    assert found.dtype == dtype and found[rows:].eq(0).all()
    assert not rows or ratio(found[:rows], wanted) > LEAST
    out = torch.empty(found.shape, dtype=dtype)
    assert grouped_experts(one.x, off, one.w13, one.w2, **one.scales, **how, out=out) is out
    assert torch.equal(out, found)


def test_a_scale_for_gate_and_one_for_up() -> None:
    """As transformers stores per-tensor scales of two projections that it joined."""
    one = fp8_layer()
    wide = spread(one.w13, one.w13_scale)
    halves = [quantise(half, (0, 0)) for half in wide.chunk(2, dim=1)]
    one.w13, one.w13_scale = (torch.cat(parts, 1) for parts in zip(*halves, strict=True))
    assert one.w13_scale.shape == (4, 2, 1)
    meant = one.meant()
    meant.w13 = torch.cat([spread(q, s) for q, s in halves], 1)
    assert ratio(fused_experts(*one.args, **one.scales), loop(meant)) > LEAST


# Where the products' operands are the very same but for a few that lie between two values of e4m3.
ALIKE = 40.0


def powers_of_two(one: FP8Layer, which: tuple[bool, bool]) -> None:
    """Makes such of the scales of w13, of w2, in the dtype that says so; no value changes by that."""
    for name, power in zip(("w13", "w2"), which, strict=True):
        q, scale = quantise(spread(getattr(one, name), getattr(one, f"{name}_scale")), (128, 128), True)
        setattr(one, name, q)
        setattr(one, f"{name}_scale", scale.to(torch.float8_e8m0fnu) if power else scale)


@pytest.mark.parametrize("form", ["fused", "routed", "grouped"])
@pytest.mark.parametrize("limit", [None, 0.5])
def test_what_is_multiplied_by_powers_of_two_has_such_scales(form: str, limit: float | None) -> None:
    """Each weight's dtype decides for what it multiplies; in fp32 the same powers of two decide nothing."""
    found: dict[tuple[bool, bool], torch.Tensor] = {}
    wanted: dict[tuple[bool, bool], torch.Tensor] = {}
    for which in itertools.product((False, True), repeat=2):
        one, how = fp8_layer(tokens=12, width=200), {"limit": limit}
        powers_of_two(one, which)
        if form == "routed":
            logits = torch.randn(12, 4, generator=torch.Generator().manual_seed(3))
            router: dict[str, Any] = {"k": 2, "score": "softmax", "renorm": True}
            one.weights, one.ids = route(logits, **router)
            y = routed_experts(one.x, logits, one.w13, one.w2, **router, **one.scales, **how)
        elif form == "grouped":
            one.ids, one.weights = torch.arange(4).repeat_interleave(3)[:, None], torch.ones(12, 1)
            y = grouped_experts(one.x, torch.tensor([0, 3, 6, 9, 12]), one.w13, one.w2, **one.scales, **how)
        else:
            y = fused_experts(*one.args, **one.scales, **how)
        found[which], wanted[which] = y, rounded(one, which, **how)
    for which, y in found.items():
        assert ratio(y, wanted.pop(which)) > ALIKE
        assert all(ratio(y, found[other]) < ALIKE - 5 for other in found if other != which)


def test_the_dtype_of_w2_s_scale_decides_alone_where_x_has_scales() -> None:
    for which in ((True, True), (True, False)):
        one = fp8_layer(scaled_x=True)
        powers_of_two(one, which)
        assert ratio(fused_experts(*one.args, **one.scales), rounded(one, which)) > ALIKE


def test_kernels_get_contiguous_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slice of all ranks' scales, say, whose strides are not its own."""
    one, known = fp8_layer(), compiled.function
    wanted, seen = fused_experts(*one.args, **one.scales), []

    def function(key: compiled.Key) -> Any:
        return lambda *args: (
            seen.extend(a for a in args[5:] if isinstance(a, torch.Tensor)) or known(key)(*args)
        )

    monkeypatch.setattr("moec.ops.library.function", function)
    given = {name: s.repeat_interleave(2, 0)[::2] for name, s in one.scales.items()}
    assert torch.equal(fused_experts(*one.args, **given), wanted)
    assert len(seen) == 2 and all(s.is_contiguous() for s in seen)


def test_a_gpu_without_fp8_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moec.ops.library.target_of", lambda device: ("sm_80", False))
    one = fp8_layer()
    with pytest.raises(DeviceUnavailable, match=r"M0505.*sm_80 multiplies no fp8\n.*in bfloat16"):
        fused_experts(*one.args, **one.scales)
    with pytest.raises(DeviceUnavailable, match="sm_80 multiplies no fp8"):
        off = torch.tensor([0, 2, 3, 9, 9], dtype=torch.int32)
        grouped_experts(one.x, off, one.w13, one.w2, **one.scales)


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


INTERPRETED = """
import torch
from moec.ops import compiled, fused_experts, grouped_experts
from tests.codegen import interpreter_casts
from tests.moec.experts import loop
from tests.moec.fp8_experts import LEAST, fp8_layer, ratio, rounded

interpreter_casts.install()
for block, x_block in (((128, 128), (1, 0)), ((1, 0), (0, 0)), ((0, 0), (1, 128))):
    one = fp8_layer(block, x_block, tokens=5, hidden=200, width=100)
    assert ratio(fused_experts(*one.args, **one.scales), loop(one.meant())) > LEAST
    off = torch.tensor([0, 2, 2, 4, 4])
    y = grouped_experts(one.x, off, one.w13, one.w2, **one.scales)
    one.ids, one.weights = torch.tensor([[0], [0], [2], [2], [-1]]), torch.ones(5, 1)
    assert ratio(y, loop(one.meant())) > LEAST
one = fp8_layer(tokens=5)
one.w13_scale, one.w2_scale = (s.log2().ceil().exp2() for s in (one.w13_scale, one.w2_scale))
power = {name: s.to(torch.float8_e8m0fnu) for name, s in one.scales.items()}
for limit in (None, 0.5):
    assert ratio(fused_experts(*one.args, **power, limit=limit), rounded(one, (True, True), limit=limit)) > 40
    y = fused_experts(*one.args, **one.scales, limit=limit)
    assert ratio(y, rounded(one, (False, False), limit=limit)) > 40
assert {key.target for key in compiled._functions} == {compiled.INTERPRETED}
"""


def test_scales_of_other_granularities_in_the_kernels() -> None:
    switches = {"MOEC_INTERPRET": "1", "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", INTERPRETED]
    done = subprocess.run(command, env=os.environ | switches, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_scales_with_two_meanings_are_refused() -> None:
    """[E, 2, 1] of 200 rows of 100: gate's and up's, or those of blocks of 128 and of 72 rows."""
    one = fp8_layer(hidden=100, width=100)
    x, w13, w2, weights, ids = one.args
    experts = len(w13)
    halves, w2_scale = torch.rand(experts, 2, 1) + 0.1, torch.ones(experts, 1, 1)
    with pytest.raises(BadInput, match=r"may be of gate and up or of 128 x 128 blocks.*\[E, 200, 1\]"):
        fused_experts(x.bfloat16(), w13, w2, weights, ids, w13_scale=halves, w2_scale=w2_scale)
    rows = halves.repeat_interleave(100, 1)
    fused_experts(x.bfloat16(), w13, w2, weights, ids, w13_scale=rows, w2_scale=w2_scale)


def test_scales_cut_from_those_of_all_experts() -> None:
    """They may start anywhere: what kernels get starts at a multiple of 16 bytes."""
    all_of_them = torch.rand(5, 1, 1)
    assert all_of_them[1:].data_ptr() % 16
    found = scales.aligned(all_of_them[1:])
    assert found.data_ptr() % 16 == 0 and torch.equal(found, all_of_them[1:])
    assert scales.aligned(all_of_them) is all_of_them


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
            r"w13_scale must be float32 or float8_e8m0fnu, one of \[4, 2, 2\] \(128 x 128",
        ),
        (change("w2_scale", torch.Tensor.half), r"w2_scale must be .*, not float16"),
        (change("w2_scale", lambda s: s.repeat(1, 2, 2)), "w2_scale must be"),
        (
            change("x_scale", lambda s: s[:8]),
            r"x_scale must be float32, one of \[9, 2\] \(1 x 128 .*, \[9, 1\] \(rows\), \[1\] \(all of x\)",
        ),
        (change("x_scale", lambda s: s[0]), "x_scale must be float32, one of"),
        (change("x_scale", lambda s: s.to(torch.float8_e8m0fnu)), "x_scale must be float32, one of"),
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
