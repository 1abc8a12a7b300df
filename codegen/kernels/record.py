"""What all kernel records have."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from moec.codegen.kernels.workspace import WORKSPACE, Workspace, nothing
from moec.errors import BadSchedule, UnknownKernel
from moec.ir.amount import Amount
from moec.ir.op import Op


@dataclass(frozen=True)
class Record:
    """``name`` is what ``kernel=`` in the IR calls it: by default its family and its op.

    ``row_by_row``: with one schedule for all of M, a row's bits depend on that row alone (see
    ``codegen/invariance.py``).
    """

    family: ClassVar[str] = "torch"
    row_by_row: ClassVar[bool] = False
    usual_workspace: ClassVar[Workspace] = nothing
    op: str
    name: str = field(default="", kw_only=True)

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", f"{self.family}.{self.op}")

    def supports(self, op: Op) -> list[str]:
        """Reasons against; none means yes."""
        return []

    def workspace(self, op: Op) -> Amount:
        """Bytes that it allocates beside the op's results, at most."""
        return WORKSPACE.get(self.name, type(self).usual_workspace)(op)

    def schedules(self, op: Op, target: str) -> str:
        """The op's schedules as text: its own, once they are known to be possible, else the ones picked."""
        if "schedule" in op.annotations:
            raise refuse(BadSchedule, op, f"{self.name} has no schedules")
        return ""

    def measured_on(self, op: Op, target: str) -> str:
        """The device and the date of the measurements behind the schedules picked, if there are any."""
        return ""


def emits_nothing(op: Op) -> None:
    """Raises UnknownKernel where an op that no kernel emits names one all the same."""
    if op.annotations.keys() & {"kernel", "schedule"}:
        raise refuse(UnknownKernel, op, "no kernel emits it, so it can't name one")


def refuse(error: type[UnknownKernel | BadSchedule], op: Op, message: str) -> UnknownKernel | BadSchedule:
    """The error about an annotation of ``op``: at its line in the text that it was read from."""
    return error(f"{op.name}: {message}", loc=op.written or op.loc)
