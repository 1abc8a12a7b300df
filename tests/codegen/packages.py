"""Tiny packages for the tests of what a build writes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import moec
from moec import models
from moec.models.families.registry import FAMILIES

TINY = sorted(family.tiny for family in FAMILIES.values())


def build(spec: object, out: Path, level: int = 2, dtype: str | None = None) -> moec.Built:
    return moec.build(spec, out=out, dtype=dtype, options=moec.BuildOptions(opt_level=level))


def fp8_tiny() -> models.Model:
    """DeepSeek-V3 in miniature with weights stored in FP8 blocks that don't divide them."""
    return dataclasses.replace(models.preset("deepseek-v3-tiny"), quantization=models.BlockFP8((16, 8)))


def tied_tiny() -> models.Model:
    return dataclasses.replace(models.preset("mixtral-tiny"), tied=True)


def moe_layer() -> models.Layer:
    """One MoE block: the size at which kernel engineers work."""
    block = models.MoE(
        models.Router(experts=4, top_k=2, renorm=True), models.Experts(count=4, intermediate=6)
    )
    return models.Layer(block, hidden=8, dtype="f32", name="moe-layer")
