"""Each op as the CPU runs it, and programs of several, against the references in the IR."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.ir import Builder, Function, Interpreter, Module, Range, TensorType
from moec.ir.op import op_class
from moec.ir.types import DTYPES, IndexType, bf16, f16, f32, i64, symbol
from tests.codegen.emission import WideGraph, agree, emitted, forward, programs
from tests.strategies_ir import DRAW, Case

N = symbol("N")
OPS = sorted(DRAW.keys() - {"bind"})  # a bind is a statement of the load program: see test_load_program.py


@pytest.mark.parametrize("op", OPS)
def test_an_op_equals_its_reference(op: str) -> None:
    @settings(max_examples=12)
    @given(programs((op,)))
    def check(case: Case) -> None:
        agree(case.module, case.weights, case.args)

    check()


@given(programs(most=7, kind=WideGraph))
def test_a_program_equals_its_interpretation(case: Case) -> None:
    agree(case.module, case.weights, case.args, tolerance=1e-4)


def tensor(dtype_name: str, *shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DTYPES[dtype_name].torch)


@given(
    x=st.sampled_from(["f32", "bf16", "f16"]),
    bias=st.sampled_from([None, "f32", "bf16", "f16"]),
    acc=st.sampled_from([None, "f32", "bf16", "f16"]),
    tokens=st.integers(0, 3),
)
def test_linear_rounds_once_whatever_the_dtypes(
    x: str, bias: str | None, acc: str | None, tokens: int
) -> None:
    def write(b, x):  # type: ignore[no-untyped-def]
        w = b.param("w", (5, 16), x.type.dtype)
        return b.linear(x, w, b.param("b", (5,), DTYPES[bias]) if bias else None, acc=acc and DTYPES[acc])

    module = forward(write, TensorType(DTYPES[x], (N, 16)))
    weights = {"w": tensor(x, 5, 16, seed=1)} | ({"b": tensor(bias, 5, seed=2)} if bias else {})
    agree(module, weights, [tensor(x, tokens, 16)])


@pytest.mark.parametrize(
    "bounds", [(-1.0, float("inf")), (float("-inf"), 0.5), (float("-inf"), float("inf"))]
)
def test_clamp_may_be_open(bounds: tuple[float, float]) -> None:
    module = forward(lambda b, x: b.clamp(x, lo=bounds[0], hi=bounds[1]), TensorType(f32, (N, 3)))
    agree(module, {}, [tensor("f32", 4, 3)])


def test_a_split_into_one_part_is_a_tensor() -> None:
    module = forward(lambda b, x: b.sigmoid(b.split(x, sizes=(3,))), TensorType(f32, (N, 3)))
    agree(module, {}, [tensor("f32", 4, 3)])


@pytest.mark.parametrize("dtype", [f32, bf16, f16], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_views_can_go_into_any_op(dtype, tokens: int) -> None:  # type: ignore[no-untyped-def]
    """What split and broadcast give is not contiguous; the ops that follow must not mind."""

    def write(b, x):  # type: ignore[no-untyped-def]
        left, right = b.split(x, sizes=(8, 8))
        heads = b.broadcast(right, axis=1, size=2)
        w, id = b.route(left, k=2, score="sigmoid", groups=2, topk_groups=1, masked="zero")
        slot, off = b.sort_by_expert(id, experts=8)
        rows = b.gather_rows(right, slot, per_row=2)
        y = b.combine(rows, slot, w, left)
        normed = b.rms_norm(left, b.param("w", (8,)), eps=1e-6)
        return y, normed, b.swiglu(left), b.reshape(heads, shape=(N, 16)), off

    module = forward(write, TensorType(dtype, (N, 16)))
    agree(module, {"w": tensor(str(dtype), 8)}, [tensor(str(dtype), tokens, 16)])


# A body whose number, arguments and scope are awkward.
def loop_module(scope: str, number: str, carried: str, same_twice: bool = False) -> Module:
    x_type = TensorType(f32, (N, 3))
    module = Module("tests", "cpu", {"N": 8})
    body = module.add(Function("layer", [(number, IndexType()), ("a", x_type), ("b", x_type)]))
    b = Builder(module, body, f32)
    w = b.param("w", (3, 3))
    body.ret(b.add(b.linear(body.args[1], w), body.args[2]), b.mul(body.args[2], body.args[1]))
    outer = module.add(Function("forward", [(carried, x_type), ("other", x_type)]))
    start = outer.args[0]
    attrs = {"callee": "layer", "carry": 2, "scope": scope, "layers": Range(0, 1)}
    op = op_class("call")([start, start if same_twice else outer.args[1]], attrs)
    outer.create(op, ["p", "q"])
    outer.ret(*op.results, start)
    return module


@pytest.mark.parametrize("same_twice", [False, True])
@pytest.mark.parametrize("scope", ["layers.*", "shared", ""])
@pytest.mark.parametrize(
    ("number", "carried"), [("layer", "layer"), ("for", "x"), ("range", "range"), ("i", "torch")]
)
def test_loops_keep_values_apart(scope: str, number: str, carried: str, same_twice: bool) -> None:
    module = loop_module(scope, number, carried, same_twice)
    names = {"layers.*": ["layers.0.w", "layers.1.w"], "shared": ["shared.w"], "": ["w"]}[scope]
    weights = {name: tensor("f32", 3, 3, seed=i) for i, name in enumerate(names)}
    agree(module, weights, [tensor("f32", 2, 3, seed=8), tensor("f32", 2, 3, seed=9)], tolerance=1e-4)


def test_a_loop_may_carry_a_parameter() -> None:
    square = TensorType(f32, (3, 3))
    module = Module("tests", "cpu", {"N": 8})
    body = module.add(Function("layer", [("layer", IndexType()), ("a", square)]))
    body.ret(Builder(module, body, f32).add(body.args[1], body.args[1]))
    outer = module.add(Function("forward", [("x", TensorType(f32, (N, 3)))]))
    b = Builder(module, outer, f32)
    start = b.param("w", (3, 3))
    op = op_class("call")([start], {"callee": "layer", "carry": 1, "scope": "", "layers": Range(0, 2)})
    outer.create(op, ["p"])
    outer.ret(b.linear(outer.args[0], op.results[0]), b.linear(outer.args[0], start))
    agree(module, {"w": tensor("f32", 3, 3)}, [tensor("f32", 2, 3)])


@pytest.mark.parametrize("dtype", [bf16, f16], ids=str)
def test_in_16_bits_all_but_ties_of_the_rounding_are_the_reference_s_bits(dtype) -> None:  # type: ignore[no-untyped-def]
    """What is rounded in between differs in a third of the elements; another order of sums in very few."""

    def write(b, x, positions):  # type: ignore[no-untyped-def]
        cos, sin = b.rope_table(positions, dim=256, theta=1e4)
        w, id = b.route(b.split(x, sizes=(8, 248))[0], k=3, score="softmax", renorm=True)
        slot, _ = b.sort_by_expert(id, experts=8)
        rows = b.gather_rows(x, slot, per_row=3)
        return (
            b.rms_norm(x, b.param("w", (256,)), eps=1e-6),
            b.swiglu(x),
            b.rope(x, cos, sin, layout="half"),
            b.rope(x, cos, sin, layout="interleaved"),
            b.combine(rows, slot, w, x),
            b.linear(x, b.param("v", (64, 256), dtype)),
        )

    module = forward(write, TensorType(dtype, (N, 256)), TensorType(i64, (N,)))
    weights = {"w": tensor("f32", 256), "v": tensor(str(dtype), 64, 256, seed=1)}
    args = [tensor(str(dtype), 40, 256), torch.arange(40)]
    expected = Interpreter(module, weights).run("forward", *args)
    for value, got, want in zip(
        module["forward"].outputs, emitted(module, weights, *args), expected, strict=True
    ):
        assert float((got != want).float().mean()) < 0.03, value


@given(
    scaling=st.sampled_from(["none", "linear", "yarn", "llama3"]),
    factor=st.sampled_from([1.0, 2.5, 40.0]),
    magnitude=st.sampled_from([1.0, 0.7, 1.3]),
    truncate=st.booleans(),
)
def test_rope_tables(scaling: str, factor: float, magnitude: float, truncate: bool) -> None:
    how = {"scaling": scaling, "factor": factor, "magnitude": magnitude, "truncate": truncate, "original": 64}
    module = forward(lambda b, n: b.rope_table(n, dim=16, theta=1e4, **how), TensorType(i64, (N,)))
    agree(module, {}, [torch.tensor([0, 1, 7, 63, 64, 5000])])
