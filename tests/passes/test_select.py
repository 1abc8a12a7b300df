"""Kernels and schedules as annotations: written, kept where they were edited, refused where impossible."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from moec.errors import BadOption, BadSchedule, MoecError, UnknownKernel, UnknownTarget
from moec.ir import Module, parse_module, print_module, records
from moec.passes import parse_pipeline
from moec.passes.manager import PassManager
from tests.passes.modules import MoE, func, golden_text, module, run


def grouped(target: str = "sm_90a") -> Module:
    """The products of an MoE block, as permute-fusion leaves them, with load-time ops beside them."""
    m = MoE(experts=8, k=2, hidden=256, inner=128, dtype="bf16", layered=True).build()
    m.target = target
    PassManager(parse_pipeline("canonicalise,expert-grouping,canonicalise,permute-fusion")).run(m)
    return m


def selected(m: Module) -> dict[str, dict[str, object]]:
    run("select", m)
    return {op.results[0].name: op.annotations for f in m for op in f.ops if op.results}


def test_golden(golden: Callable[[str, str], None]) -> None:
    m = grouped()
    golden("select.before.moec", golden_text(m))
    run("select", m)
    golden("select.after.moec", golden_text(m))


def test_schedules_of_equal_ops_are_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from moec.codegen import select as model

    asked = []
    explain = model.explain
    monkeypatch.setattr(
        model, "explain", lambda p, d, r, *c: asked.append((p, d.name, r)) or explain(p, d, r, *c)
    )
    model._ladder_of_target.cache_clear()
    for _ in range(3):
        run("select", grouped())
    assert len(asked) == len(set(asked)) > 0


@pytest.mark.parametrize("target", ["cpu", "sm_80", "sm_120a"])
def test_each_target_gets_its_own(target: str) -> None:
    found = selected(grouped(target))
    kernels = {str(notes["kernel"]) for notes in found.values() if notes}
    assert any(k.startswith("triton.") for k in kernels) == (target != "cpu")
    assert any("schedule" in notes for notes in found.values()) == (target != "cpu")
    assert not any("swapped" in str(notes.get("schedule")) for notes in found.values())


def test_load_time_runs_on_the_cpu() -> None:
    m = grouped()
    run("select", m)
    loading = [op for f in m if f.name.startswith("weights") for op in f.ops]
    kernels = [op.annotations.get("kernel") for op in loading if op.results]
    assert kernels and all(str(k).startswith("torch.") for k in kernels)


def test_without_a_target_it_is_the_cpu() -> None:
    assert selected(grouped("")) == selected(grouped("cpu"))


def edited(*changes: tuple[str, str]) -> Module:
    m = grouped()
    run("select", m)
    text = print_module(m)
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return parse_module(text, "edited.moec")


SCHEDULE = 'kernel=triton.grouped_linear, schedule="'


def test_what_is_there_stays() -> None:
    m = edited((SCHEDULE, f"{SCHEDULE}<2 rows: rows 64x128x64 w4 s3; "))
    text = print_module(m)
    run("select", m)
    assert print_module(m) == text
    m = edited(("kernel=triton.combine", "kernel=torch.combine"))
    run("select", m)
    assert "torch.combine" in print_module(m)


def test_what_is_missing_is_filled_in() -> None:
    m = edited((SCHEDULE, SCHEDULE))
    whole = print_module(m)
    for op in (op for f in m for op in f.ops):
        op.annotate("schedule", None)
    run("select", m)
    assert print_module(m) == whole


IMPOSSIBLE = {
    "no such kernel": (
        ("kernel=triton.combine", "kernel=triton.combin"),
        UnknownKernel,
        "combine: no kernel is called 'triton.combin'; did you mean triton.combine, torch.combine?",
    ),
    "another op's": (
        ("kernel=triton.combine", "kernel=torch.rope"),
        UnknownKernel,
        "combine: torch.rope is a kernel of rope; for sm_90a there is triton.combine and torch.combine",
    ),
    "one that can't": (
        ("kernel=triton.grouped_linear", "kernel=triton.fp8_grouped_linear"),
        UnknownKernel,
        "grouped_linear: triton.fp8_grouped_linear can't: x and w have no scales; for sm_90a there is "
        "triton.grouped_linear and gluon.grouped_linear and torch.grouped_linear",
    ),
    "one of the CPU": (
        ("kernel=torch.linear", "kernel=onednn.linear"),
        UnknownKernel,
        "linear: onednn.linear is for cpu, not sm_90a; for sm_90a there is torch.linear",
    ),
    "no schedule": (
        (SCHEDULE, f"{SCHEDULE}rows 64; "),
        BadSchedule,
        "grouped_linear: schedule 'rows 64' is none: '<4 rows: rows 128x128x64 w8 s3' is",
    ),
    "a bound is missing": (
        (SCHEDULE, f"{SCHEDULE}rows 64x128x64 w4 s3; "),
        BadSchedule,
        "grouped_linear: schedule 'rows 64x128x64 w4 s3': every part but the last says below how many "
        "rows it holds",
    ),
    "bounds fall": (
        (SCHEDULE, f"{SCHEDULE}<9 rows: rows 64x128x64 w4 s3; <9 rows: rows 64x128x64 w4 s4; "),
        BadSchedule,
        "grouped_linear: schedule '<9 rows: rows 64x128x64 w4 s4': the numbers of rows must ascend",
    ),
    "shared memory": (
        (SCHEDULE, f"{SCHEDULE}<2 rows: rows 128x256x64 w8 s6; "),
        BadSchedule,
        "grouped_linear: schedule 'rows 128x256x64 w8 s6' is not for sm_90a: 295936 bytes of shared memory, "
        "sm_90a has 232448 a block",
    ),
    "outside the space": (
        (SCHEDULE, f"{SCHEDULE}<2 rows: rows 96x128x64 w4 s3; "),
        BadSchedule,
        "grouped_linear: schedule 'rows 96x128x64 w4 s3' is not for sm_90a: it is in no list of those that "
        "compile well; near it are rows 128x128x64 w4 s3, rows 64x128x64 w4 s3, rows 128x128x64 w4 s4",
    ),
    "a schedule of a kernel without": (
        ("kernel=triton.combine", 'kernel=triton.combine, schedule="rows 64x128x64 w4 s3"'),
        BadSchedule,
        "combine: triton.combine has no schedules",
    ),
    "on a loop": (
        ("layers=1..2, scope", "kernel=torch.call, layers=1..2, scope"),
        UnknownKernel,
        "call: no kernel emits it, so it can't name one",
    ),
}


@pytest.mark.parametrize(("change", "error", "message"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_the_impossible_names_its_line(change: tuple[str, str], error: type[MoecError], message: str) -> None:
    m = edited(change)
    line = next(i for i, text in enumerate(print_module(m).splitlines(), 1) if change[1] in text)
    with pytest.raises(error) as caught:
        run("select", m)
    assert caught.value.message == message
    assert str(caught.value.loc) == f"edited.moec:{line}"


def test_a_kernel_of_another_target_is_refused() -> None:
    m = edited()
    m.target = "cpu"
    with pytest.raises(UnknownKernel, match=r"cuda\.\w+ is for sm_80, .*, not cpu; for cpu there is torch"):
        run("select", m)


def test_an_unknown_target_is_refused() -> None:
    m = module(func("@forward(%x: f32[N,4]) -> f32[N,4]", "%y = sigmoid(%x) : f32[N,4]", "return %y"))
    m.target = "sm_90"
    with pytest.raises(UnknownTarget):
        run("select", m)


def test_without_records_it_says_what_to_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "_provided", [])
    with pytest.raises(BadOption, match="import it before running select or plan"):
        run("select", grouped())
