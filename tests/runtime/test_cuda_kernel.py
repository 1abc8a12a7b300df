"""CUDA kernels: compiled ahead of time by NVRTC, kept, refused, declared and launched up to the driver."""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from moec.errors import (
    BadArgument,
    CompileFailed,
    CompilerMissing,
    DeviceUnavailable,
    Misaligned,
    MoecError,
    NotCompiled,
)
from moec.runtime import ahead, launch, nvrtc
from moec.runtime.compile import compile_many
from moec.runtime.devices import FAMILIES
from moec.runtime.kernel_cache import Cubin
from moec.runtime.nvrtc import CudaRequest
from tests.runtime.test_launch import Driver, import_file

SOURCE = """\
// y[t, w] = x[t, w] * s[t], a block a row.
extern "C" __global__ void scale_rows(const float* x, const float* s, float* y, int tokens) {
    extern __shared__ float row[];
    for (int w = threadIdx.x; w < WIDTH; w += blockDim.x) {
        row[w] = x[(long long)blockIdx.x * WIDTH + w];
        y[(long long)blockIdx.x * WIDTH + w] = row[w] * s[blockIdx.x] + (blockIdx.x < tokens ? 0.f : 1.f);
    }
}
"""
PYTHON = """\
import torch

from moec.runtime.cuda_kernel import CudaKernel, CudaVariant

SCALE_ROWS = CudaKernel(
    "scale_rows.cu",
    "scale_rows",
    signature={"x": "*fp32", "s": "*fp32", "y": "*fp32", "tokens": "i32"},
    variants={
        "w4": CudaVariant({"WIDTH": 100}, threads=128, shared=400),
        "w8": CudaVariant({"WIDTH": 13000}, threads=256, shared=52000, cooperative=True),
    },
    aligned=("x",),
)
"""
REQUEST = CudaRequest(
    kernel="scale_rows",
    variant="w4",
    source=SOURCE,
    file="scale_rows.cu",
    function="scale_rows",
    signature={"x": "*fp32", "s": "*fp32", "y": "*fp32", "tokens": "i32"},
    macros={"WIDTH": 100},
    threads=128,
    arch="sm_90a",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A package of one CUDA kernel, built for sm_90a."""
    folder = tmp_path_factory.mktemp("cuda")
    (folder / "kernels").mkdir()
    (folder / "__init__.py").touch()
    (folder / "kernels" / "__init__.py").write_text("from .scale_rows import SCALE_ROWS\n")
    (folder / "kernels" / "scale_rows.py").write_text(PYTHON)
    (folder / "kernels" / "scale_rows.cu").write_text(SOURCE)
    ahead.compile_kernels(folder, "sm_90a", cache)
    return folder


@pytest.fixture
def module(folder: Path) -> Iterator[ModuleType]:
    before = set(sys.modules)
    yield import_file(folder / "kernels" / "scale_rows.py")
    for name in sys.modules.keys() - before:
        del sys.modules[name]


def compiled(request: CudaRequest, cache: Path | None = None) -> Cubin:
    return compile_many([request], cache, jobs=1).check()[0]


def refused(request: CudaRequest) -> MoecError:
    (error,) = compile_many([request], None, jobs=1).errors
    return error


def test_every_target_compiles(cache: Path) -> None:
    for arch in FAMILIES:
        cubin = compiled(replace(REQUEST, arch=arch), cache)
        assert cubin.data.startswith(b"\x7fELF") and cubin.stem == f"scale_rows.w4.{arch}"
        assert cubin.facts.registers > 0 and not cubin.facts.spills, cubin.facts
        assert cubin.metadata["compiler"].startswith("nvrtc V")


def test_what_is_kept_is_not_compiled_again(tmp_path: Path) -> None:
    first = compile_many([REQUEST, REQUEST], tmp_path, jobs=1)
    again = compile_many([REQUEST], tmp_path, jobs=1)
    assert (first.compiled, again.compiled, again.reused) == (1, 0, 1)
    assert again.check() == [first.check()[0]]


def test_equal_sources_give_equal_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = compiled(REQUEST)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NVRTC_APPEND_FLAGS", "--device-debug")
    assert compiled(REQUEST) == first
    assert b"/tmp" not in first.data and sys.prefix.encode() not in first.data


@pytest.mark.parametrize(
    "other",
    [
        replace(REQUEST, source=SOURCE + "// more\n"),
        replace(REQUEST, macros={"WIDTH": 101}),
        replace(REQUEST, threads=256),
        replace(REQUEST, shared=16),
        replace(REQUEST, cooperative=True),
        replace(REQUEST, divisible=("x",)),
        replace(REQUEST, signature=REQUEST.signature | {"tokens": "u32"}),
        replace(REQUEST, fp_fusion=False),
        replace(REQUEST, arch="sm_89"),
    ],
)
def test_whatever_decides_an_entry_is_in_its_key(other: CudaRequest) -> None:
    assert other.key() != REQUEST.key()


def test_another_nvrtc_is_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = REQUEST.key()
    monkeypatch.setattr(nvrtc, "compiler_version", lambda: "nvrtc V1.2.3")
    assert REQUEST.key() != before


def test_a_mistake_in_the_source_is_named_by_its_line() -> None:
    error = refused(replace(REQUEST, source=SOURCE.replace("row[w] = x", "rows[w] = x")))
    assert isinstance(error, CompileFailed) and error.code == "M0801"
    assert "scale_rows w4 for sm_90a: scale_rows.cu(5): error: " in error.message and "rows" in error.message


def test_a_header_is_named_and_not_found() -> None:
    error = refused(replace(REQUEST, source="#include <cuda_fp8.h>\n" + SOURCE))
    assert "scale_rows.cu(1)" in error.message and "cuda_fp8.h" in error.message


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (replace(REQUEST, signature={"x": "*fp32", "tokens": "i32"}), "takes parameters of [8, 8, 8, 4]"),
        (replace(REQUEST, threads=100), "100 threads a block"),
        (replace(REQUEST, macros={"A B": 1}), "A B=1 can't be defined"),
        (replace(REQUEST, shared=300_000), "300,000 bytes of shared memory a block; there are 232,448"),
    ],
)
def test_what_is_refused(request_: CudaRequest, message: str) -> None:
    assert message in refused(request_).message


def test_a_missing_nvrtc_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    nvrtc.compiler_version.cache_clear()
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", None)
    monkeypatch.delattr("cuda.bindings.nvrtc", raising=False)
    with pytest.raises(CompilerMissing) as raised:
        compile_many([REQUEST], None)
    assert raised.value.code == "M0803" and "nvidia-cuda-nvrtc" in str(raised.value)


def test_a_package_declares_its_cuda_kernels(folder: Path) -> None:
    assert [kernel.name for kernel in ahead.declared(folder)] == ["scale_rows"]
    built = sorted(f.name for f in (folder / "cubin").iterdir())
    assert built == [f"scale_rows.{v}.sm_90a.{suffix}" for v in ("w4", "w8") for suffix in ("cubin", "json")]


def test_it_is_launched_as_it_was_declared(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Driver(monkeypatch)
    x, s, y = torch.zeros(3, 100), torch.zeros(3), torch.zeros(3, 100)
    kernel = module.SCALE_ROWS
    kernel["w4", (3,)](x, s, y, 3)
    kernel["w8", (2,)](x, s, y, 3)
    kernel["w8", (0,)](x, s, y, 3)
    assert [(label, *rest) for label, _, *rest in fake.loads] == [
        ("scale_rows w4", "scale_rows", 4, 400, 0),
        ("scale_rows w8", "scale_rows", 8, 52000, 0, "together"),
    ]
    packed = struct.pack("<QQQi", x.data_ptr(), s.data_ptr(), y.data_ptr(), 3)
    assert fake.launches == [("scale_rows w4", (3, 1, 1), packed), ("scale_rows w8", (2, 1, 1), packed)]


def test_what_a_launch_refuses(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    x, s, y = torch.zeros(3, 100), torch.zeros(3), torch.zeros(3, 100)
    kernel = module.SCALE_ROWS
    with pytest.raises(DeviceUnavailable, match="scale_rows w4 is CUDA C"):
        kernel["w4", (3,)](x, s, y, 3)
    Driver(monkeypatch)
    with pytest.raises(Misaligned, match="x: its address"):
        kernel["w4", (3,)](torch.zeros(301)[1:], s, y, 3)
    with pytest.raises(NotCompiled, match=r"no variant 'w5'; did you mean w8, w4"):
        kernel["w5", (3,)](x, s, y, 3)
    with pytest.raises(BadArgument, match=r"x must be torch\.float32"):
        kernel["w4", (3,)](x.half(), s, y, 3)


def test_preloading_loads_cuda_kernels_too(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Driver(monkeypatch)
    launch.preload(module.__name__.partition(".")[0], 0)
    assert [label for label, *_ in fake.loads] == ["scale_rows w4", "scale_rows w8"]


def test_a_missing_source_is_named(tmp_path: Path) -> None:
    (tmp_path / "alone.py").write_text(PYTHON)
    kernel = import_file(tmp_path / "alone.py").SCALE_ROWS
    with pytest.raises(BadArgument, match=r"can't read .*scale_rows\.cu: No such file"):
        kernel.requests("sm_90a")
