"""Triton kernel files: right in the interpreter, readable, and what they compile to on Hopper."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moec.codegen.kernels.triton_grouped import problem
from moec.codegen.schedules import Problem, Schedule, space
from moec.ir.devices import GPUS
from moec.ir.op import Op
from moec.runtime.compile import compile_many
from moec.runtime.kernel_cache import Cubin
from moec.runtime.launch import Kernel
from tests.codegen.triton_kernels import (
    and_quant,
    combine_op,
    fp8_op,
    grouped_combine_op,
    grouped_op,
    hash_route_op,
    linear_op,
    load,
    local_sort_op,
    norm_op,
    quant_op,
    record,
    route_op,
    sort_op,
    source,
)

ROOT = Path(__file__).parents[2]
INTERPRETED = [
    "triton_interpreted.py",
    "triton_interpreted_fp8.py",
    "triton_interpreted_persistent.py",
    "triton_interpreted_few.py",
    "triton_interpreted_experts.py",
    "triton_interpreted_gluon.py",
    "triton_interpreted_sort_quant.py",
]
V3_ROUTER: dict[str, Any] = {"score": "sigmoid", "renorm": True, "scale": 2.5, "groups": 8, "topk_groups": 4}
V3_ROUTER["group_score"] = "top2sum"
V3 = {
    "hash_route": lambda dtype: hash_route_op(
        256, 6, 129280, "f32", score="sqrtsoftplus", renorm=True, scale=1.5
    ),
    "route": lambda dtype: route_op("route", 256, 8, "f32", True, **V3_ROUTER),
    "route_sort": lambda dtype: route_op("route_sort", 256, 8, "f32", True, shared=1, **V3_ROUTER),
    "sort_by_expert": lambda dtype: sort_op(8, 256),
    "local_sort": lambda dtype: local_sort_op(8, 64, 128, dtype),
    "gather_grouped_linear": lambda dtype: grouped_op(
        dtype, 256, 2048, 7168, gather=True, per_row=8, act="silu"
    ),
    "grouped_linear": lambda dtype: grouped_op(dtype, 256, 7168, 2048, scatter=True),
    "combine": lambda dtype: combine_op(dtype, "f32", dtype, 8, 7168, slot=False, plus=dtype),
    "grouped_linear_combine": lambda dtype: grouped_combine_op(dtype, 256, 7168, 2048, 8, plus=dtype),
}
# Beside V3: what takes more registers. Masks for tails, gelu, rows in pieces of less than 16 bytes.
HARD = {
    "gelu": lambda dtype: grouped_op(dtype, 256, 2048, 7168, gather=True, per_row=8, act="gelu"),
    "gelu, clamped": lambda dtype: grouped_op(
        dtype, 256, 2048, 7168, gather=True, per_row=8, act="gelu", limit=7.0
    ),
    "no epilogue": lambda dtype: grouped_op(dtype, 64, 2816, 2048, gather=True, per_row=6),
    "tails": lambda dtype: grouped_op(dtype, 60, 75, 104, gather=True, per_row=6, act="gelu_tanh"),
    "tails, down": lambda dtype: grouped_op(dtype, 60, 104, 72),
    "pieces": lambda dtype: grouped_op(dtype, 60, 75, 100, gather=True, per_row=6, act="silu"),
    "pieces, down": lambda dtype: grouped_op(dtype, 60, 100, 74, scatter=True),
    "long tails": lambda dtype: grouped_op(dtype, 60, 75, 2024, gather=True, per_row=6, act="gelu"),
    "long tails, summed": lambda dtype: grouped_combine_op(dtype, 60, 104, 2024, 20),
    "long pieces": lambda dtype: grouped_op(dtype, 60, 75, 2022, gather=True, per_row=6, act="gelu"),
    "pieces, summed": lambda dtype: grouped_combine_op(dtype, 60, 100, 74, 20, plus="f32"),
}
# Scaled: as DeepSeek-V3 has it, and what takes more registers.
V3_FP8 = {
    "quant": lambda: quant_op("bf16", 7168),
    "rms_norm": lambda: norm_op("bf16", 7168, add=False),
    "add_rms_norm": lambda: norm_op("bf16", 7168, add=True),
    "add_rms_norm_and_quant": lambda: norm_op("bf16", 7168, add=True, plain=True),
    "route_sort_and_quant": lambda: and_quant(V3["route_sort"]("bf16"), "bf16", 7168),
    "local_sort_and_quant": lambda: and_quant(V3["local_sort"]("f32"), "bf16", 7168),
    "sort_by_expert_and_quant": lambda: and_quant(V3["sort_by_expert"]("bf16"), "bf16", 7168),
    "gather_grouped_linear": lambda: fp8_op(
        256, 2048, 7168, gather=True, per_row=8, act="silu", quant="fp32"
    ),
    "grouped_linear": lambda: fp8_op(256, 7168, 2048, scatter=True),
    "linear": lambda: linear_op(7168, 16384),
    "grouped_linear_combine": lambda: grouped_combine_op(
        "f8e4m3", 256, 7168, 2048, 8, scales=("1x128", "128x128"), plus="bf16"
    ),
}
HARD_FP8 = {
    "gelu, ue8m0": lambda: fp8_op(256, 2048, 7168, gather=True, per_row=8, act="gelu", quant="ue8m0"),
    "clamped": lambda: fp8_op(256, 2048, 7168, gather=True, per_row=8, act="silu", quant="ue8m0", limit=7.0),
    "kept in bf16": lambda: fp8_op(256, 2048, 7168, gather=True, per_row=8, act="silu"),
    "no epilogue": lambda: fp8_op(64, 2816, 2048, gather=True, per_row=6),
    "a scale a row": lambda: fp8_op(
        64, 2816, 2048, gather=True, per_row=6, act="silu", quant="fp32", scales=("1x*", "1x*")
    ),
    "a scale a row of x": lambda: fp8_op(
        64, 2816, 2048, gather=True, per_row=6, act="silu", quant="fp32", scales=("1x*", "128x128")
    ),
    "a scale a tensor": lambda: fp8_op(64, 2816, 2048, scales=("*x*", "*x*")),
    "tails": lambda: fp8_op(60, 75, 208, gather=True, per_row=6, act="gelu_tanh"),
    "tails, quantised": lambda: fp8_op(60, 200, 208, gather=True, per_row=6, act="gelu", quant="fp32"),
    "pieces, quantised": lambda: fp8_op(60, 75, 200, gather=True, per_row=6, act="gelu", quant="fp32"),
    "pieces, down": lambda: fp8_op(60, 200, 76, scatter=True),
    "long tails": lambda: fp8_op(60, 200, 2000, gather=True, per_row=6, act="gelu", quant="fp32"),
    "long pieces": lambda: fp8_op(
        60, 75, 1996, gather=True, per_row=6, act="gelu", scales=("1x128", "64x128")
    ),
    "pieces, summed": lambda: grouped_combine_op("f8e4m3", 60, 200, 76, 20, scales=("1x*", "64x128")),
    "dense, tails": lambda: linear_op(75, 208, ("1x128", "64x128")),
    "dense, pieces": lambda: linear_op(200, 76, ("1x*", "1x*"), "f32"),
}
PRODUCTS = ["gather_grouped_linear", "grouped_linear", "grouped_linear_combine"]


@pytest.mark.parametrize("file", INTERPRETED)
def test_interpreter_equals_reference(file: str) -> None:
    """In a process of its own: Triton interprets only where that was set before it was imported."""
    tests = Path(__file__).with_name(file)
    command = [sys.executable, "-m", "pytest", str(tests), "-q", "-x", "-p", "no:cacheprovider"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.parametrize("name", V3)
def test_generated_files_read_as_before(name: str, golden: Callable[[str, str], None]) -> None:
    golden(f"v3_{name}.py.txt", source(V3[name]("bf16")))


@pytest.mark.parametrize("name", V3_FP8)
def test_generated_fp8_files_read_as_before(name: str, golden: Callable[[str, str], None]) -> None:
    golden(f"v3_fp8_{name}.py.txt", source(V3_FP8[name]()))


@pytest.mark.parametrize("target", GPUS)
def test_every_op_renders_for_every_target(target: str) -> None:
    """render_python parses what it renders; beyond that, lines have a length and nothing trails."""
    ops = [make("bf16") for make in (V3 | HARD).values()]
    ops += [combine_op("f16", "f32", "f32", 6, 100, slot=True, plus="f32"), V3["grouped_linear"]("f32")]
    if GPUS[target].fp8:
        ops += [make() for make in (V3_FP8 | HARD_FP8).values()]
    for op in ops:
        for line in source(op, target).splitlines():
            assert len(line) <= 110 and line == line.rstrip(), line


def test_offsets_have_64_bits() -> None:
    """Rows of x and y, and the experts of weights by pointer: each is widened before it is multiplied."""
    text = source(V3["gather_grouped_linear"]("bf16"), "sm_80")
    assert "x + source.to(tl.int64)[:, None] * K" in text
    assert "w + (expert.to(tl.int64) * 2 * N + cols)[:, None] * K" in text
    assert "y + rows.to(tl.int64)[:, None] * N" in text
    assert "y + place.to(tl.int64)[None, :] * N" in source(V3["grouped_linear"]("bf16"))
    assert "token = tl.program_id(0).to(tl.int64)" in source(V3["combine"]("bf16"))


@pytest.mark.parametrize(
    "op, reason",
    [
        (lambda: grouped_op("bf16", 4, 16, 33), "multiples of 4 bytes"),
        (lambda: grouped_op("bf16", 4, 16, 34), None),
        (lambda: grouped_op("f32", 4, 16, 33), None),
        (lambda: grouped_op("f8e4m3", 4, 16, 32), "f8e4m3 is none of bf16, f16, f32"),
        (lambda: fp8_op(4, 16, 32), None),
        (lambda: fp8_op(4, 16, 34), "multiples of 4 bytes"),
        (lambda: fp8_op(4, 16, 256, scales=("1x64", "128x128")), "x has scales of 1x64"),
        (lambda: fp8_op(4, 16, 256, scales=("1x128", "128x64")), "w has scales of 128x64"),
        (lambda: fp8_op(4, 16, 256, scales=("1x*", "1x*")), None),
        (lambda: fp8_op(4, 16, 256, to="f64"), "f64 is none of"),
        (lambda: grouped_op("f8e5m2", 4, 16, 32, scales=("1x128", "128x128")), "f8e5m2 is not f8e4m3"),
        (lambda: grouped_op("bf16", 4, 16, 32, gather=True, quant="fp32"), "x has no scales"),
        (lambda: linear_op(16, 32), None),
        (lambda: linear_op(16, 32, bias=True), "it has a bias"),
        (lambda: linear_op(16, 33), "multiples of 4 bytes"),
        (lambda: quant_op("bf16", 100), None),
        (lambda: quant_op("bf16", 100, "1x64"), "block is 1x64"),
        (lambda: quant_op("bf16", 100, "128x128"), "block is 128x128"),
        (lambda: quant_op("bf16", 16384, "1x*"), None),
        (lambda: quant_op("bf16", 16385, "1x*"), "K is 16385"),
        (lambda: sort_op(2, 2047), None),
        (lambda: hash_route_op(512, 16, 9, score="sigmoid"), None),
        (lambda: hash_route_op(4, 2, 9, "f64", score="sigmoid"), "f64 is none of"),
        (lambda: route_op("route", 1024, 2, score="softmax"), None),
        (lambda: route_op("route_sort", 1024, 2, score="softmax", shared=1), "1024 experts and 1 shared"),
        (lambda: sort_op(2, 2048), "2048 experts"),
        (lambda: combine_op("bf16", "f32", "f64", 2, 16, slot=True, plus=None), "f64 is none of"),
    ],
)
def test_what_is_not_supported_says_why(op: Callable[[], Op], reason: str | None) -> None:
    found = record(op()).supports(op())
    assert (not found) if reason is None else any(reason in r for r in found)


def compiled(
    op: Op, schedules: list[Schedule] | None, folder: Path, target: str = "sm_90a"
) -> list[tuple[str, Cubin]]:
    """Each variant of the op's kernels, by function and variant."""
    module = load(source(op, target, schedules), folder)
    kernels = [value for value in vars(module).values() if isinstance(value, Kernel)]
    requests = [r for kernel in kernels for r in kernel.requests(target)]
    assert requests
    cubins = compile_many(requests, cache=folder / "cache").check()
    return [(f"{r.function} {r.variant}", c) for r, c in zip(requests, cubins, strict=True)]


