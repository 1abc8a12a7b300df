"""Kernel records: how each op is emitted.

A record is one object in one file of this folder. ``Inline`` writes an expression into ``model.py``;
``Templated`` renders a function of its own into ``kernels/``, its op's attributes folded in. Both are PyTorch
and serve every target. ``CudaKernel`` (cuda.py) and ``TritonKernel`` (triton.py) are kernels for GPUs; they
go before them.

A scaled value is one Python value, ``Scaled(q, scale)``. An ``Inline`` expression gets its name; a kernel
function gets ``x.q, x.scale`` in place of ``x``, and returns a ``Scaled``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, ClassVar

from moec.codegen.choosing import choosing
from moec.codegen.kernels.cuda import CudaKernel
from moec.codegen.kernels.record import Record, refuse
from moec.codegen.kernels.triton import GluonKernel, TritonKernel
from moec.codegen.kernels.workspace import Workspace, wide_copies
from moec.errors import InternalError, UnknownKernel, nearest
from moec.ir.devices import GPUS
from moec.ir.op import Op
from moec.ir.types import TensorType, f32


@dataclass(frozen=True)
class Inline(Record):
    """``expression(op, operands)`` is the Python text. An operand that is left out is None."""

    expression: Callable[[Op, list[Any]], str]
    targets: tuple[str, ...] = ()
    reasons: Callable[[Op], list[str]] = field(default=lambda op: [])

    def supports(self, op: Op) -> list[str]:
        """Reasons against; none means yes."""
        return self.reasons(op)


@dataclass(frozen=True)
class Templated(Record):
    """``template`` defines one function, called with the op's operands; ``constants(op)`` fills it in.

    ``in_place`` marks a kernel that writes its result into the operand of that number (the cache). ``calls``
    names the op whose kernel function this one calls, by the name that the template finds under the op's;
    ``called(op)`` are that one's constants.
    """

    usual_workspace: ClassVar[Workspace] = wide_copies
    template: str
    constants: Callable[[Op], dict[str, Any]] = field(default=lambda op: {})
    targets: tuple[str, ...] = ()
    in_place: int | None = None
    reasons: Callable[[Op], list[str]] = field(default=lambda op: [])
    calls: str = ""
    called: Callable[[Op], dict[str, Any]] = field(default=lambda op: {})

    def supports(self, op: Op) -> list[str]:
        """Reasons against; none means yes."""
        return self.reasons(op)


def not_fp32(op: Op) -> list[str]:
    """A reason where an operand or a result is of another dtype."""
    types = [v.type for v in (*op.operands, *op.results) if v is not None]
    floats = {t.dtype for t in types if isinstance(t, TensorType) and t.dtype.is_float}
    return [f"it is {' and '.join(sorted(map(str, floats)))}, not fp32"] if floats != {f32} else []


def has_scales(op: Op) -> list[str]:
    """A reason where an operand has scales, or a result."""
    types = [v.type for v in (*op.operands, *op.results) if v is not None]
    return [f"{t} has scales" for t in types if isinstance(t, TensorType) and t.scale][:1]


def quantises(op: Op) -> list[str]:
    """A reason where what the op makes is quantised at its end."""
    return ["the result is quantised"] if op.attrs["quant"] else []


Kernel = Inline | Templated | TritonKernel | GluonKernel | CudaKernel
KERNELS: list[Kernel] = []
_BY_NAME: dict[str, Kernel] = {}
_BY_OP: dict[str, list[Kernel]] = {}  # in the order in which they are tried
_ORDER = (CudaKernel, TritonKernel, GluonKernel, Templated, Inline)


def register(*kernels: Kernel) -> None:
    for kernel in kernels:
        if kernel.name in _BY_NAME:
            raise RuntimeError(f"two kernels are called {kernel.name}: give one a name of its own")
        _BY_NAME[kernel.name] = kernel
        serving = _BY_OP.setdefault(kernel.op, [])
        serving.append(kernel)
        serving.sort(key=lambda k: _ORDER.index(type(k)))
    KERNELS.extend(kernels)


def serving(op_name: str, target: str) -> list[Kernel]:
    """The records that may emit ops of that name for ``target``, the first to be tried first."""
    return [k for k in _BY_OP.get(op_name, []) if not k.targets or target in k.targets]


def family_of(kernel: Kernel) -> str:
    """What its name begins with: ``triton``, ``onednn``, ..."""
    return kernel.name.partition(".")[0]


def check_family(name: str) -> None:
    """Raises UnknownKernel where no kernel's name begins so."""
    known = sorted(set(map(family_of, KERNELS)))
    if name not in known:
        hint = nearest(name, known) or f"; there is {', '.join(known)}"
        raise UnknownKernel(f"no family of kernels is called {name!r}{hint}")


def select(op: Op, target: str) -> Kernel:
    """The record that emits ``op`` for ``target``: the one its ``kernel`` names, else the first that can.

    Tried are the family that the build prefers, then CUDA's, Triton's, a function, an expression.
    Raises UnknownKernel where the named one can't, BadSchedule where the op's ``schedule`` is not one of the
    kernel's, InternalError where there is none.
    """
    name = op.annotations.get("kernel")
    kernel = _first(op, target) if name is None else _named(name, op, target)
    if "schedule" in op.annotations:
        kernel.schedules(op, target)
    return kernel


def _first(op: Op, target: str) -> Kernel:
    """Gluon's goes first where the op's schedules have what only it runs, and is left out elsewhere."""
    able = [k for k in serving(op.name, target) if not k.supports(op)]
    first = [k for k in able if family_of(k) == choosing().kernels]
    if "schedule" in op.annotations or not first:
        first = [k for k in able if isinstance(k, GluonKernel) and k.wanted(op, GPUS[target])]
    for kernel in (*first, *(k for k in able if not isinstance(k, GluonKernel))):
        return kernel
    raise InternalError(f"{op.name}: nothing emits it for {target}")


def _named(name: str, op: Op, target: str) -> Kernel:
    able = [k.name for k in serving(op.name, target) if not k.supports(op)]
    kernel = _BY_NAME.get(name)
    instead = f"; for {target} there is {' and '.join(able)}"
    if kernel is None:
        hint = nearest(name, able) or nearest(name, _BY_NAME) or instead
        raise refuse(UnknownKernel, op, f"no kernel is called {name!r}{hint}")
    if kernel.op != op.name:
        raise refuse(UnknownKernel, op, f"{name} is a kernel of {kernel.op}{instead}")
    if kernel.targets and target not in kernel.targets:
        raise refuse(UnknownKernel, op, f"{name} is for {', '.join(kernel.targets)}, not {target}{instead}")
    if reasons := kernel.supports(op):
        raise refuse(UnknownKernel, op, f"{name} can't: {'; '.join(reasons)}{instead}")
    return kernel


for _module in sorted(m.name for m in iter_modules(__path__)):
    import_module(f"{__name__}.{_module}")
