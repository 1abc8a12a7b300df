"""moec.ops as PyTorch operators: opcheck, torch.compile, refusals, devices, and what is built for a GPU."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from moec.codegen import TARGETS
from moec.config import BuildOptions
from moec.errors import BadInput, DeviceUnavailable, InterpreterOff, NotDifferentiable
from moec.ir import Interpreter
from moec.ops import compiled, fused_experts, grouped_experts
from moec.ops.inputs import check_layout
from moec.passes import PassManager, pipeline
from tests.moec.experts import close, layer, loop, strided
from tests.moec.fp8_experts import fp8_layer


# As PyTorch operators.
def operators() -> list[Any]:
    one = layer(experts=3)
    off = torch.tensor([0, 2, 2, 4], dtype=torch.int32)
    unscaled = (None, None, None, False)
    fused = (*one.args, None, "swiglu", None, 0, *unscaled)
    shared = (*one.args, torch.ones_like(one.x), "geglu", 0.5, 1, *unscaled)
    grouped = (one.x, off, one.w13, one.w2, "swiglu", None, *unscaled)
    begin = (one.x, one.w13, one.weights, one.ids)
    _, weights, _, slot, off_of_slots = torch.ops.moec.experts_begin(*begin)
    end = (torch.randn(10, 6), one.w2, weights, slot, off_of_slots, None)
    return [
        pytest.param("fused_experts", fused, id="fused"),
        pytest.param("fused_experts", shared, id="fused-shared"),
        pytest.param("fused_experts_out", (*fused, torch.empty_like(one.x)), id="fused-out"),
        pytest.param("grouped_experts", grouped, id="grouped"),
        pytest.param("grouped_experts_out", (*grouped, torch.empty_like(one.x)), id="grouped-out"),
        pytest.param("experts_begin", begin, id="begin"),
        pytest.param("experts_end", end, id="end"),
        pytest.param("experts_end", (*end[:-1], one.x), id="end-plus"),
    ]


@pytest.mark.parametrize(("name", "args"), operators())
def test_opcheck(name: str, args: tuple[Any, ...]) -> None:
    torch.library.opcheck(getattr(torch.ops.moec, name).default, args)


def test_opcheck_in_fp8() -> None:
    """Without the test that looks for changed arguments: PyTorch can't compare fp8."""
    one = fp8_layer(scaled_x=True)
    args = (*one.args, None, "swiglu", None, 0, *one.scales.values(), False)
    able = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.moec.fused_experts.default, args, test_utils=able)


