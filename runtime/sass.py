"""Facts of a cubin: registers, spills, shared memory, matrix instructions, memory accesses.

They are read with the tools in Triton's wheel, so a machine without a GPU or a CUDA toolkit can say what a
kernel became: whether ``tl.dot`` turned into the wide matrix instructions (HGMMA) or into the slow path
(HMMA), whether loads are 128 bits wide, whether registers spilt.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moec.errors import CompileFailed, CompilerMissing

# `/*0250*/  @!P0 LDG.E.128 R4, desc[UR6][R2.64] ;`: the address, a predicate, the instruction.
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+\{?\s*(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)", re.MULTILINE)
# `STL.64 [R1], RZ` keeps no register: for sm_120 ptxas has one before each copy by descriptor.
_ZERO = re.compile(r"\], RZ\b")
# HGMMA.64x128x16.F32.BF16, QGMMA, HMMA.16816.F32, IMMA, QMMA, DMMA, UTCHMMA, UTCQMMA.2CTA.
_MATRIX = re.compile(r"(?:UTC)?[A-Z]{1,3}MMA\b")
_SHAPE = re.compile(r"\d+(?:x\d+){2}|\d{4,6}")
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)")
_PARAMETER = re.compile(r"Ordinal\s*: 0x([0-9a-f]+)\s+Offset\s*: 0x([0-9a-f]+)\s+Size\s*: 0x([0-9a-f]+)")
_WIDTHS = ("8", "16", "64", "128", "256")


@dataclass(frozen=True)
class KernelFacts:
    """What a kernel became. Counts are of instructions in the code, not of how often they run.

    An access is named by its instruction and width in bits: ``LDG.128``; asynchronous copies to shared
    memory are ``LDGSTS``, those by tensor descriptor ``UTMALDG`` with their number of dimensions.
    """

    registers: int  # per thread
    stack_bytes: int  # per thread: spilt registers, and arrays that are indexed at run time
    spill_stores: int
    spill_loads: int
    shared_static: int  # bytes per block that the cubin itself asks for
    shared_dynamic: int  # bytes per block that the launch asks for
    matrix: dict[str, int]  # HGMMA.64x128x16: 8
    loads: dict[str, int]
    stores: dict[str, int]
    atomics: dict[str, int]
    # BAR: among a block's warps; SYNCS: mbarrier operations; WARPGROUP.DEPBAR: waits for wgmma
    barriers: dict[str, int]
    instructions: int

    @property
    def spills(self) -> int:
        """Instructions that move registers to or from local memory."""
        return self.spill_stores + self.spill_loads

    @property
    def serialised(self) -> bool:
        """Whether each wgmma is waited for before the next one begins.

        ptxas does so, and says so in its warning C7515 only, where it can't keep the sums in place.
        """
        products = sum(n for name, n in self.matrix.items() if "GMMA" in name)
        return 1 < products <= self.barriers.get("WARPGROUP.DEPBAR", 0)

    def as_manifest(self) -> dict[str, Any]:
        """As JSON; ``from_manifest`` reads it."""
        return asdict(self)

    @staticmethod
    def from_manifest(data: dict[str, Any]) -> KernelFacts:
        return KernelFacts(**{f.name: data[f.name] for f in fields(KernelFacts)})


@dataclass(frozen=True)
class Parameter:
    """One parameter of a cubin's kernel: bytes from the first parameter on, and bytes long."""

    offset: int
    size: int


def facts(cubin: bytes, shared: int = 0) -> KernelFacts:
    """Facts of a cubin with one kernel; ``shared`` is what its launch asks for, in bytes.

    Raises CompilerMissing without Triton's tools, CompileFailed where ``cubin`` is none.
    """
    with _file(cubin) as path:
        resources = _run("cuobjdump", "-res-usage", path)
        code = _run("nvdisasm", "-c", path)
    found = _RESOURCES.search(resources)
    if found is None:
        raise CompileFailed(f"cuobjdump shows no kernel: {resources.strip()[:200]}")
    registers, stack, static = map(int, found.groups())
    counts = count(code)
    return KernelFacts(
        registers=registers,
        stack_bytes=stack,
        spill_stores=sum(counts.pop("spill_stores", Counter()).values()),
        spill_loads=sum(counts.pop("spill_loads", Counter()).values()),
        shared_static=static,
        shared_dynamic=shared,
        instructions=sum(counts.pop("all").values()),
        **{
            kind: dict(sorted(counts.get(kind, {}).items()))
            for kind in ("matrix", "loads", "stores", "atomics", "barriers")
        },
    )


