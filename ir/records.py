"""What passes and analyses may ask of kernel records, which live where they may not look: in codegen.

``moec.codegen`` provides them when it is imported; nothing here, nor in passes, imports codegen.
"""

from __future__ import annotations

from typing import Protocol

from moec.errors import BadOption
from moec.ir.amount import Amount
from moec.ir.op import Op


class Records(Protocol):
    """The records of all targets."""

    def annotations(self, op: Op, target: str) -> dict[str, str]:
        """``kernel`` and, where it has schedules, ``schedule`` of ``op``: its own, else those picked for it.
        ``tuned`` where these were picked by measurements.

        Empty for what no kernel emits (loops, ``return``, ``bind``). Raises UnknownKernel or BadSchedule
        where the op's own are impossible.
        """

    def workspace(self, op: Op, target: str) -> Amount:
        """Bytes that the op's kernel allocates beside its results, at most."""


_provided: list[Records] = []


def provide(records: Records) -> None:
    """Makes ``records`` what ``kernel_records`` answers."""
    _provided[:] = [records]


def kernel_records() -> Records:
    """The records. Raises BadOption where nobody has provided any."""
    if not _provided:
        raise BadOption("kernels are known to moec.codegen: import it before running select or plan")
    return _provided[0]
