"""Kernel records: how each op is emitted.

A record is one object in one file of this folder. ``Inline`` writes an expression into ``model.py``;
``Templated`` renders a function of its own into ``kernels/``, its op's attributes folded in. Both are PyTorch
and serve every target. ``TritonKernel`` (triton.py) is a kernel for GPUs; it goes before them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from moec.codegen.kernels.triton import TritonKernel
from moec.errors import InternalError
from moec.ir.op import Op
from moec.ir.types import TensorType, f32


@dataclass(frozen=True)
class Inline:
    """``expression(op, operands)`` is the Python text. An operand that is left out is None."""

    op: str
    expression: Callable[[Op, list[Any]], str]
    targets: tuple[str, ...] = ()

    def supports(self, op: Op) -> list[str]:
        """Reasons against; none means yes."""
        return []


@dataclass(frozen=True)
class Templated:
    """``template`` defines one function, called with the op's operands; ``constants(op)`` fills it in.

    ``in_place`` marks a kernel that writes its result into the operand of that number (the cache). ``calls``
    names the op whose kernel function this one calls, by the name that the template finds under the op's.
    """

    op: str
    template: str
    constants: Callable[[Op], dict[str, Any]] = field(default=lambda op: {})
    targets: tuple[str, ...] = ()
    in_place: int | None = None
    reasons: Callable[[Op], list[str]] = field(default=lambda op: [])
    calls: str = ""

    def supports(self, op: Op) -> list[str]:
        """Reasons against; none means yes."""
        return self.reasons(op)


def not_fp32(op: Op) -> list[str]:
    """A reason where an operand or a result is of another dtype."""
    types = [v.type for v in (*op.operands, *op.results) if v is not None]
    floats = {t.dtype for t in types if isinstance(t, TensorType) and t.dtype.is_float}
    return [f"it is {', '.join(map(str, floats))}, not fp32"] if floats != {f32} else []


Kernel = Inline | Templated | TritonKernel
KERNELS: list[Kernel] = []


def register(*kernels: Kernel) -> None:
    KERNELS.extend(kernels)


def select(op: Op, target: str) -> Kernel:
    """The first record that emits ``op`` for ``target``: Triton's, then a function, then an expression.

    Raises InternalError where there is none.
    """
    order = (TritonKernel, Templated, Inline)
    for kernel in sorted(KERNELS, key=lambda k: order.index(type(k))):
        serves = not kernel.targets or target in kernel.targets
        if kernel.op == op.name and serves and not kernel.supports(op):
            return kernel
    raise InternalError(f"{op.name}: nothing emits it for {target}")


for _module in sorted(m.name for m in iter_modules(__path__)):
    import_module(f"{__name__}.{_module}")