def check_hopper(op: Op, schedules: list[Schedule] | None, folder: Path, instruction: str = "HGMMA") -> None:
    limit, most = GPUS["sm_90a"].smem_per_block, estimates(problem(op))
    for name, cubin in compiled(op, schedules, folder):
        facts = cubin.facts
        assert facts.spills == 0, f"{name} spills"
        assert not facts.serialised, f"{name}: {facts.barriers}"
        if "_tokens_sum" in name:  # combine's, without a product
            continue
        assert facts.shared_dynamic <= min(limit, most[name.split()[1]]), name
        assert facts.matrix and all(m.startswith(f"{instruction}.64x") for m in facts.matrix), (
            name,
            facts.matrix,
        )
        if "_swapped 16x" in name:
            assert all(m.startswith(f"{instruction}.64x16x") for m in facts.matrix), name


def estimates(p: Problem) -> dict[str, int]:
    """The shared memory that a tile is taken to need."""
    return {s.tile: p.shared_memory(s, GPUS["sm_90a"]) for s in space(p, GPUS["sm_90a"])}


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_picked_schedules_on_hopper(name: str, dtype: str, tmp_path: Path) -> None:
    check_hopper(V3[name](dtype), None, tmp_path)


@pytest.mark.parametrize("name", HARD)
def test_hard_shapes_on_hopper(name: str, tmp_path: Path) -> None:
    """Of each form, persistent or not, the schedule with the most sums, which is the first to spill."""
    op = HARD[name]("bf16")
    p = problem(op)
    schedules = space(p, GPUS["sm_90a"])
    most_sums_last = sorted(schedules, key=lambda s: (p.sums(s), s.block_m))
    worst = {s.function: s for s in most_sums_last}
    check_hopper(op, list(worst.values()), tmp_path)


