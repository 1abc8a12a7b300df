"""Kernel records whose kernels are CUDA C++, generated and compiled ahead of time by NVRTC."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from moec.codegen.kernels.record import Record
from moec.codegen.render import identifier, render_python, render_text
from moec.ir.devices import GPU, GPUS
from moec.ir.op import Op

FRAME = "cuda/kernel_file.py.jinja"


@dataclass(frozen=True)
class CudaKernel(Record):
    """``source`` renders a .cu file of the kernel's own, named as its function; ``template`` the part of a
    kernel file that declares it: the ``CudaKernel`` object, the PyTorch function that stands in for it on the
    CPU, and one Python function, called with those of the op's operands that are there.

    ``constants(op, device)`` fills both; ``reasons(op)`` says what is against it.
    """

    family: ClassVar[str] = "cuda"
    row_by_row: ClassVar[bool] = True  # route_sort: a warp chooses for a token, whatever the others do
    template: str
    source: str
    constants: Callable[[Op, GPU], dict[str, Any]]
    reasons: Callable[[Op], list[str]]
    targets: tuple[str, ...] = tuple(GPUS)
    in_place: int | None = None

    def supports(self, op: Op) -> list[str]:
        """Reasons against; none means yes."""
        return self.reasons(op)

    def key(self, op: Op, target: str) -> str:
        """Equal for ops that can share one kernel function."""
        constants = self.constants(op, GPUS[target])
        return f"{self.source} {sorted(constants.items(), key=lambda c: c[0])}"

    def render(self, op: Op, name: str, target: str) -> str:
        """The part that defines the Python function ``name``."""
        return render_python(self.template, name=name, **self.constants(op, GPUS[target]))

    def render_source(self, op: Op, name: str, target: str) -> str:
        """The file ``name.cu``."""
        return render_text(self.source, name=name, **self.constants(op, GPUS[target]))


def kernel_file(op: str, parts: list[str], target: str) -> str:
    """A kernel file of the package: the parts of all CUDA kernels of one op, made by ``render``."""
    return render_python(FRAME, op=identifier(op), parts=parts, target=target)
