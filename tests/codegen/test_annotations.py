"""Emission obeys ``kernel`` and ``schedule``, chosen or edited, and is the same where nobody chose."""

from __future__ import annotations

import ast

import pytest

from moec import models, passes
from moec.codegen.emit import emit_python, emitted_by
from moec.errors import BadSchedule, UnknownKernel
from moec.ir import Module, parse_module, print_module
from tests.codegen.packages import TINY, fp8_tiny, moe_layer


def optimised(spec: object, target: str, *, level: int = 2, without: tuple[str, ...] = ()) -> Module:
    module = models.lower(models.resolve(spec))
    module.target = target
    passes.PassManager([p for p in passes.pipeline(level, target) if p.name not in without]).run(module)
    return module


def sources(module: Module) -> dict[str, str]:
    return emit_python(module, module.target, "0.1.0")


@pytest.mark.parametrize("target", ["cpu", "sm_90a"])
@pytest.mark.parametrize("spec", [*TINY, fp8_tiny, moe_layer], ids=lambda s: getattr(s, "__name__", s))
def test_what_select_writes_is_what_emission_does_without_it(spec: object, target: str) -> None:
    spec = spec() if callable(spec) else spec
    for level in (1, 2):
        chosen = optimised(spec, target, level=level, without=("plan",))
        assert any("kernel" in op.annotations for f in chosen for op in f.ops)
        bare = optimised(spec, target, level=level, without=("select", "plan"))
        assert not any(op.annotations for f in bare for op in f.ops)
        assert sources(chosen) == sources(bare)


def edited_text(old: str, new: str, times: int = -1) -> str:
    text = print_module(optimised(models.preset("deepseek-v3-tiny").with_dtype("bf16"), "sm_90a"))
    assert old in text
    return text.replace(old, new, times)


def edited(old: str, new: str) -> Module:
    return parse_module(edited_text(old, new), "edited.moec")


def test_an_edited_kernel_is_emitted() -> None:
    before = sources(edited("", ""))
    after = sources(edited("kernel=cuda.route_sort", "kernel=torch.route_sort"))
    assert "kernels/route_sort.cu" in before and "kernels/route_sort.cu" not in after
    assert "CudaKernel(" in before["kernels/route_sort.py"] and "Cuda" not in after["kernels/route_sort.py"]
    assert "stable=True" in after["kernels/route_sort.py"]
    assert emitted_by(edited("", ""), "sm_90a")["triton"] == [
        "gather_grouped_linear",
        "grouped_linear_combine",
    ]
    assert emitted_by(edited("", ""), "sm_90a")["cuda"] == ["route_sort"]


def ladders(module: Module) -> list[list[tuple[float, str]]]:
    """What the host picks variants for few tokens by: (rows an expert below which, tile), by function."""
    tree = ast.parse(sources(module)["kernels/grouped_linear_combine.py"])
    found = []
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).endswith("_FEW"):
            rungs = [ast.unparse(item).strip("()").split(", ") for item in node.value.elts]  # type: ignore[attr-defined]
            found.append([(float(eval(below)), tile.strip("'")) for below, _, tile in rungs])
    return found


def test_an_edited_schedule_is_emitted() -> None:
    mark = 'kernel=triton.grouped_linear_combine, schedule="'
    (before,) = ladders(edited("", ""))
    (after,) = ladders(edited(mark, f"{mark}<0.5 rows: rows 64x64x64 w4 s3; "))
    assert after == [(0.5, "64x64x64w4s3"), *before]


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("kernel=cuda.route_sort", "kernel=cuda.route_sorted", UnknownKernel),
        ("kernel=cuda.route_sort", "kernel=cuda.route_sort, schedule=none", BadSchedule),
        (
            'grouped_linear_combine, schedule="',
            'grouped_linear_combine, schedule="<1 rows: rows 64x64x64; ',
            BadSchedule,
        ),
        ("layers=0..0", "kernel=torch.call, layers=0..0", UnknownKernel),
    ],
)
def test_the_impossible_is_refused_at_its_line(old: str, new: str, error: type[Exception]) -> None:
    text = edited_text(old, new, times=1)
    line = next(i for i, written in enumerate(text.splitlines(), 1) if new in written)
    with pytest.raises(error) as caught:
        sources(parse_module(text, "edited.moec"))
    assert str(caught.value.loc) == f"edited.moec:{line}"  # type: ignore[attr-defined]


def test_no_two_records_have_one_name() -> None:
    from moec.codegen.kernels import Inline, register

    with pytest.raises(RuntimeError, match=r"two kernels are called torch\.add"):
        register(Inline("add", lambda op, args: ""))
