"""A layer whose products fp8-cast casts, native weights that are cut, and what the tests ask of both."""

from __future__ import annotations

import torch

from moec.ir import Interpreter, Module, parse_module
from moec.ir.scaled import Scaled
from tests.passes.modules import (
    replaced,
)

GROUP = "canonicalise,expert-grouping,canonicalise"

# A layer as a user could write it. The tests below change a line or two.
LAYER = """\
moec.ir 1 func @forward(%x: f32[N,40]) -> f32[N,40] target=cpu
  param $norm.weight: f32[40]
  param $up.weight: f32[48,40]
  param $gate.weight: f32[48,40]
  param $down.weight: f32[40,48]
  param $router.weight: f32[4,40]
  param $experts.w13: f32[4,24,40]
  param $experts.w2: f32[4,40,12]
  param $own_gate.weight: f32[1,40]
  %n = rms_norm(%x, $norm.weight) {eps=1e-06} : f32[N,40]
  %up = linear(%n, $up.weight) : f32[N,48]
  %gate = linear(%n, $gate.weight) : f32[N,48]
  %h = swiglu(%gate, %up) : f32[N,48]
  %shared = linear(%h, $down.weight) : f32[N,40]
  %g = linear(%n, $own_gate.weight) : f32[N,1]
  %gated = mul(%shared, %g) : f32[N,40]
  %logits = linear(%n, $router.weight) : f32[N,4]
  %w, %id = route(%logits) {k=2, score=softmax} : f32[N,2], i32[N,2]
  %slot, %off = sort_by_expert(%id) {experts=4} : i32[2*N~4], i32[5]
  %xp = gather_rows(%n, %slot) {per_row=2} : f32[2*N~4,40]
  %gu = grouped_linear(%xp, $experts.w13, %off) : f32[2*N~4,24]
  %e = swiglu(%gu) : f32[2*N~4,12]
  %d = grouped_linear(%e, $experts.w2, %off) : f32[2*N~4,40]
  %y = combine(%d, %slot, %w, %gated) : f32[N,40]
  return %y
end
"""


def layer(*edits: tuple[str, str]) -> Module:
    return parse_module(replaced(*edits)(LAYER))


def sqnr(exact: torch.Tensor, got: torch.Tensor) -> float:
    """Signal to quantisation noise, in dB."""
    noise = (got.double() - exact.double()).square().sum()
    return float(10 * torch.log10(exact.double().square().sum() / noise.clamp(min=1e-300)))


CUT = """\
moec.ir 1 module @test target=cpu

func @forward(%x: f32[N,8]) -> (f32[N,6], f32[N,6], f32[N,6])
  param $a: f32[6,8]
  param $b: f32[6,8]
  param $c: f32[6,8]
  %ya = linear(%x, $a) : f32[N,6]
  %yb = linear(%x, $b) : f32[N,6]
  %yc = linear(%x, $c) : f32[N,6]
  return %ya, %yb, %yc
end

func @weights() -> ()
  param $kv.weight: f8e4m3[12,8]
  param $kv.weight_scale_inv: f32[3,2]
  param $c.plain: f32[6,8]
  %q = scaled($kv.weight, $kv.weight_scale_inv) {block=4x4} : f8e4m3[12,8]@s4x4
  %w = dequant(%q) {to=f32} : f32[12,8]
  %heads = reshape(%w) {shape=[2,6,8]} : f32[2,6,8]
  %first, %second = split(%heads) {axis=0, sizes=[1,1]} : f32[1,6,8], f32[1,6,8]
  %a = reshape(%first) {shape=[6,8]} : f32[6,8]
  %b = reshape(%second) {shape=[6,8]} : f32[6,8]
  bind(%a) {param=a}
  bind(%b) {param=b}
  bind($c.plain) {param=c}
  return
end
"""


def bound(m: Module, weights: dict[str, torch.Tensor]) -> dict[str, Scaled]:
    return {n: v for n, v in Interpreter(m, weights)._bound.items() if isinstance(v, Scaled)}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))
