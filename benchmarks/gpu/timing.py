"""What the benchmarks measure with: moec's clock, and the device's roofs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moec.runtime.timing import Call, Clock, Measured, cache_size

__all__ = ["Call", "Clock", "Measured", "Roofs", "cache_size", "roofs"]


@dataclass(frozen=True)
class Roofs:
    """What this device does, measured: bytes a second of a copy, FLOP/s of its matrix library (cuBLAS)."""

    bandwidth: float
    flops: float

    def floor(self, flops: float, moved: float) -> float:
        """The seconds below which nothing can be."""
        return max(moved / self.bandwidth, flops / self.flops)


def roofs(clock: Clock, dtype: torch.dtype) -> Roofs:
    sizes, size = ((64, 128), 2**20) if clock.device == "cpu" else ((4096, 8192), 2**30)
    return Roofs(_copy(clock, size), max(_product(clock, n, dtype) for n in sizes))


def _copy(clock: Clock, size: int) -> float:
    source = torch.ones(size, dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    return 2 * size / clock.measure([lambda: target.copy_(source)]).median


def _product(clock: Clock, n: int, dtype: torch.dtype) -> float:
    a, b, c = (torch.randn(n, n, device=clock.device).to(dtype) for _ in range(3))
    if dtype.itemsize == 1:  # with one scale a tensor: the fastest product of fp8 that cuBLAS has
        one = torch.ones((), device=clock.device)
        product = lambda: torch._scaled_mm(a, b.T, one, one, out_dtype=torch.bfloat16)  # noqa: E731
        return 2 * n**3 / clock.measure([product]).median
    return 2 * n**3 / clock.measure([lambda: torch.mm(a, b.T, out=c)]).median
