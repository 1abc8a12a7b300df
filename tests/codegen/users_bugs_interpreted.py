"""What users of other MoE kernels ran into, of what Triton's interpreter can show: each must not happen here.

Run by test_users_bugs.py in a process of its own. Where a bug comes from stands with its test.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moec.codegen.schedules import Schedule
from moec.ir.scaled import Scaled, quantize
from tests.codegen.interpreted import FOLDER, call, close, folder, normal, poisoned
from tests.codegen.triton_kernels import combine_op, fp8_op, grouped_op, route_op, sort_op, source

__all__ = ["folder", "poisoned"]  # fixtures, which pytest finds by name

FORMS = pytest.mark.parametrize("form", ["rows", "swapped"])
TARGETS = pytest.mark.parametrize("target", ["sm_80", "sm_90a"])  # pointers to weights, and descriptors
FAR = (1 << 31) // 16 + 3  # a row of 16 values beyond the reach of 32-bit offsets


def run(op: Any, *operands: Any, target: str = "sm_90a", schedule: Schedule | None = None) -> Any:
    text = source(op, target, None if schedule is None else [schedule])
    return call(op, text, FOLDER["kernels"], *operands)


# sglang#32340: k = 6 in a range of a power of two, whose rest was read and written.
@pytest.mark.parametrize("k", [3, 6, 10])
def test_top_6_and_other_k_that_are_no_power_of_two(k: int) -> None:
    logits = normal(1, 9, 60, dtype=torch.float32)
    route = route_op("route", 60, k, score="softmax", renorm=True)
    w, id = run(route, logits, None)
    close(w, logits.softmax(-1).topk(k).values / logits.softmax(-1).topk(k).values.sum(-1, keepdim=True))
    assert torch.equal(id.long(), logits.topk(k).indices)
    slot, off = run(sort_op(k, 60), id)
    assert torch.equal(off.diff().long(), id.flatten().long().bincount(minlength=60))
    assert torch.equal(id.flatten()[slot.long()], id.flatten().sort().values)
    rows = normal(2, 9 * k, 40, dtype=torch.float32)
    found = run(combine_op("f32", "f32", "f32", k, 40, slot=False, plus=None), rows, None, w, None)
    close(found, (rows.view(9, k, 40) * w[..., None]).sum(1))


# vLLM's source: K that no tile divides is wrong with tensor descriptors.
@FORMS
@TARGETS
@pytest.mark.parametrize("depth", [8, 24, 40, 56, 136])
def test_k_that_no_tile_divides_with_tensor_descriptors(depth: int, target: str, form: Any) -> None:
    """Whatever lies behind the last column, of x's row or of the expert's last row, is NaN."""
    x, w = normal(3, 2, depth, dtype=torch.float16), normal(4, 2, 40, depth, dtype=torch.float16)
    x[1], w[1] = torch.nan, torch.nan
    slot, off = torch.tensor([0], dtype=torch.int32), torch.tensor([0, 1, 1], dtype=torch.int32)
    op = grouped_op("f16", 2, 40, depth, gather=True)
    found = run(op, x, w, slot, off, target=target, schedule=Schedule(form, 16, 32, 32, 4, 3))
    close(found, (x[:1].float() @ w[0].float().T).half())


@FORMS
@pytest.mark.parametrize("depth", [16, 144, 208])
def test_k_tails_in_fp8_with_tensor_descriptors(depth: int, form: Any) -> None:
    """The last block of scales is partial; behind it are another expert's values and scales, all NaN."""
    x = quantize(normal(5, 2, depth, dtype=torch.float32), (1, 128))
    w = quantize(normal(6, 2, 40, depth, dtype=torch.float32), (128, 128))
    for scaled in (x, w):
        scaled.q[1], scaled.scale[1] = torch.nan, torch.nan
    slot, off = torch.tensor([0], dtype=torch.int32), torch.tensor([0, 1, 1], dtype=torch.int32)
    op = fp8_op(2, 40, depth, gather=True)
    found = run(op, x, w, slot, off, schedule=Schedule(form, 16, 32, 128, 4, 3))
    close(found, (x.float()[:1] @ w.float()[0].T).bfloat16())


# DeepGEMM#20, TransformerEngine#3116: NaN out of empty experts, and out of the rows that pad a tile.
@FORMS
@TARGETS
def test_empty_experts_and_padding_rows_make_no_nan(target: str, form: Any) -> None:
    """3 rows in tiles of 16, 7 of 8 experts without any: NaN wherever nothing is to be read."""
    x, w = normal(7, 12, 40, dtype=torch.float16), normal(8, 8, 24, 40, dtype=torch.float16)
    x[3:], w[:3], w[4:] = torch.nan, torch.nan, torch.nan
    slot = torch.tensor([0, 2, 1], dtype=torch.int32)
    off = torch.tensor([0, 0, 0, 0, 3, 3, 3, 3, 3], dtype=torch.int32)
    op = grouped_op("f16", 8, 24, 40, gather=True)
    found = run(op, x, w, slot, off, target=target, schedule=Schedule(form, 16, 16, 32, 4, 3))
    close(found, (x[slot.long()].float() @ w[3].float().T).half())


