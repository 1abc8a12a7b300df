"""What reaches the CUDA driver through cuda.core and cuda.bindings: a recording libcuda stands in for it."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moec.runtime.arguments import expand
from moec.runtime.kernel_cache import Cubin

ROOT = Path(__file__).parents[2]
pytest.importorskip("cuda.core")
pytestmark = [
    pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver: tests/gpu asks it"),
]

# Launches the kernel in the package folder argv[1] on tensors at addresses that count as a GPU's.
SCRIPT = """
import contextlib, json, os, sys
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import torch
from moec.runtime import driver
from moec.runtime.arguments import Arguments

torch.cuda.init = lambda: None
torch.cuda.device = lambda device: contextlib.nullcontext()
torch.cuda.current_device = lambda: 0
torch.cuda.current_stream = lambda: SimpleNamespace(cuda_stream=int(sys.argv[2], 16))
(file,) = Path(sys.argv[1]).glob("*.json")
about = json.loads(file.read_text())
arguments = Arguments(about["kernel"], about["arguments"], about["divisible"])
a, b, c = (torch.zeros(n, 256, dtype=torch.bfloat16) for n in (64, 128, 64))
args = [a, b, 4096] if about["kernel"] == "copy" else [a, b, c, 256, 0.5]
assert arguments.check(args) is None
try:
    cubin = file.with_suffix(".cubin").read_bytes()
    together = about.get("cooperative", False)
    loaded = driver.load("k v", cubin, about["symbol"], about["warps"], about["shared"], 0, together)
    packed = arguments.pack(args, about["descriptors"], about["flags"])
    driver.launch(loaded, (3, 2, 1), [*packed, np.uint64(0), np.uint64(0)])
    if "AT_ONCE" in os.environ:
        torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=132)
        print(driver.at_once(loaded), driver.at_once(loaded))
except driver.LaunchFailed as error:
    print(error)
sys.stdout.flush()
print(*(t.data_ptr().to_bytes(8, "little").hex() for t in (a, b, c)))
"""


@pytest.fixture(scope="module")
def libcuda(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the recorder as libcuda.so.1."""
    folder = tmp_path_factory.mktemp("driver")
    source, out = Path(__file__).with_name("recorder.c"), folder / "libcuda.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", out, source, "-ldl"], check=True)
    return folder


def record(cubin: Cubin, libcuda: Path, folder: Path, stream: int, **variables: str) -> list[str]:
    """The lines that the recorder wrote, then the addresses of the three tensors."""
    cubin.write(folder)
    sizes = ",".join(str(size) for _, size in expand(cubin.metadata))
    path = os.pathsep.join([str(libcuda), os.environ.get("LD_LIBRARY_PATH", "")])
    variables |= {"LD_LIBRARY_PATH": path, "PYTHONPATH": str(ROOT), "SIZES": sizes}
    command = [sys.executable, "-c", SCRIPT, str(folder), hex(stream)]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def i32(n: int) -> str:
    return struct.pack("<i", n).hex()


def i64(n: int) -> str:
    return struct.pack("<q", n).hex()


def test_pointers_and_numbers(built: dict[str, Cubin], libcuda: Path, tmp_path: Path) -> None:
    *lines, addresses = record(built["copy sm_90a"], libcuda, tmp_path, stream=0)
    a, b, _ = addresses.split()
    assert lines == [
        "load ELF",
        "kernel copy",
        "launch 3,2,1 of 128,1,1 shared 0 stream 0x1",  # CU_STREAM_LEGACY: torch's default stream
        *(a, b, i32(4096), i64(0), i64(0)),
    ]


def test_tensor_maps_and_much_shared_memory(built: dict[str, Cubin], libcuda: Path, tmp_path: Path) -> None:
    cubin = built["product_tma sm_90a"]
    shared = cubin.metadata["shared"]
    *lines, addresses = record(cubin, libcuda, tmp_path, stream=0x5555)
    a, b, c = addresses.split()
    made = "map type 9 swizzle 3 promotion 2 fill 0: 256/64/1"
    assert lines == [
        "load ELF",
        "kernel product_tma",
        f"attribute 8={shared}",  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        f"{made} 64/64/1 stride 512",
        f"{made} 128/128/1 stride 512",
        f"{made} 64/64/1 stride 512",
        f"launch 3,2,1 of 128,1,1 shared {shared} stream 0x5555",
        *(a, i32(64), i32(256), i64(256), i64(1)),
        *(b, i32(128), i32(256), i64(256), i64(1)),
        *(c, i32(64), i32(256), i64(256), i64(1)),
        *(i32(256), struct.pack("<f", 0.5).hex(), i64(0), i64(0)),
    ]


def test_a_cooperative_launch(built: dict[str, Cubin], libcuda: Path, tmp_path: Path) -> None:
    cubin = built["copy sm_90a"]
    together = Cubin(cubin.data, cubin.metadata | {"cooperative": True}, cubin.facts)
    *lines, addresses = record(together, libcuda, tmp_path, stream=0x5555)
    a, b, _ = addresses.split()
    assert lines == [
        "load ELF",
        "kernel copy",
        "together: launch 3,2,1 of 128,1,1 shared 0 stream 0x5555",
        *(a, b, i32(4096), i64(0), i64(0)),
    ]


def test_a_refusal_names_the_kernel(built: dict[str, Cubin], libcuda: Path, tmp_path: Path) -> None:
    lines = record(built["copy sm_90a"], libcuda, tmp_path, stream=0, REFUSE="1")
    assert lines[2].startswith("error[M0808] k v: ") and "launch" not in "".join(lines[3:])


def test_programs_at_once_are_asked_for_once(built: dict[str, Cubin], libcuda: Path, tmp_path: Path) -> None:
    """As many blocks as the driver counts on each SM."""
    cubin = built["product_tma sm_90a"]
    *_, occupancy, answers, _ = record(cubin, libcuda, tmp_path, stream=0, AT_ONCE="1")
    assert occupancy == f"occupancy of 128 threads shared {cubin.metadata['shared']}"
    assert answers == "264 264"
