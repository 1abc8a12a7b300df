"""Kernels compiled ahead of time, for devices that this machine needn't have: Triton's; nvrtc.py has CUDA's.

``compile_many(requests, cache)`` looks each request up in a cache keyed by content and compiles what is
missing in worker processes. A request that its compiler refuses becomes an error that names the kernel and
the variant; the others go on. Equal requests give equal bytes on every machine with the same compilers:
cubins hold no path and no time.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import queue
import re
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from moec.errors import BadArgument, CompileFailed, CompilerMissing, MoecError, TooMuchSharedMemory
from moec.runtime.arguments import expand
from moec.runtime.device_source import device_source
from moec.runtime.devices import family
from moec.runtime.kernel_cache import Cubin, KernelCache
from moec.runtime.sass import facts, parameters, tool, triton_folder
from moec.runtime.workers import Worker

# Part of every key: one more whenever what an entry holds changes.
FORMAT = 2
# The pointers that Triton appends to a kernel's parameters, in order, whatever their size. 3.6 to 3.9 have
# both.
HIDDEN = ("global_scratch", "profile_scratch")
# How many flags a tensor descriptor has where there is no TMA: 3.9 has one more than 3.6.
FLAGS = (1, 2)

Progress = Callable[[int, int], None]
Constant = int | float | bool | str | None


class Compilable(Protocol):
    """A variant of a kernel to compile for one family of devices, whatever it's written in."""

    def payload(self) -> dict[str, Any]:
        """What a worker is sent: all that decides the cubin, and nothing else. Raises BadArgument."""

    def key(self) -> str:
        """Equal for equal cubins. Raises CompilerMissing, UnknownTarget or BadArgument."""

    def cubin(self, reply: dict[str, Any]) -> Cubin:
        """Of a worker's reply without an error. Raises CompileFailed or TooMuchSharedMemory."""


