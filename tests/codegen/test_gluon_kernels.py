"""Gluon's kernels without a GPU: what they compile to, and who may have them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from moec.codegen import kernels
from moec.codegen.choosing import Choosing, choose_by
from moec.codegen.kernels import select, triton_grouped
from moec.codegen.kernels.gluon_grouped import reasons_against
from moec.codegen.kernels.triton_grouped import problem
from moec.codegen.ladders import parse_ladder
from moec.codegen.schedules import Problem, Schedule
from moec.codegen.specialised import specialised
from moec.errors import BadSchedule, UnknownKernel
from moec.ir.devices import GPUS
from moec.ir.op import Op
from moec.runtime.compile import Cubin, compile_many
from moec.runtime.device_source import device_source
from moec.runtime.gluon_kernel import GluonKernel
from tests.codegen.triton_kernels import (
    fp8_op,
    gluon_source,
    grouped_combine_op,
    grouped_op,
    linear_op,
    load,
)

H100 = GPUS["sm_90a"]
V3: dict[str, Callable[[], Op]] = {
    "up": lambda: grouped_op("bf16", 256, 2048, 7168, gather=True, per_row=8, act="silu"),
    "down": lambda: grouped_op("bf16", 256, 7168, 2048, scatter=True),
    "up, fp8": lambda: fp8_op(256, 2048, 7168, gather=True, per_row=8, act="silu", quant="fp32"),
    "down, fp8": lambda: fp8_op(256, 7168, 2048, scatter=True),
}
SUMMED: dict[str, Callable[[], Op]] = {
    "summed": lambda: grouped_combine_op("bf16", 256, 7168, 2048, 8, plus="bf16"),
    "summed, fp8": lambda: grouped_combine_op(
        "f8e4m3", 256, 7168, 2048, 8, scales=("1x128", "128x128"), plus="bf16"
    ),
}
# More registers, more or less shared memory, few experts and many.
OTHERS: dict[str, Callable[[], Op]] = {
    "gelu, f16": lambda: grouped_op("f16", 8, 14336, 4096, gather=True, per_row=2, act="gelu"),
    "clamped, f16": lambda: grouped_op("f16", 8, 14336, 4096, gather=True, per_row=2, act="silu", limit=7.0),
    "no epilogue": lambda: grouped_op("bf16", 512, 2048, 7168, gather=True, per_row=8),
    "one expert": lambda: grouped_op("bf16", 1, 256, 256),
    "narrow": lambda: grouped_op("bf16", 60, 384, 64, scatter=True),
    "gelu, ue8m0": lambda: fp8_op(256, 2048, 7168, gather=True, per_row=8, act="gelu", quant="ue8m0"),
    "clamped, ue8m0": lambda: fp8_op(
        256, 2048, 7168, gather=True, per_row=8, act="gelu", quant="ue8m0", limit=7.0
    ),
    "kept in bf16": lambda: fp8_op(256, 2048, 7168, gather=True, per_row=8, act="gelu_tanh"),
    "quantised, no epilogue": lambda: fp8_op(64, 2816, 2048, gather=True, per_row=6, quant="fp32"),
    "kept in f32": lambda: fp8_op(256, 7168, 2048, scatter=True, to="f32"),
}


@pytest.mark.parametrize("name", V3)
def test_files_read_as_before(name: str, golden: Callable[[str, str], None]) -> None:
    golden(f"v3_gluon_{name.replace(', ', '_')}.py.txt", gluon_source(V3[name]()))


@pytest.mark.parametrize("name", V3 | SUMMED | OTHERS)
def test_lines_have_a_length(name: str) -> None:
    for line in gluon_source((V3 | SUMMED | OTHERS)[name]()).splitlines():
        assert len(line) <= 110 and line == line.rstrip(), line


def check(name: str, schedules: Callable[[Problem], list[Schedule]], tmp_path: Path) -> None:
    """Three warpgroups, no spills, the matrix path of Hopper for 64 rows, and the shared memory estimated."""
    op = (V3 | SUMMED | OTHERS)[name]()
    p = problem(op)
    every = {s.tile: s for s in schedules(p)}
    module = load(gluon_source(op, list(every.values())), tmp_path)
    (kernel,) = [v for v in vars(module).values() if isinstance(v, GluonKernel)]
    assert kernel.variants.keys() == every.keys()
    cubins = compile_many(kernel.requests("sm_90a"), cache=tmp_path / "cache").check()
    assert len(cubins) == len(every)
    for variant, cubin in zip(kernel.variants, cubins, strict=True):
        check_facts(cubin, p, every[variant])


def check_facts(cubin: Cubin, p: Problem, s: Schedule) -> None:
    facts = cubin.facts
    assert facts.spills == 0 and facts.stack_bytes == 0, s.text
    assert not facts.serialised, s.text
    assert facts.shared_dynamic <= p.shared_memory(s, H100) <= H100.smem_per_block, s.text
    assert cubin.metadata["warps"] == 12
    instruction = f"{'Q' if p.fp8 else 'H'}GMMA.64x{s.block_n}"
    assert facts.matrix and all(m.startswith(instruction) for m in facts.matrix), (s.text, facts.matrix)
    gathered = {"LDGSTS.128", "UTMALDG.3D"} if p.gathered else {"UTMALDG.2D", "UTMALDG.3D"}
    assert gathered | ({"LDGSTS.32"} if p.fp8 else set()) <= facts.loads.keys()
    assert "LDGSTS.128" in gathered or "LDGSTS.128" not in facts.loads


@pytest.mark.parametrize("name", V3)
def test_on_hopper(name: str, tmp_path: Path) -> None:
    """What is picked where an op only names the kernel."""
    check(name, lambda p: specialised(p, H100)[:1], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", V3 | SUMMED | OTHERS)
def test_all_on_hopper(name: str, tmp_path: Path) -> None:
    check(name, lambda p: specialised(p, H100), tmp_path)


def test_the_twin_is_not_compiled(tmp_path: Path) -> None:
    module = load(gluon_source(V3["down"]()), tmp_path)
    (kernel,) = [v for v in vars(module).values() if isinstance(v, GluonKernel)]
    twin = kernel.twin
    assert twin.name == "grouped_linear_twin" and twin not in vars(module).values()
    assert twin.variants.keys() == kernel.variants.keys()


def test_the_source_says_gluon_to_the_worker_and_to_the_key(tmp_path: Path) -> None:
    text = gluon_source(V3["down"]())
    module = load(text, tmp_path)
    (kernel,) = [v for v in vars(module).values() if isinstance(v, GluonKernel)]
    (request,) = kernel.requests("sm_90a")
    payload = request.payload()
    assert payload["language"] == "gluon" and "import language as gl\n" in payload["source"]
    assert "def grouped_linear_load(" in payload["source"] and "twin" not in payload["source"]
    assert "gluon" not in device_source(text, "grouped_linear_swapped")


# Who may have them.
def named(make: Callable[[], Op], name: str, **annotations: str) -> Op:
    op = make()
    op.annotations.update({"kernel": name, **annotations})
    return op


WIDE, NARROW = "specialised 128x256x64 w8 s4 persistent", "specialised 128x128x64 w8 s6 persistent"
MIXED = f"<1 rows: swapped 16x64x64 w4 s3; <40 rows: {NARROW}; <90 rows: rows 64x128x64 w4 s4; {WIDE}"


def test_without_measurements_only_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if they were tried first."""
    serving = kernels.serving
    by_name = lambda *op: sorted(serving(*op), key=lambda k: not k.name.startswith("gluon."))  # noqa: E731
    monkeypatch.setattr(kernels, "serving", by_name)
    for make in (V3 | SUMMED).values():
        name = f"gluon.{make().name}"
        assert by_name(make().name, "sm_90a")[0].name == name
        assert select(make(), "sm_90a").name.startswith("triton.")
        kernel = select(op := named(make, name), "sm_90a")
        assert kernel.name == name
        *few, (_, last) = parse_ladder(kernel.schedules(op, "sm_90a"), problem(op), H100)
        assert last == specialised(problem(op), H100)[0]
        assert few == triton_grouped.rungs(make(), H100)[:-1]


