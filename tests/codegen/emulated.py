"""CUDA kernels on the CPU: their very sources, compiled by g++ behind a header that emulates threads.

Only what they say in PTX is replaced.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import shutil
import subprocess
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch

from moec.runtime.cuda_kernel import CudaKernel, CudaVariant

HERE = Path(__file__).parent / "cuda"
COMPILER = shutil.which("g++")
FLAGS = ["-O1", "-std=c++17", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-Werror", "-ffp-contract=off"]
# What is undefined ends the kernel with an error, not the process.
TRAPS = ["-fsanitize=undefined", "-fsanitize-undefined-trap-on-error", "-fno-sanitize=alignment"]
# What kernels say in PTX, by what emulator.h has for it.
PTX = {
    'asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(bits) : "f"(high), "f"(low));': (
        "bits = cvt_e4m3x2(high, low);"
    ),
}
_LIBC = ctypes.CDLL(None)
_FOLDER = Path(mkdtemp(prefix="moec-emulated-"))
_SCALARS = {"i32": ctypes.c_int32, "u32": ctypes.c_uint32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}


def compile_with(*arguments: Any) -> None:
    """Runs g++. Raises RuntimeError with what it printed."""
    done = subprocess.run([str(COMPILER), *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)


@cache
def _runtime() -> Path:
    """emulator.cpp, compiled once."""
    made = _FOLDER / "emulator.o"
    compile_with(*FLAGS, "-c", HERE / "emulator.cpp", "-o", made)
    return made


@cache
def library(source: str, function: str, macros: tuple[tuple[str, Any], ...]) -> Any:
    """A C function that launches ``function`` of a .cu file."""
    stem = hashlib.sha256(f"{source}{function}{macros}".encode()).hexdigest()[:16]
    file, made = _FOLDER / f"{stem}.cpp", _FOLDER / f"{stem}.so"
    for ptx, emulated in PTX.items():
        source = source.replace(ptx, emulated)
    launcher = (
        f'extern "C" const char* emulate(void** arguments, unsigned blocks, unsigned threads, unsigned seed, '
        f"bool cooperative) {{\n"
        f"    return launch({function}, arguments, {{blocks, 1, 1}}, threads, seed, cooperative);\n}}\n"
    )
    file.write_text(f'#include "{HERE / "emulator.h"}"\n#line 1 "{function}.cu"\n{source}\n{launcher}')
    defined = [f"-D{name}={int(value) if isinstance(value, bool) else value}" for name, value in macros]
    compile_with(*FLAGS, *TRAPS, *defined, "-shared", file, _runtime(), "-o", made)
    emulate = ctypes.CDLL(str(made)).emulate
    emulate.restype = ctypes.c_char_p
    return emulate


def launch(kernel: CudaKernel, variant: str, grid: tuple[int, ...], *args: Any, seed: int = 0) -> None:
    """What ``kernel[variant, grid](*args)`` does on a GPU, on tensors of the CPU.

    ``seed`` decides the order in which threads and blocks run. Raises RuntimeError for what a GPU would hang
    on or leave undefined: threads that wait for ever, lanes that part, an array's end overrun.
    """
    how: CudaVariant = kernel.variants[variant]
    assert kernel._checker(variant).check(args) is None
    fenced = {id(value): Fenced(value) for value in args if isinstance(value, torch.Tensor)}
    values: list[Any] = []
    for kind, value in zip(kernel.signature.values(), args, strict=True):
        if kind.startswith("*"):
            values.append(ctypes.c_void_p(None if value is None else fenced[id(value)].address))
        else:
            values.append(_SCALARS[kind](value))
    pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
    emulate = library(kernel.file.read_text(), kernel.name, tuple(how.constants.items()))
    (blocks,) = grid
    error = emulate(pointers, blocks, how.threads, seed, how.cooperative)
    if error:
        raise RuntimeError(f"{kernel.name} {variant}: {error.decode()}")
    for copy in fenced.values():
        copy.read_back()


class Fenced:
    """A copy of a contiguous tensor between two pages that nobody may touch, its end at the second."""

    def __init__(self, tensor: torch.Tensor) -> None:
        assert tensor.is_contiguous()
        self.tensor, self.bytes = tensor, tensor.numel() * tensor.element_size()
        inside = -(-self.bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self._memory = mmap.mmap(-1, inside + 2 * mmap.PAGESIZE)
        first = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        for fence in (first, first + mmap.PAGESIZE + inside):
            assert _LIBC.mprotect(ctypes.c_void_p(fence), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
        self.address = first + mmap.PAGESIZE + inside - self.bytes  # the end is at the fence
        ctypes.memmove(self.address, tensor.data_ptr(), self.bytes)

    def read_back(self) -> None:
        ctypes.memmove(self.tensor.data_ptr(), self.address, self.bytes)
