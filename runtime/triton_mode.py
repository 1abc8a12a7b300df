"""Whether Triton interprets in this process, and what stands in for it where it's needed for its names only.

Triton fixes its mode when it is first imported: functions of its own library become compiled or interpreted
ones.
"""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

from moec.errors import DeviceUnavailable, InterpreterOff

# What the interpreter of Triton 3.6 and 3.9 does to a dtype. Tests that have repaired it empty both.
WRONG = {"bf16": "multiplies wrongly"}
INEXACT = {"f8e4m3": "rounds some values wrongly, at worst to half of what they are"}


def interpreting() -> bool:
    """Whether Triton's interpreter runs kernels here, or would if Triton were imported now."""
    library = sys.modules.get("triton.language.standard")
    if library is not None:
        return type(library.cdiv).__name__ == "InterpretedFunction"
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def require_interpreter(what: str, dtype: str = "") -> None:
    """Raises InterpreterOff unless ``what`` can be interpreted; DeviceUnavailable where it would be wrong.

    Warns where it is wrong in places.
    """
    name = {"bfloat16": "bf16"}.get(dtype, dtype)
    if name in WRONG:
        raise DeviceUnavailable(
            f"{what} computes in {name}, which Triton's interpreter {WRONG[name]}",
            notes=["f16 and f32 are right in it: build with --dtype f16, or give tensors of these"],
        )
    if not interpreting():
        raise InterpreterOff(
            f"{what} is to run on the CPU, in Triton's interpreter, which is off",
            notes=[
                "set TRITON_INTERPRET=1 before the process starts: Triton fixes its mode when it is imported"
            ],
        )
    if name in INEXACT:
        warnings.warn(f"{name} in Triton's interpreter: it {INEXACT[name]}", stacklevel=2)


def triton_module() -> Any:
    """The module ``triton``, or what stands in for it."""
    if interpreting():
        import triton

        return triton
    return _Triton()


def language() -> Any:
    """The module ``triton.language``, or what stands in for it."""
    if interpreting():
        import triton.language

        return triton.language
    return _Language()


class _Triton:
    """What a kernel file uses of ``triton`` outside its kernels."""

    @staticmethod
    def jit(function: Any = None, **options: Any) -> Any:
        """Leaves the function as it is: a worker compiles it from its source, ahead of time."""
        return function if function is not None else lambda f: f

    @staticmethod
    def cdiv(a: int, b: int) -> int:
        return -(-a // b)

    @staticmethod
    def next_power_of_2(n: int) -> int:
        return 1 << max(n - 1, 0).bit_length()

    def __getattr__(self, name: str) -> Any:
        import triton

        return getattr(triton, name)


class _Language:
    """What a kernel file uses of ``triton.language`` outside its kernels."""

    class constexpr:
        """Marks a parameter, or a constant of the module."""

        def __init__(self, value: Any) -> None:
            self.value = value

    def __getattr__(self, name: str) -> Any:
        import triton.language

        return getattr(triton.language, name)