@dataclass(frozen=True)
class Request:
    """One variant of a kernel to compile for one family of devices.

    ``source`` is the text of a Python file that defines ``function`` under ``@triton.jit``; what the
    function doesn't need of it plays no part. ``signature`` has every parameter in order: ``*bf16``,
    ``i32``, ``fp32``, ``tensordesc<bf16[128, 64]>``, ``constexpr``; a descriptor's box may name constexprs.
    ``divisible`` names pointers (in bytes) and integers that are multiples of 16: without that promise
    loads become narrow.
    """

    kernel: str
    variant: str
    source: str
    function: str
    signature: dict[str, str]
    constants: dict[str, Constant]
    divisible: tuple[str, ...]
    warps: int
    stages: int
    arch: str
    maxnreg: int | None = None  # registers per thread at most
    fp_fusion: bool = True  # a * b + c in one rounding
    language: str = "triton"  # or gluon, whose descriptors have the layout of their box's widest swizzle
    cooperative: bool = False  # its programs wait for each other, so a launch has no more than fit at once

    def resolved(self) -> dict[str, str]:
        """The signature with numbers in descriptors' boxes. Raises BadArgument if it contradicts itself."""
        constexprs = {name for name, kind in self.signature.items() if kind == "constexpr"}
        if constexprs != set(self.constants):
            odd = ", ".join(sorted(constexprs ^ set(self.constants)))
            raise BadArgument(f"{self}: {odd}: a constexpr without a value, or a value without a constexpr")
        for name in self.divisible:
            if not re.match(r"\*|[iu]\d", self.signature.get(name, "")):
                raise BadArgument(
                    f"{self}: {name} is neither a pointer nor an integer: it can't be divisible"
                )
        return {name: self._type(kind) for name, kind in self.signature.items()}

    def _type(self, kind: str) -> str:
        def value(name: re.Match[str]) -> str:
            return str(self.constants.get(name.group(), name.group()))

        head, bracket, box = kind.partition("[")
        return head + bracket + re.sub(r"[A-Za-z_]\w*", value, box).replace(" ", "")

    def payload(self) -> dict[str, Any]:
        """What a worker is sent: all that decides the cubin, and nothing else."""
        options = {
            "num_warps": self.warps,
            "num_stages": self.stages,
            "maxnreg": self.maxnreg or family(self.arch).maxnreg,
            "enable_fp_fusion": self.fp_fusion,
        }
        return {
            "kernel": self.kernel,
            "source": device_source(self.source, self.function),
            "function": self.function,
            "signature": self.resolved(),
            "constants": self.constants,
            "divisible": list(self.divisible),
            "number": family(self.arch).number,
            "options": options,
            **({"language": self.language} if self.language != "triton" else {}),
        }

    def key(self) -> str:
        """SHA-256 over compiler, flags, device, source, signature, constants and promises."""
        about = {
            "format": FORMAT,
            "compiler": compiler_version(self.arch),
            "variant": self.variant,  # the entry's metadata says it
            "arch": self.arch,
            **self.payload(),
            **({"cooperative": True} if self.cooperative else {}),
        }
        # As pairs: the order of a signature counts.
        text = json.dumps(about | {"signature": list(self.resolved().items())}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def cubin(self, reply: dict[str, Any]) -> Cubin:
        """Of a worker's reply without an error. Raises CompileFailed or TooMuchSharedMemory."""
        return _cubin(self, reply)

    def __str__(self) -> str:
        return f"{self.kernel} {self.variant} for {self.arch}"


@dataclass(frozen=True)
class Results:
    """What became of each request, in order: a cubin, or None and an error."""

    cubins: list[Cubin | None]
    errors: list[MoecError] = field(default_factory=list)
    compiled: int = 0  # how many of the requests a compiler ran for
    reused: int = 0  # how many the cache had

    def check(self) -> list[Cubin]:
        """The cubins, if all are there; else raises the first error, which then lists the others."""
        if self.errors:
            first, *others = self.errors
            for other in others:
                first = first.note(f"also: {other.message.splitlines()[0]}")
            raise first
        return [cubin for cubin in self.cubins if cubin is not None]


def compile_many(
    requests: Sequence[Compilable],
    cache: Path | None,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Results:
    """Compiles what ``cache`` (a folder; None: no cache) doesn't hold, in ``jobs`` processes (by default
    one a core).

    ``progress`` is called with (requests done, requests in all). Raises CompilerMissing without Triton, or
    without NVRTC where a request needs it, and OutputUnwritable where the cache can't be written; what is
    wrong with one request is in the results.
    """
    store = KernelCache(cache) if cache is not None else None
    outcomes: dict[int, Cubin | MoecError] = {}
    missing: dict[str, list[int]] = {}  # by key: equal requests are compiled once
    for index, request in enumerate(requests):
        try:
            key = request.key()
            found = store.get(key) if store else None
        except CompilerMissing:
            raise
        except MoecError as error:
            outcomes[index] = error
            continue
        if found is not None:
            outcomes[index] = found
        else:
            missing.setdefault(key, []).append(index)
    reused = sum(isinstance(o, Cubin) for o in outcomes.values())
    done = len(outcomes)
    if progress:
        progress(done, len(requests))
    jobs = min(jobs or available_cores(), len(missing))
    idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
    workers = [Worker() for _ in range(jobs)]
    for worker in workers:
        idle.put(worker)

    def build(key: str) -> Cubin | MoecError:
        worker = idle.get()
        try:
            request = requests[missing[key][0]]
            reply = worker.ask(request.payload())
            if "error" in reply:
                return CompileFailed(f"{request}: {reply['error']}")
            cubin = request.cubin(reply)
        except MoecError as error:
            return error
        finally:
            idle.put(worker)
        if store:
            store.put(key, cubin)
        return cubin

    try:
        with ThreadPoolExecutor(max(jobs, 1)) as pool:
            for indices, outcome in zip(missing.values(), pool.map(build, missing), strict=True):
                outcomes |= dict.fromkeys(indices, outcome)
                done += len(indices)
                if progress:
                    progress(done, len(requests))
    finally:
        for worker in workers:
            worker.close()
    ordered = [outcomes[i] for i in range(len(requests))]
    cubins = [o if isinstance(o, Cubin) else None for o in ordered]
    errors = list({id(o): o for o in ordered if isinstance(o, MoecError)}.values())
    return Results(cubins, errors, len(missing), reused)


def available_cores() -> int:
    """The cores that this process may use, which may be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cubin(request: Request, reply: dict[str, Any]) -> Cubin:
    limits = family(request.arch)
    data, found = base64.b64decode(reply["cubin"]), reply["metadata"]
    if found["shared"] > limits.shared:
        raise TooMuchSharedMemory(
            f"{request}: {found['shared']:,} bytes of shared memory a block; there are {limits.shared:,}",
            notes=["a smaller tile or fewer stages need less"],
        )
    if (found["tmem_size"] or 0) > limits.tensor_memory:
        raise TooMuchSharedMemory(
            f"{request}: {found['tmem_size']} columns of tensor memory; the device has {limits.tensor_memory}"
        )
    descriptors = found["tensordesc_meta"] or []
    if any(d["fp4_padded"] for d in descriptors):
        raise CompileFailed(f"{request}: moec makes no tensor descriptors of padded 4-bit elements")
    metadata = {
        "kernel": request.kernel,
        "variant": request.variant,
        "arch": request.arch,
        "symbol": found["name"],
        "warps": found["num_warps"],
        "shared": found["shared"],
        "arguments": [[n, t] for n, t in request.resolved().items() if t != "constexpr"],
        "divisible": list(request.divisible),
        "descriptors": descriptors,
        "flags": 0,
        "hidden": {
            name: {"size": found[f"{name}_size"] or 0, "align": found[f"{name}_align"] or 1}
            for name in HIDDEN
        },
        "compiler": compiler_version(request.arch),
        **({"cooperative": True} if request.cooperative else {}),
    }
    metadata["flags"] = _flags(request, data, metadata)
    return Cubin(data, metadata, facts(data, found["shared"]))


def _flags(request: Request, data: bytes, metadata: dict[str, Any]) -> int:
    """How many flags a descriptor without TMA has: as many as the cubin's own table of parameters shows.

    Raises CompileFailed where a launch would pass other parameters: another Triton may append others.
    """
    found = [p.size for p in parameters(data)]
    for flags in FLAGS:
        expected = [size for _, size in expand(metadata | {"flags": flags})]
        if found == expected:
            return flags
    raise CompileFailed(
        f"{request}: the cubin takes parameters of {found} bytes, a launch would pass {expected}",
        notes=[f"this moec can't launch what {metadata['compiler']} compiles"],
    )


@cache
def compiler_version(arch: str) -> str:
    """``triton 3.6.0, ptxas V12.8.93``, as keys and manifests hold it. Raises CompilerMissing."""
    text = (triton_folder() / "__init__.py").read_text(encoding="utf-8")
    version = re.search(r"^__version__ = ['\"]([^'\"]+)", text, re.MULTILINE)
    # Triton 3.6 has a second ptxas for Blackwell; a wheel without it uses one for all.
    blackwell = family(arch).number >= 100
    try:
        ptxas = tool("ptxas-blackwell" if blackwell else "ptxas")
    except CompilerMissing:
        ptxas = tool("ptxas")
    try:
        shown = subprocess.run([ptxas, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise CompilerMissing(f"{ptxas.name} doesn't run: {error}") from None
    build = re.search(r"V\d[\d.]*", shown)
    return f"triton {version.group(1) if version else '?'}, ptxas {build.group() if build else shown.strip()}"
