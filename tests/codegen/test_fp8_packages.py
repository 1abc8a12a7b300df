"""Packages for a GPU that mix fp8 kernels with others of the same op: which file has which; all import."""

from __future__ import annotations

from pathlib import Path

import pytest

from moec.codegen import target, write_package
from moec.ir.text import parse_module
from moec.runtime.package import Package
from tests.codegen.emission import ABOUT

MODULE = """moec.ir 1 module @tests target={target}

func @forward(%x: bf16[T,256], %y: bf16[T,67], %w: f8e4m3[4,256,256]@s128x128, \
%v: f8e4m3[4,256,67]@s128x128, %w2: f8e4m3[4,256,128]@s128x128, %u: bf16[4,256,256], \
%slot: i32[2*T~4], %off: i32[5]) -> bf16[2*T,256]
  %x.q = quant(%x) {{block=1x128}} : f8e4m3[T,256]@s1x128
  %y.q = quant(%y) {{block=1x128}} : f8e4m3[T,67]@s1x128
  %g = gather_grouped_linear(%x.q, %w, %slot, %off) {{epilogue=swiglu, per_row=2, quant=1x128}} : \
f8e4m3[2*T~4,128]@s1x128
  %h = gather_grouped_linear(%y.q, %v, %slot, %off) {{epilogue=swiglu, per_row=2, quant=1x128}} : \
f8e4m3[2*T~4,128]@s1x128
  %d = grouped_linear(%g, %w2, %off) : bf16[2*T~4,256]
  %e = grouped_linear(%h, %w2, %off) : bf16[2*T~4,256]
  %f = add(%d, %e) : bf16[2*T~4,256]
  %z = grouped_linear(%f, %u, %off, %slot) : bf16[2*T,256]
  return %z
end
"""


def files(folder: Path, goal: str) -> dict[str, str]:
    """The package's kernel files, once every one of them could be imported."""
    write_package(folder, parse_module(MODULE.format(target=goal)), target(goal), "0.1.0", ABOUT)
    assert Package(folder).module("model").forward
    return {f.stem: f.read_text(encoding="utf-8") for f in (folder / "kernels").glob("*.py")}


def test_kernels_of_both_kinds(tmp_path: Path) -> None:
    """K of 67 is for PyTorch: its quantisation lies beside Triton's, and its product calls that one."""
    found = files(tmp_path / "package", "sm_90a")
    assert "@triton.jit" in found["quant"] and "@triton.jit" not in found["quant_more"]
    assert "@triton.jit" in found["gather_grouped_linear"]
    assert "from .quant_more import quant" in found["gather_grouped_linear_more"]
    assert "@triton.jit" not in found["gather_grouped_linear_more"]
    # Products of floats and of fp8 share a file and its helpers; it holds none that neither calls.
    down = found["grouped_linear"]
    assert down.count("def find_tile(") == 1 and "def quantize(" not in down
    assert '"w": "tensordesc<fp8e4nv' in down and '"w": "tensordesc<bf16' in down
    assert found["gather_grouped_linear"].count("def quantize(") == 1


@pytest.mark.parametrize("goal", ["sm_80", "cpu"])
def test_where_no_unit_multiplies_fp8_pytorch_does(goal: str, tmp_path: Path) -> None:
    found = files(tmp_path / "package", goal)
    assert not any("fp8e4nv" in text for text in found.values())
    assert "An emulation, not an fp8 kernel" in "".join(found.values())
