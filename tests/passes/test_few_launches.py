"""A routed layer in decode is three launches: choice and sort, one product, and the other with the sum."""

from __future__ import annotations

from dataclasses import replace

import pytest

import moec.codegen  # noqa: F401 - select asks it for kernels
from moec import models
from moec.codegen.kernels import select
from moec.passes import PassManager
from moec.passes.pipelines import pipeline

ROUTED = ["route_sort", "gather_grouped_linear", "grouped_linear_combine"]


@pytest.mark.parametrize("fp8", [False, True])
def test_deepseek_v3(fp8: bool) -> None:
    v3 = models.resolve("deepseek-v3")
    module = models.lower(replace(v3, layers=v3.layers[3:5]))
    module.target = "sm_90a"
    PassManager(pipeline(3, "sm_90a", fp8=fp8)).run(module)
    ops = module["decode.layer.moe"].ops
    names = [op.name for op in ops]
    gate = names.index("route_sort") - 1
    assert names[gate:] == ["linear", *ROUTED]  # nothing is quantised between
    assert [op.launches for op in ops[gate + 1 :]] == [1, 1, 1]
    families = [select(op, "sm_90a").family for op in ops[gate + 1 :]]
    assert families == ["cuda", "triton", "triton"]