def test_persistent_programs_with_two_products_are_none_for_hopper(tmp_path: Path) -> None:
    """Each wgmma would wait for the one before it. Once ptxas doesn't make it, the space may have them."""
    op = V3["gather_grouped_linear"]("bf16")
    tile = Schedule("rows", 128, 128, 64, 8, 4)
    once, persistent = (
        compiled(op, [replace(tile, persistent=p)], tmp_path)[0][1].facts for p in (False, True)
    )
    assert persistent.serialised and not once.serialised
    offered = space(problem(op), GPUS["sm_90a"])
    assert tile in offered and replace(tile, persistent=True) not in offered


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("name", [*PRODUCTS, *HARD])
def test_whole_space_on_hopper(name: str, dtype: str, tmp_path: Path) -> None:
    op = (V3 | HARD)[name](dtype)
    check_hopper(op, space(problem(op), GPUS["sm_90a"]), tmp_path)


@pytest.mark.parametrize("name", [*PRODUCTS, "linear"])
def test_picked_fp8_schedules_on_hopper(name: str, tmp_path: Path) -> None:
    check_hopper(V3_FP8[name](), None, tmp_path, "QGMMA")


@pytest.mark.parametrize("name", HARD_FP8)
def test_hard_fp8_shapes_on_hopper(name: str, tmp_path: Path) -> None:
    """Of each form, persistent or not, the schedule with the most sums."""
    op = HARD_FP8[name]()
    p = problem(op)
    most_sums_last = sorted(space(p, GPUS["sm_90a"]), key=lambda s: (p.sums(s), s.block_m))
    worst = {s.function: s for s in most_sums_last}
    check_hopper(op, list(worst.values()), tmp_path, "QGMMA")


