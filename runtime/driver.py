"""The CUDA driver: the one place that loads cubins and launches them. What is above it runs without a GPU.

cuda.core loads and launches; cuda.bindings does what it can't, or not in every version: more than 48 KB of
dynamic shared memory, parameters of 128 bytes (tensor maps), cooperative launches.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from moec.errors import LaunchFailed
from moec.runtime.arguments import TensorMap

_UNASKED = 48 * 1024  # bytes of dynamic shared memory that a kernel may use without asking


@dataclass(frozen=True)
class Loaded:
    """A kernel on a device."""

    label: str  # for messages
    kernel: Any  # cuda.core's
    threads: int  # per block
    shared: int  # bytes of dynamic shared memory per block
    device: int
    cooperative: bool = False  # its blocks wait for each other, and so must all fit on the device at once


def capability(device: int) -> tuple[int, int]:
    """(9, 0) for an H100."""
    return torch.cuda.get_device_capability(device)


@lru_cache(maxsize=64)
def multiprocessors(device: int) -> int:
    """132 for an H100: as many blocks run at once in any case."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def load(
    label: str, cubin: bytes, symbol: str, warps: int, shared: int, device: int, cooperative: bool = False
) -> Loaded:
    """Loads a cubin onto a device at once: the first launch, which a graph may be recording, loads nothing.

    Raises LaunchFailed where the driver refuses it.
    """
    from cuda.bindings import driver
    from cuda.core import ObjectCode

    try:
        torch.cuda.init()
        with torch.cuda.device(device):
            torch.cuda.current_stream()  # makes the device's context the current one
            kernel = ObjectCode.from_cubin(cubin, name=label).get_kernel(symbol)
            if shared > _UNASKED:
                attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                _call(driver.cuKernelSetAttribute, attribute, shared, kernel.handle, driver.CUdevice(device))
            _call(driver.cuKernelGetFunction, kernel.handle)
    except Exception as error:
        raise LaunchFailed(f"{label}: {error}") from error
    return Loaded(label, kernel, 32 * warps, shared, device, cooperative)


@lru_cache(maxsize=4096)
def at_once(loaded: Loaded) -> int:
    """How many of a kernel's blocks its device holds at once. Raises LaunchFailed."""
    from cuda.bindings import driver

    try:
        function = driver.CUfunction(int(loaded.kernel.handle))
        with torch.cuda.device(loaded.device):
            blocks = _call(
                driver.cuOccupancyMaxActiveBlocksPerMultiprocessor, function, loaded.threads, loaded.shared
            )
    except Exception as error:
        raise LaunchFailed(f"{loaded.label}: {error}") from error
    return max(1, blocks) * multiprocessors(loaded.device)


def launch(loaded: Loaded, grid: tuple[int, int, int], parameters: Sequence[Any]) -> None:
    """Enqueues a kernel on torch's current stream of its device. Raises LaunchFailed where the driver
    refuses it.

    ``parameters`` are NumPy scalars and TensorMaps, each of the size that the cubin takes.
    """
    elsewhere = torch.cuda.current_device() != loaded.device
    with torch.cuda.device(loaded.device) if elsewhere else nullcontext():
        stream = torch.cuda.current_stream().cuda_stream
        try:
            if loaded.cooperative or any(isinstance(p, TensorMap) for p in parameters):
                _launch_by_driver(loaded, grid, parameters, stream)
            else:
                _launch(loaded, grid, parameters, stream)
        except Exception as error:
            raise LaunchFailed(f"{loaded.label}, grid {grid}: {error}") from error


def _launch(loaded: Loaded, grid: tuple[int, int, int], parameters: Sequence[Any], stream: int) -> None:
    from cuda import core

    config = core.LaunchConfig(grid=grid, block=loaded.threads, shmem_size=loaded.shared)
    core.launch(_stream(stream), config, loaded.kernel, *parameters)


def recording(stream: int) -> int:
    """The number, unique in the process, of the capture that records the stream of that handle.

    Raises LaunchFailed where the driver doesn't say.
    """
    from cuda.bindings import driver

    code, _, number, *_ = driver.cuStreamGetCaptureInfo(driver.CUstream(stream))
    if code != driver.CUresult.CUDA_SUCCESS:
        raise LaunchFailed(f"cuStreamGetCaptureInfo: {code}")
    return int(number)


@lru_cache(maxsize=64)
def _stream(handle: int) -> Any:
    from cuda import core

    return core.Stream.from_handle(handle) if handle else core.LEGACY_DEFAULT_STREAM


def _launch_by_driver(
    loaded: Loaded, grid: tuple[int, int, int], parameters: Sequence[Any], stream: int
) -> None:
    from cuda.bindings import driver

    block = ParameterBlock([encode(p) if isinstance(p, TensorMap) else p.tobytes() for p in parameters])
    function = driver.CUfunction(int(loaded.kernel.handle))
    where = (*grid, loaded.threads, 1, 1, loaded.shared, stream)
    if loaded.cooperative:
        _call(driver.cuLaunchCooperativeKernel, function, *where, block.address)
    else:
        _call(driver.cuLaunchKernel, function, *where, block.address, 0)


class ParameterBlock:
    """Parameters in memory as cuLaunchKernel reads them: an array of pointers to each. It copies them."""

    ALIGNMENT = 128  # of tensor maps; for the others it does no harm

    def __init__(self, parameters: Sequence[bytes]) -> None:
        self._memory = ctypes.create_string_buffer(self.ALIGNMENT * (sum(map(self._units, parameters)) + 1))
        address = -(-ctypes.addressof(self._memory) // self.ALIGNMENT) * self.ALIGNMENT
        self._pointers = (ctypes.c_void_p * len(parameters))()
        for i, parameter in enumerate(parameters):
            ctypes.memmove(address, parameter, len(parameter))
            self._pointers[i] = address
            address += self.ALIGNMENT * self._units(parameter)

    def _units(self, parameter: bytes) -> int:
        return -(-len(parameter) // self.ALIGNMENT)

    @property
    def address(self) -> int:
        """Of the array of pointers, while this object lives."""
        return ctypes.addressof(self._pointers)


@lru_cache(maxsize=4096)
def encode(tensor_map: TensorMap) -> bytes:
    """The 128 bytes of a CUtensorMap. They depend on nothing but the map, so equal maps are encoded once."""
    from cuda.bindings import driver

    made = _call(
        driver.cuTensorMapEncodeTiled,
        driver.CUtensorMapDataType(tensor_map.element),
        len(tensor_map.shape),
        tensor_map.address,
        [driver.cuuint64_t(n) for n in tensor_map.shape],
        [driver.cuuint64_t(n) for n in tensor_map.strides],
        [driver.cuuint32_t(n) for n in tensor_map.box],
        [driver.cuuint32_t(1) for _ in tensor_map.shape],
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle(tensor_map.swizzle),
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    return ctypes.string_at(made.getPtr(), 128)


def _call(function: Any, *args: Any) -> Any:
    """The result of a driver function. Raises RuntimeError with the driver's words."""
    from cuda.bindings import driver

    code, *results = function(*args)
    if code != driver.CUresult.CUDA_SUCCESS:
        _, text = driver.cuGetErrorString(code)
        raise RuntimeError(f"{function.__name__}: {text.decode() if text else code}")
    return results[0] if results else None
