"""expert-grouping: same results, the shape it promises, and why it stays away."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moec.ir import Builder, Module, TensorType, parse_module, print_module, verify
from moec.ir.types import bf16, f32
from moec.ir.weights import weights_of
from moec.passes import pipeline
from moec.passes.manager import PassManager
from tests.passes.modules import (
    MoE,
    close,
    edited,
    golden_text,
    interpret,
    moe_blocks,
    op_names,
    random_weights,
    run,
    tokens,
)


@given(block=moe_blocks(), count=st.integers(0, 7), seed=st.integers(0, 99))
def test_same_result(block: MoE, count: int, seed: int) -> None:
    m = block.build()
    weights = random_weights(m, seed)
    x = tokens(count, block.hidden, seed)
    before = interpret(m, weights, x)
    run("expert-grouping", m)
    assert not [op for f in m for op in f.ops if op.name in ("for_each", "scatter_add", "expert_slots")]
    close(before, interpret(m, weights, x))
    PassManager(pipeline(2)).run(m)
    close(before, interpret(m, weights, x))
    assert print_module(parse_module(print_module(m))) == print_module(m)


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_low_precision(dtype: str) -> None:
    block = MoE(dtype=dtype, shared=True)
    m = block.build()
    weights, x = random_weights(m), tokens(9, 8, dtype=dtype)
    before = interpret(m, weights, x)
    PassManager(pipeline(2)).run(m)
    # One rounding of the sum instead of two: a unit in the last place at most.
    close(before.float(), interpret(m, weights, x).float(), tolerance=2**-7 if dtype == "bf16" else 2**-10)


@pytest.mark.parametrize(
    ("k", "ids"),
    [
        (1, [[2], [2], [2]]),  # all to one expert; the others are empty
        (2, [[0, 3], [3, 0], [1, 2]]),
        (4, [[3, 2, 1, 0], [0, 1, 2, 3]]),  # k = E
        (2, [[0, 1]]),  # one token
        (2, []),  # none
    ],
)
def test_routing_edges(k: int, ids: list[list[int]]) -> None:
    m = MoE(k=k, router=False).build()
    weights = random_weights(m)
    id = torch.tensor(ids, dtype=torch.int32).reshape(-1, k)
    x, w = tokens(len(ids), 8), torch.rand(len(ids), k)
    before = interpret(m, weights, x, w, id)
    run("expert-grouping", m)
    close(before, interpret(m, weights, x, w, id))


@pytest.mark.parametrize("bad", [-1, 4, 1000])
def test_slots_of_no_expert_add_nothing(bad: int) -> None:
    m = MoE(router=False).build()
    weights, x = random_weights(m), tokens(3, 8)
    id, w = torch.tensor([[0, bad], [bad, bad], [2, 1]], dtype=torch.int32), torch.rand(3, 2)
    before = interpret(m, weights, x, w, id)
    run("expert-grouping", m)
    assert "combine" in op_names(m)
    close(before, interpret(m, weights, x, w, id))


def test_a_nan_stays_in_its_row() -> None:
    m = MoE(router=False).build()
    weights, x = random_weights(m), tokens(4, 8)
    id = torch.tensor([[0, 1], [0, 1], [1, 2], [0, 3]], dtype=torch.int32)
    w = torch.rand(4, 2)
    run("expert-grouping", m)
    clean = interpret(m, weights, x, w, id)
    x[1, 3] = float("nan")
    dirty = interpret(m, weights, x, w, id)
    assert bool(dirty[1].isnan().all())
    rest = [0, 2, 3]
    assert torch.equal(clean[rest], dirty[rest])


def test_names_do_not_matter() -> None:
    plain, other = MoE(), MoE(names=("left", "right", "back"), prefix="zoo.animals")
    shapes = []
    for block in (plain, other):
        m = block.build()
        run("expert-grouping", m)
        shapes.append(op_names(m))
        wanted = {f"{block.prefix}.w13", f"{block.prefix}.w2", "router.weight"}
        assert set(m["forward"].params) == wanted
    assert shapes[0] == shapes[1]
    assert shapes[0].count("grouped_linear") == 2


def test_the_loop_its_body_and_its_loading_are_gone() -> None:
    m = MoE(layered=True, shared=True, fp8=True).build()
    assert "weights.layer.expert" in m
    run("expert-grouping", m)
    assert set(m.functions) == {"forward", "layer", "weights", "weights.layer"}
    loading = print_module(m).split("func @weights.layer(")[1]
    # The FP8 work of one expert is done on the stacked tensors; nothing of the old parameters is bound.
    assert "f8e4m3[4,6,8]" in loading and "scaled(%gate_proj," in loading
    bound = {op.attrs["param"] for op in m["weights.layer"].ops if op.name == "bind"}
    assert bound == {"mlp.experts.w13", "mlp.experts.w2", "mlp.shared.w13", "mlp.shared.down_proj.weight"}


def test_a_new_name_never_clashes() -> None:
    block = MoE(layered=True)
    m = block.build()
    taken = m["layer"].param("mlp.experts.w2", m["layer"].params["router.weight"].type)
    assert taken.name == "mlp.experts.w2"
    run("expert-grouping", m)
    assert {"mlp.experts.w2", "mlp.experts.w2.1", "mlp.experts.w13"} <= set(m["layer"].params)


def test_two_entries_share_the_stacked_weights() -> None:
    m = MoE(fp8=True).build()
    weights, x = random_weights(m), tokens(5, 8)
    text = print_module(m, derived=False)
    forward = text.split("func @forward")[1].split("\nend")[0]
    m = parse_module(text + "\nfunc @step" + forward + "\nend\n")
    before = interpret(m, weights, x)
    run("expert-grouping", m)
    assert set(m["step"].params) == set(m["forward"].params)
    assert op_names(m, "weights").count("bind") == 2
    for entry in ("forward", "step"):
        close(before, interpret(m, weights, x, entry=entry))


def test_a_sum_that_does_not_start_at_zeros() -> None:
    m = edited(lambda text: text.replace("zeros_like(%x) {dtype=f32}", "sigmoid(%x)"))
    weights, x = random_weights(m), tokens(5, 8)
    before = interpret(m, weights, x)
    run("expert-grouping", m)
    (combine,) = (op for op in m["forward"].ops if op.name == "combine")
    assert combine.operands[3] is not None
    close(before, interpret(m, weights, x))


def test_what_all_experts_compute_alike_is_computed_once() -> None:
    m = edited(
        lambda text: text.replace("gather_rows(%x,", "gather_rows(%xs,").replace(
            "  %rows =", "  %xs = sigmoid(%x) : f32[N,8]\n  %rows ="
        )
    )
    weights, x = random_weights(m), tokens(5, 8)
    before = interpret(m, weights, x)
    run("expert-grouping", m)
    assert op_names(m).count("sigmoid") == 1
    close(before, interpret(m, weights, x))


def test_the_order_of_functions_does_not_matter() -> None:
    """Where the body comes first, its gate and up are joined before the loop is taken apart."""
    m = MoE(fp8=True, layered=True, shared=True).build()
    turned = Module(m.name, m.target, m.bounds)
    for f in reversed([f.clone() for f in m]):
        turned.add(f)
    weights, x = random_weights(m), tokens(5, 8)
    before = interpret(m, weights, x)
    run("expert-grouping", m)
    run("expert-grouping", turned)
    assert op_names(m, "layer") == op_names(turned, "layer")
    assert set(m["layer"].params) == set(turned["layer"].params)
    assert set(m.functions) == set(turned.functions)
    close(before, interpret(m, weights, x))
    close(before, interpret(turned, weights, x))


def test_load_time_work_on_stored_tensors_is_lifted() -> None:
    """Experts stored as one flat tensor in bf16 each: cast, reshaped and split when they're loaded."""
    m = MoE().build()
    load = weights_of(m, "forward.expert")
    b = Builder(m, load, f32)
    flat = load.param("all", TensorType(bf16, (2 * 6 * 8,)))
    gate, up = b.split(b.reshape(b.cast(flat, f32), shape=(12, 8)), sizes=(6, 6), axis=0)
    b.bind(gate, param="gate_proj.weight")
    b.bind(b.concat(*b.split(up, sizes=(3, 3), axis=-2), axis=0), param="up_proj.weight")
    verify(m)
    weights, x = random_weights(m), tokens(5, 8)
    before = interpret(m, weights, x)
    run("expert-grouping", m)
    assert op_names(m, "weights").count("stack") == 2  # the flat tensor, read once, and down
    close(before, interpret(m, weights, x))


@pytest.mark.parametrize("name", ["moe", "moe_fp8_layers"])
def test_golden(name: str, golden: Callable[[str, str], None]) -> None:
    block = {"moe": MoE(shared=True), "moe_fp8_layers": MoE(fp8=True, layered=True, dtype="bf16")}[name]
    m = block.build()
    golden(f"{name}.before.moec", golden_text(m))
    run("expert-grouping", m)
    golden(f"{name}.after.moec", golden_text(m))
    PassManager(pipeline(2)).run(m)
    golden(f"{name}.O2.moec", golden_text(m))