@pytest.mark.slow
@pytest.mark.parametrize("name", [*PRODUCTS, "linear", *HARD_FP8])
def test_whole_fp8_space_on_hopper(name: str, tmp_path: Path) -> None:
    op = (V3_FP8 | HARD_FP8)[name]()
    check_hopper(op, space(problem(op), GPUS["sm_90a"]), tmp_path, "QGMMA")


def test_scales_are_copied_ahead(tmp_path: Path) -> None:
    """Beside the operands, asynchronously: no step waits for its scales, two rows' of x and one of w."""
    schedules = [Schedule("rows", 64, 128, 128, 8, stages) for stages in (3, 4)]
    cubins = compiled(V3_FP8["grouped_linear"](), schedules, tmp_path)
    assert [cubin.facts.loads.get("LDGSTS.32", 0) for _, cubin in cubins] == [3 * 3, 3 * 4]


def test_quant_on_hopper(tmp_path: Path) -> None:
    for name, cubin in compiled(V3_FP8["quant"](), None, tmp_path):
        facts = cubin.facts
        wide = {"LDG.64" if "1w1" in name else "LDG.128"}
        assert not facts.spills and facts.loads.keys() == wide, (name, facts.loads)


def test_sort_and_combine_on_hopper(tmp_path: Path) -> None:
    cubins = dict(compiled(V3["sort_by_expert"]("bf16"), None, tmp_path))
    cubins |= dict(compiled(V3["local_sort"]("bf16"), None, tmp_path))
    cubins |= dict(compiled(V3["combine"]("bf16"), None, tmp_path))
    cubins |= dict(compiled(V3["route_sort"]("bf16"), None, tmp_path))
    cubins |= dict(compiled(route_op("route", 512, 16, "bf16", score="softmax"), None, tmp_path))
    cubins |= dict(compiled(route_op("route", 384, 6, score="sqrtsoftplus"), None, tmp_path))
    cubins |= dict(compiled(V3["hash_route"]("f32"), None, tmp_path))
    for name in ("route_sort", "local_sort", "sort_by_expert"):
        cubins |= dict(compiled(V3_FP8[f"{name}_and_quant"](), None, tmp_path))
    assert all(c.facts.spills == 0 for c in cubins.values())
    # Eight rows and what is added, 16 bytes a thread each.
    assert cubins["combine_sum 1024w4"].facts.loads["LDG.128"] >= 9