@pytest.mark.parametrize("make", [V3["down"], SUMMED["summed"]])
def test_a_schedule_says_it_too(make: Callable[[], Op]) -> None:
    """Rungs of both, anywhere: Gluon's record runs them, named or not; Triton's alone are Triton's."""
    for text in (MIXED, WIDE):
        op = make()
        op.annotations["schedule"] = text
        assert select(op, "sm_90a").name == f"gluon.{op.name}"
        assert (
            select(named(make, f"gluon.{op.name}", schedule=text), "sm_90a").schedules(op, "sm_90a") == text
        )
    op.annotations["schedule"] = "rows 128x128x64 w8 s3"
    assert select(op, "sm_90a").name == f"triton.{op.name}"


def test_rungs_of_both_are_variants_of_one_file(tmp_path: Path) -> None:
    op = V3["down"]()
    op.annotations["schedule"] = MIXED
    module = load(gluon_source(op), tmp_path)
    ladder = [(below, kernel.name, tile) for below, kernel, tile in module.GROUPED_LINEAR_LADDER]
    assert ladder == [
        (1, "grouped_linear_swapped", "16x64x64w4s3"),
        (40, "grouped_linear_specialised", "128x128x64w8s6p"),
        (90, "grouped_linear_rows", "64x128x64w4s4"),
        (float("inf"), "grouped_linear_specialised", "128x256x64w8s4p"),
    ]


