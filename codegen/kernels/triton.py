"""Kernel records of the GPU targets: ops whose kernels are Triton, generated and compiled ahead of time."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, ClassVar

from moec.codegen.choosing import choosing, measured
from moec.codegen.kernels.record import Record
from moec.codegen.render import identifier, render_python
from moec.codegen.schedules import Problem
from moec.ir.devices import GPU, GPUS
from moec.ir.op import Op, Value
from moec.ir.types import DType, TensorType

TRITON_TYPES = {"bf16": "bf16", "f16": "fp16", "f32": "fp32", "f8e4m3": "fp8e4nv", "i32": "i32", "i64": "i64"}
FLOATS = ("bf16", "f16", "f32")
FRAME = "triton/kernel_file.py.jinja"
_DEF = re.compile(r"^def (\w+)\(", re.MULTILINE)


@dataclass(frozen=True)
class TritonKernel(Record):
    """``template`` renders a part of a kernel file: Triton functions, their ``Kernel`` declarations, and one
    Python function, called with those of the op's operands that are there.

    ``constants(op, device)`` fills the template; ``reasons(op)`` says what is against it; ``helpers`` are
    templates of Triton functions that all parts of one file share. ``ladder(op, device)`` gives the schedules
    of a kernel that has any, as text; ``problem(op)`` is what they are picked for.
    """

    family: ClassVar[str] = "triton"
    row_by_row: ClassVar[bool] = True
    template: str
    constants: Callable[[Op, GPU], dict[str, Any]]
    reasons: Callable[[Op], list[str]]
    helpers: tuple[str, ...] = ()
    targets: tuple[str, ...] = tuple(GPUS)
    in_place: int | None = None
    ladder: Callable[[Op, GPU], str] | None = None
    problem: Callable[[Op], Problem] | None = None

    def schedules(self, op: Op, target: str) -> str:
        return super().schedules(op, target) if self.ladder is None else self.ladder(op, GPUS[target])

    def measured_on(self, op: Op, target: str) -> str:
        tuning = choosing().tuning
        if self.problem is None or "schedule" in op.annotations or tuning is None:
            return ""
        problem = self.problem(op)
        return tuning.origin(problem) if measured(problem, GPUS[target]) else ""

    def supports(self, op: Op) -> list[str]:
        """Reasons against; none means yes."""
        return self.reasons(op)

    def key(self, op: Op, target: str) -> str:
        """Equal for ops that can share one kernel function."""
        constants = self.constants(op, GPUS[target])
        return f"{self.template} {sorted(constants.items(), key=lambda c: c[0])}"

    def render(self, op: Op, name: str, target: str) -> str:
        """The part that defines the Python function ``name``."""
        return render_python(self.template, name=name, **self.constants(op, GPUS[target]))


@dataclass(frozen=True)
class GluonKernel(TritonKernel):
    """One whose ladders have schedules of warps with tasks of their own, in Gluon, among Triton's.

    ``wanted(op, device)``: whether the op's schedules, its own or those picked, have any. To other ops only
    those who name it give it.
    """

    family: ClassVar[str] = "gluon"
    wanted: Callable[[Op, GPU], bool] = field(kw_only=True)


def kernel_file(kernels: Collection[TritonKernel], parts: list[str], target: str) -> str:
    """A kernel file of the package: the parts of all ``kernels``, which are of one op, made by ``render``.

    Of the kernels' helpers it holds those that a part calls.
    """
    helpers = dict.fromkeys(helper for kernel in kernels for helper in kernel.helpers)
    sources = [render_python(helper) for helper in helpers]
    called = [s for s in sources if any(f"{f}(" in part for f in _DEF.findall(s) for part in parts)]
    op = identifier(next(iter(kernels)).op)
    return render_python(FRAME, op=op, parts=parts, helpers=called, target=target)


def pointer(dtype: DType) -> str:
    """Triton's name of a pointer to ``dtype``."""
    return f"*{TRITON_TYPES[dtype.name]}"


def signature_lines(signature: dict[str, str]) -> list[str]:
    """The entries of a signature as lines of a dict."""
    return [f'"{name}": "{kind}",' for name, kind in signature.items()]


def tensor(value: Value | None) -> TensorType:
    """The type of an operand that is a tensor and there."""
    if value is None or not isinstance(value.type, TensorType):
        raise TypeError(f"{value} is no tensor")
    return value.type


def not_static(**dims: Any) -> list[str]:
    """A reason for each dimension that is only known at run time."""
    return [f"{name} is {dim}, not a number" for name, dim in dims.items() if not isinstance(dim, int)]


def not_float(*types: TensorType) -> list[str]:
    """A reason for each dtype that the kernels don't compute with."""
    return [f"{t.dtype} is none of {', '.join(FLOATS)}" for t in types if t.dtype.name not in FLOATS]
