"""CUDA C++ compiled ahead of time by NVRTC, which needs neither a GPU nor a CUDA toolkit.

NVRTC brings no headers (``cuda_fp8.h``, ``cub``), so a package's .cu files include none.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from moec.errors import BadArgument, CompileFailed, CompilerMissing, TooMuchSharedMemory
from moec.runtime.arguments import size_of
from moec.runtime.compile import Constant
from moec.runtime.devices import family
from moec.runtime.kernel_cache import Cubin
from moec.runtime.sass import facts, parameters

# Part of every key: one more whenever what an entry holds changes.
FORMAT = 1
INSTALL = "pip install cuda-python nvidia-cuda-nvrtc; no macOS wheels"
# Bytes of a block's shared memory that the system takes: from sm_90 on the cubin's figure holds them.
_KEPT = 1024
_MACRO = re.compile(r"[A-Za-z_]\w*")


@dataclass(frozen=True)
class CudaRequest:
    """One variant of a CUDA kernel to compile for one family of devices.

    ``source`` is the text of ``file``, which defines ``extern "C" __global__ function``; ``macros`` are
    defined before it. ``signature`` has every parameter in order, in Triton's names (``*bf16``, ``i32``);
    ``divisible`` names those that are multiples of 16, pointers in bytes: the source relies on it.
    """

    kernel: str
    variant: str
    source: str
    file: str
    function: str
    signature: dict[str, str]
    macros: dict[str, Constant]
    threads: int
    arch: str
    divisible: tuple[str, ...] = ()
    shared: int = 0  # bytes of dynamic shared memory a block
    cooperative: bool = False
    fp_fusion: bool = True  # a * b + c in one rounding
    flags: tuple[str, ...] = field(default=())

    def options(self) -> list[str]:
        """NVRTC's. Raises BadArgument for a macro that has no such name or value."""
        made = [f"--gpu-architecture={family(self.arch).arch}", "--std=c++17", "--no-source-include"]
        made.append(f"--fmad={str(self.fp_fusion).lower()}")
        for name, value in sorted(self.macros.items()):
            text = str(int(value) if isinstance(value, bool) else value)
            if not _MACRO.fullmatch(name) or "\n" in text:
                raise BadArgument(f"{self}: {name}={text} can't be defined")
            made.append(f"--define-macro={name}={text}")
        return [*made, *self.flags]

    def payload(self) -> dict[str, Any]:
        """What a worker is sent. Raises BadArgument."""
        if self.threads % 32 or not 0 < self.threads <= 1024:
            raise BadArgument(f"{self}: {self.threads} threads a block; warps have 32, a block 1024 at most")
        return {
            "language": "cuda",
            "source": self.source,
            "file": self.file,
            "options": self.options(),
        }

    def key(self) -> str:
        """SHA-256 over compiler, flags, device, source and all that the entry's metadata says."""
        about = {
            "format": FORMAT,
            "compiler": compiler_version(),
            "kernel": self.kernel,
            "variant": self.variant,
            "arch": self.arch,
            "function": self.function,
            "signature": list(self.signature.items()),
            "divisible": self.divisible,
            "threads": self.threads,
            "shared": self.shared,
            "cooperative": self.cooperative,
            **self.payload(),
        }
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()

    def cubin(self, reply: dict[str, Any]) -> Cubin:
        """Of a worker's reply. Raises CompileFailed or TooMuchSharedMemory."""
        data = base64.b64decode(reply["cubin"])
        found = facts(data, self.shared)
        limits = family(self.arch)
        kept = _KEPT if limits.number >= 90 else 0
        shared = found.shared_static - kept + self.shared
        if shared > limits.shared:
            raise TooMuchSharedMemory(
                f"{self}: {shared:,} bytes of shared memory a block; there are {limits.shared:,}"
            )
        takes, passed = [p.size for p in parameters(data)], [size_of(k) for k in self.signature.values()]
        if takes != passed:
            raise CompileFailed(
                f"{self}: {self.function} takes parameters of {takes} bytes, its signature says {passed}"
            )
        metadata = {
            "kernel": self.kernel,
            "variant": self.variant,
            "arch": self.arch,
            "symbol": self.function,
            "warps": self.threads // 32,
            "shared": self.shared,
            "cooperative": self.cooperative,
            "arguments": [list(item) for item in self.signature.items()],
            "divisible": list(self.divisible),
            "descriptors": [],
            "flags": 0,
            "hidden": {},
            "compiler": compiler_version(),
        }
        return Cubin(data, metadata, found)

    def __str__(self) -> str:
        return f"{self.kernel} {self.variant} for {self.arch}"


@cache
def compiler_version() -> str:
    """``nvrtc V13.5.37``, as keys and manifests hold it. Raises CompilerMissing, which says what to install.

    NVRTC itself tells two numbers only; the PTX that it writes names the build.
    """
    try:
        from cuda.bindings import nvrtc

        _, program = nvrtc.nvrtcCreateProgram(b"", b"version.cu", 0, [], [])
        nvrtc.nvrtcCompileProgram(program, 1, [b"--gpu-architecture=compute_80"])
        _, size = nvrtc.nvrtcGetPTXSize(program)
        text = b" " * size
        nvrtc.nvrtcGetPTX(program, text)
        nvrtc.nvrtcDestroyProgram(program)
    except Exception as error:  # no package, no library, one of another CUDA: each raises its own
        reason = str(error).splitlines()
        raise CompilerMissing(
            f"CUDA kernels are compiled by NVRTC, which can't be loaded: {reason[0] if reason else error!r}",
            notes=[INSTALL, "--kernels triton (MOEC_KERNELS=triton) has routers that need none"],
        ) from None
    build = re.search(rb"V\d[\d.]*", text)
    return f"nvrtc {build.group().decode() if build else '?'}"