def test_torch_compile_takes_it_whole_for_any_number_of_tokens() -> None:
    one = layer(40, k=3)
    graphs = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    def block(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        y = fused_experts(x * 2, one.w13, one.w2, weights, ids, shared=x, expert_range=(0, 4))
        return y + fused_experts(x, one.w13, one.w2, weights, ids, out=torch.empty_like(x))

    for backend in ("aot_eager", count):
        fast = torch.compile(block, fullgraph=True, backend=backend, dynamic=True)
        for tokens in (40, 7, 2):
            given = (one.x[:tokens], one.weights[:tokens], one.ids[:tokens])
            torch.testing.assert_close(fast(*given), block(*given))
    assert len(graphs) == 1
    off = torch.tensor([0, 1, 3, 3, 30], dtype=torch.int32)
    grouped = torch.compile(grouped_experts, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        grouped(one.x, off, one.w13, one.w2), grouped_experts(one.x, off, one.w13, one.w2)
    )


def test_compiling_reports_what_the_call_would() -> None:
    one = layer()
    fast = torch.compile(fused_experts, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"BadInput.*w2 must be float32 \[E, H, I\] = \[4, 8, 6\]"):
        fast(one.x, one.w13, one.w2[:3], one.weights, one.ids)


def test_there_is_no_backward_pass() -> None:
    one = layer()
    one.w2.requires_grad_()
    y = fused_experts(*one.args)  # with parameters that train: a forward pass needs no torch.no_grad()
    with pytest.raises(NotDifferentiable, match=r"M0603.*fused_experts has no derivative"):
        y.sum().backward()
    with pytest.raises(NotDifferentiable, match="writes into out"):
        fused_experts(*one.args, out=torch.empty_like(one.x))
    with torch.no_grad():
        fused_experts(*one.args, out=torch.empty_like(one.x))


# What doesn't fit.
def wrong(**changes: Any) -> Any:
    """A call with some arguments made from the right ones."""
    one = layer()
    names = ("x", "w13", "w2", "topk_weights", "topk_ids")
    args = dict(zip(names, one.args, strict=True)) | {"out": torch.empty_like(one.x), "shared": one.x}
    return args | {k: v(args[k]) if callable(v) else v for k, v in changes.items()}


BAD: list[tuple[dict[str, Any], str]] = [
    (
        {"x": Tensor.double},
        r"x must be bfloat16 or float16 or float32 \[T, H\] = \[\*, \*\], not float64 \[5, 8\]",
    ),
    ({"x": lambda x: x[0]}, r"x must be .* not float32 \[8\]"),
    ({"w13": Tensor.half}, r"w13 must be float32 \[E, 2·I, H\] = \[\*, \*, 8\], not float16 \[4, 12, 8\]"),
    ({"w13": lambda w: w.transpose(1, 2)}, r"w13 must be .* not float32 \[4, 8, 12\]"),
    ({"w13": lambda w: w[:, 1:]}, r"w13 must hold as many up rows as gate rows"),
    ({"w2": lambda w: w[:3]}, r"w2 must be float32 \[E, H, I\] = \[4, 8, 6\], not float32 \[3, 8, 6\]"),
    ({"w2": lambda w: w.transpose(1, 2)}, "w2 must be"),
    ({"topk_ids": Tensor.float}, r"topk_ids must be int32 or int64 \[T, k\] = \[5, \*\], not float32"),
    ({"topk_ids": lambda i: i[:4]}, "topk_ids must be"),
    ({"topk_ids": lambda i: i[:, :0]}, "topk_ids must name an expert"),
    ({"topk_weights": lambda w: w[:, :1]}, r"topk_weights must be float32 \[T, k\] = \[5, 2\]"),
    ({"topk_weights": Tensor.half}, r"topk_weights must be float32 "),
    ({"shared": lambda s: s[:1]}, r"shared must be float32 like x = \[5, 8\], not float32 \[1, 8\]"),
    ({"out": lambda o: o[:, 1:]}, "out must be float32 like x"),
    ({"out": Tensor.half}, "out must be float32 like x"),
    ({"activation": "relu"}, "activation is 'relu'; it must be one of swiglu, geglu, geglu_tanh"),
    ({"limit": 0.0}, "limit is 0.0"),
    ({"limit": math.nan}, "limit is nan; it must be a positive number in float32"),
    ({"limit": -1.0}, "limit is -1.0"),
    ({"limit": math.inf}, "limit is inf"),
    ({"limit": 1e39}, r"limit is 1e\+39"),
    ({"limit": 10**5000}, "limit is an integer of 16610 bits"),
    ({"expert_range": (0, 3)}, r"means 3 experts, but w13 is float32 \[4, 12, 8\]"),
    ({"expert_range": (3, 3)}, "must be"),
    ({"expert_range": (0, 3, 4)}, r"must be \(first, end\) or a range"),
    ({"expert_range": (0.0, 4.0)}, r"\(0.0, 4.0\): it must be \(first, end\), two integers"),
    ({"expert_range": (False, 4)}, r"\(False, 4\): it must be \(first, end\), two integers"),
    ({"expert_range": 4}, r"expert_range is 4: it must be \(first, end\) or a range"),
    ({"expert_range": "04"}, "expert_range is '04': it must be"),
    ({"expert_range": (10**30, 10**30 + 4)}, r"\(an integer of 100 bits, an integer of 100 bits\): it must"),
    ({"expert_range": (-1, 3)}, "must be"),
    ({"expert_range": range(0, 8, 2)}, "must follow each other"),
    ({"w2": lambda w: w.to("meta")}, "x is on cpu, but w2 on meta"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[f"{i}-{min(c)}" for i, (c, _) in enumerate(BAD)])
def test_what_does_not_fit_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        fused_experts(**wrong(**changes))


def test_it_fits_unchanged() -> None:
    fused_experts(**wrong())


@pytest.mark.parametrize("off", [[1, 2, 2, 3, 4], [0, 3, 2, 3, 4], [0, 1, 2, 3, 6]])
def test_offsets_that_do_not_rise_or_end_too_late(off: list[int]) -> None:
    one = layer()
    with pytest.raises(BadInput, match="off must rise from 0 to at most 5"):
        grouped_experts(one.x, torch.tensor(off, dtype=torch.int32), one.w13, one.w2)
    with pytest.raises(BadInput, match=r"off must be int32 or int64 \[E\+1\] = \[5\], not int32 \[4\]"):
        grouped_experts(one.x, torch.tensor(off[:4], dtype=torch.int32), one.w13, one.w2)


def test_kernels_want_contiguous_weights() -> None:
    w = layer().w13
    check_layout("w13", w, contiguous=True)
    check_layout("w13", strided(w), contiguous=False)
    with pytest.raises(BadInput, match=r"w13 must be contiguous here, but float32 \[4, 12, 8\] has strides"):
        check_layout("w13", strided(w), contiguous=True)


# Devices and the interpreter.
def test_a_device_that_nothing_is_built_for() -> None:
    with pytest.raises(DeviceUnavailable, match="cpu and cuda, not on meta"):
        compiled.target_of(torch.device("meta"))


def test_the_interpreter_must_be_on_from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "options", lambda: BuildOptions.from_environment({"MOEC_INTERPRET": "1"}))
    monkeypatch.setattr(compiled, "require_interpreter", _off)
    with pytest.raises(InterpreterOff, match="M0807"):
        compiled.target_of.__wrapped__(torch.device("cpu"))


def _off(what: str) -> None:
    raise InterpreterOff(f"{what} are to be interpreted")


INTERPRETED = """
import torch, moec.ops
from tests.moec.experts import close, layer, loop
from moec.ops import compiled

for dtype in (torch.float32, torch.float16):
    one = layer(9, k=6, experts=8, hidden=32, width=16, dtype=dtype)
    one.ids[2, 1], one.weights[2, 1] = -1, torch.nan
    close(moec.ops.fused_experts(*one.args, shared=one.x), loop(one, shared=one.x), dtype)
    # Choices cut from a batch start anywhere; x is to start at a multiple of 16 bytes.
    x, weights, ids = one.x[1:], one.weights[1:], one.ids[1:].long()
    assert x.data_ptr() % 16 == 0 and weights.data_ptr() % 16
    part = type(one)(x, one.w13, one.w2, weights, ids)
    close(moec.ops.fused_experts(*part.args), loop(part), dtype)
    part.ids = ids.int()[1:]
    part.x, part.weights = x[1:], weights[1:]
    close(moec.ops.fused_experts(*part.args), loop(part), dtype)
    table = torch.randint(8, (5, 3)).int()
    tokens = torch.tensor([0, 1, 2, 3])[1:]
    moec.ops.hash_route(torch.randn(4, 7)[1:], table[1:] % 7, tokens, score="sigmoid", renorm=True)
    how = {"k": 6, "score": "softmax", "renorm": True}
    logits = torch.randn(9, 8, generator=torch.Generator().manual_seed(0))
    one.weights, one.ids = moec.ops.route(logits, **how)
    close(moec.ops.routed_experts(one.x, logits, one.w13, one.w2, **how), loop(one), dtype)
    one.x[7:] = torch.nan
    for limit in (None, 0.5):
        for off in (torch.tensor([0, 0, 2, 2, 3, 7, 7, 7, 7]), torch.zeros(9, dtype=torch.int32)):
            got = moec.ops.grouped_experts(one.x, off, one.w13, one.w2, limit=limit)
            one.ids = torch.repeat_interleave(torch.arange(8), off.diff())[:, None]
            one.weights, end = torch.ones(one.ids.shape), int(off[-1])
            close(got[:end], loop(one, limit=limit)[:end], dtype)
            assert got[end:].eq(0).all()
assert {key.target for key in compiled._functions} == {compiled.INTERPRETED}
"""


@pytest.mark.skipif(
    compiled.INTERPRETED not in TARGETS, reason=f"nothing is emitted for {compiled.INTERPRETED}"
)
def test_kernels_in_the_interpreter() -> None:
    switches = {"MOEC_INTERPRET": "1", "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=os.environ | switches, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# What is built for a GPU.
@pytest.mark.parametrize("limit", [None, 0.5])
def test_a_gpus_pipeline_fuses_the_permutation(limit: float | None) -> None:
    one = layer(9, k=3)
    sizes = {"experts": 4, "hidden": 8, "width": 12, "k": 3}
    key = compiled.Key(
        "fused",
        "sm_90a",
        False,
        torch.float32,
        weights=torch.float32,
        limit=limit,
        plus=torch.float32,
        **sizes,
    )
    module = compiled.lower(key)
    PassManager(pipeline(2, key.target)).run(module)
    assert [op.name for op in module["forward"].ops] == [
        "local_sort",
        "gather_grouped_linear",
        "grouped_linear_combine",
    ]
    one.ids[2, 1], one.weights[2, 1] = 4, math.nan
    (y,) = Interpreter(module, {}).run("forward", *one.args, one.x)
    close(y, loop(one, shared=one.x, limit=limit), torch.float32)


@pytest.mark.parametrize("form", ["grouped", "grouped_fp8"])
@pytest.mark.parametrize("limit", [None, 0.5])
def test_on_a_gpu_sorted_rows_take_the_product_with_an_epilogue(form: str, limit: float | None) -> None:
    sizes = {"experts": 4, "hidden": 256, "width": 256}
    blocks = ((128, 128), (128, 128)) if form == "grouped_fp8" else ()
    key = compiled.Key(form, "sm_90a", False, torch.bfloat16, limit=limit, blocks=blocks, **sizes)
    module = compiled.lower(key)
    PassManager(pipeline(2, key.target)).run(module)
    found = [op.name for op in module["forward"].ops if op.name != "scaled"]
    quant = ["quant"] if blocks else []
    assert found == [*quant, "gather_grouped_linear", "grouped_linear"]
