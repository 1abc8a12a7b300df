"""What the tests of CUDA kernels share: files with constants of a test's choice, emulated launches."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from moec.codegen.kernels import KERNELS, cuda
from moec.codegen.kernels.cuda import CudaKernel as Record
from moec.ir.op import Op
from moec.runtime.cuda_kernel import CudaKernel
from tests.codegen import emulated
from tests.codegen.triton_kernels import load

RECORDS = {k.op: k for k in KERNELS if isinstance(k, Record)}
needs_gxx = pytest.mark.skipif(
    emulated.COMPILER is None, reason="g++ isn't installed: it compiles the emulated kernels"
)


def files(op: Op, target: str = "sm_90a", **constants: Any) -> tuple[str, str]:
    """The kernel file and the .cu file of one op."""
    record = RECORDS[op.name]
    if constants:
        made = record.constants
        record = Record(
            op.name,
            record.template,
            record.source,
            lambda op, device: made(op, device) | constants,
            record.reasons,
        )
    part, source = record.render(op, op.name, target), record.render_source(op, op.name, target)
    return cuda.kernel_file(op.name, [part], target), source


_loaded: dict[Any, ModuleType] = {}


def forget() -> None:
    """Lets go of what ``module`` has imported, before its folder goes."""
    _loaded.clear()


def module(op: Op, folder: Path, target: str = "sm_90a", **constants: Any) -> ModuleType:
    """The kernel file of an op, imported."""
    python, source = files(op, target, **constants)
    key = (python, source)
    if key not in _loaded:
        into = folder / str(len(_loaded))
        into.mkdir(exist_ok=True)
        _loaded[key] = load(python, into)
        (into / "kernels" / f"{op.name}.cu").write_text(source, encoding="utf-8")
    return _loaded[key]


class Launches:
    """The kernel's launches while a test runs: on emulated threads, outputs poisoned."""

    def __init__(self, seed: int = 0, multiprocessors: int = 3) -> None:
        self.seed, self.multiprocessors = seed, multiprocessors
        self.made: list[tuple[str, int]] = []
        self.patch = pytest.MonkeyPatch()

    def __enter__(self) -> Launches:
        empty = torch.Tensor.new_empty

        def launch(kernel: CudaKernel, variant: str, grid: Any, *args: Any) -> None:
            self.made.append((variant, grid[0]))
            emulated.launch(kernel, variant, grid, *args, seed=self.seed)

        def new_empty(like: Tensor, *size: Any, **how: Any) -> Tensor:
            out = empty(like, *size, **how)
            return out.fill_(torch.nan if out.is_floating_point() else -99)

        self.patch.setattr(CudaKernel, "_launch", launch)
        self.patch.setattr(CudaKernel, "runs_on", lambda *_: True)
        self.patch.setattr(torch.Tensor, "new_empty", new_empty)
        self.patch.setattr("moec.runtime.driver.multiprocessors", lambda index: self.multiprocessors)
        return self

    def __exit__(self, *error: object) -> None:
        self.patch.undo()


def run(
    op: Op, folder: Path, operands: list[Tensor], launches: Launches, **constants: Any
) -> tuple[Tensor, ...]:
    with launches:
        found: tuple[Tensor, ...] = getattr(module(op, folder, **constants), op.name)(*operands)
    return found


def ends_well(function: Callable[[], None]) -> bool:
    """In a process of its own, which a wild store may end."""
    child = os.fork()
    if not child:
        status = 1
        try:
            function()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1] == 0
