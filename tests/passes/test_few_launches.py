"""A routed layer in decode is three launches: choice and sort, one product, and the other with the sum."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import moec.codegen  # noqa: F401 - select asks it for kernels
from moec import models
from moec.codegen.kernels import select
from moec.ir.devices import GPUS
from moec.ops import compiled
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


SIZES = {"experts": 256, "hidden": 7168, "width": 4096, "k": 8, "weights": torch.float32}
ROUTER = (("score", "sigmoid"), ("renorm", True), ("scale", 2.5))


@pytest.mark.parametrize("target", [name for name, device in GPUS.items() if device.fp8])
@pytest.mark.parametrize("form", ["fused", "routed"])
@pytest.mark.parametrize("fp8", [False, True])
def test_moec_ops(form: str, fp8: bool, target: str) -> None:
    """In fp8 x is quantised by the launch that sorts."""
    how: dict[str, Any] = {"blocks": ((128, 128), (128, 128))} if fp8 else {}
    how |= {"router": ROUTER, "bias": torch.float32} if form == "routed" else {}
    key = compiled.Key(f"{form}_fp8" if fp8 else form, target, False, torch.bfloat16, **SIZES, **how)
    module = compiled.lower(key)
    PassManager(pipeline(2, target)).run(module)
    ops = [op for op in module["forward"].ops if op.launches]
    sort = "route_sort" if form == "routed" else "local_sort"
    assert [op.name for op in ops] == [f"{sort}_and_quant" if fp8 else sort, *ROUTED[1:]]
    families = [select(op, target).family for op in ops]
    assert families == ["cuda" if form == "routed" else "triton", "triton", "triton"]