def count(sass: str) -> dict[str, Counter[str]]:
    """The instructions of disassembled code by kind: all, matrix, loads, stores, atomics, ..."""
    counts: dict[str, Counter[str]] = {"all": Counter()}
    for instruction, operands in _INSTRUCTION.findall(sass):
        name = instruction.partition(".")[0]
        counts["all"][name] += 1
        if name == "STL" and _ZERO.search(operands):
            continue
        for kind, label in _kinds(instruction, name):
            counts.setdefault(kind, Counter())[label] += 1
    return counts


def _kinds(instruction: str, name: str) -> Iterator[tuple[str, str]]:
    parts = instruction.split(".")[1:]
    if _MATRIX.fullmatch(name):
        shape = next((p for p in parts if _SHAPE.fullmatch(p)), "")
        yield "matrix", f"{name}.{shape}" if shape else name
    elif name in ("LDG", "LDGSTS"):
        yield "loads", f"{name}.{_width(parts)}"
    elif name.startswith(("UTMALDG", "UBLKCP")):
        yield "loads", ".".join([name, *(p for p in parts if re.fullmatch(r"\dD", p))])
    elif name == "STG":
        yield "stores", f"{name}.{_width(parts)}"
    elif name.startswith(("UTMASTG", "UTMAREDG")):
        yield "stores", ".".join([name, *(p for p in parts if re.fullmatch(r"\dD", p))])
    elif name in ("ATOM", "ATOMG", "RED", "REDG"):
        yield "atomics", name
    elif name in ("BAR", "SYNCS"):
        yield "barriers", name
    elif name == "WARPGROUP" and parts[0] == "DEPBAR":
        yield "barriers", "WARPGROUP.DEPBAR"
    elif name in ("STL", "LDL"):
        yield ("spill_stores" if name == "STL" else "spill_loads"), name


def _width(parts: list[str]) -> str:
    """Bits that one thread moves: LDG.E.U16 16, LDG.E.128.CONSTANT 128, LDG.E 32."""
    return next((w for w in (p.lstrip("US") for p in parts) if w in _WIDTHS), "32")


def parameters(cubin: bytes) -> list[Parameter]:
    """The kernel's parameters in order, as the cubin's own table lists them. Raises as ``facts`` does."""
    with _file(cubin) as path:
        table = _run("cuobjdump", "-elf", path)
    rows = sorted(tuple(int(n, 16) for n in row) for row in _PARAMETER.findall(table))
    return [Parameter(offset, size) for _, offset, size in rows]


@cache
def tool(name: str) -> Path:
    """The path of a program of Triton's wheel: ptxas, cuobjdump, nvdisasm. Triton isn't imported.

    Triton's own variables (``TRITON_PTXAS_PATH``, ``TRITON_PTXAS_BLACKWELL_PATH``, ...) name others.
    Raises CompilerMissing.
    """
    named = os.environ.get(f"TRITON_{name.upper().replace('-', '_')}_PATH")
    path = Path(named) if named else triton_folder() / "backends" / "nvidia" / "bin" / name
    if not os.access(path, os.X_OK):
        raise CompilerMissing(f"{name} isn't a program at {path}", notes=["Triton's Linux wheel carries it"])
    return path


@cache
def triton_folder() -> Path:
    """Where Triton is installed. Raises CompilerMissing."""
    spec = find_spec("triton")
    if spec is None or spec.origin is None:
        raise CompilerMissing("Triton isn't installed", notes=["pip install triton; Linux only"])
    return Path(spec.origin).parent


class _file:
    """A cubin in a file of its own, while the block runs."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def __enter__(self) -> str:
        descriptor, self.path = tempfile.mkstemp(suffix=".cubin")
        with os.fdopen(descriptor, "wb") as file:
            file.write(self.data)
        return self.path

    def __exit__(self, *error: object) -> None:
        os.unlink(self.path)


def _run(name: str, *args: str) -> str:
    done = subprocess.run([tool(name), *args], capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise CompileFailed(f"{name} can't read the cubin: {(done.stderr or done.stdout).strip()[:300]}")
    return done.stdout
