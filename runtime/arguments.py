"""From Python values to a cubin's parameters, as Triton lays them out.

The order is the signature's, constexprs left out. A tensor descriptor becomes a 128-byte tensor map, its
shape as i32 and its strides as i64. On a device without TMA, pointer, shape and strides as i64 and flags come
in the map's place: padding with NaN in Triton 3.6, rounding to tf32 as well in 3.9, both off. The pointers to
scratch memory come last. (Triton's backends/nvidia/driver.py.)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moec.errors import BadArgument, Misaligned

PROMISE = 16  # what Triton's tt.divisibility promises: pointers in bytes, integers as they are
TENSOR_MAP = "tensormap"  # a CUtensorMap by value, 128 bytes
_SIZES = {TENSOR_MAP: 128, "fp64": 8, "fp32": 4, "f32": 4, "fp16": 2, "bf16": 2, "i1": 1, "u1": 1}
_INTEGERS: dict[str, Callable[[Any], Any]] = {
    "i1": np.int8,
    "u1": np.uint8,
    "i8": np.int8,
    "i16": np.int16,
    "i32": np.int32,
    "i64": np.int64,
    "u8": np.uint8,
    "u16": np.uint16,
    "u32": np.uint32,
    "u64": np.uint64,
}
_FLOATS: dict[str, Callable[[Any], Any]] = {"fp64": np.float64, "fp32": np.float32, "f32": np.float32}
TENSORS: dict[str, tuple[torch.dtype, ...]] = {
    "fp64": (torch.float64,),
    "fp32": (torch.float32,),
    "fp16": (torch.float16,),
    "bf16": (torch.bfloat16,),
    "fp8e4nv": (torch.float8_e4m3fn,),
    "fp8e5": (torch.float8_e5m2,),
    "i64": (torch.int64,),
    "i32": (torch.int32,),
    "i16": (torch.int16,),
    "i8": (torch.int8,),
    "u8": (torch.uint8,),
    "i1": (torch.bool,),
}
_DESCRIPTOR = re.compile(r"tensordesc<(\w+)\[([^\]]*)\]")


@dataclass(frozen=True)
class TensorMap:
    """What the driver makes a tensor map of; every list innermost dimension first, as it takes them."""

    address: int
    element: int  # CUtensorMapDataType
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # bytes from one index to the next of all but the innermost; then bytes in all
    box: tuple[int, ...]
    swizzle: int  # CUtensorMapSwizzle


# Triton numbers the element types as the device does; the driver's enumeration has three of them in another
# order.
HOST_ELEMENT = {i: i for i in range(16)} | {8: 10, 9: 8, 10: 9}


def descriptor_box(kind: str) -> tuple[str, tuple[int, ...]] | None:
    """Element type and box of ``tensordesc<bf16[128,64]>``; None for any other type."""
    match = _DESCRIPTOR.match(kind)
    return (match[1], tuple(int(n) for n in match[2].split(","))) if match else None


def expand(metadata: dict[str, Any]) -> list[tuple[str, int]]:
    """The type and the size in bytes of each parameter of a cubin, hidden ones included."""
    types: list[str] = []
    maps = bool(metadata["descriptors"])
    for _, kind in metadata["arguments"]:
        box = descriptor_box(kind)
        if box is None:
            types.append(kind)
            continue
        rank = len(box[1])
        types += [TENSOR_MAP] if maps else [f"*{box[0]}", *["i64"] * (2 * rank), *["i1"] * metadata["flags"]]
        types += ["i32"] * rank + ["i64"] * rank
    types += ["*i8"] * len(metadata["hidden"])
    return [(t, size_of(t)) for t in types]


def size_of(kind: str) -> int:
    """Bytes of a parameter: 8 for a pointer, 2 for a bf16 scalar."""
    if kind.startswith("*"):
        return 8
    return _SIZES.get(kind) or int(kind[1:]) // 8


class Arguments:
    """How the arguments of one kernel are checked and packed; as in its cubin's metadata."""

    def __init__(self, kernel: str, arguments: Sequence[Sequence[str]], divisible: Sequence[str]) -> None:
        self.kernel = kernel
        self.names = [name for name, _ in arguments]
        self.kinds = [kind for _, kind in arguments]
        self.boxes = [descriptor_box(kind) for kind in self.kinds]
        self.promised = [name in divisible for name in self.names]

    def check(self, args: Sequence[Any]) -> str | None:
        """The first broken promise of divisibility, or None.

        Raises BadArgument for arguments that can't be meant, and Misaligned where TMA can't read one.
        """
        if len(args) != len(self.names):
            raise BadArgument(
                f"{self.kernel} takes {len(self.names)} arguments ({', '.join(self.names)}), not {len(args)}"
            )
        broken = None
        for i, value in enumerate(args):
            number = self._check(i, value)
            if self.promised[i] and number % PROMISE and broken is None:
                what = "its address" if isinstance(value, torch.Tensor) else "it"
                broken = f"{self.names[i]}: {what} is {number}, no multiple of {PROMISE}"
        return broken

    def _check(self, i: int, value: Any) -> int:
        """The number that a promise would be about. Raises BadArgument."""
        kind, box = self.kinds[i], self.boxes[i]
        if kind.startswith("*") or box is not None:
            if value is None and box is None:
                return 0
            if not isinstance(value, torch.Tensor):
                raise self._bad(i, f"must be a tensor, not {type(value).__name__}")
            dtypes = TENSORS.get(box[0] if box else kind.lstrip("*k"))
            if dtypes and value.dtype not in dtypes:
                raise self._bad(i, f"must be {dtypes[0]}, not {value.dtype}")
            if box is not None:
                self._check_descriptor(i, value, len(box[1]))
            return value.data_ptr()
        if kind in _INTEGERS:
            if not isinstance(value, int | np.integer):
                raise self._bad(i, f"must be an integer, not {type(value).__name__}")
            return int(value)
        if not isinstance(value, int | float | np.floating):
            raise self._bad(i, f"must be a number, not {type(value).__name__}")
        return 0

    def _check_descriptor(self, i: int, tensor: torch.Tensor, rank: int) -> None:
        """What TMA demands whatever a kernel promises; no variant does without it."""
        if tensor.dim() != rank:
            raise self._bad(i, f"must have {rank} dimensions, not {tensor.dim()}")
        *outer, inner = tensor.stride()
        size = tensor.element_size()
        if inner != 1 or tensor.data_ptr() % PROMISE or any(s * size % PROMISE for s in outer):
            raise Misaligned(
                f"{self.kernel}: {self.names[i]} is read by tensor descriptor, from address "
                f"{tensor.data_ptr():#x} and with strides {tensor.stride()} of {size} bytes",
                notes=[f"the last stride must be 1, all else a multiple of {PROMISE} bytes"],
            )

    def _bad(self, i: int, message: str) -> BadArgument:
        return BadArgument(f"{self.kernel}: {self.names[i]} {message}")

    def pack(self, args: Sequence[Any], descriptors: Sequence[dict[str, Any]], flags: int = 1) -> list[Any]:
        """Checked arguments as NumPy scalars of the parameters' sizes, and TensorMaps.

        ``descriptors`` and ``flags`` are the cubin's metadata. Raises BadArgument.
        """
        packed: list[Any] = []
        remaining = iter(descriptors)
        for i, (kind, box, value) in enumerate(zip(self.kinds, self.boxes, args, strict=True)):
            if box is not None:
                packed += _descriptor(value, next(remaining, None), flags)
            elif kind.startswith("*"):
                packed.append(np.uint64(0 if value is None else value.data_ptr()))
            else:
                packed.append(self._scalar(i, kind, value))
        return packed

    def _scalar(self, i: int, kind: str, value: Any) -> Any:
        try:
            if kind in _INTEGERS:
                return _INTEGERS[kind](value)
            if kind in _FLOATS:
                return _FLOATS[kind](value)
        except OverflowError:
            raise self._bad(i, f"is {value}, which is no {kind}") from None
        if kind == "fp16":
            return np.float16(value).view(np.uint16)
        # bf16: the upper half of a float, cut off as Triton's launcher does.
        return np.uint16(np.float32(value).view(np.uint32) >> 16)


def _descriptor(tensor: torch.Tensor, made: dict[str, Any] | None, flags: int) -> list[Any]:
    """The parameters of one tensor descriptor; ``made`` is how the compiler laid it out, None without TMA."""
    shape, strides = tuple(tensor.shape), tensor.stride()
    if made is None:
        first = [np.uint64(tensor.data_ptr()), *map(np.int64, (*shape, *strides)), *[np.int8(0)] * flags]
    else:
        first = [tensor_map(tensor.data_ptr(), shape, strides, made)]
    return [*first, *map(np.int32, shape), *map(np.int64, strides)]


def tensor_map(address: int, shape: Sequence[int], strides: Sequence[int], made: dict[str, Any]) -> TensorMap:
    """The map of a tensor; shape and strides in elements, outermost first, ``made`` as the compiler says."""
    size = made["elem_size"]
    outer = [s * size for s in reversed(strides[:-1])]
    return TensorMap(
        address=address,
        element=HOST_ELEMENT[made["elem_type"]],
        shape=tuple(reversed(shape)),
        strides=(*outer, shape[0] * (outer[-1] if outer else size)),
        box=tuple(reversed(made["block_size"])),
        swizzle=made["swizzle"],
    )