def test_no_expert_has_rows() -> None:
    w = torch.full((4, 24, 40), torch.nan, dtype=torch.float16)
    slot, off = torch.tensor([0, 1], dtype=torch.int32), torch.zeros(5, dtype=torch.int32)
    found = run(grouped_op("f16", 4, 24, 40, gather=True), normal(9, 2, 40, dtype=w.dtype), w, slot, off)
    assert found.eq(0).all()


# sglang#4727, vllm#5938, Liger-Kernel#1296: 32-bit offsets overflow from about 37 thousand tokens on.
@FORMS
def test_offsets_past_int32_of_tokens(form: Any) -> None:
    """4 GiB of tokens that nobody touches but two, so that they take no memory."""
    x = torch.empty(FAR + 1, 16, dtype=torch.float16)
    x[[2, FAR]] = normal(15, 2, 16, dtype=x.dtype)
    w = normal(16, 1, 16, 16, dtype=x.dtype) / 4
    slot, off = torch.tensor([FAR, 2], dtype=torch.int32), torch.tensor([0, 2], dtype=torch.int32)
    op = grouped_op("f16", 1, 16, 16, gather=True)
    found = run(op, x, w, slot, off, target="sm_80", schedule=Schedule(form, 16, 16, 16, 4, 3))
    close(found, type(op).reference(x, w, slot, off, **op.attrs))


@FORMS
@TARGETS
def test_offsets_past_int32_of_weights(form: Any, target: str) -> None:
    """Only the last of 2049 experts has rows, and only its weights exist."""
    w = torch.empty(2049, 1024, 1024, dtype=torch.float16)
    w[-1] = normal(17, 1024, 1024, dtype=w.dtype) / 32
    x = normal(18, 3, 1024, dtype=w.dtype)
    off = torch.zeros(2050, dtype=torch.int32)
    off[-1] = 3
    op = grouped_op("f16", 2049, 1024, 1024)
    found = run(op, x, w, off, target=target, schedule=Schedule(form, 16, 256, 256, 4, 3))
    close(found, (x.float() @ w[-1].float().T).half())


# vllm#34846, #44830: 256 experts with fp8 blocks, which no shipped configuration fits.
@FORMS
def test_256_experts_in_fp8_with_block_scales(form: Any) -> None:
    """Two rows to an expert of 256; rows of gate and of up begin inside a block of scales."""
    columns, depth = 72, 200
    x = quantize(normal(19, 5, depth, dtype=torch.float32), (1, 128))
    w = quantize(normal(20, 256, 2 * columns, depth, dtype=torch.float32) / 8, (128, 128))
    used = [0, 17, 17, 128, 255]
    idle = [e for e in range(256) if e not in used]
    w.q[idle], w.scale[idle] = torch.nan, torch.nan
    off = torch.tensor(used).bincount(minlength=256).cumsum(0)
    off = torch.cat([torch.zeros(1, dtype=torch.int64), off]).int()
    slot = torch.tensor([4, 0, 3, 1, 2], dtype=torch.int32)
    op = fp8_op(256, columns, depth, gather=True, act="silu")
    found = run(op, x, w, slot, off, schedule=Schedule(form, 16, 32, 128, 4, 3))
    for row, (token, e) in enumerate(zip(slot.tolist(), used, strict=True)):
        gate, up = (x.float()[token] @ Scaled(w.q[e], w.scale[e], w.block).float().T).chunk(2)
        close(found[row], (torch.nn.functional.silu(gate) * up).bfloat16())


# transformers#43362, vllm#56887: sums by index_add or atomics, in whatever order programs end.
@pytest.mark.parametrize("slot", [False, True])
def test_a_tokens_sum_has_one_order_whichever_program_is_first(slot: bool) -> None:
    """Values whose sum depends on its order: ``call`` wants the same bits of programs in either order."""
    rows = torch.tensor([1.0, 1e8, -1e8, 5.0, 1e8, -1e8]).repeat_interleave(40).view(6, 40)
    w, place = torch.ones(2, 3), torch.tensor([3, 4, 5, 0, 1, 2], dtype=torch.int32) if slot else None
    found = run(combine_op("f32", "f32", "f32", 3, 40, slot=slot, plus=None), rows, place, w, None)
    ordered = [0.0, 8.0]  # (1 + 1e8) - 1e8 and (5 + 1e8) - 1e8 in fp32; in another order 1 and 5
    assert found[:, 0].tolist() == (ordered[::-1] if slot else ordered) and (found == found[:, :1]).all()
