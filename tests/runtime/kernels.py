"""Small kernels to compile: a masked copy, and a product with operands by pointer or by tensor descriptor."""

from __future__ import annotations

from dataclasses import replace

from moec.runtime.compile import Request

SOURCE = """
import torch
import triton
import triton.language as tl

HALF = tl.constexpr(0.5)


def host(x):
    return torch.empty_like(x)


@triton.jit
def halve(v):
    return v * HALF


@triton.jit
def copy(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    host = tl.load(x + at, mask=at < n, other=0.0)
    tl.store(y + at, halve(host), mask=at < n)


@triton.jit
def product(
    a, b, c, M, N, K, stride_a, stride_b, stride_c, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    sums = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, K, BK):
        left = tl.load(a + m[:, None] * stride_a + k0 + k[None, :], mask=m[:, None] < M, other=0.0)
        right = tl.load(b + n[:, None] * stride_b + k0 + k[None, :], mask=n[:, None] < N, other=0.0)
        sums = tl.dot(left, right.T, sums)
    inside = (m[:, None] < M) & (n[None, :] < N)
    tl.store(c + m[:, None] * stride_c + n[None, :], sums.to(tl.bfloat16), mask=inside)


@triton.jit
def product_tma(a, b, c, K, scale, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    m = tl.program_id(0) * BM
    n = tl.program_id(1) * BN
    sums = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, K, BK):
        sums = tl.dot(a.load([m, k0]), b.load([n, k0]).T, sums)
    c.store([m, n], (sums * scale).to(tl.bfloat16))
"""

COPY = Request(
    kernel="copy",
    variant="b1024w4",
    source=SOURCE,
    function="copy",
    signature={"x": "*bf16", "y": "*bf16", "n": "i32", "BLOCK": "constexpr"},
    constants={"BLOCK": 1024},
    divisible=("x", "y", "n"),
    warps=4,
    stages=2,
    arch="sm_90a",
)
_TILE = {"BM": 64, "BN": 128, "BK": 64}
PRODUCT = Request(
    kernel="product",
    variant="64x128x64w4s3",
    source=SOURCE,
    function="product",
    signature={
        **dict.fromkeys("abc", "*bf16"),
        **dict.fromkeys(("M", "N", "K", "stride_a", "stride_b", "stride_c"), "i32"),
        **dict.fromkeys(_TILE, "constexpr"),
    },
    constants=_TILE,
    divisible=("a", "b", "c", "N", "K", "stride_a", "stride_b", "stride_c"),
    warps=4,
    stages=3,
    arch="sm_90a",
)
TMA = replace(
    PRODUCT,
    kernel="product_tma",
    function="product_tma",
    signature={
        "a": "tensordesc<bf16[BM, BK]>",
        "b": "tensordesc<bf16[BN, BK]>",
        "c": "tensordesc<bf16[BM, BN]>",
        "K": "i32",
        "scale": "fp32",
        **dict.fromkeys(_TILE, "constexpr"),
    },
    divisible=("K",),
)
REQUESTS = {
    **{
        f"{r.kernel} {arch}": replace(r, arch=arch)
        for r in (COPY, TMA)
        for arch in ("sm_80", "sm_90a", "sm_100a")
    },
    "product sm_80": replace(PRODUCT, arch="sm_80", warps=8),
    "product sm_90a": PRODUCT,
    "copy without promises": replace(COPY, variant="any", divisible=()),
    "product of few registers": replace(PRODUCT, variant="few", arch="sm_80", maxnreg=64),
}
