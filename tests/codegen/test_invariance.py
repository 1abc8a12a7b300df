"""One schedule for all of M: what is picked, what it costs, and that a row's bits are then its own."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import moec
from moec import models, passes
from moec.codegen import invariance
from moec.codegen.choosing import Choosing, choose_by, pick, prices
from moec.codegen.kernels import KERNELS
from moec.codegen.schedules import Problem
from moec.codegen.select import ROWS, explain, ladder
from moec.errors import BadSchedule
from moec.ir import OPS, Module, parse_module, print_module, read_module
from moec.ir.devices import GPUS
from moec.ir.types import f32
from moec.tune.products import products
from tests.codegen.packages import moe_layer
from tests.codegen.test_triton_select import PROBLEMS, V3_DOWN, V3_UP

ROOT = Path(__file__).parents[2]
INVARIANT = Choosing(batch_invariant=True)
V3_FP8 = Problem(256, 7168, 2048, "f8e4m3", 1)


@given(PROBLEMS, st.sampled_from(list(GPUS)))
def test_one_schedule_that_loses_least(problem: Problem, target: str) -> None:
    device = GPUS[target]
    with choose_by(INVARIANT):
        rungs = pick(problem, device)
    assert pick(problem, device) == ladder(problem, device)
    ((below, one),) = rungs
    assert below == math.inf
    possible = [rows for rows in ROWS if rows * problem.experts >= 1]
    seconds = [{c.schedule: c.seconds for c in explain(problem, device, rows)} for rows in possible]
    loss = {s: sum(math.log(known[s] / min(known.values())) for known in seconds) for s in seconds[0]}
    assert loss[one] == min(lost for s, lost in loss.items() if s.split == 1)


@pytest.mark.parametrize("problem", [V3_UP, V3_DOWN, V3_FP8], ids=lambda p: p.text)
def test_without_it_sums_along_k_depend_on_m(problem: Problem) -> None:
    """Another instruction, other steps or another number of parts is another order."""

    def orders() -> set[tuple[str, int, int]]:
        return {(s.form, s.block_k, s.split) for _, s in pick(problem, GPUS["sm_90a"])}

    with choose_by(INVARIANT):
        assert len(orders()) == 1
    assert len(orders()) > 1


def test_its_cost_is_that_over_the_ladder() -> None:
    with choose_by(INVARIANT):
        ((_, one),) = pick(V3_DOWN, GPUS["sm_90a"])
        times = dict(prices(V3_DOWN, GPUS["sm_90a"]))
    assert list(times) == ROWS and max(times.values()) > 1.05
    rows = max(times, key=lambda r: times[r])
    seconds = {c.schedule: c.seconds for c in explain(V3_DOWN, GPUS["sm_90a"], rows)}
    rung = next(s for below, s in ladder(V3_DOWN, GPUS["sm_90a"]) if rows < below)
    assert times[rows] == pytest.approx(seconds[one] / seconds[rung])


def test_kernels_get_one_variant_each(tmp_path: Path) -> None:
    """Also where no pass selects: emission asks by itself."""
    for level in (0, 2):
        options = moec.BuildOptions(batch_invariant=True, opt_level=level, cache=str(tmp_path / "cache"))
        with warnings.catch_warnings(record=True):
            built = moec.build(moe_layer(), "sm_90a", tmp_path / str(level), "f16", options)
        products = [k["kernel"] for k in built.manifest["kernels"] if "grouped_linear" in k["kernel"]]
        assert len(products) == len(set(products)) and len(products) >= 2 * (level > 0)


def test_what_is_not_invariant_is_named(tmp_path: Path) -> None:
    options = moec.BuildOptions(batch_invariant=True, cache=str(tmp_path / "cache"))
    with pytest.warns(UserWarning, match=r"its batch in torch\.linear$"):
        gpu = moec.build(moe_layer(), "sm_90a", tmp_path / "gpu", "f16", options).manifest
    assert gpu["batch_invariant"]["not"] == {"torch.linear": ["linear"]}  # the router's
    assert len(gpu["batch_invariant"]["cost"]) == 2 and gpu["options"]["batch_invariant"]
    with pytest.warns(UserWarning, match=r"torch\.grouped_linear"):
        cpu = moec.build(moe_layer(), "cpu", tmp_path / "cpu", "f16", options).manifest
    assert cpu["batch_invariant"]["cost"] == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = moec.build(moe_layer(), "cpu", tmp_path / "plain").manifest
    assert plain["batch_invariant"] is None and plain["tuning"] is None


def test_what_one_launch_and_gluon_cost_is_not_left_out(tmp_path: Path) -> None:
    """Products inside of one op are priced, and tuned, as outside; those that no model knows are named."""
    apart = "canonicalise,expert-grouping,canonicalise,permute-fusion{route_sort=true,combine=true}"
    found, tuned = {}, {}
    for name, pipeline, kernels in [
        ("steps", f"{apart},select,plan", None),
        ("once", f"{apart},one-launch,select,plan", None),
        ("gluon", f"{apart},select,plan", "gluon"),
    ]:
        options = moec.BuildOptions(
            batch_invariant=True, cache=str(tmp_path / "cache"), passes=pipeline, kernels=kernels
        )
        with pytest.warns(UserWarning, match="batch_invariant"):
            built = moec.build(wide_layer(), "sm_90a", tmp_path / name, "bf16", options)
        found[name] = built.manifest["batch_invariant"]
        tuned[name] = [p.problem for p in products(read_module(built.ir_files[-1]), "sm_90a")[0]]
    assert len(found["steps"]["cost"]) == 2 and found["steps"]["unknown"] == []
    assert found["once"] == found["steps"] and tuned["once"] == tuned["steps"] and len(tuned["once"]) == 2
    assert found["gluon"]["cost"] == []
    assert found["gluon"]["unknown"] == ["gather_grouped_linear", "grouped_linear_combine"]


def wide_layer() -> models.Layer:
    """Of a size that Gluon's kernels take."""
    block = models.MoE(models.Router(experts=4, top_k=2, renorm=True), models.Experts(4, intermediate=128))
    return models.Layer(block, hidden=256, dtype="bf16", name="layer")


