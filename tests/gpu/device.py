"""The device that the GPU's tests run on; in a self-test, the CPU standing in for it.

What only a GPU has (graphs, synchronisation that can be forbidden, memory that runs out) is here, so that the
tests' bodies are the same on both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import moec
from moec.ops.compiled import target_of
from moec.runtime import LanguageModel, LayerModel
from tests.moec.experts import Layer

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Device:
    """``cuda``, or ``cpu`` in a self-test."""

    type: str

    @property
    def real(self) -> bool:
        return self.type == "cuda"

    @property
    def target(self) -> str:
        """What a package for this device is built for."""
        return target_of(torch.device(self.type))[0]

    @property
    def kernels(self) -> bool:
        """Whether a GPU's kernels run: there, or in Triton's interpreter (MOEC_INTERPRET=1)."""
        return self.target != "cpu"

    def load(self, package: Path) -> LanguageModel | LayerModel:
        """A package's model with random weights, here."""
        return moec.load(package, "random:0", self.type if self.real or not self.kernels else "interpret")

    def layer(self, layer: Layer) -> Layer:
        """The same arguments, here."""
        return Layer(*(a.to(self.type) for a in layer.args))

    def record(self, call: Call, warm: bool = True) -> Call:
        """A CUDA graph of ``call``: each replay returns its one output. On the CPU, the call itself."""
        if not self.real:
            return call
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        if warm:
            with torch.cuda.stream(side):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay

    @contextmanager
    def without_synchronising(self) -> Iterator[None]:
        """Whatever makes the host wait for the device raises."""
        if not self.real:
            yield
            return
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def free(self) -> int:
        """Bytes that may be allocated; a self-test has next to none."""
        if not self.real:
            return 2**26
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
