"""How arguments become parameters: against Triton's launcher, hand layouts, and cuda.core's own packing."""

from __future__ import annotations

import ctypes
import inspect
import re
import struct
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from moec.errors import BadArgument, Misaligned, MoecError
from moec.runtime import driver
from moec.runtime.arguments import HOST_ELEMENT, Arguments, TensorMap, expand, size_of, tensor_map
from moec.runtime.kernel_cache import Cubin

C_SIZES = {"CUdeviceptr": 8, "CUtensorMap": 128, "int8_t": 1, "int32_t": 4, "uint32_t": 4, "int64_t": 8}


@pytest.mark.parametrize("name", ["copy sm_90a", "product sm_90a", "product_tma sm_90a", "product_tma sm_80"])
def test_parameters_are_those_of_tritons_launcher(name: str, built: dict[str, Cubin]) -> None:
    nvidia = pytest.importorskip("triton.backends.nvidia.driver")
    if not hasattr(nvidia, "make_launcher"):
        pytest.skip("this Triton's launcher has no source")
    metadata = built[name].metadata
    source = nvidia.make_launcher(
        {}, dict(metadata["arguments"]) | {"B": "constexpr"}, metadata["descriptors"]
    )
    declared = re.search(r"static void _launch\(.*?CUdeviceptr profile_scratch, (.*?)\) \{", source)
    assert declared is not None
    types = [argument.split()[0] for argument in declared[1].split(", ")]
    assert [size for _, size in expand(metadata)] == [*(C_SIZES[t] for t in types), 8, 8]
    passed = re.search(r"void \*params\[\] = \{ (.*?) \};", source)
    assert passed is not None
    assert passed[1].split(", ")[-2:] == ["&global_scratch", "&profile_scratch"]


def test_tensor_maps_are_those_that_triton_makes(
    built: dict[str, Cubin], monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton
    from triton.backends.nvidia import driver as nvidia
    from triton.tools.tensor_descriptor import TensorDescriptor

    assert HOST_ELEMENT == nvidia.TMA_DTYPE_DEVICE_TO_HOST
    seen: list[tuple[Any, ...]] = []

    def fill(*args: Any) -> str:
        seen.append(args)
        return "map"

    utils = SimpleNamespace(fill_tma_descriptor=fill, fill_tma_descriptor_tiled=fill)  # Triton 3.6, 3.9
    monkeypatch.setattr(
        triton.runtime, "driver", SimpleNamespace(active=SimpleNamespace(utils=utils)), raising=False
    )
    metadata = built["product_tma sm_90a"].metadata
    tensor = torch.zeros(70, 256, dtype=torch.bfloat16)[:, :192]
    made = metadata["descriptors"][1]
    more = [None] * (len(inspect.signature(nvidia.make_tensordesc_arg).parameters) - 2)
    theirs = nvidia.make_tensordesc_arg(TensorDescriptor.from_tensor(tensor, [128, 64]), made, *more)
    assert theirs == ["map", 70, 192, 256, 1]
    ours = tensor_map(tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), made)
    address, swizzle, size, element, box, shape, strides, padding = seen[0]
    # As fill_tma_descriptor in Triton's driver.c turns them round.
    pitch = strides[0] * size
    assert (ours.address, ours.element, ours.swizzle) == (address, element, swizzle)
    assert (ours.shape, ours.strides) == (tuple(shape[::-1]), (pitch, pitch * shape[0]))
    assert ours.box == tuple(box[::-1])
    assert padding == 0 and (ours.element, ours.swizzle, ours.box) == (9, 3, (64, 128))


def test_a_descriptor_becomes_a_map_its_shape_and_its_strides(built: dict[str, Cubin]) -> None:
    for name in ("product_tma sm_90a", "product_tma sm_80"):
        metadata = built[name].metadata
        arguments = Arguments("product_tma", metadata["arguments"], metadata["divisible"])
        a, b, c = (torch.zeros(n, 256, dtype=torch.bfloat16) for n in (64, 128, 64))
        assert arguments.check([a, b, c, 256, 0.5]) is None
        packed = arguments.pack([a, b, c, 256, 0.5], metadata["descriptors"], metadata["flags"])
        sizes = [128 if isinstance(p, TensorMap) else len(p.tobytes()) for p in packed]
        assert [*sizes, 8, 8] == [size for _, size in expand(metadata)]
        assert packed[-1].tobytes() == struct.pack("<f", 0.5)
        if name.endswith("sm_90a"):
            assert packed[1:5] == [64, 256, 256, 1]
            assert [p.dtype for p in packed[1:5]] == [np.int32, np.int32, np.int64, np.int64]
        else:
            flags = [0] * metadata["flags"]
            assert packed[: 9 + len(flags)] == [a.data_ptr(), 64, 256, 256, 1, *flags, 64, 256, 256, 1]


@pytest.mark.parametrize(
    ("tensor", "kind", "message"),
    [
        (torch.zeros(64, 256, dtype=torch.bfloat16).T, Misaligned, "a is read by tensor descriptor"),
        (torch.zeros(64, 260, dtype=torch.bfloat16), Misaligned, "with strides"),
        (torch.zeros(64 * 256 + 8, dtype=torch.bfloat16)[1:-7].view(64, 256), Misaligned, "from address"),
        (torch.zeros(256, dtype=torch.bfloat16), BadArgument, "a must have 2 dimensions, not 1"),
        (None, BadArgument, "a must be a tensor, not NoneType"),
    ],
)
def test_what_tma_cannot_read(tensor: Any, kind: type[MoecError], message: str) -> None:
    arguments = Arguments("k", [["a", "tensordesc<bf16[64,64]>"]], [])
    with pytest.raises(kind, match=message):
        arguments.check([tensor])


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        ("i64", -(2**40), struct.pack("<q", -(2**40))),
        ("u32", 2**32 - 1, b"\xff" * 4),
        ("i1", True, b"\x01"),
        ("fp32", 1, struct.pack("<f", 1)),
        ("fp64", 0.1, struct.pack("<d", 0.1)),
        ("fp16", 1.5, struct.pack("<e", 1.5)),
        ("bf16", -2.0, b"\x00\xc0"),
        ("*fp8e4nv", None, bytes(8)),
    ],
)
def test_scalars_have_the_size_of_their_type(kind: str, value: Any, expected: bytes) -> None:
    arguments = Arguments("k", [["v", kind]], [])
    assert arguments.check([value]) is None
    (packed,) = arguments.pack([value], [])
    assert packed.tobytes() == expected and size_of(kind) == len(expected)
    handler = pytest.importorskip(
        "cuda.core._kernel_arg_handler"
    )  # what cuda.core.launch hands to the driver
    holder = handler.ParamHolder([packed])
    address = ctypes.cast(holder.ptr, ctypes.POINTER(ctypes.c_void_p))[0]
    assert address is None or ctypes.string_at(address, len(expected)) == expected


def test_a_parameter_block_points_at_its_parameters() -> None:
    values = [b"\x01" * 8, bytes(range(128)), b"\x02" * 4, b"\x03"]
    block = driver.ParameterBlock(values)
    pointers = ctypes.cast(block.address, ctypes.POINTER(ctypes.c_void_p))
    for pointer, value in zip(pointers[: len(values)], values, strict=True):
        assert pointer is not None and pointer % 128 == 0
        assert ctypes.string_at(pointer, len(value)) == value
