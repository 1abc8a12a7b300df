"""Emulated threads do what a GPU's do, and say what a GPU would hang on or leave undefined."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moec.runtime.cuda_kernel import CudaKernel, CudaVariant
from tests.codegen import emulated

pytestmark = pytest.mark.skipif(emulated.COMPILER is None, reason="g++ isn't installed")
THREADS = 64
WHOLE = """\
__shared__ int held[64];
extern "C" __global__ void whole(const int* x, int* y, int n) {
    const int t = threadIdx.x, at = blockIdx.x * 64 + t, lane = t % 32;
"""
# y from x; with what is wrong about it, or what it gives.
RIGHT: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "reversed by shared memory": (
        "held[t] = x[at]; __syncthreads(); y[at] = held[63 - t];",
        lambda x: x.view(-1, 64).flip(1),
    ),
    "sum of a warp": (
        "y[at] = __reduce_add_sync(~0u, (unsigned)x[at]);",
        lambda x: x.view(-1, 32).sum(1, keepdim=True).expand(-1, 32),
    ),
    "highest and lowest": (
        "y[at] = __reduce_max_sync(~0u, (unsigned)x[at]) - __reduce_min_sync(~0u, (unsigned)x[at]);",
        lambda x: (x.view(-1, 32).amax(1) - x.view(-1, 32).amin(1))[:, None].expand(-1, 32),
    ),
    "prefix sums": (
        "int sum = x[at];\n"
        "for (int s = 1; s < 32; s *= 2) { int b = __shfl_up_sync(~0u, sum, s); if (lane >= s) sum += b; }\n"
        "y[at] = sum;",
        lambda x: x.view(-1, 32).cumsum(1),
    ),
    "butterfly": (
        "float sum = x[at];\n"
        "for (int s = 16; s; s /= 2) sum += __shfl_xor_sync(~0u, sum, s);\n"
        "y[at] = (int)sum;",
        lambda x: x.view(-1, 32).sum(1, keepdim=True).expand(-1, 32),
    ),
    "ballot": (
        "y[at] = __ffs(__ballot_sync(~0u, x[at] > 50)) - 1 + __shfl_sync(~0u, x[at], 5);",
        lambda x: ((x.view(-1, 32) > 50).int().argmax(1) + x.view(-1, 32)[:, 5])[:, None].expand(-1, 32),
    ),
    "atomics": (
        "if (t == 0) held[0] = 0; __syncthreads(); atomicAdd(&held[0], x[at]);\n"
        "__syncthreads(); y[at] = held[0];",
        lambda x: x.view(-1, 64).sum(1, keepdim=True).expand(-1, 64),
    ),
    "lanes that have no part": (
        "if (lane < 16) y[at] = __popc(__ballot_sync(0xffffu, true)); else y[at] = x[at];",
        lambda x: torch.where(torch.arange(len(x)) % 32 < 16, 16, x),
    ),
}
WRONG: dict[str, tuple[str, str]] = {
    "a barrier that half of the block reaches": (
        "if (t < 32) __syncthreads(); else __syncwarp();\nif (t == 0) while (n) __syncwarp();",
        "wait",
    ),
    "a lane that has ended": ("if (lane == 3) return; __syncwarp();", "ended"),
    "lanes in different places": (
        "if (lane == 3) __ballot_sync(~0u, true); else __reduce_add_sync(~0u, 1u);",
        "different places",
    ),
    "a lane outside its mask": ("__ballot_sync(1u, true);", "isn't in the mask"),
    "a store behind the end": ("y[at + (blockIdx.x == 1) * 64] = 1;", "memory that isn't there"),
    "a load before the start": ("y[at] = x[t - 1000];", "memory that isn't there"),
    "an index beyond shared memory": ("held[t + n - 127] = 1;", "out of bounds"),
    "blocks that wait for each other": (
        "if (t == 0) while (*(volatile int*)y < n) __nanosleep(9);",
        "a block waits for another that may not run",
    ),
}


def launched(
    body: str, folder: Path, seed: int, cooperative: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    (folder / "whole.cu").write_text(f"{WHOLE}    (void)lane, (void)at, (void)held;\n{body}\n}}\n")
    kernel = CudaKernel(
        "whole.cu",
        "whole",
        signature={"x": "*i32", "y": "*i32", "n": "i32"},
        variants={"v": CudaVariant({}, THREADS, cooperative=cooperative)},
    )
    kernel.file = folder / "whole.cu"
    x = torch.randint(
        0, 100, (2 * THREADS,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32
    )
    y = torch.full_like(x, -99)
    emulated.launch(kernel, "v", (2,), x, y, 2 * THREADS, seed=seed)
    return x, y


@pytest.mark.parametrize("name", RIGHT)
def test_what_threads_do_together(name: str, tmp_path: Path) -> None:
    body, meant = RIGHT[name]
    for seed in range(4):
        x, y = launched(body, tmp_path, seed)
        assert torch.equal(y, meant(x).reshape(-1).to(torch.int32))


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said(name: str, tmp_path: Path) -> None:
    body, message = WRONG[name]
    with pytest.raises(RuntimeError, match=message):
        launched(body, tmp_path, 0)


def test_a_missing_barrier_shows_in_some_order(tmp_path: Path) -> None:
    body = RIGHT["reversed by shared memory"][0].replace("__syncthreads();", "")

    def right(seed: int) -> bool:
        x, y = launched(body, tmp_path, seed)
        return torch.equal(y, x.view(-1, 64).flip(1).reshape(-1))

    assert not all(right(seed) for seed in range(4))


def test_blocks_that_meet(tmp_path: Path) -> None:
    """Shared memory goes with its block; without a cooperative launch it's an error, whatever happens."""
    body = (
        "held[t] = x[at]; __syncthreads();\n"
        "if (t == 0) { atomicAdd(y, 100); while (*(volatile int*)y < 101) __nanosleep(9); }\n"
        "__syncthreads(); if (at) y[at] = held[t];"
    )
    for seed in range(4):
        x, y = launched(body, tmp_path, seed, cooperative=True)
        assert torch.equal(y[1:], x[1:]) and int(y[0]) == -99 + 200
    with pytest.raises(RuntimeError, match="a block waits for another"):
        launched(body, tmp_path, 0)


def test_floats_become_e4m3_as_ptx_has_it(tmp_path: Path) -> None:
    """To nearest even, saturated: as PyTorch, on floats of all exponents and on both sides of each tie."""
    source = """\
extern "C" __global__ void narrow(const float* x, unsigned short* y) {
    const float low = x[2 * threadIdx.x], high = x[2 * threadIdx.x + 1];
    unsigned short bits;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(bits) : "f"(high), "f"(low));
    y[threadIdx.x] = bits;
}
"""
    kernel = CudaKernel(
        "narrow.cu", "narrow", {"x": "*fp32", "y": "*i16"}, {"v": CudaVariant({}, threads=1024)}
    )
    kernel.file = tmp_path / "narrow.cu"
    kernel.file.write_text(source)
    every = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (every[1:] + every[:-1]) / 2
    up, down = (ties.nextafter(torch.tensor(torch.inf)), ties.nextafter(torch.tensor(0.0)))
    drawn = torch.randint(-(2**31), 2**31, (512,), generator=torch.Generator().manual_seed(0)).int()
    odd = torch.tensor([torch.nan, torch.inf, 449.0, 464.0, 465.0, 1e30])
    x = torch.cat([every, ties, up, down, drawn.view(torch.float32), odd])
    x = torch.cat([x, -x])
    x = torch.cat([x, x.new_zeros(2048 - len(x))])
    y = torch.empty(1024, dtype=torch.int16)
    emulated.launch(kernel, "v", (1,), x, y)
    expected = torch.where(x.isnan(), x.abs(), x.clamp(-448.0, 448.0)).to(torch.float8_e4m3fn)
    found = y.view(torch.float8_e4m3fn)
    nan = x.isnan()
    assert torch.equal(found.view(torch.uint8)[~nan], expected.view(torch.uint8)[~nan])
    assert bool((found.view(torch.uint8)[nan] == 0x7F).all())
