"""CUDA kernels in a package: a .cu file, and beside it the Python file that declares its kernels, such as::

    KERNEL = CudaKernel(
        "scale_rows.cu",
        "scale_rows",
        signature={"x": "*bf16", "s": "*fp32", "y": "*bf16", "tokens": "i32"},
        variants={"w4": CudaVariant({"WIDTH": 1000}, threads=128)},
    )
    KERNEL["w4", (tokens,)](x, s, y, tokens)

It is compiled, cached, loaded and launched as ``launch.Kernel`` is, but by NVRTC, and no interpreter runs it:
on the CPU a package calls the PyTorch function that stands in for it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moec.errors import BadArgument, DeviceUnavailable
from moec.runtime import driver
from moec.runtime.compile import Constant
from moec.runtime.launch import Launchable
from moec.runtime.nvrtc import CudaRequest


@dataclass(frozen=True)
class CudaVariant:
    """One way to compile a CUDA kernel: the macros that it's compiled with, and how it's launched.

    ``cooperative``: its blocks wait for each other, so a launch never has more than fit at once.
    """

    constants: Mapping[str, Constant]
    threads: int
    shared: int = 0  # bytes of dynamic shared memory a block
    cooperative: bool = False
    fp_fusion: bool = True


class CudaKernel(Launchable):
    """A function of a .cu file, its signature and its variants: ``KERNEL[variant, grid](*args)`` launches it.

    ``file`` lies beside the Python file that makes this object. ``aligned`` names the pointers and integers
    that must be multiples of 16, pointers in bytes; any other may be anything.
    """

    def __init__(
        self,
        file: str,
        function: str,
        signature: Mapping[str, str],
        variants: Mapping[str, CudaVariant],
        aligned: Sequence[str] = (),
    ) -> None:
        self.signature, self.variants = dict(signature), dict(variants)
        if unknown := set(aligned) - set(signature):
            raise BadArgument(f"{function} has no parameter {', '.join(sorted(unknown))}")
        caller = Path(sys._getframe(1).f_code.co_filename)
        super().__init__(function, caller.with_name(file), tuple(n for n in signature if n in aligned))

    def requests(self, arch: str) -> list[CudaRequest]:
        """What to compile for a family of devices. Raises BadArgument where the .cu file can't be read."""
        try:
            source = self.file.read_text(encoding="utf-8")
        except OSError as error:
            raise BadArgument(f"{self.name}: can't read {self.file}: {error.strerror or error}") from None
        return [
            CudaRequest(
                kernel=self.name,
                variant=name,
                source=source,
                file=self.file.name,
                function=self.name,
                signature=self.signature,
                macros=dict(variant.constants),
                threads=variant.threads,
                arch=arch,
                divisible=self.divisible,
                shared=variant.shared,
                cooperative=variant.cooperative,
                fp_fusion=variant.fp_fusion,
            )
            for name, variant in self.variants.items()
        ]

    def runs_on(self, x: torch.Tensor) -> bool:
        """Whether it can be launched on tensors that are where ``x`` is."""
        return x.is_cuda

    def twins(self) -> dict[str, bool]:
        return dict.fromkeys(self.variants, False)

    def _kinds(self, variant: str) -> list[tuple[str, str]]:
        return list(self.signature.items())

    def _on_cpu(self, variant: str, *_: Any) -> None:
        raise DeviceUnavailable(
            f"{self.name} {variant} is CUDA C++: it runs on NVIDIA GPUs, not on tensors of the CPU"
        )


def most_blocks(device: torch.device) -> int:
    """How many blocks a cooperative launch on a GPU may have, whatever a block needs."""
    return driver.multiprocessors(device.index)