def selected() -> Module:
    module = models.lower(moe_layer().with_dtype("f16"))
    module.target = "sm_90a"
    passes.PassManager(passes.pipeline(2, "sm_90a")).run(module)
    return module


def test_a_schedule_that_depends_on_m_is_refused_at_its_line() -> None:
    text = print_module(selected())
    one = 'schedule="rows 64x64x64 w4 s3"'
    assert one in text
    assert invariance.report(parse_module(text, "x.moec"), "sm_90a")  # several are no mistake by themselves
    several = text.replace(one, 'schedule="<1 rows: rows 64x128x64 w4 s3; rows 64x64x64 w4 s3"')
    with choose_by(INVARIANT):
        invariance.report(parse_module(text, "x.moec"), "sm_90a")
        with pytest.raises(BadSchedule, match="depends on M") as caught:
            invariance.report(parse_module(several, "x.moec"), "sm_90a")
    line = next(i for i, written in enumerate(several.splitlines(), 1) if "<1 rows" in written)
    assert str(caught.value.loc) == f"x.moec:{line}"


def test_what_is_called_exact_is_an_op_with_a_kernel_of_pytorch_s() -> None:
    known = {k.op for k in KERNELS if not k.row_by_row}
    assert known >= invariance.EXACT | invariance.POINTWISE
    assert not invariance.EXACT & invariance.POINTWISE
    assert not any(OPS[name].products for name in invariance.EXACT | invariance.POINTWISE)


@pytest.mark.parametrize(
    "name", sorted(invariance.EXACT & {"add", "mul", "rope", "quant", "dequant", "cast"})
)
def test_exact_ops_give_a_row_the_same_bits_in_any_batch(name: str) -> None:
    """On the CPU, where what doesn't fill a vector runs another code."""
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(37, 130, generator=g) for _ in range(2))
    run = {
        "add": lambda a, b: a + b,
        "mul": lambda a, b: a * b,
        "rope": lambda a, b: OPS["rope"].reference(a, b[:, :65], b[:, 65:], layout="half"),
        "quant": lambda a, b: torch.cat([t.float() for t in quantised(a)[:2]], 1),
        "dequant": lambda a, b: OPS["dequant"].reference(quantised(a), to=f32),
        "cast": lambda a, b: a.to(torch.bfloat16),
    }[name]
    whole = run(x, y)
    for rows in (slice(0, 1), slice(5, 6), slice(3, 11)):
        assert torch.equal(run(x[rows], y[rows]), whole[rows])


def quantised(x: torch.Tensor) -> Any:
    return OPS["quant"].reference(x, block=(1, 128), scale="fp32")


def test_a_row_s_bits_are_its_own_in_the_interpreter() -> None:
    tests = Path(__file__).with_name("triton_interpreted_invariance.py")
    command = [sys.executable, "-m", "pytest", str(tests), "-q", "-x", "-p", "no:cacheprovider"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "MOEC_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