def test_fp32_on_hopper(tmp_path: Path) -> None:
    """No matrix instruction: TF32 would round the operands."""
    op = V3["gather_grouped_linear"]("f32")
    for name, cubin in compiled(op, None, tmp_path):
        assert not cubin.facts.matrix and not cubin.facts.spills, name


@pytest.mark.slow
@pytest.mark.parametrize("name", V3)
@pytest.mark.parametrize("target", [t for t in GPUS if t != "sm_90a"])
def test_other_targets_compile(target: str, name: str, tmp_path: Path) -> None:
    limit = GPUS[target].smem_per_block
    for variant, cubin in compiled(V3[name]("bf16"), None, tmp_path, target):
        assert cubin.facts.shared_dynamic <= limit and not cubin.facts.spills, variant


@pytest.mark.slow
@pytest.mark.parametrize("name", V3_FP8)
@pytest.mark.parametrize("target", [t for t in GPUS if GPUS[t].fp8 and t != "sm_90a"])
def test_fp8_on_other_targets(target: str, name: str, tmp_path: Path) -> None:
    """The matrix unit's fp8 instructions, whatever they are called there."""
    op = V3_FP8[name]()
    for variant, cubin in compiled(op, None, tmp_path, target):
        facts = cubin.facts
        assert facts.shared_dynamic <= GPUS[target].smem_per_block and not facts.spills, variant
        product = name in (*PRODUCTS, "linear") and "_tokens_sum" not in variant
        assert all("QMMA" in m for m in facts.matrix) and (facts.matrix or not product), variant


def test_sm_120a_spills_nothing(tmp_path: Path) -> None:
    """Of each form the smallest tile: there ptxas, untold, keeps to few registers and spills some."""
    op = V3_FP8["gather_grouped_linear"]()
    first = {s.function: s for s in reversed(space(problem(op), GPUS["sm_120a"]))}
    check_spills(op, list(first.values()), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("make", [V3_FP8, V3], ids=["fp8", "bf16"])
def test_whole_space_of_sm_120a(make: dict[str, Callable[..., Op]], name: str, tmp_path: Path) -> None:
    op = make[name](*(["bf16"] if make is V3 else []))
    check_spills(op, space(problem(op), GPUS["sm_120a"]), tmp_path)


def check_spills(op: Op, schedules: list[Schedule], folder: Path) -> None:
    for name, cubin in compiled(op, schedules, folder, "sm_120a"):
        assert not cubin.facts.spills, (name, cubin.facts)