def test_few_tokens_are_summed_below_the_first_rung_of_gluon_s(tmp_path: Path) -> None:
    """256 experts, 8 a token: below 40 tokens, one launch. Where the first rung is Gluon's: two for any."""
    op = SUMMED["summed"]()
    op.annotations["schedule"] = MIXED.replace("<1 rows", "<1.25 rows")
    text = gluon_source(op)
    module = load(text, tmp_path)
    few = [(kernel.name, tile) for _, kernel, tile in module.GROUPED_LINEAR_COMBINE_FEW]
    assert few == [("grouped_linear_combine_swapped_sum", "16x64x64w4s3")]
    assert "if tokens <= 39:" in text and "One launch for up to 39 tokens" in text
    op.annotations["schedule"] = WIDE
    text = gluon_source(op)
    assert "_FEW" not in text and "if tokens" not in text and "Two launches" in text


def test_what_is_refused_says_why() -> None:
    with pytest.raises(UnknownKernel, match=r"gluon.grouped_linear is for sm_90a, not sm_100a"):
        select(named(V3["down"], "gluon.grouped_linear"), "sm_100a")
    with pytest.raises(UnknownKernel, match="is a kernel of gather_grouped_linear"):
        select(named(V3["down"], "gluon.gather_grouped_linear"), "sm_90a")
    with pytest.raises(BadSchedule, match=r"has no rung like 'specialised 128x256x64 w8 s4 persistent'"):
        down = named(V3["down"], "gluon.grouped_linear", schedule="rows 128x128x64 w8 s3")
        select(down, "sm_90a")
    with pytest.raises(BadSchedule, match=rf"'{NARROW}' is of kernel=gluon.grouped_linear, not of Triton's"):
        select(named(V3["down"], "triton.grouped_linear", schedule=MIXED), "sm_90a")
    unnamed = V3["down"]()
    unnamed.annotations["schedule"] = MIXED
    with pytest.raises(BadSchedule, match="warps with tasks of their own are for sm_90a"):
        select(unnamed, "sm_100a")
    with choose_by(Choosing(batch_invariant=True)), pytest.raises(BadSchedule, match="depends on M"):
        select(unnamed, "sm_90a")


@pytest.mark.parametrize(
    ("make", "text", "reason"),
    [
        ("up", WIDE, "256 columns spill registers"),
        ("down", "specialised 128x256x64 w8 s5 persistent", "bytes of shared memory"),
        ("down", "specialised 128x256x64 w8 s4", "programs are persistent with 8 warps that multiply"),
        ("down", "specialised 64x128x64 w8 s4 persistent", "its tile is of 128 rows and 128 or 256 columns"),
        ("down", "specialised 128x128x64 w8 s3 persistent", "near it are specialised 128x128x64 w8 s5"),
        ("down, fp8", WIDE.replace("x64", "x128"), "256 columns spill registers"),
    ],
)
def test_schedules_that_are_none(make: str, text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{text!r} is not for sm_90a: ")) as refused:
        parse_ladder(text, problem(V3[make]()), H100)
    assert reason in str(refused.value)


@pytest.mark.parametrize(
    "op, reason",
    [
        (lambda: grouped_op("bf16", 4, 128, 64), None),
        (
            lambda: grouped_op("bf16", 4, 128, 72),
            "K is 72, and there are 128 columns: tiles are of 64 and 128",
        ),
        (lambda: grouped_op("bf16", 4, 136, 64), "there are 136 columns"),
        (lambda: grouped_op("bf16", 4, 128, 33), "multiples of 4 bytes"),
        (lambda: grouped_op("f32", 4, 128, 64), "f32 has no matrix unit"),
        (lambda: fp8_op(4, 128, 128), None),
        (lambda: fp8_op(4, 128, 192), "K is 192"),
        (lambda: fp8_op(4, 128, 128, scales=("1x*", "1x*")), "scales of 1x128 for x and 128x128 for w"),
        (lambda: fp8_op(4, 128, 128, scales=("1x128", "256x128")), "scales of 1x128 for x and 128x128 for w"),
    ],
)
def test_reasons(op: Callable[[], Op], reason: str | None) -> None:
    found = reasons_against(op())
    assert (not found) if reason is None else any(reason in r for r in found), found


def test_linear_has_none() -> None:
    with pytest.raises(UnknownKernel, match="no kernel is called"):
        select(named(lambda: linear_op(256, 256), "gluon.linear"), "sm_90a")
