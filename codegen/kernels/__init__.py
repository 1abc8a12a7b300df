"""Kernel records: how each op is emitted.

A record is one object in one file of this folder. ``Inline`` writes an expression into ``model.py``;
``Templated`` renders a function of its own into ``kernels/``, its op's attributes folded in as constants.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from moec.errors import InternalError
from moec.ir.op import Op


@dataclass(frozen=True)
class Inline:
    """``expression(op, operands)`` is the Python text. An operand that is left out is None."""

    op: str
    expression: Callable[[Op, list[Any]], str]
    targets: tuple[str, ...] = ("cpu",)

    def supports(self, op: Op) -> list[str]:
        """Reasons against; none means yes."""
        return []


@dataclass(frozen=True)
class Templated:
    """``template`` defines one function, called with the op's operands; ``constants(op)`` fills it in.

    ``in_place`` marks a kernel that writes its result into the operand of that number (the cache).
    """

    op: str
    template: str
    constants: Callable[[Op], dict[str, Any]] = field(default=lambda op: {})
    targets: tuple[str, ...] = ("cpu",)
    in_place: int | None = None

    def supports(self, op: Op) -> list[str]:
        """Reasons against; none means yes."""
        return []


Kernel = Inline | Templated
KERNELS: list[Kernel] = []


def register(*kernels: Kernel) -> None:
    KERNELS.extend(kernels)


def select(op: Op, target: str) -> Kernel:
    """The first record that emits ``op`` for ``target``. Raises InternalError where there is none."""
    for kernel in KERNELS:
        if kernel.op == op.name and target in kernel.targets and not kernel.supports(op):
            return kernel
    raise InternalError(f"{op.name}: nothing emits it for {target}")


for _module in sorted(m.name for m in iter_modules(__path__)):
    import_module(f"{__name__}.{_module}")
